"""Puts a batch of lesions on a live denoiser and takes them off again.

Plain forward hooks on the sites, so it works under any attention processor and swaps none. Each image of a batch has
its own lesion (or none): masks are data, and an image without a lesion keeps every bit of its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lesion.anatomy import Anatomy
from lesion.lesions import Lesion, covers

UNCOND, COND = 0, 1


class Filler(Protocol):
    """A replacement at work: what a site's output becomes."""

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
            hook = _hook(path, plan, steps, fillers)
            stack.callback(denoiser.get_submodule(path).register_forward_hook(hook).remove)
        yield


def _hook(path: str, plan: _SitePlan, steps: Steps, fillers: Mapping[str, Filler]) -> Any:
    memory: dict[tuple[int, int], Tensor] = {}
    all_steps = all(window == (0.0, 1.0) for window in plan.window)
    names = [name for name in dict.fromkeys(plan.replacement) if name]

    def weights_at(rows: int) -> tuple[Tensor, Tensor]:
        branches = branches_of(rows, len(plan.strength))
        key = (rows, 0 if all_steps else steps.call)
        if key not in memory:
            memory[key] = plan.weights(steps.call, steps.total, branches)
        return memory[key], branches

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        weights, branches = weights_at(len(output))
        if not bool(weights.any()):
            return None
        for name in names:
            mine = weights
            if len(names) > 1:
                mine = weights * torch.tensor(
                    [plan.replacement[row % len(plan.strength)] == name for row in range(len(output))]
                )
            values = fillers[name].fill(path, steps.call, branches.to(output.device), output)
            output = blend(output, values, mine)
        return output

    return hook


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
