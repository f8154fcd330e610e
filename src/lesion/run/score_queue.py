"""Scores for the images of a study that have none yet, computed once and remembered in the store."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from lesion import scoring
from lesion.errors import RequestError
from lesion.scoring import Scorer, ScorerSpec, Shot
from lesion.store.claims import Claims
from lesion.store.images import Damaged, Store
from lesion.store.scores import Picture, Scores
from lesion.study.grid import Cell, Study
from lesion.study.prompts import Prompt

log = logging.getLogger(__name__)
CHUNK, CHUNK_BYTES = 256, 256 << 20  # images scored at once, and their pixels in memory
FLUSH = 2048  # records after which a part file is written
BLOCK = 64  # images whose scores are claimed at once
OFTEN = 30.0  # seconds after which a part file is written while other processes may wait for it
WAITING = (0.2, 5.0)  # seconds between looks at what other processes score: from, up to
PATIENCE = 300.0  # seconds without a new score after which what others have claimed is scored here too
T = TypeVar("T")


class ScoreQueue:
    """Of the images of one model and settings in one store; what it scores is remembered for every later run.

    context: `Study.context` of the studies it is for. device: where metrics compute. While images are made on a GPU,
    they are scored as they come. check: read and compare every image once, not only those to score. prompts: of the
    study, among which are those whose images others are compared with.

    Several processes on one store score each image once: an image to score is claimed until its scores are written.
    """

    def __init__(
        self,
        context: str,
        store: Store,
        spec: ScorerSpec,
        device: str,
        check: bool = False,
        prompts: Iterable[Prompt] = (),
    ):
        self.store, self.spec, self.device, self.check = store, spec, device, check
        self._checked: set[bytes] = set()
        self._masses: dict[str, float] = {}  # of steered images, by key
        try:
            self.identities = scoring.identities(spec)
        except scoring.ScorerError as error:
            raise RequestError("scorer", str(error).removeprefix("scorer ")) from None
        self.scores = Scores(store.scores / context[:16], self.identities)
        self.scores.load()
        self._unwritten, self._written_at = 0, time.monotonic()
        self._warned = False
        self._claims = Claims(store.claims, required=False, what="scores")
        self._claimed_as = json.dumps(self.identities, sort_keys=True)
        self._scored: set[str] = set()  # claims of what is scored and not written yet
        self._size: tuple[int, int] | None = None  # height and width of the images
        self._queue: defaultdict[frozenset[str], list[Shot]] = defaultdict(list)  # by the columns they lack
        self._scorer: Scorer | None = None
        self._beside = {one.name: one for one in spec.described if one.beside != "baseline"}
        self._prompts = {prompt.text: prompt for prompt in prompts}
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
                    against = pixels if baseline == cell.key else self._pixels(baseline)
                    if self._claims.take([self._claim(cell.key)]):
                        self._enqueue(cell, pixels, against)

    def refresh(self) -> None:
        """Read what other processes have scored meanwhile, so that it is not scored again."""
        self.scores.load()

    def flush(self) -> None:
        """Score what waits, and write all down for other processes."""
        self._score(self._queue.keys())
        self._write()

    def close(self) -> None:
        """Write down what is scored, and give claims back; what waits is left to whoever comes next."""
        self._queue.clear()
        self._write()
        self._claims.close()

    def complete(self, study: Study, failures: Mapping[str, str]) -> set[str]:
        """Score every image of the study that lacks one, and write it down; wait for what other processes score.

        Returns the keys of images that turn out not to be there: damaged ones, now removed, or torn ones.
        """
        self._size = study.settings.height, study.settings.width
        self._score(self._queue.keys())  # what still waits, or it would be read and queued once more
        damaged: set[str] = set()

        def guarded(cell: Cell, work: Callable[[Cell], bool]) -> bool:
            """What the work says; False where an image that it reads is damaged."""
            try:
                return cell.baseline.key not in damaged and work(cell)
            except Damaged as error:
                key = str(error.args[1]) if len(error.args) > 1 else cell.key
                log.warning("a stored image is damaged and removed; it is made again (%s)", error.args[0])
                with suppress(OSError):  # where it cannot be removed it is written over, or fails
                    self.store.discard(key)
                damaged.add(key)
                return False

        def lacks(cell: Cell) -> bool:
            if cell.key in failures or cell.key in damaged:
                return False
            facts = self._facts(cell.key)
            if facts is None:
                damaged.add(cell.key)
                return False
            baseline = cell.baseline.key
            against = facts if baseline == cell.key else self.scores.picture(baseline)
            if facts.reason or against is None or against.reason or baseline in failures:
                return False
            return bool(self._lacking(cell))

        def queue(cell: Cell) -> bool:
            pixels = self._pixels(cell.key) if cell.key == cell.baseline.key else self._read(cell.key)
            self._enqueue(cell, pixels, self._pixels(cell.baseline.key))
            return True

        def score(cells: Sequence[Cell]) -> None:
            for cell in cells:
                guarded(cell, queue)

        cells = tqdm(study.cells(), total=len(study), desc="score", unit="image", disable=None)
        self._in_turn(cells, lambda cell: guarded(cell, lacks), lambda cell: cell.key, score)
        return damaged

    def _in_turn(
        self, items: Iterable[T], lacks: Callable[[T], bool], key: Callable[[T], str], score: Callable[[list[T]], None]
    ) -> None:
        """Score what lacks a score and no other process scores; then wait for the others, and score what they leave.

        lacks: whether one has no score yet. key: by which it is claimed. score: scores them, or queues them.
        """
        try:
            left = self._turn(items, lacks, key, score)
            pause, changed = WAITING[0], time.monotonic()
            if left:
                log.info("waiting for the scores of %d images that other processes work out", len(left))
            while left:
                time.sleep(pause)
                with suppress(OSError):
                    self.refresh()
                before, late = len(left), time.monotonic() > changed + PATIENCE
                left = self._turn(left, lacks, key, score, late)
                pause = min(2 * pause, WAITING[1])
                if len(left) < before:
                    changed = time.monotonic()
        finally:
            self.close()

    def _turn(
        self,
        items: Iterable[T],
        lacks: Callable[[T], bool],
        key: Callable[[T], str],
        score: Callable[[list[T]], None],
        late: bool = False,
    ) -> list[T]:
        """One round of `_in_turn`: what other processes score at the moment. late: score that too."""
        left: list[T] = []
        items = iter(items)
        while block := list(islice(items, BLOCK)):
            lacking = [one for one in block if lacks(one)]
            names = [self._claim(key(one)) for one in lacking]
            mine = self._claims.take(names) if names else set()
            if mine:
                with suppress(OSError):
                    self.refresh()  # what was scored before these claims
            ours = [one for one, name in zip(lacking, names, strict=True) if late or name in mine]
            left += [one for one, name in zip(lacking, names, strict=True) if not late and name not in mine]
            still = [one for one in ours if lacks(one)]
            self._claims.release(mine - {self._claim(key(one)) for one in still})
            score(still)
            if time.monotonic() > self._written_at + OFTEN:
                self._write()
        self.flush()
        return left

    def _claim(self, key: str) -> str:
        """Under which scores by these metrics are claimed."""
        return hashlib.blake2b(f"{self._claimed_as} {key}".encode(), digest_size=16).hexdigest()

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
        for name in self._beside:
            if (other := self._other(cell, name)) and name in (values := self.scores.values(cell.key, other.key)):
                found[name] = values[name]
        return found

    def _other(self, cell: Cell, name: str) -> Cell | None:
        """What a metric compares an image with that is not its baseline; None where there is nothing."""
        metric = self._beside[name]
        if metric.beside == "unsteered":
            return cell.unsteered
        donor = self._prompts.get(metric.donor or "")
        return replace(cell, prompt=donor, lesion=None) if donor and metric.asks(cell.prompt.text) else None

    def value(self, cell: Cell) -> float:
        """What the metric of importance says of an image; NaN if it has no score or is not valid."""
        return self.values(cell).get(self.spec.importance, float("nan"))

    def pairs(self, metric: str, pairs: Sequence[tuple[Cell, Cell]]) -> list[float]:
        """What a metric says of pairs of valid images of one size, NaN for a damaged one; scores what has no score."""
        self._in_turn(
            pairs,
            lambda pair: self.scores.pair(metric, pair[0].key, pair[1].key) is None,
            lambda pair: " ".join([metric, *sorted(cell.key for cell in pair)]),
            partial(self._score_pairs, metric),
        )
        found = (self.scores.pair(metric, a.key, b.key) for a, b in pairs)
        return [float("nan") if value is None else value for value in found]

    def _score_pairs(self, metric: str, pairs: Sequence[tuple[Cell, Cell]]) -> None:
        if not pairs:
            return
        settings = pairs[0][0].settings
        size = max(1, min(CHUNK, CHUNK_BYTES // (6 * settings.height * settings.width)))
        for start in range(0, len(pairs), size):
            shots = []
            for a, b in pairs[start : start + size]:
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
        self._unwritten, self._written_at = 0, time.monotonic()
        try:
            self.scores.flush()
        except OSError as error:
            if not self._warned:
                log.warning("scores cannot be kept, so the next run computes them again (%s)", error)
            self._warned = True
        self._claims.release(self._scored)
        self._scored.clear()

    def _written(self, records: int) -> None:
        self._unwritten += records
        if self._unwritten >= FLUSH:
            self._write()

    def _lacking(self, cell: Cell) -> frozenset[str]:
        """The columns without a value. Raises Damaged, as `_read` does, of an image beside which it is."""
        asked = self._asked(cell.prompt.text, bool(cell.prompt.boxes), cell.settings.steering is not None)
        lacking = asked.difference(self.values(cell))
        for name in lacking & self._beside.keys():
            other = self._other(cell, name)
            facts = self._facts(other.key) if other else None
            if facts is None or facts.reason:  # nothing to compare with: failed, or not made yet
                lacking -= {name}
        return lacking

    def _enqueue(self, cell: Cell, pixels: NDArray[np.uint8], baseline: NDArray[np.uint8]) -> None:
        lacking = self._lacking(cell)
        self._wait(lacking.difference(self._beside), cell, pixels, cell.baseline.key, baseline)
        for name in sorted(lacking & self._beside.keys()):
            if other := self._other(cell, name):
                self._wait(frozenset({name}), cell, pixels, other.key, self._pixels(other.key))

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
                self._scored.add(self._claim(shot.key))
            self._written(len(shots))
