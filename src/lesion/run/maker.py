"""Make the images that a study lacks: claim, generate and store each batch; an error fails only its own cells."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import filterfalse
from typing import Any, Self

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from lesion import models, replacements, tasks
from lesion.config.parsing import Request
from lesion.generation.capture import Capturing
from lesion.generation.generate import generate, say_unseen, to_pixels
from lesion.generation.snapshots import States
from lesion.models import memory
from lesion.run.environment import code
from lesion.store.claims import Claims
from lesion.store.images import Picture, Store
from lesion.store.maps import ImageMaps, Maps
from lesion.study.capture import Capture
from lesion.study.columns import MADE_WITH, TRUNCATED
from lesion.study.grid import Cell, Study
from lesion.study.plan import batches
from lesion.study.settings import Settings
from lesion.surgery.intervention import Intervention
from lesion.surgery.operation import replacement_key

log = logging.getLogger(__name__)
WAITING = (1.0, 15.0)  # seconds between looks at what other processes are making: from, up to
WRITERS = 4  # threads that encode the images of a batch; the encoder lets go of the interpreter
IN_FLIGHT = 2  # batches that may wait to be stored while the next is generated

Made = Callable[[Cell, NDArray[np.uint8], Picture], None]
_Kind = tuple[models.ModelSpec, str, str, Settings]
# Batch sizes of this process: those found for `auto`, and those reduced after running out of memory. Holds no model.
_sizes: dict[tuple[_Kind, int, Capture | None], int] = {}
_cut: dict[_Kind, int] = {}


def brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _made_with(device: str) -> dict[str, str]:
    """The columns `MADE_WITH` of an image that is made now."""
    card = torch.cuda.get_device_name(device) if device.startswith("cuda") and torch.cuda.is_available() else device
    return dict(zip(MADE_WITH, (card, torch.__version__, diffusers.__version__, code()), strict=True))


def label(cell: Cell) -> str:
    lesion = f"{cell.lesion.selection} {cell.lesion.layer}".strip() if cell.lesion else "baseline"
    return f"{cell.prompt.id} seed {cell.seed} {lesion}"


class Maker:
    """Make what is missing of one study.

    made: called for every image after it is stored, one at a time, in a separate thread; may score it.
    maps: where the attention maps of every image are kept beside it; None for no maps.
    failures: why each failed cell could not be made, by key.
    """

    def __init__(
        self,
        request: Request,
        model: models.Model,
        study: Study,
        store: Store,
        made: Made,
        maps: Maps | None = None,
    ):
        self.request, self.model, self.study, self.store, self.made = request, model, study, store, made
        self.maps = maps
        self.states = States(store.states)
        self.failures: dict[str, str] = {}
        self.masses: dict[str, float] = {}  # of steered images that wait to be stored, `Picture.box_mass`
        self.size = study.settings.batch_size or 0
        self.sizes: list[int] = []  # of batches, in the order of their use
        self.interventions: dict[str, Intervention] = {}
        self.broken: dict[str, str] = {}
        self.alone: dict[str, str] = {}  # why each image failed that was made by itself, until the first is made
        self.made_with = _made_with(request.device)
        self.unstored: set[str] = set()  # why images could not be stored, each told once
        self.sound = False  # whether an image was made, or some fail for reasons of their own
        self.stopped = ""  # why none can be made

    def run(self, progress: Callable[[int], None]) -> None:
        """Make everything that is missing, and wait for what other processes are making.

        progress: called with the number of further images that are settled: made here, made by others, or failed.
        """
        self.size = _size(self.request, self.model, self.study, self.maps.capture if self.maps else None)
        self.sizes.append(self.size)
        say_unseen(self.model, self.study.prompts)
        self._prepare()
        wait, left_before = WAITING[0], 0
        with (
            Claims(self.store.claims, required=False) as claims,
            _Shelf(lambda batch, images, maps: self._put(batch, images, maps, claims)) as shelf,
        ):
            while True:
                done, left = 0, 0
                for batch in batches(self.study, lambda: self.size, self._settled()):
                    mine = claims.take(cell.key for cell in batch)
                    here = [cell for cell in batch if cell.key in mine]
                    ours = [cell for cell in here if not self._there(cell.key)]  # made by others since planning
                    claims.release({cell.key for cell in here} - {cell.key for cell in ours})
                    self._make(ours, shelf, claims)
                    if self.stopped:
                        self._stop()
                        return
                    done, left = done + len(here), left + len(batch) - len(here)
                    progress(len(here))
                shelf.drain()
                progress(max(0, left_before - left - done))  # what others have made meanwhile
                if not left:
                    return
                wait = WAITING[0] if done else min(2 * wait, WAITING[1])
                log.info("waiting for %d images that other processes are making", left)
                time.sleep(wait)
                left_before = left

    def _settled(self) -> Callable[[str], bool]:
        known, maps = self.store.known(), self.maps
        if maps is None:
            return lambda key: key in known or key in self.failures
        return lambda key: (key in known and maps.has(key)) or key in self.failures

    def _there(self, key: str) -> bool:
        return self.store.has(key) and (self.maps is None or self.maps.has(key))

    def _prepare(self) -> None:
        """Build every replacement of the study; one that cannot be built fails only its own cells."""
        for lesion in self.study.lesions():
            key, name = replacement_key(lesion), lesion.replacement.name
            if key in self.interventions or key in self.broken:
                continue
            intervention, why = self._built(name)
            if intervention is not None:
                self.interventions[key] = intervention
            else:
                self.broken[key] = f"replacement {name} could not be made ready: {why}"
                log.error(self.broken[key])

    def _built(self, name: str) -> tuple[Intervention | None, str]:
        """Build a replacement; return None and why if that fails. Retry with half the batch if memory runs out."""
        while True:
            size = min(self.size, 32)
            studied = self.request.layers.components
            bench = replacements.Bench(self.model, self.study.settings, self.store.means, size, studied)
            try:
                return replacements.build(name, self.request.replacements[name], bench), ""
            except Exception as error:  # a model can raise anything; the other replacements continue
                memory.raise_if_lost(error)
                why, crowded = brief(error), memory.ran_out(error)  # see `_make`
            if crowded:
                memory.release(self.request.device)
            if not crowded or size == 1:
                return None, why
            self._shrink(size)

    def _shrink(self, tried: int) -> None:
        """Continue with half the size that did not fit, also in later rounds and jobs of the same kind."""
        self.size = min(self.size, tried // 2)
        self.sizes.append(self.size)
        log.warning("out of memory with a batch of %d; continuing with %d", tried, self.size)
        _cut[_kind(self.request, self.model, self.study)] = self.size

    def _make(self, batch: Sequence[Cell], shelf: _Shelf, claims: Claims) -> None:
        """Generate and store a batch. Halve it if memory runs out; after any other error make each cell alone."""
        if not batch:
            return
        lesion = batch[0].lesion  # a batch has one kind of lesion
        if lesion and (broken := self.broken.get(replacement_key(lesion))):
            self._give_up(batch, broken, claims)
            return
        try:
            capturing = Capturing(self.model, batch, self.maps.capture, self.maps.folder) if self.maps else None
            images = generate(
                self.model, batch, self.interventions, self.states, self.study.begins, capturing, self.masses, True
            )
            maps = capturing.maps if capturing else None
        except Exception as error:  # a model can raise anything; the other cells continue
            memory.raise_if_lost(error)
            # The error is not kept: its traceback holds every tensor of the failed call; the retry needs the memory.
            why, crowded = brief(error), memory.ran_out(error)
        else:
            self.sound = True
            shelf.put(batch, images, maps)
            return
        if crowded and shelf.drain():  # scores of earlier batches may have taken the memory
            memory.release(self.request.device)
            self._make(batch, shelf, claims)
            return
        if crowded:
            memory.release(self.request.device)
            if len(batch) == 1:
                log.error("%s: a single image does not fit in memory", label(batch[0]))
                self._give_up(batch, f"a single image does not fit in memory: {why}", claims)
                self._stop_if_none_can_be_made(batch[0], why)
                return
            self._shrink(len(batch))
        elif len(batch) > 1:
            log.warning("a batch of %d failed (%s); its images are made one at a time", len(batch), why)
        else:
            log.error("%s failed: %s", label(batch[0]), why)
            self._give_up(batch, why, claims)
            self._stop_if_none_can_be_made(batch[0], why)
            return
        rest = list(batch)
        while rest:  # split step by step, since the size may shrink further
            number = self.size if crowded else 1
            self._make(rest[:number], shelf, claims)
            rest = rest[number:]
            if self.stopped:
                claims.release(cell.key for cell in rest)
                return

    def _stop_if_none_can_be_made(self, cell: Cell, why: str) -> None:
        """Find out whether every image will fail, as soon as a second one fails by itself before any was made.

        So it is if all failed for one reason that another prompt and seed without a lesion does not change.
        """
        self.alone[cell.key] = why
        if self.sound or len(self.alone) < 2:
            return
        last = self.study.cell(self.study.prompts[-1], self.study.seeds[-1], None)
        if len(set(self.alone.values())) == 1 and last.key not in self.alone:
            try:
                generate(self.model, [last], {})
            except Exception as error:  # whatever a model can raise
                memory.raise_if_lost(error)
                self.alone[last.key] = brief(error)
            else:
                self.sound = True
        if not self.sound and set(self.alone.values()) == {why}:
            self.stopped = why
        else:
            self.sound = True

    def _stop(self) -> None:
        """Give up all that is missing."""
        log.error("no image of this study can be made, so no more are tried: %s", self.stopped)
        self.failures |= dict.fromkeys(filterfalse(self._settled(), self.study.keys()), self.stopped)

    def _give_up(self, batch: Sequence[Cell], why: str, claims: Claims) -> None:
        self.failures |= {cell.key: why for cell in batch}
        claims.release(cell.key for cell in batch)

    def _put(
        self, batch: Sequence[Cell], images: NDArray[Any], maps: Sequence[ImageMaps] | None, claims: Claims
    ) -> None:
        with ThreadPoolExecutor(WRITERS, "lesion-write") as pool:
            kept: Sequence[ImageMaps | None] = maps or [None] * len(batch)
            written = [pool.submit(self._write, *one) for one in zip(batch, images, kept, strict=True)]
            for cell, waiting in zip(batch, written, strict=True):
                try:
                    pixels, picture = waiting.result()
                    if picture:
                        self.made(cell, pixels, picture)
                except OSError as error:
                    self.failures[cell.key] = brief(error)
                    if (why := error.strerror or brief(error)) not in self.unstored:
                        log.error("%s could not be stored: %s; more like it are not named here", label(cell), why)
                    self.unstored.add(why)
                claims.release([cell.key])

    def _write(
        self, cell: Cell, image: NDArray[Any], maps: ImageMaps | None
    ) -> tuple[NDArray[np.uint8], Picture | None]:
        """Encode and write one image and its maps; its pixels, and no picture if it was there. Raises OSError."""
        pixels, reason = to_pixels(image)
        if reason:
            log.warning("%s is invalid: %s", label(cell), reason)
        if self.maps and maps:
            self.maps.put(cell, maps)
        if self.maps and self.store.has(cell.key):  # made earlier, without maps: it is the same image
            return pixels, None
        made: dict[str, Any] = {**self.made_with}
        if (cut := self.model.unseen.get(cell.prompt.text, (None, ()))[0]) is not None:
            made[TRUNCATED] = cut
        return pixels, self.store.put(cell, pixels, reason, self.masses.pop(cell.key, math.nan), made)


class _Shelf:
    """Store finished batches in a separate thread while generation continues."""

    def __init__(self, put: Callable[[Sequence[Cell], NDArray[Any], Sequence[ImageMaps] | None], None]):
        self._put = put
        self._pool = ThreadPoolExecutor(1, "lesion-store")
        self._waiting: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True)  # batches already handed over are stored, also after an interrupt

    def put(self, batch: Sequence[Cell], images: NDArray[Any], maps: Sequence[ImageMaps] | None = None) -> None:
        """Queue a batch for storing; wait while IN_FLIGHT are unwritten. Raises what storing an earlier one raised."""
        while len(self._waiting) >= IN_FLIGHT:
            self._waiting.pop(0).result()
        self._waiting.append(self._pool.submit(self._put, batch, images, maps))

    def drain(self) -> bool:
        """Wait until every queued batch is on disk; whether any was not."""
        waited = False
        while self._waiting:
            waiting = self._waiting.pop(0)
            waited |= not waiting.done()
            waiting.result()
        return waited


def _probed(settings: Settings) -> Settings:
    """Return settings for images that measure memory: the fewest steps, since more steps need no more memory."""
    return tasks.of(settings.task).shortest(settings)


def _kind(request: Request, model: models.Model, study: Study) -> _Kind:
    """Return what decides how many images fit in memory: model and its options, device, and settings of the images."""
    return request.model, model.identity.fingerprint, request.device, _probed(study.settings)


def _size(request: Request, model: models.Model, study: Study, capture: Capture | None = None) -> int:
    """Return the batch size: as requested or as memory allows, but no larger than an earlier reduction."""
    size = study.settings.batch_size or _fitting(request, model, study, capture)
    most = _cut.get(_kind(request, model, study), size)
    if most < size:
        log.info("batches of %d instead of %d: memory ran out earlier in this process", most, size)
    return min(size, most)


def _fitting(request: Request, model: models.Model, study: Study, capture: Capture | None = None) -> int:
    """Return the batch size that memory allows, measured once per process for each model and kind of image.

    capture: the attention maps that are kept of each image. They, and donors' images, are made in the probe, too.

    Return 1 if not even one image can be made to measure it: each cell then succeeds or fails by itself.
    """
    rows = 1 + any(replacements.find(lesion.replacement.name).donor_images for lesion in study.lesions())
    kind = _kind(request, model, study), rows, capture
    if kind not in _sizes:
        cell = Cell(model.identity, study.prompts[0], 0, _probed(study.settings), None)

        def make(number: int) -> object:
            cells = [cell] * (rows * number)
            return generate(model, cells, {}, None, (), Capturing(model, cells, capture) if capture else None)

        try:
            _sizes[kind] = memory.fitting(make, request.device)
        except Exception as error:  # a model can raise anything; not kept, as this prompt may be the cause
            memory.raise_if_lost(error)
            log.warning("batch_size=auto: 1, since the first image failed (%s)", brief(error))
            return 1
    return _sizes[kind]
