"""Checks a finished study as another lab would: its files, pictures, scores, tables, and the numbers of a paper."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lesion.audit import merged
from lesion.audit.checks import Audit, Check
from lesion.audit.paper import Tables, numbers
from lesion.audit.run import RunAudit, Sample
from lesion.run import environment

__all__ = ["Audit", "Sample", "audit"]


def audit(runs: Sequence[Path], sample: Sample, papers: Sequence[Path] = (), above: Path | None = None) -> Audit:
    """Check these run folders, and every number of the papers (.tex, .md) against the tables of all of them.

    above: the folder that the runs are in; if it has a report over all of them, that is checked too.
    """
    checks: dict[str, list[Check]] = {}
    tables: list[Path] = []
    with tempfile.TemporaryDirectory(prefix="lesion-audit-") as work:
        for number, run in enumerate(runs):
            place = Path(work) / str(number)
            place.mkdir()
            one = RunAudit(run, sample, place, [other for other in runs if other != run])
            checks[str(run)] = one.checks()
            tables += one.tables
        if above is not None and merged.is_there(above, runs):
            place = Path(work) / "merged"
            place.mkdir()
            check, more = merged.report(above, runs, place)
            checks[str(above)], tables = [check], tables + more
        known = Tables(tables)
        for paper in papers:
            checks[str(paper)] = [_paper(paper, known)]
    facts = {
        "ended": environment.now(),
        "command": sys.argv[1:],
        "share": sample.share,
        "seed": sample.seed,
        "environment": environment.here("cpu"),
        "audited": {
            str(run): {
                path.name: environment.sha256(path)
                for path in sorted(run.iterdir())
                if path.suffix in (".parquet", ".html", ".json") and path.name != "audit.json"
            }
            for run in runs
        },
    }
    return Audit(facts, checks)


def _paper(paper: Path, known: Tables) -> Check:
    check = Check("paper", "numbers")
    if not len(known):
        check.undone = "no run has tables to compare with"
    for number in numbers(paper.read_text(encoding="utf-8"), paper.suffix):
        check.looked += 1
        if not known.where(number):
            check.differs.append(f"line {number.line}: {number.text} is in none of the tables")
    return check
