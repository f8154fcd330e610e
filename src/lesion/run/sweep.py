"""How far a multirun is: its number of jobs, and a bar over all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Sweep:
    """Of the multirun in this process; nothing where there is none."""

    jobs: int = 0
    number: int = 0  # of the job at work, from 1
    _bar: Any = field(default=None, repr=False)

    def begin(self, jobs: int) -> None:
        """Note that a multirun of so many jobs begins; one job needs no bar."""
        self.end()
        self.jobs, self.number = jobs, 0

    def job(self) -> None:
        """Note that the next job begins, and show the bar below that of its images."""
        from tqdm.auto import tqdm

        if self.jobs < 2:
            return
        if self._bar is None:
            self._bar = tqdm(total=self.jobs, unit="job", desc="all jobs", position=1)
        elif self.number:
            self._bar.update(1)
        self.number += 1

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.update(1)
            self._bar.close()
        self.jobs, self.number, self._bar = 0, 0, None

    def __str__(self) -> str:
        return f"job {self.number} of {self.jobs}, " if self.number else ""
