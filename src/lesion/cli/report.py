"""lesion-report: (re)make the report of one or several finished runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lesion.analysis.bootstrap import METHODS
from lesion.cli import in_utf8, say, unforeseen
from lesion.errors import visible
from lesion.processes import drawers

if TYPE_CHECKING:
    from lesion.report.findings import Findings


class _WrongUsage(Exception):
    """The command line is wrong."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _WrongUsage(message)


def report(runs: Sequence[Path], out: Path, mix: bool = False, **options: Any) -> tuple[Findings, list[Path]]:
    """Write one report of these run folders to `out`: what is found in the merged frame, and the paths written.

    mix: runs that cannot be compared stand side by side, never averaged together; else Refused. options: those of
    `write_report`.
    """
    from lesion.report import findings, write_report
    from lesion.report.merging import alike, gather, put_together

    frame, floor, maps, notes = put_together(runs, out, mix)
    if again := alike(frame):
        message = f"{again} images repeat others of another run in all that the results name; they are averaged"
        say("lesion-report", message)
    out.mkdir(parents=True, exist_ok=True)
    with drawers(len(frame)) as others:
        others.start()
        frame = gather(frame, out).reset_index(drop=True)
        known = findings(frame, floor, options.get("interval", METHODS[0]), others)
        return known, write_report(out, frame, floor, maps, notes=notes, known=known, processes=others, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Console script; 0: the report is written, 2: the request is wrong (one line on stderr, nothing written)."""
    in_utf8()
    parser = _Parser(prog="lesion-report", description="Make the report of one or several finished runs.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run folder, or a folder of run folders")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where to write (default: the run folder if there is one, else ./lesion-report)",
    )
    parser.add_argument(
        "--mix",
        action="store_true",
        help="put runs that cannot be compared (other steps, guidance, scorer, weights...) side by side in one report",
    )
    parser.add_argument(
        "--all-grids",
        action="store_true",
        help="draw every picture and figure of a large study, not just the first, and show every image on the page (it "
        "shows the first 100,000 anyway)",
    )
    parser.add_argument("--clustered", action="store_true", help="heat maps with layers and prompts in clusters too")
    parser.add_argument(
        "--interval",
        choices=METHODS,
        default=METHODS[0],
        help="95 %% intervals of means: bootstrap-t (the default), BCa or Student's t over prompts",
    )
    parser.add_argument(
        "--style",
        action="append",
        default=[],
        metavar="STYLE",
        help="a matplotlib style file (say with font.family) or the name of one of its styles, over ours; repeatable",
    )
    parser.add_argument("--titles", action="store_true", help="draw titles into figures")
    parser.add_argument("--siunitx", action="store_true", help="LaTeX tables with the S columns of siunitx")
    try:
        arguments = parser.parse_args(argv)
    except _WrongUsage as error:
        return _refuse(error)
    from lesion.report import ranking_lines  # with pandas and matplotlib, which --help does without
    from lesion.report.figures import Look, looking
    from lesion.report.merging import Refused, certified, run_folders

    try:
        runs = run_folders(arguments.folders)
        out = arguments.out or (runs[0] if len(runs) == 1 else Path("lesion-report"))
        if out.exists() and not out.is_dir():
            raise Refused(f"--out {out}: is a file, not a folder")
        drawn = {name: getattr(arguments, name) for name in ("all_grids", "clustered", "siunitx", "interval", "titles")}
        drawn["styles"] = arguments.style
        try:
            with looking(Look(tuple(arguments.style))):
                pass
        except ValueError as error:
            raise Refused(f"--{error}") from None
        known, written = report(runs, out, arguments.mix, **drawn)
    except (Refused, OSError) as error:
        return _refuse(error)
    except Exception as error:
        return unforeseen("lesion-report", error, 2)
    told = [*ranking_lines(known), "", *map(visible, certified(runs))]
    print("\n".join([*told, f"runs: {len(runs)}, images: {len(known.frame)}, files: {len(written)}"]))
    print(visible(str(written[-1])))
    return 0


def _refuse(error: Exception) -> int:
    say("lesion-report", " ".join(str(error).split()))
    return 2


if __name__ == "__main__":
    sys.exit(main())
