"""Scores for the images of a study that have none yet, computed once and remembered in the store."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from lesion import scoring
from lesion.errors import RequestError
from lesion.scoring import Scorer, ScorerSpec, Shot
from lesion.store.images import Damaged, Store
from lesion.store.scores import Picture, Scores
from lesion.study.grid import Cell, Study

log = logging.getLogger(__name__)
CHUNK, CHUNK_BYTES = 256, 256 << 20  # images scored at once, and their pixels in memory
FLUSH = 2048  # records after which a part file is written


class ScoreQueue:
    """Of the images of one model and settings in one store; what it scores is remembered for every later run.

    context: `Study.context` of the studies it is for. device: where metrics compute. While images are made on a GPU,
    they are scored as they come. check: read and compare every image once, not only those to score.
    """

    def __init__(self, context: str, store: Store, spec: ScorerSpec, device: str, check: bool = False):
        self.store, self.spec, self.device, self.check = store, spec, device, check
        self._checked: set[bytes] = set()
        self._masses: dict[str, float] = {}  # of steered images, by key
        try:
            self.identities = scoring.identities(spec)
        except scoring.ScorerError as error:
            raise RequestError("scorer", str(error).removeprefix("scorer ")) from None
        self.scores = Scores(store.scores / context[:16], self.identities)
        self.scores.load()
        self._unwritten = 0
        self._warned = False
        self._size: tuple[int, int] | None = None  # height and width of the images
        self._queue: defaultdict[frozenset[str], list[Shot]] = defaultdict(list)  # by the columns they lack
        self._scorer: Scorer | None = None
        self._beside = frozenset(one.name for one in spec.described if one.beside_unsteered)
        self._asked = lru_cache(maxsize=4096)(partial(scoring.columns_for, spec))
        self._pixels = lru_cache(maxsize=64)(self._read)  # of baselines: a lesion follows its neighbours

    @property
    def scorer(self) -> Scorer:
        """Loaded when first asked for. Raises RequestError if it cannot be."""
        if self._scorer is None:
            try:
                self._scorer = scoring.make_scorer(self.spec, self.device)
            except scoring.ScorerError as error:
                raise RequestError("scorer", str(error).removeprefix("scorer ")) from None
        return self._scorer

    def made(self, cell: Cell, pixels: NDArray[np.uint8], picture: Picture) -> None:
        """Note an image that has just been stored; score it at once if that costs the generating side nothing."""
        self.note(cell.key, picture)
        self._size = pixels.shape[:2]
        if self.device.startswith("cuda") and not picture.reason:
            baseline = cell.baseline.key
            facts = self.scores.picture(baseline)
            if facts and not facts.reason:
                with suppress(Damaged):
                    self._enqueue(cell, pixels, pixels if baseline == cell.key else self._pixels(baseline))

    def refresh(self) -> None:
        """Read what other processes have scored meanwhile, so that it is not scored again."""
        self.scores.load()

    def flush(self) -> None:
        """Score what waits, and write all down for other processes."""
        self._score(self._queue.keys())
        self._write()

    def complete(self, study: Study, failures: Mapping[str, str]) -> set[str]:
        """Score every image of the study that lacks one, and write it down.

        Returns the keys of images that turn out not to be there: damaged ones, now removed, or torn ones.
        """
        self._size = study.settings.height, study.settings.width
        self._score(self._queue.keys())  # what still waits, or it would be read and queued once more
        damaged: set[str] = set()
        for cell in tqdm(study.cells(), total=len(study), desc="score", unit="image", disable=None):
            baseline = cell.baseline.key
            if cell.key in failures or cell.key in damaged:
                continue
            try:
                facts = self._facts(cell.key)
                if facts is None:
                    damaged.add(cell.key)
                    continue
                if baseline in damaged:  # it is scored once its baseline is made again
                    continue
                against = facts if baseline == cell.key else self.scores.picture(baseline)
                if facts.reason or against is None or against.reason or baseline in failures:
                    continue
                if not self._lacking(cell):
                    continue
                pixels = self._pixels(cell.key) if cell.key == baseline else self._read(cell.key)
                self._enqueue(cell, pixels, self._pixels(baseline))
            except Damaged as error:
                key = str(error.args[1]) if len(error.args) > 1 else cell.key
                log.warning("a stored image is damaged and removed; it is made again (%s)", error.args[0])
                with suppress(OSError):  # where it cannot be removed it is written over, or fails
                    self.store.discard(key)
                damaged.add(key)
        self.flush()
        return damaged

    def picture(self, key: str) -> Picture | None:
        """What is known of a stored image; None of one that is not there."""
        return self.scores.picture(key)

    def facts(self, key: str) -> Picture | None:
        """Those of a stored image, read if they are not known; None of one that is not there, or damaged."""
        try:
            return self.scores.picture(key) or self._facts(key)
        except Damaged as error:
            log.warning("a pair for the noise floor is left out: %s", error.args[0])
            return None

    def values(self, cell: Cell) -> dict[str, float]:
        """The columns known for an image; none if it has no score or is not valid."""
        found = self.scores.values(cell.key, cell.baseline.key)
        if self._beside and cell.unsteered:
            found |= self.scores.values(cell.key, cell.unsteered.key)
        return found

    def value(self, cell: Cell) -> float:
        """What the metric of importance says of an image; NaN if it has no score or is not valid."""
        return self.values(cell).get(self.spec.importance, float("nan"))

    def pairs(self, metric: str, pairs: Sequence[tuple[Cell, Cell]]) -> list[float]:
        """What a metric says of pairs of valid images of one size, NaN for a damaged one; scores what has no score."""
        lacking = [(a, b) for a, b in pairs if self.scores.pair(metric, a.key, b.key) is None]
        if lacking:
            settings = lacking[0][0].settings
            size = max(1, min(CHUNK, CHUNK_BYTES // (6 * settings.height * settings.width)))
            for start in range(0, len(lacking), size):
                self._score_pairs(metric, lacking[start : start + size])
            self._write()
        found = (self.scores.pair(metric, a.key, b.key) for a, b in pairs)
        return [float("nan") if value is None else value for value in found]

    def _score_pairs(self, metric: str, pairs: Sequence[tuple[Cell, Cell]]) -> None:
        shots = []
        for a, b in pairs:
            first, second = sorted((a.key, b.key))  # whichever way round they are asked for
            try:
                shots.append(Shot(first, self._pixels(first), second, self._pixels(second), a.prompt.text))
            except Damaged as error:
                log.warning("a pair for the noise floor is left out: %s", error.args[0])
        values = self.scorer.score(shots, only={metric})[metric] if shots else ()
        for shot, value in zip(shots, values, strict=True):
            self.scores.add_pair(metric, shot.key, shot.baseline_key, float(value))

    def _facts(self, key: str) -> Picture | None:
        """Of a stored image: those remembered, if its file is still the same; None if it is not there."""
        facts = self.scores.picture(key)
        if facts is not None and self.store.matches(key, facts) and not self._unchecked(key):
            return facts
        if not self.store.has(key):
            return None
        self._read(key)
        return self.scores.picture(key)

    def _unchecked(self, key: str) -> bool:
        return self.check and bytes.fromhex(key) not in self._checked

    def _read(self, key: str) -> NDArray[np.uint8]:
        """Pixels of a stored image. Raises Damaged with a message and the key.

        Pixels that are not those noted when the image was made count as damage: scores of them would be of an image
        that the cell does not describe.
        """
        noted = self.scores.picture(key)
        try:
            stored = self.store.get(key, self._size, noted.digest if noted else None)
        except Damaged as error:
            raise Damaged(str(error), key) from None
        if self.check:
            self._checked.add(bytes.fromhex(key))
        self._mass(key, stored.picture)
        if noted != stored.picture:
            self.note(key, stored.picture)
        return stored.pixels

    def note(self, key: str, picture: Picture) -> None:
        """Remember the facts of a stored image."""
        self._mass(key, picture)
        self.scores.add_picture(key, picture)
        self._written(1)

    def _mass(self, key: str, picture: Picture) -> None:
        if math.isfinite(picture.box_mass):
            self._masses[key] = picture.box_mass

    def _write(self) -> None:
        """Write what is known to the store; where that cannot be, one warning: it serves this run all the same."""
        self._unwritten = 0
        try:
            self.scores.flush()
        except OSError as error:
            if not self._warned:
                log.warning("scores cannot be kept, so the next run computes them again (%s)", error)
            self._warned = True

    def _written(self, records: int) -> None:
        self._unwritten += records
        if self._unwritten >= FLUSH:
            self._write()

    def _lacking(self, cell: Cell) -> frozenset[str]:
        """The columns without a value. Raises Damaged, as `_read` does, of an unsteered image."""
        asked = self._asked(cell.prompt.text, bool(cell.prompt.boxes), cell.settings.steering is not None)
        lacking = asked.difference(self.values(cell))
        if lacking & self._beside and cell.unsteered:
            facts = self._facts(cell.unsteered.key)
            if facts is None or facts.reason:  # nothing to compare with: failed, or not made by an earlier version
                return lacking - self._beside
        return lacking

    def _enqueue(self, cell: Cell, pixels: NDArray[np.uint8], baseline: NDArray[np.uint8]) -> None:
        lacking = self._lacking(cell)
        self._wait(lacking - self._beside, cell, pixels, cell.baseline.key, baseline)
        if lacking & self._beside and cell.unsteered:
            self._wait(lacking & self._beside, cell, pixels, cell.unsteered.key, self._pixels(cell.unsteered.key))

    def _wait(
        self,
        columns: frozenset[str],
        cell: Cell,
        pixels: NDArray[np.uint8],
        other: str,
        compared: NDArray[np.uint8],
    ) -> None:
        """Queue an image beside another, by its key and pixels, for these columns."""
        if not columns:
            return
        prompt, mass = cell.prompt, self._masses.get(cell.key, math.nan)
        queue = self._queue[columns]
        queue.append(Shot(cell.key, pixels, other, compared, prompt.text, prompt.boxes, mass))
        if len(queue) >= CHUNK or len(queue) * pixels.nbytes >= CHUNK_BYTES:
            self._score([columns])

    def _score(self, groups: Collection[frozenset[str]]) -> None:
        for lacking in list(groups):
            shots = self._queue.pop(lacking, [])
            if not shots:
                continue
            found = self.scorer.score(shots, only=lacking)
            for number, shot in enumerate(shots):
                values = {column: float(values[number]) for column, values in found.items()}
                self.scores.add_values(shot.key, shot.baseline_key, values)
            self._written(len(shots))
