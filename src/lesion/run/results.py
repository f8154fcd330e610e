"""The results frame of a study: what is known of each image, and scores for those that have none yet."""

from __future__ import annotations

import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from lesion import scoring
from lesion.analysis.metrics import DISTANCES
from lesion.errors import RequestError
from lesion.scoring import Scorer, ScorerSpec, Shot
from lesion.store.images import Damaged, Store, atomically
from lesion.store.scores import Picture, Scores
from lesion.study import pairs as floor
from lesion.study.columns import GENERATION, row
from lesion.study.grid import Cell, Study

log = logging.getLogger(__name__)
CHUNK, CHUNK_BYTES = 256, 256 << 20  # images scored at once, and their pixels in memory
FLUSH = 2048  # records after which a part file is written
ROWS = 1024  # of a table that wait as Python objects, which take more memory than the table's columns


class Results:
    """Of one study in one store; scores what has no score, and remembers it for every later run.

    device: where metrics compute. While images are made on a GPU, they are scored as they come.
    """

    def __init__(self, study: Study, store: Store, spec: ScorerSpec, device: str):
        self.study, self.store, self.spec, self.device = study, store, spec, device
        try:
            self.identities = scoring.identities(spec)
        except scoring.ScorerError as error:
            raise RequestError("scorer", str(error).removeprefix("scorer ")) from None
        self.scores = Scores(store.scores / study.context[:16], self.identities)
        self.scores.load()
        self._unwritten = 0
        self._queue: defaultdict[frozenset[str], list[Shot]] = defaultdict(list)  # by the columns they lack
        self._scorer: Scorer | None = None
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
        if self.device.startswith("cuda") and not picture.reason:
            baseline = cell.baseline.key
            facts = self.scores.picture(baseline)
            if facts and not facts.reason:
                with suppress(Damaged):
                    self._enqueue(cell, pixels, pixels if baseline == cell.key else self._pixels(baseline))

    def refresh(self) -> None:
        """Read what other processes have scored meanwhile, so that it is not scored again."""
        self.scores.load()

    def complete(self, failures: Mapping[str, str]) -> set[str]:
        """Score every image that lacks one, and write it down.

        Returns the keys of images that turn out not to be there: damaged ones, now removed, or torn ones.
        """
        self._score(self._queue.keys())  # what still waits, or it would be read and queued once more
        damaged: set[str] = set()
        for cell in tqdm(self.study.cells(), total=len(self.study), desc="score", unit="image", disable=None):
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
                self.store.discard(key)
                damaged.add(key)
        self._score(self._queue.keys())
        self.scores.flush()
        self._unwritten = 0
        return damaged

    def frame(self, paths: Sequence[str], failures: Mapping[str, str], folder: Path | None = None) -> pd.DataFrame:
        """One row an image, in the order of `Study.cells`.

        paths: every layer of the model in forward order. failures: reasons for images that could not be made. folder:
        the run folder, in which each image gets a place; without one, `image` is its path in the store.
        """
        columns: defaultdict[str, list[Any]] = defaultdict(list)
        parts: list[pd.DataFrame] = []
        publisher = _Publisher(self.store, folder)
        protocol = self.study.protocol
        scorer = {
            "scorer": self.spec.name,
            "scorer_identity": "; ".join(self.identities.values()),
            "importance_metric": self.spec.importance,
        }
        for cell in self.study.cells():
            status, reason = self._status(cell, failures)
            values = self.scores.values(cell.key, cell.baseline.key) if status == "ok" else {}
            record = row(cell, paths) | {
                "status": status,
                "reason": reason,
                "image": "" if status == "failed" else publisher.publish(cell),
                **{column: values.get(column, float("nan")) for column in self.identities},
                **scorer,
                "protocol": protocol[cell.lesion.replacement.name] if cell.lesion else "",
            }
            for name, value in record.items():
                columns[name].append(value)
            if len(columns["cell"]) == ROWS:
                parts.append(pd.DataFrame(columns))
                columns.clear()
        if columns or not parts:
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]

    def floor(self) -> pd.DataFrame:
        """How similar baselines are to each other: what `lesion.analysis.floor` reads, one row a pair of
        `lesion.floor.pairs`. Scores what has no score yet; a pair with an image that is not valid has no row.
        """
        metric = self.importance
        baselines = takewhile(lambda cell: cell.lesion is None, self.study.cells())  # they come first
        valid = {cell.key for cell in baselines if (facts := self.scores.picture(cell.key)) and not facts.reason}
        pairs = [(a, b) for a, b in floor.pairs(self.study) if a.key != b.key and {a.key, b.key} <= valid]
        lacking = [(a, b) for a, b in pairs if self.scores.pair(metric, a.key, b.key) is None]
        size = max(1, min(CHUNK, CHUNK_BYTES // (6 * self.study.settings.height * self.study.settings.width)))
        for start in range(0, len(lacking), size):
            self._score_pairs(metric, lacking[start : start + size])
        self.scores.flush()
        records = []
        for a, b in pairs:
            value = self.scores.pair(metric, a.key, b.key)
            if value is None or not np.isfinite(value):
                continue
            records.append(
                {
                    "model": self.study.model.name,
                    "prompt_id_a": a.prompt.id,
                    "seed_a": a.seed,
                    "prompt_id_b": b.prompt.id,
                    "seed_b": b.seed,
                    "similarity": 1.0 - value if metric in DISTANCES else value,
                    **{name: value for name, value in row(a, ()).items() if name in GENERATION},
                    "metric": metric,
                    "scorer_identity": self.identities[metric],
                }
            )
        columns = ["model", *floor.COLUMNS, *GENERATION, "metric", "scorer_identity"]
        return pd.DataFrame(records, columns=columns)

    @property
    def importance(self) -> str:
        """The metric that importance is computed from."""
        return self.spec.importance

    def value(self, cell: Cell) -> float:
        """What `importance` says of an image; NaN if it has no score or is not valid."""
        return self.scores.values(cell.key, cell.baseline.key).get(self.importance, float("nan"))

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

    def _status(self, cell: Cell, failures: Mapping[str, str]) -> tuple[str, str]:
        if why := failures.get(cell.key):
            return "failed", why
        facts = self.scores.picture(cell.key)
        if facts is None:
            return "failed", "not made yet"
        if facts.reason:
            return "invalid", facts.reason
        baseline = cell.baseline.key
        against = self.scores.picture(baseline)
        why = failures.get(baseline) or ("not made yet" if against is None else against.reason)
        return ("invalid", f"its baseline cannot be compared with: {why}") if why else ("ok", "")

    def _facts(self, key: str) -> Picture | None:
        """Of a stored image: those remembered, if its file is still the same; None if it is not there."""
        facts = self.scores.picture(key)
        if facts is not None and self.store.matches(key, facts):
            return facts
        if not self.store.has(key):
            return None
        self._read(key)
        return self.scores.picture(key)

    def _read(self, key: str) -> NDArray[np.uint8]:
        """Pixels of a stored image. Raises Damaged with a message and the key."""
        try:
            stored = self.store.get(key)
        except Damaged as error:
            raise Damaged(str(error), key) from None
        if self.scores.picture(key) != stored.picture:
            self.note(key, stored.picture)
        return stored.pixels

    def note(self, key: str, picture: Picture) -> None:
        """Remember the facts of a stored image."""
        self.scores.add_picture(key, picture)
        self._written(1)

    def _written(self, records: int) -> None:
        self._unwritten += records
        if self._unwritten >= FLUSH:
            self.scores.flush()
            self._unwritten = 0

    def _lacking(self, cell: Cell) -> frozenset[str]:
        return self._asked(cell.prompt.text).difference(self.scores.values(cell.key, cell.baseline.key))

    def _enqueue(self, cell: Cell, pixels: NDArray[np.uint8], baseline: NDArray[np.uint8]) -> None:
        lacking = self._lacking(cell)
        queue = self._queue[lacking]
        queue.append(Shot(cell.key, pixels, cell.baseline.key, baseline, cell.prompt.text))
        if len(queue) >= CHUNK or len(queue) * pixels.nbytes >= CHUNK_BYTES:
            self._score([lacking])

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


class _Publisher:
    """Gives every picture a readable place in the run folder, as a link to the store where the disk can."""

    def __init__(self, store: Store, folder: Path | None):
        self.store, self.folder = store, folder
        self._made: set[str] = set()

    def publish(self, cell: Cell) -> str:
        """Its path relative to the run folder."""
        source = self.store.path(cell.key)
        if self.folder is None:
            return source.relative_to(self.store.folder).as_posix()
        parts = (
            [cell.lesion.selection, cell.lesion.replacement.name, cell.lesion.layer] if cell.lesion else ["baseline"]
        )
        name = "-".join([f"seed{cell.seed}", *(part for part in parts if part), cell.key[:8]]) + ".png"
        place = f"images/{cell.prompt.id}/{name}"
        target = self.folder / place
        if cell.prompt.id not in self._made:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._made.add(cell.prompt.id)
        try:
            os.link(source, target)
        except OSError:  # an older picture of the cell is there, or the disk has no links
            with atomically(target) as temporary:
                try:
                    os.link(source, temporary)
                except OSError:
                    shutil.copyfile(source, temporary)
        return place
