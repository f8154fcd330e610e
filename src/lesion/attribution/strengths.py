"""Many lesions at once at strengths that gradients can be taken of, as a client of a denoising run.

Every site is computed as it is, and `quantity + strength * (replacement - quantity)` is put in its place. At strength 0
the images are those of the baseline, and the gradient with respect to a strength says where they would go if its lesion
began.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lesion.denoising.run import COND, UNCOND, Client, DenoiserCall, Denoising, SchedulerStep
from lesion.denoising.wrapping import forward_replaced
from lesion.study.lesions import Lesion, covers
from lesion.surgery.anatomy import Anatomy, Site
from lesion.surgery.hook_points import Call, Share, TextLength, wide
from lesion.surgery.intervention import Intervention
from lesion.surgery.operation import replacement_key


class Strengths(Client):
    """Every lesion at its strength in every image of a batch.

    anatomy: of the denoiser.
    lesions: of one kind of site. Where several reach one row of a site, their strengths add up.
    strengths: of each, (lesions, images); floating point, where the denoiser is.
    interventions: the built replacement for each `replacement_key`, of those that change a site's output.
    checkpointing: keep of each denoiser call its input alone, and run it once more for its gradients.

    latents: after the last scheduler step so far, (images, …).
    """

    throughout = True

    def __init__(
        self,
        anatomy: Anatomy,
        lesions: Sequence[Lesion],
        strengths: Tensor,
        interventions: Mapping[str, Intervention],
        checkpointing: bool = False,
    ):
        self.strengths, self.checkpointing = strengths, checkpointing
        self.latents: Tensor | None = None
        self._whole = not bool(strengths.detach().any())  # nothing is lesioned yet: outputs keep their every bit
        self._of_site: dict[str, list[tuple[int, Lesion, Intervention]]] = {}
        for number, lesion in enumerate(lesions):
            intervention = interventions[replacement_key(lesion)]
            for path in (site for layer in lesion.layers for site in anatomy.sites[layer]):
                self._of_site.setdefault(path, []).append((number, lesion, intervention))
        self._sites = [site for path, site in anatomy.by_path.items() if path in self._of_site]
        # The denoiser call under way: its number, of how many, of which branch alone.
        self._at: tuple[int, int, int | None] = (0, 1, None)

    @contextmanager
    def attached(self, run: Denoising) -> Iterator[None]:
        self.run = run
        with ExitStack() as stack:
            for path, group in itertools.groupby(self._sites, lambda site: site.hook.module):
                sites, module, text = list(group), run.denoiser.get_submodule(path), TextLength()
                stack.enter_context(forward_replaced(module, functools.partial(self._mixed, sites, module, text)))
                stack.enter_context(text.watching(run.denoiser, sites[0].hook.block))
            yield

    def before_call(self, run: Denoising, call: DenoiserCall) -> None:
        self._at = at = (run.call, run.calls, run.half)
        call.args, call.kwargs = _normal(call.args), _normal(call.kwargs)
        if not self.checkpointing:
            return
        running = True

        def again(*args: Any, **kwargs: Any) -> Any:
            if running:
                return run.denoiser(*args, **kwargs)
            before, self._at = self._at, at
            try:
                with self.attached(run):
                    return run.denoiser(*args, **kwargs)
            finally:
                self._at = before

        with run.aside():
            call.output = checkpoint(again, *call.args, use_reentrant=False, **call.kwargs)
        running = False

    def after_step(self, run: Denoising, step: SchedulerStep) -> None:
        self.latents = step.latents

    def _mixed(
        self, sites: Sequence[Site], module: nn.Module, text: TextLength, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Return the module's forward with its sites' lesions at their strengths."""
        hook = sites[0].hook

        def mixed(*args: Any, **kwargs: Any) -> Any:
            call = Call(module, forward, args, kwargs, text.image)
            output = hook.placeholder(call) if hook.of_input and not self._whole else None
            if output is None:
                output = hook.run(call)
            changes = [change for site in sites for change in self._changes(site, call, output)]
            if not changes:
                return output
            written = hook.write(call, output, changes)
            return _valued(output, written) if self._whole else written

        return mixed

    def _changes(self, site: Site, call: Call, output: Any) -> Iterator[tuple[int, Tensor, Share]]:
        number, calls, _ = self._at
        inside = [one for one in self._of_site[site.path] if covers(one[1].window, number, calls)]
        for part, name in site.parts(output) if inside else ():
            quantity = site.hook.read(call, output, part)
            branches = self._branches(len(quantity))
            value = precise = quantity.to(wide(quantity))
            shape = (-1, *[1] * (quantity.dim() - 1))
            for place, lesion, intervention in inside:
                strength = self.strengths[place].repeat(len(branches) // self.run.samples).to(value.dtype)
                if lesion.branch != "both":
                    strength = strength * (branches == (COND if lesion.branch == "cond" else UNCOND)).to(strength)
                fill = _normal(intervention.fill(name, number, branches, quantity))
                value = value + strength.reshape(shape) * (fill.to(value.dtype) - precise)
            whole = [1.0] * len(quantity)
            share = Share.of(torch.ones(len(quantity), device=value.device), whole, quantity.dim())
            yield part, value.to(quantity.dtype), share

    def _branches(self, rows: int) -> Tensor:
        before, self.run.half = self.run.half, self._at[2]
        try:
            return self.run.branches(rows).to(self.strengths.device)
        finally:
            self.run.half = before


class _Valued(torch.autograd.Function):
    """The first tensor's values with the second one's gradient."""

    @staticmethod
    def forward(context: Any, values: Tensor, written: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return None, gradients[0]


def _valued(output: Any, written: Any) -> Any:
    """What a module puts out, bit for bit, with the gradient of what stands in its place."""
    if isinstance(output, Tensor):
        return _Valued.apply(output, written)
    if isinstance(output, tuple):
        return tuple(None if one is None else _valued(one, other) for one, other in zip(output, written, strict=True))
    return type(output)(**{name: _valued(output[name], written[name]) for name in output})


def _normal(value: Any) -> Any:
    """The same, with tensors of `inference_mode`, which no gradient may pass, copied."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, list | tuple):
        return type(value)(_normal(one) for one in value)
    if isinstance(value, dict):
        return {name: _normal(one) for name, one in value.items()}
    return value
