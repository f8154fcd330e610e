"""Takes the finished run of the worked example into docs/study: results, tables, figures; and into docs/study.md.

    lesion experiment=study
    python scripts/study_doc.py outputs/DATE/TIME     everything under docs/study, then the blocks of docs/study.md
    python scripts/study_doc.py                       tables and blocks again, from docs/study/results.parquet

The images (50 MB) stay in the run folder; the results keep all else, so that every number can be computed again.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

import pandas as pd

from lesion.analysis.settings import settings
from lesion.report import contents, crossing, tables
from lesion.report.findings import Findings, findings
from lesion.report.merging import FLOOR, RESULTS
from lesion.report.words import comparison, summary

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "study.md"
KEPT = ROOT / "docs" / "study"
BLOCK = re.compile(r"(<!-- (table|words): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def take(run: Path) -> None:
    """Results and figures of the run folder, without its images."""
    KEPT.mkdir(parents=True, exist_ok=True)
    frame = pd.read_parquet(run / RESULTS)
    frame.assign(image="").to_parquet(KEPT / RESULTS, compression="zstd", index=False)
    floor = pd.read_parquet(run / FLOOR)
    floor.to_parquet(KEPT / FLOOR, compression="zstd", index=False)
    shutil.rmtree(KEPT / "figures", ignore_errors=True)
    (KEPT / "figures").mkdir()
    for path in sorted((run / "figures").glob("*.png")):
        shutil.copyfile(path, KEPT / "figures" / path.name)


def worked_out() -> Findings:
    return findings(pd.read_parquet(KEPT / RESULTS), pd.read_parquet(KEPT / FLOOR))


def made(found: Findings) -> dict[str, tables.Table]:
    """Every table of the report, by the stem of its files."""
    listed = [table for one in settings(found.frame) for table in contents.of_setting(found, one)]
    return {table.stem: table for table in [*listed, *crossing.over_settings(found), contents.status(found.frame)]}


def sentences(found: Findings) -> dict[str, list[str]]:
    """What the report says of each setting, and of all together."""
    return {one.slug: summary(found, one) for one in settings(found.frame)} | {"over-settings": comparison(found)}


def filled(text: str, found: Findings) -> str:
    """The page with every block as the results have it. KeyError: a block names what there is not."""
    listed, said = made(found), sentences(found)

    def block(match: re.Match[str]) -> str:
        start, kind, name, end = match.groups()
        body = tables.to_markdown(listed[name]) if kind == "table" else "".join(f"- {one}\n" for one in said[name])
        return f"{start}\n{body}\n{end}"

    return BLOCK.sub(block, text)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="the run folder of `lesion experiment=study`")
    run = parser.parse_args(given).run
    if run:
        take(run)
    found = worked_out()
    shutil.rmtree(KEPT / "tables", ignore_errors=True)
    listed = made(found)
    for table in listed.values():
        tables.write(KEPT / "tables", table)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"{len(listed)} tables in {(KEPT / 'tables').relative_to(ROOT)}; {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
