"""Many lesions at once at strengths that gradients can be taken of, as a client of a denoising run.

Every site is computed as it is, and `quantity + strength * (replacement - quantity)` is put in its place. At strength 0
the images are those of the baseline, and the gradient with respect to a strength says where they would go if its lesion
began.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lesion.denoising.run import COND, UNCOND, Client, DenoiserCall, Denoising, SchedulerStep
from lesion.denoising.wrapping import forward_replaced
from lesion.study.lesions import Lesion, covers
from lesion.study.tokens import layer_and_set
from lesion.surgery.anatomy import Anatomy, Site
from lesion.surgery.hook_points import Call, Share, TextLength, wide
from lesion.surgery.intervention import Intervention
from lesion.surgery.operation import replacement_key
from lesion.surgery.tokens import OfTokens, Places, token_mask


class Strengths(Client):
    """Every lesion at its strength in every image of a batch.

    anatomy: of the denoiser.
    lesions: of one kind of site. Where several reach one row of a site, their strengths add up.
    strengths: of each, (lesions, images); floating point, where the denoiser is.
    interventions: the built replacement for each `replacement_key`, of those that change a site's output.
    checkpointing: keep of each denoiser call its input alone, and run it once more for its gradients.
    places: of text tokens, where the layers are by token; the interventions then change their values alone.

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
        places: Places | None = None,
    ):
        self.strengths, self.checkpointing, self.places = strengths, checkpointing, places
        self.latents: Tensor | None = None
        self._whole = not bool(strengths.detach().any())  # nothing is lesioned yet: outputs keep their every bit
        self._masks: dict[tuple[Any, ...], Tensor] = {}  # of sets of tokens
        self._of_rows: dict[tuple[int, int | None], Tensor] = {}  # the branches of so many
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
        together: dict[str, list[Site]] = {}
        for site in self._sites:
            together.setdefault(site.hook.module, []).append(site)
        with ExitStack() as stack:
            for path, sites in together.items():
                module, text = run.denoiser.get_submodule(path), TextLength()
                made = functools.partial(self._mixed, sites, module, text)
                if self.places:
                    made = functools.partial(self._of_tokens, OfTokens(sites, self.places), sites, module, text)
                stack.enter_context(forward_replaced(module, made))
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

    def _of_tokens(
        self,
        of: OfTokens,
        sites: Sequence[Site],
        module: nn.Module,
        text: TextLength,
        forward: Callable[..., Any],
    ) -> Callable[..., Any]:
        """Return the same of sites of tokens, by a second run with other values of theirs.

        What an attention puts out is linear in its values: with values that are a strength's way to others it is that
        way to what it puts out with these.
        """

        def mixed(*args: Any, **kwargs: Any) -> Any:
            call = Call(module, forward, args, kwargs, text.image)
            if not any(self._inside(site) for site in sites):
                return call.run()
            of.text(call)
            # Where the second run gives all gradients, the first one gives values alone.
            with torch.no_grad() if self._whole and of.hook.everything else nullcontext():
                output = call.run()
            values = functools.partial(self._of_values, sites)
            image = of.image(call, of.projected(call, ("values",), values))
            written = of.hook.write(call, output, [(0, image, _everywhere(image))])
            return _valued(output, written) if self._whole else written

        return mixed

    def _of_values(self, sites: Sequence[Site], projected: Tensor) -> Tensor:
        """Values of text tokens, (rows, tokens, channels), with the lesions at their strengths."""
        branches = self._branches(len(projected))
        value = precise = projected.to(wide(projected))
        for site in sites:
            chosen = self._chosen(site, branches, projected)
            for place, lesion, intervention in self._inside(site):
                strength = self._strength(place, lesion, branches).to(value.dtype)[:, None, None] * chosen
                fill = _normal(intervention.fill(site.path, self._at[0], branches, projected))
                value = value + strength * (fill.to(value.dtype) - precise)
        return value.to(projected.dtype)

    def _chosen(self, site: Site, branches: Tensor, projected: Tensor) -> Tensor:
        """Which tokens of each row are of the site's set, (rows, tokens, 1)."""
        assert self.places
        name, length = layer_and_set(site.path)[1], projected.shape[1]
        key = name, self._at[2], len(branches), length, projected.device
        if key not in self._masks:
            of, images = self.places.of, self.run.samples
            columns = [of[row % images].get((branch, name), ()) for row, branch in enumerate(branches.tolist())]
            self._masks[key] = token_mask(columns, length).to(projected.device)
        return self._masks[key]

    def _inside(self, site: Site) -> list[tuple[int, Lesion, Intervention]]:
        """The lesions of a site whose windows the denoiser call under way is in."""
        number, calls, _ = self._at
        return [one for one in self._of_site[site.path] if covers(one[1].window, number, calls)]

    def _strength(self, place: int, lesion: Lesion, branches: Tensor) -> Tensor:
        """Of a lesion in each row, (rows,)."""
        strength = self.strengths[place].repeat(len(branches) // self.run.samples)
        if lesion.branch == "both":
            return strength
        return strength * (branches == (COND if lesion.branch == "cond" else UNCOND)).to(strength)

    def _changes(self, site: Site, call: Call, output: Any) -> Iterator[tuple[int, Tensor, Share]]:
        number, inside = self._at[0], self._inside(site)
        for part, name in site.parts(output) if inside else ():
            quantity = site.hook.read(call, output, part)
            branches = self._branches(len(quantity))
            value = precise = quantity.to(wide(quantity))
            shape = (-1, *[1] * (quantity.dim() - 1))
            for place, lesion, intervention in inside:
                strength = self._strength(place, lesion, branches).to(value.dtype)
                fill = _normal(intervention.fill(name, number, branches, quantity))
                value = value + strength.reshape(shape) * (fill.to(value.dtype) - precise)
            yield part, value.to(quantity.dtype), _everywhere(value)

    def _branches(self, rows: int) -> Tensor:
        key = rows, self._at[2]
        if key not in self._of_rows:
            before, self.run.half = self.run.half, self._at[2]
            try:
                self._of_rows[key] = self.run.branches(rows).to(self.strengths.device)
            finally:
                self.run.half = before
        return self._of_rows[key]


def _everywhere(like: Tensor) -> Share:
    """All of every row."""
    return Share.of(torch.ones(len(like), device=like.device), [1.0] * len(like), like.dim())


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
