"""Which job of a multirun draws the report over all of them: the one that ends last, wherever a launcher put it.

Format: .jobs/ in the folder of the multirun; asked.json says how many jobs there are and what was asked for, NUMBER is
there once that job has ended, well or badly, and report once one of them draws. A launcher may have returned by then,
or have died; where it waits, it finds the report and draws none.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lesion.store.files import atomically

JOBS = ".jobs"


def begin(folder: Path, jobs: int, asked: Mapping[str, Any]) -> None:
    """Note how many jobs a multirun has, before the first starts; what an earlier one in this folder left is removed.

    asked: what the report needs. Where it cannot be written, the process that launches the jobs draws the report.
    """
    with suppress(OSError):
        shutil.rmtree(folder / JOBS, ignore_errors=True)
        (folder / JOBS).mkdir(parents=True)
        with atomically(folder / JOBS / "asked.json") as temporary:
            temporary.write_text(json.dumps({"jobs": jobs, **asked}), encoding="utf-8")


def ended(folder: Path, number: int) -> dict[str, Any] | None:
    """Note that a job has ended. Return what was asked for if all have, and this one is to draw the report."""
    try:
        (folder / JOBS / str(number)).touch()
        asked: dict[str, Any] = json.loads((folder / JOBS / "asked.json").read_text(encoding="utf-8"))
        if not all((folder / JOBS / str(one)).exists() for one in range(asked["jobs"])):
            return None
        os.close(os.open(folder / JOBS / "report", os.O_CREAT | os.O_EXCL))
    except (OSError, ValueError, KeyError):
        return None
    return asked


def drawn(folder: Path) -> bool:
    """Whether a job has drawn the report."""
    return (folder / JOBS / "report").exists() and (folder / "report.html").exists()
