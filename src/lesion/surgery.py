"""Puts a batch of lesions on a live denoiser and takes them off again.

Plain forward hooks on the sites, so it works under any attention processor and swaps none. Each image of a batch has
its own lesion (or none): masks are data, and an image without a lesion keeps every bit of its output. A site that is
replaced in every row of the batch is not computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lesion.anatomy import Anatomy
from lesion.lesions import Lesion, covers
from lesion.reuse import forward_replaced

UNCOND, COND = 0, 1


class Filler(Protocol):
    """A replacement at work: what a site's output becomes.

    A filler that reads the values of `output`, not only its shape, dtype and device, has an attribute
    `reads_output = True`; without it a site that is replaced in every row is not computed. A TextFiller changes what a
    site reads instead, a Rerunner the condition it runs in. A filler with an attribute `companion: str` gets beside every lesioned image an un-ablated one
    of that prompt, with the same noise; their rows follow in the same order (see `generate`) and are dropped.
    """

    def fill(self, site: str, call: int, branches: Tensor, output: Tensor) -> Tensor:
        """Values broadcastable to `output`, (rows, tokens, channels), for rows of the given CFG branches (0, 1)."""
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
                f"{type(self.pipe.scheduler).__name__} calls the denoiser more often than its {self.total} timesteps; "
                "steps cannot be told apart"
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
    with ExitStack() as stack:
        stack.enter_context(steps.counting(denoiser))
        for path, fitting in fitted.items():
            module = denoiser.get_submodule(path)
            if fitting.reruns:
                stack.enter_context(forward_replaced(module, functools.partial(fitting.rerun, module)))
            if fitting.retells:
                stack.enter_context(forward_replaced(module, fitting.retold))
            elif _keeps_shape(module) and not fitting.reruns:
                stack.enter_context(forward_replaced(module, fitting.spared))
            stack.callback(module.register_forward_hook(fitting.hook).remove)
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
    return {path: Fitting(path, plan, steps, fillers) for path, plan in plans.items()}


class Fitting:
    """The lesions of a batch at one site: blends in their values, and spares the site where nothing of it is left."""

    def __init__(self, path: str, plan: _SitePlan, steps: Steps, fillers: Mapping[str, Filler]):
        self.path, self.plan, self.steps, self.fillers = path, plan, steps, fillers
        self.names = [name for name in dict.fromkeys(plan.replacement) if name]
        self.all_steps = all(window == (0.0, 1.0) for window in plan.window)
        self.retells = [name for name in self.names if hasattr(fillers[name], "retell")]
        self.reruns = [name for name in self.names if hasattr(fillers[name], "rerun")]
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

    def spared(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, or its input where every row will be replaced: it only lends its shape to the replacement."""

        def maybe(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.needed and self.weights(len(hidden_states))[2]:
                return hidden_states
            return forward(hidden_states, *args, **kwargs)

        return maybe

    def retold(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` with another text for the rows that are to read it; a row in part gets a mixture of outputs."""

        def told(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.weights(len(hidden_states))[1]:
                return forward(hidden_states, *args, **kwargs)
            if kwargs.get("encoder_hidden_states") is None:
                raise RuntimeError(f"{self.path} is given no text by name, so it cannot be given another")
            shares = self.shares(hidden_states)[1]
            mixed = [name for name in self.retells if shares[name].mixed]
            output = forward(hidden_states, *args, **self._retell(kwargs, [n for n in self.retells if n not in mixed]))
            for name in mixed:
                output = blend(output, forward(hidden_states, *args, **self._retell(kwargs, [name])), shares[name])
            return output

        return told

    def rerun(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, and its output under another condition for the rows that are to have it."""

        def twice(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            output = forward(hidden_states, *args, **kwargs)
            if not self.weights(len(hidden_states))[1]:
                return output
            shares = self.shares(output)[1]
            for name in self.reruns:
                filler: Any = self.fillers[name]
                with filler.rerun(self.path, module):  # seen anew, so that nothing remembered of the text is used
                    other = forward(*map(_anew, (hidden_states, *args)), **{k: _anew(v) for k, v in kwargs.items()})
                output = blend(output, other, shares[name])
            return output

        return twice

    def _retell(self, kwargs: dict[str, Any], names: list[str]) -> dict[str, Any]:
        """Arguments with the text of these replacements' rows in its place; the same tensor at every step."""
        text, mask = kwargs["encoder_hidden_states"], kwargs.get("attention_mask")
        key = (*self._key(len(text)), *names)
        if key not in self._texts or self._texts[key][0] is not text:
            new, new_mask = text, mask
            for name in names:
                branches, shares = self.shares(text)
                filler: Any = self.fillers[name]
                other, other_mask = filler.retell(self.path, branches, text, mask)
                rows = shares[name].column > 0
                new = torch.where(rows, other.to(new.dtype), new)
                if new_mask is not None and other_mask is not None:
                    new_mask = torch.where(rows.reshape(-1, *[1] * (new_mask.dim() - 1)), other_mask, new_mask)
            self._texts[key] = text, new, new_mask
        _, new, new_mask = self._texts[key]
        return {**kwargs, "encoder_hidden_states": new, **({"attention_mask": new_mask} if mask is not None else {})}

    def hook(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not self.weights(len(output))[1]:
            return None
        branches, shares = self.shares(output)
        for name, share in shares.items():
            if name in self.retells or name in self.reruns:
                continue
            values = self.fillers[name].fill(self.path, self.steps.call, branches, output)
            output = blend(output, values, share)
        return output


@dataclass(frozen=True)
class Share:
    """How much of each row is replaced: column (rows, 1, …), where the output is; what is known of it beforehand."""

    column: Tensor
    whole: bool  # every row wholly
    mixed: bool  # some row in part

    @classmethod
    def of(cls, weights: Tensor, like: Tensor) -> Share:
        """weights: (rows,) on the CPU, in [0, 1]."""
        column = weights.to(like.device, like.dtype).reshape(-1, *[1] * (like.dim() - 1))
        return cls(column, bool((weights == 1).all()), bool(((weights > 0) & (weights < 1)).any()))


def _anew(value: Any) -> Any:
    """The same numbers as another tensor object: `reuse.text_projected_once` goes by identity."""
    return value.view_as(value) if isinstance(value, Tensor) else value


def _keeps_shape(module: nn.Module) -> bool:
    """Whether a site puts out what it takes in: the shape of its hidden states."""
    return getattr(module, "query_dim", None) == getattr(module, "out_dim", -1)


def blend(output: Tensor, values: Tensor, share: Share) -> Tensor:
    """Row by row: weight 0 keeps the output and 1 takes the value, both to the bit; between, a linear mixture.

    output: (rows, tokens, channels); values: broadcastable to it.
    """
    values = values.to(output.dtype)
    if share.whole:
        return values.expand_as(output)
    column = share.column
    blended = torch.where(column == 1, values, output)
    if share.mixed:
        blended = torch.where((column > 0) & (column < 1), output + column * (values - output), blended)
    return blended
