"""Constants in the place of what a layer's sites put out, chosen so that the denoiser changes least without them.

Optimal ablation (Li & Janson, "Optimal ablation for interpretability", NeurIPS 2024): among all constants the one under
which the model does best, so that what is left of the loss is what the layer's dependence on its input is worth, and
nothing of it comes from putting in something that the rest of the model never sees. Here, for every layer, denoising
step and branch of guidance: the squared error of the denoiser's output against its own without a lesion, on the way of
un-lesioned images of the calibration set. A layer's constants are chosen with that layer alone lesioned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lesion.denoising.run import Client, DenoiserCall, Denoising
from lesion.replacements._means import watched
from lesion.study.lesions import Lesion, Replacement
from lesion.study.prompts import Prompt
from lesion.surgery.intervention import Intervention
from lesion.surgery.operation import Lesions, replacement_key

if TYPE_CHECKING:
    from lesion.replacements import Bench

FIRST, LONGER, SHORTER = 0.5, 1.5, 0.3  # the first step, as a share of Polyak's; by what later ones grow and shrink
_NAMED = Replacement("optimal")


def optimised(
    bench: Bench, subjects: Sequence[tuple[Prompt, int]], means: Mapping[str, Tensor], updates: int
) -> dict[str, Tensor]:
    """The best constants seen in `updates` steps from the means; never worse than these on the subjects.

    means: of every part of every site, (calls, 2, channels), unconditional branch first; the result is alike. Every
    step is by the gradient over all subjects, so batches do not matter but for rounding.
    """
    tuning = Tuning(bench.model.anatomy, means)
    for _ in range(updates + 1):  # the last one only looks
        watched(bench, subjects, tuning)
        tuning.update()
    return tuning.best


class _Trial(Intervention):
    """The constants under trial: differentiable."""

    def __init__(self, tuning: Tuning):
        self.tuning = tuning

    def fill(self, site: str, call: int, branches: Tensor, output: Tensor) -> Tensor:
        rows = self.tuning.trial(site, call, output.device)[branches]
        return rows[:, :, None, None] if output.dim() == 4 else rows[:, None, :]


class Tuning(Client):
    """Adds up gradients of every layer's constants over any number of runs; `update` takes a step along them.

    A step goes down the gradient of the best constants so far, by a share of Polyak's length (loss by squared
    gradient), longer after each that helped and shorter after each that did not; every layer, call and branch for
    itself.
    """

    gradients = True

    def __init__(self, anatomy: Any, means: Mapping[str, Tensor]):
        self.anatomy = anatomy
        self.values = {name: mean.clone() for name, mean in means.items()}
        self.best = {name: mean.clone() for name, mean in means.items()}
        self.steepest = {name: torch.zeros_like(mean) for name, mean in means.items()}  # gradient at the best
        self.lowest: dict[tuple[str, int], Tensor] = {}  # loss of each branch, by layer and call
        self.shares: dict[tuple[str, int], Tensor] = {}
        self._leaves: dict[tuple[str, int], Tensor] = {}
        self._forget()

    def _forget(self) -> None:
        self.slopes = {name: torch.zeros_like(value) for name, value in self.values.items()}
        self.losses: dict[tuple[str, int], Tensor] = {}
        self.names: dict[str, set[str]] = {}

    def trial(self, name: str, call: int, device: torch.device) -> Tensor:
        """The constants of one part of a site at one denoiser call, (2, channels): a leaf that gradients go to."""
        if (name, call) not in self._leaves:
            self._leaves[name, call] = self.values[name][call].to(device).requires_grad_()
        return self._leaves[name, call]

    def after_call(self, run: Denoising, call: DenoiserCall) -> None:
        wanted, number = _tensor(call.output).detach(), run.call
        branches = run.branches(len(wanted)).to(wanted.device)
        for layer in self.anatomy.layers:
            lesion = Lesion("leave_one_out", layer.path, (layer.path,), _NAMED)
            lesions = Lesions(self.anatomy, [lesion] * run.samples, {replacement_key(lesion): _Trial(self)})
            self._leaves.clear()
            with torch.enable_grad(), run.aside(), lesions.attached(run):
                lesions.before_call(run, call)
                found = _tensor(run.denoiser(*call.args, **call.kwargs))
                errors = (found.float() - wanted.float()).flatten(1).square().mean(dim=1)  # (rows,)
                leaves = list(self._leaves.values())
                slopes = torch.autograd.grad(errors.sum(), leaves, allow_unused=True)
            for (name, _), slope in zip(self._leaves, slopes, strict=True):
                if slope is not None:
                    self.slopes[name][number] += slope.detach().cpu()
            self.names.setdefault(layer.path, set()).update(name for name, _ in self._leaves)
            loss = torch.zeros(2, dtype=torch.float64).index_add_(0, branches.cpu(), errors.detach().double().cpu())
            self.losses[layer.path, number] = self.losses.get((layer.path, number), 0) + loss

    def update(self) -> None:
        """Keep what is better than before, and take the next step from there."""
        for (layer, call), loss in self.losses.items():
            at, names = (layer, call), sorted(self.names[layer])
            if at in self.lowest:
                better = loss < self.lowest[at]
                self.shares[at] = self.shares[at] * torch.where(better, LONGER, SHORTER)
                self.lowest[at] = torch.minimum(loss, self.lowest[at])
            else:
                better, self.lowest[at] = torch.ones(2, dtype=torch.bool), loss
                self.shares[at] = torch.full((2,), FIRST, dtype=torch.float64)
            for name in names:
                self.best[name][call][better] = self.values[name][call][better]
                self.steepest[name][call][better] = self.slopes[name][call][better]
            squares = sum(self.steepest[name][call].double().square().sum(dim=1) for name in names)
            length = self.shares[at] * self.lowest[at] / (squares + 1e-30)  # (2,), by branch
            for name in names:
                step = length[:, None] * self.steepest[name][call].double()
                self.values[name][call] = self.best[name][call] - step.float()
        self._forget()


def _tensor(output: Any) -> Tensor:
    """What the denoiser puts out, (rows, …)."""
    if isinstance(output, Tensor):
        return output
    found = output[0] if isinstance(output, tuple) else output.sample
    return torch.stack(list(found)) if isinstance(found, list) else found
