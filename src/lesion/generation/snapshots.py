"""Snapshots: where the denoising of an image stands after some steps, so that it can be resumed from there.

A lesion that begins at step k leaves the first k steps as they are in the baseline. Its images start from the
baseline's snapshot at k: the latents, what the scheduler remembers of earlier steps, and the state of the image's noise
generator. The pipeline itself still runs its own loop; during the first k steps its denoiser is not computed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from lesion.denoising.run import Client, DenoiserCall, Denoising, Enough, SchedulerStep
from lesion.store import tensors as tensorfiles
from lesion.study.grid import Cell, ModelIdentity
from lesion.study.lesions import covers
from lesion.study.settings import Settings

log = logging.getLogger(__name__)
_LATENTS, _GENERATOR, _MEMORY, _NUMBER = "latents", "generator", "memory.", "number."


class Unknown(Exception):
    """This scheduler keeps something between steps that cannot be kept for later."""


class OtherCount(Exception):
    """The pipeline at work calls its denoiser another number of times than the one that left the states."""


@dataclass(frozen=True)
class State:
    """Of one image: latents (1, …), generator state, scheduler memory by dotted name; its scalars in `plain`.

    calls: denoiser calls from noise to image of the pipeline call that left it.
    """

    tensors: dict[str, Tensor]
    plain: dict[str, Any]
    calls: int


def first_step(window: tuple[float, float], steps: int) -> int:
    """The first of `steps` denoiser calls that comes after the start of a window; `steps` if none does."""
    return next((step for step in range(steps) if covers((window[0], 1.0), step, steps)), steps)


def _memory(scheduler: Any, rows: int, form: torch.Size) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a scheduler remembers of these images, by attribute, and its scalars.

    Raises Unknown for memory of another kind (Brownian trees of SDE solvers, for one).
    """
    tensors: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for name, value in vars(scheduler).items():
        if name in ("_internal_dict", "step"):
            continue
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, Tensor) and value.shape[:1] == (rows,) and value.dim() == len(form):
            tensors[name] = value
        elif isinstance(value, list) and any(_is_row(item, rows) for item in value):
            if not all(item is None or _is_row(item, rows) for item in value):
                raise Unknown(f"{type(scheduler).__name__}.{name} holds more than this batch")
            tensors[name] = value
        elif isinstance(value, list) and all(_is_plain(item) or _is_number(item) for item in value):
            # UniPC keeps timesteps as tensors without dimensions; JSON takes them as numbers
            plain[name] = [item.item() if isinstance(item, Tensor) else item for item in value]
        elif _is_plain(value):
            plain[name] = value
        elif not isinstance(value, Tensor | np.ndarray):  # numbers see `_capture`; others set_timesteps alone makes
            raise Unknown(f"{type(scheduler).__name__}.{name} is a {type(value).__name__}")
    return tensors, plain


def _is_row(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.shape[:1] == (rows,)


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _capture(scheduler: Any, latents: Tensor, generators: Sequence[torch.Generator], calls: int) -> list[State]:
    memory, plain = _memory(scheduler, len(latents), latents.shape)
    states = []
    for row, generator in enumerate(generators):
        tensors = {_LATENTS: latents[row : row + 1].cpu().clone(), _GENERATOR: generator.get_state()}
        for name, value in memory.items():
            items = {f"{name}.{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
            tensors |= {
                _MEMORY + key: item[row : row + 1].cpu().clone() for key, item in items.items() if item is not None
            }
        lists = {name: len(value) for name, value in memory.items() if isinstance(value, list)}
        numbers = {name: value for name, value in vars(scheduler).items() if _is_number(value)}  # Heun's dt, for one
        tensors |= {_NUMBER + name: value.reshape(1).cpu().clone() for name, value in numbers.items()}
        # On a GPU, a number in main memory takes part in full precision, one beside the latents in theirs.
        on_cpu = [name for name, value in numbers.items() if value.device.type == "cpu"]
        form = {"scalars": plain, "lists": lists, "strides": list(latents.stride()), "on_cpu": on_cpu}
        states.append(State(tensors, form, calls))
    return states


def _restore(scheduler: Any, states: Sequence[State], generators: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """Put the scheduler and generators where the states were; the latents."""

    def batch(key: str) -> Tensor | None:
        if key not in states[0].tensors:
            return None
        kept = torch.cat([state.tensors[key] for state in states])
        return kept.to(like.device)

    plain = states[0].plain
    for name, value in plain["scalars"].items():
        setattr(scheduler, name, value)
    for name, length in plain["lists"].items():
        setattr(scheduler, name, [batch(f"{_MEMORY}{name}.{i}") for i in range(length)])
    for key in [key for key in states[0].tensors if key.startswith(_NUMBER)]:
        name = key.removeprefix(_NUMBER)
        device = torch.device("cpu") if name in plain["on_cpu"] else like.device
        setattr(scheduler, name, states[0].tensors[key].reshape(()).to(device))
    singles = {key for key in states[0].tensors if key.startswith(_MEMORY)}
    for key in singles - {f"{_MEMORY}{name}.{i}" for name, length in plain["lists"].items() for i in range(length)}:
        setattr(scheduler, key.removeprefix(_MEMORY), batch(key))
    for state, generator in zip(states, generators, strict=True):
        generator.set_state(state.tensors[_GENERATOR])
    latents = batch(_LATENTS)
    assert latents is not None
    # The same numbers laid out in another order would take other kernels, which round differently.
    order = sorted(range(latents.dim()), key=lambda dim: -plain["strides"][dim])
    laid_out = latents.permute(order).contiguous()
    return laid_out.permute([order.index(dim) for dim in range(latents.dim())])


class Recording(Client):
    """Records the snapshots of a run's images where a window begins.

    generators: the noise generator of each image.
    windows: those of the study.
    stop: raise Enough once all are there.

    calls: denoiser calls of the run, 0 before its first step. states: the snapshots by step; none for a scheduler whose
    memory is Unknown.
    """

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        windows: Sequence[tuple[float, float]],
        stop: bool = False,
    ):
        self.generators, self.windows, self.stop = generators, windows, stop
        self.calls = 0
        self.states: dict[int, list[State]] = {}
        self._wanted: set[int] = set()

    def before_step(self, run: Denoising, step: SchedulerStep) -> None:
        if not self.calls:
            self.calls = run.calls
            self._wanted = {first_step(window, self.calls) for window in self.windows} - {0}

    def after_step(self, run: Denoising, step: SchedulerStep) -> None:
        if run.steps not in self._wanted or step.latents is None:
            return
        try:
            self.states[run.steps] = _capture(run.pipe.scheduler, step.latents, self.generators, self.calls)
        except Unknown:
            self._wanted.clear()
        if self.stop and self._wanted <= self.states.keys():
            raise Enough


class Resuming(Client):
    """Resumes a run from snapshots, one an image: its first `start` steps are not computed.

    generators: the noise generator of each image; each is set to where its snapshot was.
    Raises OtherCount within the run if its number of steps is not that of the snapshots.
    """

    def __init__(self, generators: Sequence[torch.Generator], states: Sequence[State], start: int):
        self.generators, self.states, self.start = generators, states, start

    def before_call(self, run: Denoising, call: DenoiserCall) -> None:
        if run.steps >= self.start:
            return
        if run.calls != self.states[0].calls:
            raise OtherCount(f"the pipeline takes {run.calls} steps, the kept states are of {self.states[0].calls}")
        as_class = call.kwargs.get("return_dict", True)
        if isinstance(call.sample, list):  # Z-Image
            of_rows = [row.new_zeros(row.shape) for row in call.sample]
            call.output = Transformer2DModelOutput(sample=of_rows) if as_class else (of_rows,)
            return
        channels = getattr(run.denoiser.config, "out_channels", None)  # more than it takes in, for a learned variance
        form = list(call.sample.shape)
        if call.sample.dim() == 4 and isinstance(channels, int):
            form[1] = channels
        nothing = call.sample.new_zeros(form)
        call.output = Transformer2DModelOutput(sample=nothing) if as_class else (nothing,)

    def before_step(self, run: Denoising, step: SchedulerStep) -> None:
        if run.steps + 1 < self.start:
            step.latents = step.sample
        elif run.steps + 1 == self.start:
            step.latents = _restore(run.pipe.scheduler, self.states, self.generators, step.sample)


class States:
    """Kept states on disk, one file an image and step: folder/ab/<key of the baseline>-<step>.safetensors.

    A file names its image and step in its metadata (`state`), so that one in another's place is noticed. Files of
    version 0.1 do not, and hold nothing else to tell it by: they are taken under the name they have.

    How many steps an image takes is the pipeline's affair (`model.arguments` may change it, some schedulers need more
    than a number to tell), so it is never computed here: each state says how many there were when it was recorded.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.usable = True  # until a scheduler turns out to be Unknown
        self._calls: dict[tuple[ModelIdentity, Settings], int] = {}  # seen in this process
        self._warned = False

    def path(self, key: str, step: int) -> Path:
        return self.folder / key[:2] / f"{key}-{step}.safetensors"

    def note(self, cell: Cell, calls: int) -> None:
        """Remember how many denoiser calls an image with the cell's model and settings takes."""
        if calls:
            self._calls[cell.model, cell.settings] = calls

    def calls(self, baselines: Sequence[Cell]) -> int | None:
        """Denoiser calls of an image: seen earlier, or told by a state of one of these baselines; None if unknown."""
        for cell in baselines:
            if (known := self._calls.get((cell.model, cell.settings))) is not None:
                return known
            for path in sorted((self.folder / cell.key[:2]).glob(f"{cell.key}-*.safetensors")):
                if (state := _read(path)) is not None:
                    self.note(cell, state.calls)
                    return state.calls
        return None

    def put(self, key: str, step: int, state: State) -> None:
        """Keep a state; where that cannot be, one warning: it costs the late lesions time, and nothing else."""
        path = self.path(key, step)
        metadata = {"plain": json.dumps(state.plain), "calls": str(state.calls), "state": path.stem}
        try:
            tensorfiles.write(path, state.tensors, metadata)
        except OSError as error:
            if not self._warned:
                log.warning("snapshots cannot be kept, so late windows take longer (%s)", error)
            self._warned = True

    def get(self, key: str, step: int, calls: int) -> State | None:
        """The state after `step` of `calls` denoiser calls. None where there is none; a damaged one is removed."""
        state = _read(self.path(key, step))
        return state if state is not None and state.calls == calls else None


def _read(path: Path) -> State | None:
    try:
        if (kept := tensorfiles.read(path, lambda carried: carried.get("state", path.stem) == path.stem)) is None:
            return None
        tensors, metadata = kept
        plain = json.loads(metadata["plain"])
        if missing := {"scalars", "lists", "strides", "on_cpu"} - plain.keys():
            raise KeyError(*sorted(missing))
        return State(tensors, plain, int(metadata["calls"]))
    except OSError as error:
        log.warning("%s cannot be read: %s", path, error)
    except (KeyError, ValueError, TypeError) as error:  # whole, but of another form
        log.warning("%s is not used: %r", path, error)
    return None
