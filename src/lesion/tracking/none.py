"""No tracker: everything a study gives is in its run folder anyway."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lesion.tracking import JobInfo, Tracker

if TYPE_CHECKING:
    import pandas as pd


class NoTracker:
    """Does nothing."""

    def start(self, job: JobInfo) -> None:
        pass

    def progress(self, done: int, total: int, images_per_second: float) -> None:
        pass

    def finish(self, frame: pd.DataFrame, run_dir: Path, summary: Callable[[], Mapping[str, float]]) -> None:
        pass

    def close(self, exit_code: int) -> None:
        pass


def build(options: dict[str, object]) -> Tracker:
    """Takes no options. Raises ValueError when given one."""
    if options:
        raise ValueError(f"tracker=none takes no options, got {', '.join(sorted(options))}")
    return NoTracker()
