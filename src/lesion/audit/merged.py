"""The audit of a report over several runs: made anew from their results, in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lesion.analysis.bootstrap import METHODS
from lesion.audit.checks import Check
from lesion.audit.run import compare
from lesion.report import OPTIONS, findings, write_report
from lesion.report.merging import Refused, gathered, put_together
from lesion.run import environment

WRITTEN = ("grids", "tables", "figures", "thumbs")  # folders that a report writes


def is_there(folder: Path, runs: Sequence[Path]) -> bool:
    """Whether a folder, which is none of the runs, has a report over all of them."""
    return (folder / OPTIONS).is_file() and folder.resolve() not in {run.resolve() for run in runs}


def report(folder: Path, runs: Sequence[Path], work: Path) -> tuple[Check, list[Path]]:
    """Compare every table, figure and page with the same made anew in `work`; also the new tables."""
    check = Check("merged", "tables, figures and pages")
    try:
        frame, floor, maps, _ = put_together(runs, folder, mix=True)
        options: dict[str, Any] = json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
        frame = gathered(frame).reset_index(drop=True)
        known = findings(frame, floor, options.get("interval", METHODS[0]))
        for path in folder.iterdir():
            if path.is_dir() and path.name not in WRITTEN:
                (work / path.name).symlink_to(path.absolute())
        made = [path for path in write_report(work, frame, floor, maps, known=known, **options) if path.name != OPTIONS]
    except (Refused, OSError, TypeError, ValueError) as error:
        check.undone = " ".join(str(error).split())
        return check, []
    compare(check, folder, work, made, [environment.read(run) for run in runs])
    return check, [path for path in made if path.parent.name == "tables"]
