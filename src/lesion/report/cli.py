"""lesion-report: (re)make the report of one or several finished runs."""

from __future__ import annotations

import argparse
import os
import posixpath
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pandas as pd

from lesion.analysis.settings import GENERATION, LESION, slug
from lesion.report import ranking_lines, write_report
from lesion.report.data import inside

RESULTS = "results.parquet"
NEEDED = (
    *("model", "prompt_id", "prompt", "seed", "selection", "layer", "layer_index"),
    *("replacement", "window_start", "window_end", "branch", "strength"),
    *("status", "reason", "image", "cell", "clip_similarity"),
)
LATER: dict[str, str | float] = {
    "kind": "cross_attention",
    "lesioned": "",
    "noising": 0.0,
}  # columns that results of earlier versions lack
BEST = {"ok": 0, "invalid": 1, "failed": 2}


class Refused(Exception):
    """The request is wrong; the message is one line for the user."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused(message)


def run_folders(folders: Sequence[Path]) -> list[Path]:
    """Every run folder among or below `folders`, each once. Refused when one holds no results."""
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise Refused(f"{folder}: no such folder")
        below = [folder] if (folder / RESULTS).is_file() else sorted(path.parent for path in folder.rglob(RESULTS))
        if not below:
            raise Refused(f"{folder}: no {RESULTS} in it or below it")
        for run in below:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def read(run: Path, out: Path) -> pd.DataFrame:
    """The run's results, with image paths relative to `out`. Refused when they cannot be read or miss columns."""
    try:
        frame = pd.read_parquet(run / RESULTS)
    except Exception as error:  # pyarrow raises many kinds; each means that the file is not a results file
        raise Refused(f"{run / RESULTS}: cannot be read ({str(error).splitlines()[0]})") from error
    missing = [name for name in NEEDED if name not in frame]
    if missing:
        raise Refused(f"{run / RESULTS}: no column {', '.join(missing)}")
    try:
        frame["clip_similarity"] = frame["clip_similarity"].astype("float64")
    except (TypeError, ValueError) as error:
        raise Refused(f"{run / RESULTS}: column clip_similarity is not a number everywhere") from error
    for name, value in LATER.items():
        if name not in frame:
            frame[name] = value
    texts = ["prompt", "replacement", "layer", "lesioned", "kind", "reason", "image"]
    frame[texts] = frame[texts].astype(object).fillna("")
    start = Path(os.path.relpath(run.resolve(), out.resolve())).as_posix()
    # A results file may come from anybody: what it names outside its own folder is no image of the run.
    names = frame["image"].map(inside)
    frame["image"] = [posixpath.normpath(f"{start}/{name}") if name else "" for name in names]
    return frame


def gather(frame: pd.DataFrame, out: Path) -> pd.DataFrame:
    """Links (or copies) images that lie outside `out` into it, so that the folder can be sent as it is.

    They come to images/<run>/, where <run> tells the folders of the runs apart. A file that is not there stays away.
    """
    places = {name: name for name in frame["image"].unique()}
    roots: dict[str, str] = {}
    for name in places:
        if name.startswith("../"):
            root, _, rest = name.rpartition("/images/")
            rest = rest or posixpath.basename(name)
            if root not in roots:
                roots[root] = slug(root)  # its hash is that of the whole path
            places[name] = f"images/{roots[root]}/{rest}"
            _link(out / name, out / places[name])
    return frame.assign(image=frame["image"].map(places))


def _link(source: Path, target: Path) -> None:
    if not source.is_file() or (target.exists() and target.samefile(source)):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def merge(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """All rows, each image of a lesion once: an ok one rather than an invalid or failed one, then the first seen.

    A prompt_id that stands for different prompts gets a number for the second and later texts.
    """
    frame = pd.concat(frames, ignore_index=True)
    _check_comparable(frame)
    texts = frame[["prompt_id", "prompt"]].drop_duplicates()
    nth = texts.groupby("prompt_id").cumcount()
    names = {
        (one, text): one if n == 0 else f"{one}-{n + 1}"
        for one, text, n in zip(texts["prompt_id"], texts["prompt"], nth, strict=True)
    }
    frame["prompt_id"] = [names[pair] for pair in zip(frame["prompt_id"], frame["prompt"], strict=True)]
    own = ["model", "prompt_id", "seed", "selection", "layer", *(name for name in GENERATION if name in frame)]
    lesion = frame[list(LESION)].astype(object).where(frame["selection"] != "none", "")  # a baseline has no lesion
    key = pd.concat([frame[["cell", *own]], lesion], axis=1)
    better = frame["status"].map(BEST).fillna(len(BEST)).sort_values(kind="stable").index
    keep = key.loc[better].drop_duplicates().index.sort_values()
    return frame.loc[keep].reset_index(drop=True)


def _check_comparable(frame: pd.DataFrame) -> None:
    """Refuses to average, under one name, images of different weights, precisions, scorers or protocols."""
    lesioned = frame[frame["selection"] != "none"]
    for name, part, group in (
        ("fingerprint", frame, ["model"]),
        ("dtype", frame, ["model"]),
        ("device", frame, ["model"]),
        ("scorer_identity", frame, ["model"]),
        ("protocol", lesioned, ["model", "replacement"]),
    ):
        if name not in frame:
            continue
        counts = part.groupby(group)[name].nunique()
        if (counts > 1).any():
            who = counts[counts > 1].index[0]
            raise Refused(f"{name} of {who!r} differs between the runs: they cannot be averaged; report them apart")


def _alike(frame: pd.DataFrame) -> int:
    """Rows that differ from another only in what results do not show (weights, calibration, precision)."""
    lesioned = frame[frame["selection"].isin(("leave_one_out", "only_one", "all"))]
    key = ["model", "prompt_id", "seed", "selection", "layer", *LESION, *(name for name in GENERATION if name in frame)]
    return int(lesioned.duplicated(key).sum())


def main(argv: Sequence[str] | None = None) -> int:
    """Console script; 0: the report is written, 2: the request is wrong (one line on stderr, nothing written)."""
    parser = _Parser(prog="lesion-report", description="Make the report of one or several finished runs.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run folder, or a folder of run folders")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where to write (default: the run folder if there is one, else ./lesion-report)",
    )
    parser.add_argument(
        "--all-grids",
        action="store_true",
        help="draw every comparison picture of a large study, not just the first (the page shows every image anyway)",
    )
    try:
        arguments = parser.parse_args(argv)
        runs = run_folders(arguments.folders)
        out = arguments.out or (runs[0] if len(runs) == 1 else Path("lesion-report"))
        if out.exists() and not out.is_dir():
            raise Refused(f"--out {out}: is a file, not a folder")
        frame = merge([read(run, out) for run in runs])
        if frame.empty:
            raise Refused(f"{', '.join(map(str, runs))}: no images in the results")
        if alike := _alike(frame):
            message = f"{alike} images repeat others of another run in all that the results name; they are averaged"
            print(f"lesion-report: {message}", file=sys.stderr)
        out.mkdir(parents=True, exist_ok=True)
        written = write_report(out, gather(frame, out), all_grids=arguments.all_grids)
    except (Refused, OSError) as error:
        print(f"lesion-report: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n".join([*ranking_lines(frame), "", f"runs: {len(runs)}, images: {len(frame)}, files: {len(written)}"]))
    print(written[-1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
