"""lesion-audit: check a finished study as another lab would, and write a summary that says what holds."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lesion.cli import in_utf8, say, unforeseen
from lesion.errors import visible


class _WrongUsage(Exception):
    """The command line is wrong."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _WrongUsage(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Console script; 0: all is as it was made, 1: what differs or could not be checked is named, 2: wrong request."""
    in_utf8()
    parser = _Parser(prog="lesion-audit", description="Check that the numbers of a finished study hold.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a run folder, or a folder of run folders")
    parser.add_argument(
        "--share", type=_share, default=0.01, help="of the images that are made again, in (0, 1] (default: 0.01)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these images (default: 0)")
    parser.add_argument(
        "--paper",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a .tex or .md file whose every number must be one of the tables'; repeatable",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for audit.json and audit.md (default: DIR)")
    try:
        arguments = parser.parse_args(argv)
        for paper in arguments.paper:
            if paper.suffix not in (".tex", ".md") or not paper.is_file():
                raise _WrongUsage(f"--paper {paper}: must be a .tex or .md file that is there")
        out = arguments.out or arguments.folder
        if out.exists() and not (out.is_dir() and os.access(out, os.W_OK)):
            raise _WrongUsage(f"--out {out}: must be a folder one can write to")
    except _WrongUsage as error:
        return _refuse(error)
    from lesion.report.merging import Refused, run_folders  # with pandas, which --help does without

    try:
        runs = run_folders([arguments.folder])
    except Refused as error:
        return _refuse(error)
    try:
        from lesion.audit import Sample, audit

        found = audit(runs, Sample(arguments.share, arguments.seed), arguments.paper, arguments.folder)
        written = found.write(out)
    except OSError as error:
        return _refuse(error)
    except Exception as error:
        return unforeseen("lesion-audit", error, 2)
    print("\n".join(found.lines()))
    print(visible(str(written[-1])))
    return 0 if found.sound else 1


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 1]; got {text!r}")
    return value


def _refuse(error: Exception) -> int:
    say("lesion-audit", " ".join(str(error).split()))
    return 2


if __name__ == "__main__":
    sys.exit(main())
