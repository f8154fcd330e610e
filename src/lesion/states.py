"""Half-made images: where the denoising of an image stands after some steps, so that it can go on from there.

A lesion that begins at step k leaves the first k steps as they are in the baseline. Its images start from the
baseline's state at k: the latents, what the scheduler remembers of earlier steps, and the state of the image's noise
generator. The pipeline itself still runs its own loop; during the first k steps its denoiser is not computed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lesion.lesions import covers
from lesion.reuse import forward_replaced, method_replaced
from lesion.store import atomically
from lesion.study import Settings
from lesion.surgery import calls_in, sample_of

_LATENTS, _GENERATOR, _MEMORY = "latents", "generator", "memory."


class Unknown(Exception):
    """This scheduler keeps something between steps that cannot be kept for later."""


class Enough(Exception):
    """All states asked for are there; the rest of the images is not wanted."""


@dataclass(frozen=True)
class State:
    """Of one image: latents (1, …), generator state, scheduler memory by dotted name; its scalars in `plain`."""

    tensors: dict[str, Tensor]
    plain: dict[str, Any]


def first_step(window: tuple[float, float], steps: int) -> int:
    """The first of `steps` denoiser calls that a window covers."""
    return next(step for step in range(steps) if covers(window, step, steps))


def calls_of(scheduler: Any, settings: Settings, pipe: Any = None) -> int | None:
    """How often the denoiser is called in one pipeline call; None where the scheduler cannot tell beforehand.

    pipe: of img2img, the pipeline, which says how many steps it leaves out; without it as Stable Diffusion does.
    """
    trial = copy.deepcopy(scheduler)
    try:
        trial.set_timesteps(settings.steps)
        if settings.noising and pipe is not None:
            alone = SimpleNamespace(scheduler=trial)  # all that `get_timesteps` reads of its pipeline
            return len(type(pipe).get_timesteps(alone, settings.steps, settings.noising, "cpu")[0])
    except Exception:  # one that wants more than a number of steps
        return None
    left_out = settings.steps - int(settings.steps * settings.noising) if settings.noising else 0
    return len(trial.timesteps) - left_out * int(getattr(trial, "order", 1))


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
        elif not isinstance(value, Tensor | np.ndarray):  # of these, what set_timesteps made and no step changes
            raise Unknown(f"{type(scheduler).__name__}.{name} is a {type(value).__name__}")
    return tensors, plain


def _is_row(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.shape[:1] == (rows,)


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _capture(scheduler: Any, latents: Tensor, generators: Sequence[torch.Generator]) -> list[State]:
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
        states.append(State(tensors, {"scalars": plain, "lists": lists, "strides": list(latents.stride())}))
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


@contextmanager
def recording(
    pipe: Any, generators: Sequence[torch.Generator], windows: Sequence[tuple[float, float]], stop: bool = False
) -> Iterator[dict[int, list[State]]]:
    """For one pipeline call: the states of its images where a window begins, by step; filled as the call goes.

    stop: raise Enough once all are there. Nothing is recorded for a scheduler whose memory is Unknown.
    """
    scheduler = pipe.scheduler
    found: dict[int, list[State]] = {}
    wanted: set[int] = set()
    done = 0

    def make(step: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if done == 0:
                total = calls_in(pipe)
                wanted.update({first_step(window, total) for window in windows} - {0})
            result = step(*args, **kwargs)
            done += 1
            if done in wanted:
                try:
                    found[done] = _capture(scheduler, result[0], generators)
                except Unknown:
                    wanted.clear()
                if stop and wanted <= found.keys():
                    raise Enough
            return result

        return counting

    with method_replaced(scheduler, "step", make):
        yield found


@contextmanager
def going_on(
    scheduler: Any, denoiser: nn.Module, generators: Sequence[torch.Generator], states: Sequence[State], start: int
) -> Iterator[None]:
    """For one pipeline call: its first `start` steps are not computed; it goes on from these states, one an image."""
    done = 0

    def stub(forward: Callable[..., Any]) -> Callable[..., Any]:
        def maybe(*args: Any, **kwargs: Any) -> Any:
            if done >= start:
                return forward(*args, **kwargs)
            sample = sample_of(args, kwargs)
            channels = getattr(denoiser.config, "out_channels", None)  # more than it takes in, for a learned variance
            form = list(sample.shape)
            if sample.dim() == 4 and isinstance(channels, int):
                form[1] = channels
            nothing = sample.new_zeros(form)
            return Transformer2DModelOutput(sample=nothing) if kwargs.get("return_dict", True) else (nothing,)

        return maybe

    def make(step: Callable[..., Any]) -> Callable[..., Any]:
        def maybe(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done > start:
                return step(model_output, timestep, sample, *args, **kwargs)
            latents = _restore(scheduler, states, generators, sample) if done == start else sample
            return latents, latents  # some schedulers tell a second thing, read after the last step only

        return maybe

    with ExitStack() as stack:
        stack.enter_context(forward_replaced(denoiser, stub))
        stack.enter_context(method_replaced(scheduler, "step", make))
        yield


class States:
    """Kept states on disk, one file an image and step: folder/ab/<key of the baseline>-<step>.safetensors."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.usable = True  # until a scheduler turns out to be Unknown

    def path(self, key: str, step: int) -> Path:
        return self.folder / key[:2] / f"{key}-{step}.safetensors"

    def put(self, key: str, step: int, state: State) -> None:
        path = self.path(key, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomically(path) as temporary:
            save_file(
                {name: tensor.contiguous() for name, tensor in state.tensors.items()},
                temporary,
                metadata={"plain": json.dumps(state.plain)},
            )

    def get(self, key: str, step: int) -> State | None:
        """None where there is none; a damaged one counts as none and is made again."""
        try:
            with safe_open(self.path(key, step), framework="pt") as file:
                plain: Mapping[str, Any] = json.loads(file.metadata()["plain"])
                return State({name: file.get_tensor(name) for name in file.keys()}, dict(plain))  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
