"""Report the results of a study to an experiment tracker.

A tracker is one module here with `build(options) -> Tracker`, and one `conf/tracker/NAME.yaml`. It only reads;
if it fails, the study continues.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Guarded", "JobInfo", "Tracker", "make_tracker", "tracker_names"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobInfo:
    """One job, or the report over the jobs of a multirun, as a tracker sees it."""

    name: str
    group: str | None  # the multirun the job belongs to, if any
    job_type: str
    folder: Path  # the job's run folder
    config: dict[str, object]  # the full resolved config, plain values only
    unfinished: Path | None = None  # a file that the tracker may keep until the study has finished, to resume by it


class Tracker(Protocol):
    """The life of a tracked job: start, progress (often), finish (once, when all is on disk), close (always last)."""

    def start(self, job: JobInfo) -> None:
        """Open the job. Called once."""

    def progress(self, done: int, total: int, images_per_second: float) -> None:
        """Note that `done` of `total` images are made. May be called once an image: trackers throttle themselves."""

    def finish(self, frame: pd.DataFrame, run_dir: Path, summary: Callable[[], Mapping[str, float]]) -> None:
        """Log the results frame (one row per image), the pictures under `run_dir` and the summary (name -> value).

        summary: works it out; a tracker that shows none does not call it.
        """

    def close(self, exit_code: int) -> None:
        """Close the job; `exit_code` 0 means all cells fine. Safe to call after a failure, or without a start."""


class Guarded:
    """A tracker whose failures are logged once and then silence it. `KeyboardInterrupt` and `SystemExit` pass."""

    def __init__(self, name: str, inner: Tracker) -> None:
        self.name = name
        self.inner = inner
        self.stopped = False

    def start(self, job: JobInfo) -> None:
        self._call(lambda: self.inner.start(job))

    def progress(self, done: int, total: int, images_per_second: float) -> None:
        self._call(lambda: self.inner.progress(done, total, images_per_second))

    def finish(self, frame: pd.DataFrame, run_dir: Path, summary: Callable[[], Mapping[str, float]]) -> None:
        self._call(lambda: self.inner.finish(frame, run_dir, summary))

    def close(self, exit_code: int) -> None:
        self._call(lambda: self.inner.close(exit_code))

    def _call(self, action: Callable[[], None]) -> None:
        if self.stopped:
            return
        try:
            action()
        except Exception as error:
            self.stopped = True
            what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            log.warning("tracker %s stopped: %s; the study continues", self.name, what)
            log.debug("tracker %s", self.name, exc_info=True)


def tracker_names() -> list[str]:
    """The trackers there are: the public modules of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def make_tracker(name: str, options: dict[str, object]) -> Tracker:
    """The tracker called `name`, guarded. Raises ValueError for an unknown name, an unknown option or a wrong value.

    `options` are the keys of conf/tracker/NAME.yaml; a `name` among them is ignored.
    """
    if name not in tracker_names():
        raise ValueError(f"tracker={name}: choose one of {', '.join(tracker_names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    inner: Tracker = module.build({key: value for key, value in options.items() if key != "name"})
    return Guarded(name, inner)
