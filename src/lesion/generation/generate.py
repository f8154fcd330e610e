"""A batch of cells -> their images. With `surgery` and `means` the only code that runs a model."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lesion import tasks
from lesion.generation.snapshots import Enough, OtherCount, Record, State, States, first_step, going_on, recording
from lesion.models import Model
from lesion.models.calling import arguments
from lesion.models.text_cache import text_projected_once
from lesion.study.grid import Cell
from lesion.study.lesions import Lesion
from lesion.study.prompts import Prompt
from lesion.study.settings import Settings
from lesion.surgery.operation import Filler, lesioned, replacement_key

log = logging.getLogger(__name__)


def make_deterministic(seed: int = 0, tf32: bool = False) -> None:
    """Seeds every generator there is and asks cuDNN and cuBLAS for repeatable kernels.

    tf32: let float32 products on a GPU round their factors to 10 bits. The noise of an image does not depend on these
    seeds: it comes from the image's own generator.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = tf32  # float32 is to mean float32 unless asked otherwise
    torch.backends.cuda.matmul.allow_tf32 = tf32
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator an image, seeded with its seed, so that noise depends on neither device nor batch."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def under(
    model: Model, pipe: Any, lesions: Sequence[Lesion | None], fillers: Mapping[str, Filler]
) -> AbstractContextManager[None]:
    """For one `call`, and around each: by the gates of a compiled denoiser, by `surgery.lesioned` otherwise."""
    if model.gates:
        return model.gates.lesioned(pipe, model.anatomy, lesions, fillers)
    return lesioned(model.denoiser, pipe, model.anatomy, lesions, fillers)


def call(
    model: Model, prompts: Sequence[Prompt], noise: Sequence[torch.Generator], settings: Settings
) -> NDArray[np.float32]:
    """The plain pipeline call: (n, height, width, 3) float in [0, 1]."""
    pipe, inputs = model.pipeline(settings.task), tasks.of(settings.task).inputs(prompts, settings)
    asked = arguments(pipe, settings, [prompt.text for prompt in prompts], noise, inputs, model.arguments)
    # Compiled code would be compiled anew for every module whose forward is replaced.
    sites = () if model.gates else model.text_sites
    with model.texts.attached(model.pipe), text_projected_once(model.denoiser, sites):
        images = pipe(**asked).images
    return np.asarray(images)


def generate(
    model: Model,
    cells: Sequence[Cell],
    fillers: Mapping[str, Filler],
    states: States | None = None,
    windows: Sequence[tuple[float, float]] = (),
) -> NDArray[np.float32]:
    """The images of a batch, (n, height, width, 3) float in [0, 1]; all cells have the same settings.

    fillers: the replacements at work, by `surgery.replacement_key`. states: where half-made baselines are kept, from
    which lesions that begin late go on; None: every image is made from its noise. windows: those of the study, for
    which a baseline leaves its state.
    """
    try:
        return _generate(model, cells, fillers, states, windows)
    except OtherCount as error:
        log.warning("late windows are made from noise: %s", error)
        assert states is not None
        states.usable = False
        return _generate(model, cells, fillers, states, windows)


def _generate(
    model: Model,
    cells: Sequence[Cell],
    fillers: Mapping[str, Filler],
    states: States | None,
    windows: Sequence[tuple[float, float]],
) -> NDArray[np.float32]:
    prompts, seeds, settings = [cell.prompt for cell in cells], [cell.seed for cell in cells], cells[0].settings
    lesions = [cell.lesion for cell in cells]
    companions = [_companion(lesion, fillers) for lesion in lesions]
    together = any(companions)
    if together:  # beside every image one of the donor prompt, un-ablated, with the same noise
        prompts += [
            replace(prompt, text=donor or prompt.text) for donor, prompt in zip(companions, prompts, strict=True)
        ]
        seeds, lesions = seeds * 2, lesions + [None] * len(lesions)
    noise = generators(seeds)
    pipe, late = model.pipeline(settings.task), any(start > 0 for start, _ in windows)
    record = Record()
    with torch.inference_mode(), ExitStack() as stack:
        if late and states and states.usable and not together:  # a companion leaves no state
            if not any(lesions):
                record = stack.enter_context(recording(pipe, noise, windows))
            elif all(lesions) and (kept := _states(model, cells, states)):
                stack.enter_context(going_on(pipe, model.denoiser, noise, *kept))
        stack.enter_context(under(model, pipe, lesions, fillers))
        images = call(model, prompts, noise, settings)[: len(cells)]
    if states and record.calls:
        states.note(cells[0], record.calls)
        for step, batch in record.states.items():
            for cell, state in zip(cells, batch, strict=True):
                states.put(cell.key, step, state)
    return images


def _companion(lesion: Lesion | None, fillers: Mapping[str, Filler]) -> str | None:
    """The prompt of the image that this lesion's replacement wants beside its own, if it wants one."""
    if lesion is None or lesion.strength == 0:
        return None
    return getattr(fillers[replacement_key(lesion)], "companion", None)


def _states(model: Model, cells: Sequence[Cell], states: States) -> tuple[list[State], int] | None:
    """The states of the cells' baselines at which the first lesion of the batch begins, and that denoiser call.

    Read, or made by running the baselines that far; None if the first lesion begins at once, or no state can be had.
    """
    window = min(cell.lesion.window for cell in cells if cell.lesion)
    if window[0] == 0:
        return None
    baselines = {cell.baseline.key: cell.baseline for cell in cells}
    calls = states.calls(list(baselines.values()))
    found: dict[str, State | None] = dict.fromkeys(baselines)
    start = 0
    if calls is not None:
        start = first_step(window, calls)
        if start == 0:
            return None
        found = {key: states.get(key, start, calls) for key in baselines}
    missing = [cell for key, cell in baselines.items() if found[key] is None]
    if missing:
        noise = generators([cell.seed for cell in missing])
        settings = missing[0].settings
        pipe = model.pipeline(settings.task)
        untouched = under(model, pipe, [None] * len(missing), {})
        with suppress(Enough), untouched, recording(pipe, noise, [window], stop=True) as record:
            call(model, [cell.prompt for cell in missing], noise, settings)
        if calls is not None and record.calls != calls:
            raise OtherCount(f"the pipeline takes {record.calls} steps, the kept states are of {calls}")
        states.note(missing[0], record.calls)
        start = first_step(window, record.calls)
        if start not in record.states:  # it begins at once, or the scheduler is Unknown
            states.usable = start == 0
            return None
        for cell, new in zip(missing, record.states[start], strict=True):
            states.put(cell.key, start, new)
            found[cell.key] = new
    return [state for cell in cells if (state := found[cell.baseline.key])], start


def to_pixels(image: NDArray[np.float32]) -> tuple[NDArray[np.uint8], str]:
    """uint8 pixels as diffusers makes them, and the reason why the image is invalid ("" if it is fine)."""
    reason = ""
    if not np.isfinite(image).all():
        reason = "image has non-finite values"
        image = np.nan_to_num(image, nan=0.0, posinf=1.0, neginf=0.0)
    pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
    if not reason and pixels.max() <= 1:
        reason = "image is all black"
    return pixels, reason
