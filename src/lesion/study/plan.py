"""What is left to make, grouped in batches. Pure: imports nothing of torch and touches no disk.

`cells` is a study or any cells. A study is planned without remembering its keys, so in memory that does not grow with
the number of its cells; for other cells their keys are remembered (some 100 MB a million).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from lesion.study.components import begins
from lesion.study.grid import Cell, Study, kind_of
from lesion.study.lesions import Lesion


def batches(
    cells: Study | Iterable[Cell], size: int | Callable[[], int], exists: Callable[[str], bool]
) -> Iterator[list[Cell]]:
    """Batches of at most `size` cells that do not exist yet, each cell once; a study's come in its plan order.

    size: at least 1, or what to ask for it at the start of every batch (it can shrink when memory runs out).
    exists: whether the image of a key is made; asked right before the cell is put in a batch.

    A batch mixes prompts, seeds and layers, but neither settings nor kinds of lesion: so a cell is in the same batch
    whether its kind is one of several in a job or a job of its own in a sweep, and comes out bit for bit identical.
    Raises ValueError for a size below 1.
    """
    waiting: list[Cell] = []
    limit = 1
    for cell in cells.in_plan_order() if isinstance(cells, Study) else _once(cells):
        if exists(cell.key):
            continue
        if waiting and not _go_together(cell, waiting[0]):
            yield waiting
            waiting = []
        if not waiting:
            limit = size() if callable(size) else size
            if limit < 1:
                raise ValueError(f"a batch holds at least one cell; got a size of {limit}")
        waiting.append(cell)
        if len(waiting) == limit:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _go_together(one: Cell, other: Cell) -> bool:
    if kind_of(one.lesion) != kind_of(other.lesion) or one.settings != other.settings:
        return False
    # Images that share their denoising with their baseline would be denoised beside one that does not.
    return not one.lesion or not other.lesion or begins(one.lesion) == begins(other.lesion)


def _once(cells: Iterable[Cell]) -> Iterator[Cell]:
    seen: set[int] = set()
    for cell in cells:
        number = int(cell.key, 16)  # half the memory of the key's text
        if number not in seen:
            seen.add(number)
            yield cell


UNSTEERED = "unsteered"  # mode of the images of `Study.unsteered`, which have no rows


@dataclass
class Tally:
    """Counts of a study's images by mode, for `dry_run` and the progress bar.

    missing_by_mode: different images to make; one that two modes share counts for the first.
    """

    rows: int = 0
    by_mode: dict[str, int] = field(default_factory=dict)
    missing_by_mode: dict[str, int] = field(default_factory=dict)
    baselines: int = 0
    unique: int = 0
    stored: int = 0

    @property
    def missing(self) -> int:
        return self.unique - self.stored

    def add(self, lesion: Lesion | None, rows: int = 1) -> None:
        """Count `rows` more rows under this lesion."""
        mode = mode_of(lesion)
        self.rows += rows
        self.by_mode[mode] = self.by_mode.get(mode, 0) + rows
        self.baselines += rows if lesion is None else 0

    def meet(self, mode: str, images: int, stored: int) -> None:
        """Count so many more different images, and how many of them exist."""
        self.unique += images
        self.stored += stored
        if stored < images:
            self.missing_by_mode[mode] = self.missing_by_mode.get(mode, 0) + images - stored


def mode_of(lesion: Lesion | None) -> str:
    """Under what `Tally` counts an image: selection and replacement."""
    return f"{lesion.selection} / {lesion.replacement.name}" if lesion else "baseline"


def tally(cells: Study | Iterable[Cell], exists: Callable[[str], bool], most: float = math.inf) -> Tally:
    """Count a study's rows, its distinct images and those that exist already. A study is counted fastest.

    most: how many images `exists` can know; once as many are found, no more keys of a study are worked out.
    """
    counts = Tally()
    if not isinstance(cells, Study):
        for cell in _once(_counted(cells, counts)):
            counts.meet(mode_of(cell.lesion), 1, exists(cell.key))
        return counts
    for lesion, rows in cells.rows():
        counts.add(lesion, rows)
    modes = [(mode_of(lesion), images, keys) for lesion, images, keys in cells.counted()]
    if cells.unsteered:
        _, images, keys = next(cells.unsteered.counted())
        counts.by_mode[UNSTEERED] = images
        modes.insert(0, (UNSTEERED, images, keys))
    for mode, images, keys in modes:
        counts.meet(mode, images, sum(map(exists, keys)) if counts.stored < most else 0)
    return counts


def _counted(cells: Iterable[Cell], counts: Tally) -> Iterator[Cell]:
    for cell in cells:
        counts.add(cell.lesion)
        yield cell
