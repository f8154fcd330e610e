"""Puts a batch of lesions on a live denoiser and takes them off again.

Plain forward hooks on the sites, so it works under any attention processor and swaps none. Each image of a batch has
its own lesion (or none): masks are data, and an image without a lesion keeps every bit of its output. A site that is
replaced in every row of the batch is not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
    `reads_output = True`; without it a site that is replaced in every row is not computed.
    """

    def fill(self, site: str, call: int, branches: Tensor, output: Tensor) -> Tensor:
        """Values broadcastable to `output`, (rows, tokens, channels), for rows of the given CFG branches (0, 1)."""
        ...


class Steps:
    """Counts the denoiser's calls within one pipeline call, from 0; the number expected is the scheduler's."""

    def __init__(self, scheduler: Any):
        self.scheduler, self.call, self.total = scheduler, -1, 0

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.call += 1
        if self.call == 0:  # known only now: the pipeline sets its timesteps after it is called
            self.total = len(self.scheduler.timesteps)
        if self.call >= self.total:
            raise RuntimeError(
                f"{type(self.scheduler).__name__} calls the denoiser more often than its {self.total} timesteps; "
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
    scheduler: Any,
    anatomy: Anatomy,
    lesions: Sequence[Lesion | None],
    fillers: Mapping[str, Filler],
) -> Iterator[None]:
    """For one pipeline call: image i of the batch is made under lesions[i] (None: no lesion).

    fillers: the replacement at work for each `replacement_key`. Hooks come off whatever happens. With no lesion in the
    batch nothing is attached at all.
    """
    plans: dict[str, _SitePlan] = {}
    for index, lesion in enumerate(lesions):
        if lesion is None or lesion.strength == 0:
            continue
        for layer in lesion.layers:
            for site in anatomy.sites[layer]:
                plans.setdefault(site, _SitePlan(len(lesions))).add(index, lesion)
    if not plans:
        yield
        return
    steps = Steps(scheduler)
    with ExitStack() as stack:
        stack.enter_context(steps.counting(denoiser))
        for path, plan in plans.items():
            module, fitting = denoiser.get_submodule(path), _Fitting(path, plan, steps, fillers)
            if _keeps_shape(module):
                stack.enter_context(forward_replaced(module, fitting.spared))
            stack.callback(module.register_forward_hook(fitting.hook).remove)
        yield


class _Fitting:
    """The lesions of a batch at one site: blends in their values, and spares the site where nothing of it is left."""

    def __init__(self, path: str, plan: _SitePlan, steps: Steps, fillers: Mapping[str, Filler]):
        self.path, self.plan, self.steps, self.fillers = path, plan, steps, fillers
        self.names = [name for name in dict.fromkeys(plan.replacement) if name]
        self.all_steps = all(window == (0.0, 1.0) for window in plan.window)
        self.needed = any(getattr(fillers[name], "reads_output", False) for name in self.names)
        self.memory: dict[tuple[int, int], tuple[Tensor, bool, bool]] = {}

    def weights(self, rows: int) -> tuple[Tensor, bool, bool]:
        """Of the present call: weights (rows,), whether any is not 0, whether all are 1."""
        key = (rows, 0 if self.all_steps else self.steps.call)
        if key not in self.memory:
            found = self.plan.weights(self.steps.call, self.steps.total, branches_of(rows, len(self.plan.strength)))
            self.memory[key] = found, bool(found.any()), bool((found == 1).all())
        return self.memory[key]

    def spared(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, or its input where every row will be replaced: it only lends its shape to the replacement."""

        def maybe(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.needed and self.weights(len(hidden_states))[2]:
                return hidden_states
            return forward(hidden_states, *args, **kwargs)

        return maybe

    def hook(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        weights, some, _ = self.weights(len(output))
        if not some:
            return None
        branches = branches_of(len(output), len(self.plan.strength)).to(output.device)
        for name in self.names:
            mine = weights
            if len(self.names) > 1:
                samples = len(self.plan.strength)
                mine = weights * torch.tensor(
                    [self.plan.replacement[row % samples] == name for row in range(len(output))]
                )
            values = self.fillers[name].fill(self.path, self.steps.call, branches, output)
            output = blend(output, values, mine)
        return output


def _keeps_shape(module: nn.Module) -> bool:
    """Whether a site puts out what it takes in: the shape of its hidden states."""
    return getattr(module, "query_dim", None) == getattr(module, "out_dim", -1)


def blend(output: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """Row by row: weight 0 keeps the output and 1 takes the value, both to the bit; between, a linear mixture.

    output: (rows, tokens, channels); values: broadcastable to it; weights: (rows,) on the CPU, in [0, 1].
    """
    values = values.to(output.dtype)
    if bool((weights == 1).all()):
        return values.expand_as(output)
    column = weights.to(output.device, output.dtype).reshape(-1, *[1] * (output.dim() - 1))
    fractional = bool(((weights > 0) & (weights < 1)).any())
    mixed = torch.where(column == 1, values, output)
    if fractional:
        mixed = torch.where((column > 0) & (column < 1), output + column * (values - output), mixed)
    return mixed
