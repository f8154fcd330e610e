"""What every training stage shares: the run folder, a resumable loop, an average of the weights, the rendered data."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lesion.toy_world import render, sample_scene

SEED = 20261121
DECAY_SHARE = 0.4
CONTEXT_LENGTH = 32  # tokens; the longest caption has 18


@dataclass(frozen=True)
class Run:
    """Where a training run keeps its files and puts the result, where it computes, and when it has to pause."""

    folder: Path
    target: Path
    device: torch.device
    deadline: float  # time.monotonic() at which a stage saves and stops
    quick: bool = False  # a few steps of everything, for the test of this script

    def steps(self, full: int) -> int:
        return 3 if self.quick else full

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


class Paused(Exception):
    """The time given to this call is used up; the next call goes on from the checkpoint."""


class Average:
    """Exponential moving average of a module's weights."""

    def __init__(self, module: torch.nn.Module, decay: float):
        self.decay, self.module = decay, copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        ours, theirs = list(self.module.parameters()), list(module.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - self.decay)
        for a, b in zip(self.module.buffers(), module.buffers(), strict=True):
            a.copy_(b)


def rate_at(step: int, total: int, warmup: int) -> float:
    """Warm-up, plateau, then a cosine to zero over the last DECAY_SHARE of the steps; relative to the peak."""
    start = total * (1 - DECAY_SHARE)
    if step < warmup:
        return (step + 1) / warmup
    if step < start:
        return 1.0
    return 0.5 * (1 + float(np.cos(np.pi * min(1.0, (step - start) / (total - start)))))


def loop(
    run: Run,
    name: str,
    total: int,
    parts: dict[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    step_fn: Callable[[int, torch.Generator], dict[str, float]],
    averages: dict[str, Average] | None = None,
    warmup: int = 100,
    save_every: int = 500,
) -> None:
    """Run `step_fn` up to `total` steps; save and resume; the batch of a step depends on the step number only."""
    averages = averages or {}
    path = run.folder / f"{name}.pt"
    start = 0
    if path.exists():
        state = torch.load(path, map_location=run.device, weights_only=True)
        start = state["step"]
        for key, part in parts.items():
            part.load_state_dict(state["parts"][key])
        for key, average in averages.items():
            average.module.load_state_dict(state["averages"][key])
        optimizer.load_state_dict(state["optimizer"])
    peaks = [group.setdefault("peak", group["lr"]) for group in optimizer.param_groups]

    def save(step: int) -> None:
        state: dict[str, Any] = {
            "step": step,
            "parts": {key: part.state_dict() for key, part in parts.items()},
            "averages": {key: average.module.state_dict() for key, average in averages.items()},
            "optimizer": optimizer.state_dict(),
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    smooth: dict[str, float] = {}
    bar = tqdm(range(start, total), initial=start, total=total, desc=name, mininterval=5)
    for step in bar:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate_at(step, total, min(warmup, total // 4 + 1))
        generator = torch.Generator().manual_seed(SEED * 1000 + step)
        figures = step_fn(step, generator)
        for key, average in averages.items():
            average.update(parts[key])
        for key, value in figures.items():
            smooth[key] = value if key not in smooth else 0.98 * smooth[key] + 0.02 * value
        bar.set_postfix({key: f"{value:.4f}" for key, value in smooth.items()}, refresh=False)
        if (step + 1) % save_every == 0:
            save(step + 1)
        if time.monotonic() > run.deadline:
            save(step + 1)
            raise Paused(f"{name}: paused after step {step + 1} of {total}")
    save(total)
    (run.folder / f"{name}.json").write_text(f'{{"steps": {total}}}\n', encoding="utf-8")


def backward(loss: torch.Tensor, optimizer: torch.optim.Optimizer, clip: float = 1.0) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()


def scenes(run: Run, number: int) -> tuple[torch.Tensor, list[str]]:
    """The training pictures, (number, 3, 64, 64) uint8, and their captions; rendered once, kept in the run folder."""
    number = 64 if run.quick else number
    path = run.folder / f"scenes-{number}.npz"
    if not path.exists():
        rng = random.Random(SEED)
        images, captions = [], []
        for _ in tqdm(range(number), desc="render", mininterval=5):
            scene = sample_scene(rng)
            images.append(render(scene, rng))
            captions.append(scene.caption())
        np.savez(path.with_suffix(".tmp.npz"), images=np.stack(images), captions=np.array(captions))
        path.with_suffix(".tmp.npz").replace(path)
    with np.load(path) as data:
        return torch.from_numpy(data["images"]).permute(0, 3, 1, 2).contiguous(), [str(c) for c in data["captions"]]


def pick(number: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(number, (batch,), generator=generator)
