"""Puts a batch of lesions on a live denoiser and takes them off again.

A wrapper in front of the `forward` of the modules that the sites' ports name, so it works under any attention processor
and swaps none. Each image of a batch has its own lesion (or none): masks are data, and an image without a lesion keeps
every bit of its output. A module that is replaced in every row of the batch is not computed where that can be.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from lesion.study.lesions import Lesion, covers
from lesion.surgery.anatomy import Anatomy, Site
from lesion.surgery.hook_points import Call, Change, Head, HeadTokens, Share, keeps_shape
from lesion.surgery.wrapping import forward_replaced

UNCOND, COND = 0, 1


class Filler(Protocol):
    """A replacement at work: what a site's output becomes.

    A filler that reads the values of `output`, not only its shape, dtype and device, has an attribute
    `reads_output = True`; without it a site that is replaced in every row is not computed. A TextFiller changes what a
    site reads instead, a Rerunner the condition it runs in. A filler with an attribute `companion: str` gets beside
    every lesioned image an un-ablated one of that prompt, with the same noise; their rows follow in the same order (see
    `generate`) and are dropped.
    """

    def fill(self, site: str, call: int, branches: Tensor, output: Tensor) -> Tensor:
        """Values broadcastable to `output`, for rows of the given CFG branches (0, 1).

        output: the site's quantity as its port reads it, (rows, tokens, channels) or (rows, channels, height, width).
        site: its path; with `:text` behind for the text's half of a block that has two streams.
        """
        ...


class TextFiller(Protocol):
    """A replacement of the text that a cross-attention site reads."""

    def retell(self, site: str, branches: Tensor, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Text (rows, tokens, channels) and attention mask (None if the site is given none) in the place of its own."""
        ...


class Rerunner(Protocol):
    """A replacement whose values are what the site itself puts out under another condition, say without its LoRA."""

    def rerun(self, site: str, module: nn.Module) -> AbstractContextManager[None]:
        """Within it the condition holds: the site is run a second time in it, with the same arguments."""
        ...


class Steps:
    """Counts the denoiser's calls within one pipeline call, from 0; the number expected is the pipeline's."""

    def __init__(self, pipe: Any):
        self.pipe, self.call, self.total = pipe, -1, 0

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.call += 1
        if self.call == 0:  # known only now: the pipeline sets its timesteps after it is called
            self.total = calls_in(self.pipe)
        if self.call >= self.total:
            raise RuntimeError(
                f"the denoiser is called more often than the {self.total} timesteps of "
                f"{type(self.pipe.scheduler).__name__} (a guidance that calls it twice a step?); "
                "steps and branches cannot be told apart"
            )

    @contextmanager
    def counting(self, denoiser: nn.Module) -> Iterator[None]:
        self.call, self.total = -1, 0
        handle = denoiser.register_forward_pre_hook(self.before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def calls_in(pipe: Any) -> int:
    """How often a pipeline at work calls its denoiser: img2img leaves out the scheduler's first timesteps."""
    number = getattr(pipe, "_num_timesteps", None)
    return number if isinstance(number, int) else len(pipe.scheduler.timesteps)


def sample_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The noisy latents among the arguments of a denoiser call: UNets and transformers name them differently."""
    sample: Tensor = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
    return sample


def branches_of(rows: int, samples: int) -> Tensor:
    """The CFG branch of each row, (rows,): diffusers puts the unconditional half first; without guidance, all COND."""
    if rows == samples:
        return torch.full((rows,), COND)
    if rows == 2 * samples:
        return torch.arange(rows) // samples
    raise RuntimeError(f"the denoiser ran on {rows} rows for {samples} images; expected one or two each")


class _SitePlan:
    """Of one site: the weight of every image's lesion and which replacement it uses."""

    def __init__(self, samples: int):
        self.strength = torch.zeros(samples)
        self.replacement: list[str] = [""] * samples
        self.window = [(0.0, 1.0)] * samples
        self.branch = ["both"] * samples

    def add(self, index: int, lesion: Lesion) -> None:
        self.strength[index] = lesion.strength
        self.replacement[index] = replacement_key(lesion)
        self.window[index] = lesion.window
        self.branch[index] = lesion.branch

    def weights(self, call: int, total: int, branches: Tensor) -> Tensor:
        """(rows,) in [0, 1]: how much of each row is replaced at this call."""
        samples = len(self.strength)
        rows = torch.zeros(len(branches))
        for row, branch in enumerate(branches.tolist()):
            index = row % samples
            inside = covers(self.window[index], call, total)
            touched = self.branch[index] in ("both", "cond" if branch == COND else "uncond")
            rows[row] = self.strength[index] if inside and touched else 0.0
        return rows


def replacement_key(lesion: Lesion) -> str:
    """Tells the replacements of one batch apart (two calibrations of `mean` are two replacements)."""
    return f"{lesion.replacement.name}:{sorted(lesion.replacement.identity.items())}"


@contextmanager
def lesioned(
    denoiser: nn.Module,
    pipe: Any,
    anatomy: Anatomy,
    lesions: Sequence[Lesion | None],
    fillers: Mapping[str, Filler],
) -> Iterator[None]:
    """For one pipeline call: image i of the batch is made under lesions[i] (None: no lesion).

    fillers: the replacement at work for each `replacement_key`. Hooks come off whatever happens. With no lesion in the
    batch nothing is attached at all.
    """
    steps = Steps(pipe)
    fitted = fittings(anatomy, lesions, fillers, steps)
    if not fitted:
        yield
        return
    modules = itertools.groupby(fitted.values(), lambda fitting: fitting.site.port.module)
    with ExitStack() as stack:
        stack.enter_context(steps.counting(denoiser))
        for path, together in modules:
            operation = Operation(list(together))
            module = denoiser.get_submodule(path)
            stack.enter_context(forward_replaced(module, functools.partial(operation.around, module)))
            if norm := _norm_before(denoiser, path):
                stack.enter_context(forward_replaced(norm, operation.sparing))
            if block := operation.port.block:
                watch = denoiser.get_submodule(block).register_forward_pre_hook(operation.watch.note, with_kwargs=True)
                stack.callback(watch.remove)
        yield


def fittings(
    anatomy: Anatomy, lesions: Sequence[Lesion | None], fillers: Mapping[str, Filler], steps: Steps
) -> dict[str, Fitting]:
    """What each site that any of these lesions touches has to do, by site path."""
    plans: dict[str, _SitePlan] = {}
    for index, lesion in enumerate(lesions):
        if lesion is None or lesion.strength == 0:
            continue
        for layer in lesion.layers:
            for site in anatomy.sites[layer]:
                plans.setdefault(site, _SitePlan(len(lesions))).add(index, lesion)
    return {path: Fitting(site, plans[path], steps, fillers) for path, site in anatomy.by_path.items() if path in plans}


class TextLength:
    """Notes how many text tokens a block is called with, for the modules in it that see text and image concatenated."""

    def __init__(self) -> None:
        self.tokens = 0

    def note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
        self.tokens = text.shape[1]


class Fitting:
    """The lesions of a batch at one site: which rows get which values at the present call."""

    def __init__(self, site: Site, plan: _SitePlan, steps: Steps, fillers: Mapping[str, Filler]):
        self.site, self.plan, self.steps, self.fillers = site, plan, steps, fillers
        self.names = [name for name in dict.fromkeys(plan.replacement) if name]
        self.all_steps = all(window == (0.0, 1.0) for window in plan.window)
        self.retells = [name for name in self.names if hasattr(fillers[name], "retell")]
        self.reruns = [name for name in self.names if hasattr(fillers[name], "rerun")]
        self.fills = [name for name in self.names if name not in self.retells and name not in self.reruns]
        if (self.retells or self.reruns) and isinstance(site.port, Head | HeadTokens):
            raise RuntimeError(f"{site.path}: this replacement changes a whole attention, not a head")
        self.needed = any(getattr(fillers[name], "reads_output", False) for name in self.names)
        self._weights: dict[tuple[int, int], tuple[Tensor, bool, bool]] = {}
        self._shares: dict[tuple[Any, ...], tuple[Tensor, dict[str, Share]]] = {}
        self._texts: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor | None]] = {}

    def _key(self, rows: int) -> tuple[int, int]:
        return rows, 0 if self.all_steps else self.steps.call

    def weights(self, rows: int) -> tuple[Tensor, bool, bool]:
        """Of the present call: weights (rows,), whether any is not 0, whether all are 1."""
        key = self._key(rows)
        if key not in self._weights:
            found = self.plan.weights(self.steps.call, self.steps.total, branches_of(rows, len(self.plan.strength)))
            self._weights[key] = found, bool(found.any()), bool((found == 1).all())
        return self._weights[key]

    def shares(self, like: Tensor) -> tuple[Tensor, dict[str, Share]]:
        """Of the present call, where `like` is: the CFG branch of each row, and each replacement's rows."""
        rows = len(like)
        key = (*self._key(rows), like.device, like.dtype, like.dim())
        if key not in self._shares:  # moved to the device once, not at every call
            weights, samples = self.weights(rows)[0], len(self.plan.strength)
            shares = {}
            for name in self.names:
                mine = torch.tensor([self.plan.replacement[row % samples] == name for row in range(rows)])
                shares[name] = Share.of(weights * mine, like)
            self._shares[key] = branches_of(rows, samples).to(like.device), shares
        return self._shares[key]

    def spares(self, rows: int) -> bool:
        """Whether nothing of the module's own output is left at the present call, nor looked at."""
        return not self.needed and self.fills == self.names and self.weights(rows)[2]

    def output(self, call: Call) -> Any:
        """What the module puts out where rows read another text or run under another condition.

        A row in part gets a mixture of outputs.
        """
        if not self.retells and not self.reruns:
            return call.run()
        port, shares = self.site.port, self.shares(call.hidden)[1]
        mixed = [name for name in self.retells if shares[name].mixed]
        at_once = [name for name in self.retells if name not in mixed]
        if port.everything and len(self.names) == 1 and self.reruns and shares[self.names[0]].whole:
            return self._rerun(self.names[0], call)
        output = self._told(call, at_once) if at_once else call.run()
        for name in mixed:
            output = port.merge(call, output, self._told(call, [name]), shares[name])
        for name in self.reruns:
            output = port.merge(call, output, self._rerun(name, call), shares[name])
        return output

    def changes(self, call: Call, output: Any) -> list[Change]:
        """The values that replacements put in the place of the site's quantity."""
        port, found = self.site.port, []
        for part in range(port.parts(output) if self.fills else 0):
            quantity = port.read(call, output, part)
            branches, shares = self.shares(quantity)
            for name in self.fills:
                values = self.fillers[name].fill(self.site.part(part), self.steps.call, branches, quantity)
                found.append(Change(port, part, values.to(quantity.dtype), shares[name]))
        return found

    def _told(self, call: Call, names: list[str]) -> Any:
        return call.forward(*call.args, **self._retell(call.kwargs, names))

    def _rerun(self, name: str, call: Call) -> Any:
        """Every tensor is handed over anew, so that nothing is used that was remembered of it."""
        filler: Any = self.fillers[name]
        with filler.rerun(self.site.path, call.module):
            return call.forward(*map(_anew, call.args), **{key: _anew(value) for key, value in call.kwargs.items()})

    def _retell(self, kwargs: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
        """Arguments with the text of these replacements' rows in its place; the same tensor at every step."""
        text, mask = kwargs.get("encoder_hidden_states"), kwargs.get("attention_mask")
        if text is None:
            raise RuntimeError(f"{self.site.path} is given no text by name, so it cannot be given another")
        key = (*self._key(len(text)), *names)
        if key not in self._texts or self._texts[key][0] is not text:
            new, new_mask = text, mask
            for name in names:
                branches, shares = self.shares(text)
                filler: Any = self.fillers[name]
                other, other_mask = filler.retell(self.site.path, branches, text, mask)
                rows = shares[name].column > 0
                new = torch.where(rows, other.to(new.dtype), new)
                if new_mask is not None and other_mask is not None:
                    new_mask = torch.where(rows.reshape(-1, *[1] * (new_mask.dim() - 1)), other_mask, new_mask)
            self._texts[key] = text, new, new_mask
        _, new, new_mask = self._texts[key]
        return {**kwargs, "encoder_hidden_states": new, **({"attention_mask": new_mask} if mask is not None else {})}


class Operation:
    """All that a batch's lesions do to the calls of one module: one site's fitting, or those of its heads."""

    def __init__(self, fittings: Sequence[Fitting]):
        self.fittings, self.port, self.watch = fittings, fittings[0].site.port, TextLength()

    def around(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def operated(*args: Any, **kwargs: Any) -> Any:
            call = Call(module, forward, args, kwargs, self.watch.tokens)
            rows = len(call.hidden)
            acting = [fitting for fitting in self.fittings if fitting.weights(rows)[1]]
            if not acting:
                return call.run()
            output = self.port.placeholder(call) if all(fitting.spares(rows) for fitting in acting) else None
            if output is None:
                output = acting[0].output(call)
            changes = [change for fitting in acting for change in fitting.changes(call, output)]
            return self.port.write(call, output, changes) if changes else output

        return operated

    def sparing(self, norm: Callable[..., Any]) -> Callable[..., Any]:
        """The norm before the module, not computed where the module is not."""

        def maybe(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            spared = all(fitting.spares(len(hidden)) for fitting in self.fittings)
            return hidden if spared else norm(hidden, *args, **kwargs)

        return maybe


def _norm_before(denoiser: nn.Module, path: str) -> nn.Module | None:
    """The layer norm that this attention or feed-forward alone reads, where the block is known to be built so."""
    parent, _, leaf = path.rpartition(".")
    block, module = denoiser.get_submodule(parent), denoiser.get_submodule(path)
    if not isinstance(block, BasicTransformerBlock) or block.norm_type != "layer_norm" or block.pos_embed is not None:
        return None
    norm = {"attn1": block.norm1, "attn2": block.norm2, "ff": block.norm3}.get(leaf)
    # A module that changes the shape is computed anyway.
    return norm if isinstance(norm, nn.LayerNorm) and keeps_shape(module) else None


def _anew(value: Any) -> Any:
    """The same numbers as another tensor object: `reuse.text_projected_once` goes by identity."""
    return value.view_as(value) if isinstance(value, Tensor) else value
