"""What is left to make, grouped in batches. Pure: imports nothing of torch and touches no disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from lesion.study import Cell, kind_of


def batches(cells: Iterable[Cell], size: int, exists: Callable[[str], bool]) -> Iterator[list[Cell]]:
    """Batches of at most `size` cells that do not exist yet, each cell once.

    A batch mixes prompts, seeds and layers, but not kinds of lesion: so a cell meets the same company whether its kind
    is one of several in a job or a job of its own in a sweep, and comes out the same to the bit.
    """
    seen: set[str] = set()
    waiting: list[Cell] = []
    kind = None
    for cell in cells:
        if waiting and (len(waiting) == size or kind_of(cell.lesion) != kind):
            yield waiting
            waiting = []
        if cell.key not in seen and not exists(cell.key):
            kind = kind_of(cell.lesion)
            waiting.append(cell)
        seen.add(cell.key)
    if waiting:
        yield waiting


@dataclass
class Tally:
    """Counts of a study's images by mode, for `dry_run` and the progress bar."""

    rows: int = 0
    by_mode: dict[str, int] = field(default_factory=dict)
    baselines: int = 0
    unique: int = 0
    stored: int = 0

    @property
    def missing(self) -> int:
        return self.unique - self.stored


def tally(cells: Iterable[Cell], exists: Callable[[str], bool]) -> Tally:
    """Count a study's rows, its distinct images and those that exist already."""
    counts, seen = Tally(), set()
    for cell in cells:
        counts.rows += 1
        mode = f"{cell.lesion.selection} / {cell.lesion.replacement.name}" if cell.lesion else "baseline"
        counts.by_mode[mode] = counts.by_mode.get(mode, 0) + 1
        counts.baselines += cell.lesion is None
        if cell.key not in seen:
            seen.add(cell.key)
            counts.unique += 1
            counts.stored += exists(cell.key)
    return counts
