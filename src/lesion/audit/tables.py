"""Comparing what a run folder holds with what is worked out anew: frames value by value, files by what they say."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from lesion.study.columns import EARLIER

SCORE = 1e-5  # scores of other batches of images differ by less: docs/benchmarks.md, "Batch effect"
DRAWN = (".png", ".pdf", ".svg", ".jpg")


def frames(
    name: str,
    given: pd.DataFrame,
    anew: pd.DataFrame,
    left_out: Collection[int] = (),
    older: Mapping[str, float] | None = None,
    notes: list[str] | None = None,
) -> Iterator[str]:
    """Each value that differs between a table of a run and the same worked out anew, named by row and column.

    left_out: numbers of rows that cannot be compared. older: columns that earlier versions computed in float32, and by
    how much those values may be off: a store keeps them. Values that are of float32 and off by no more are told in
    `notes`, a line a column.
    """
    if len(given) != len(anew):
        yield f"{name} has {len(given)} rows; what the config asks for has {len(anew)}"
        return
    absent = [str(column) for column in anew if column not in given and column not in EARLIER]
    if absent:
        yield f"{name} has no column {', '.join(absent)}"
    if more := [str(column) for column in given if column not in anew]:
        yield f"{name} has columns that no run writes: {', '.join(more)}"
    kept = np.array([row not in left_out for row in range(len(anew))], dtype=bool)
    for column in (column for column in anew if column in given):
        ours, theirs = anew[column], given[column]
        if pd.api.types.is_float_dtype(ours):
            numbers = pd.to_numeric(theirs, errors="coerce").to_numpy(float)
            other = ~np.isclose(numbers, ours.to_numpy(float), rtol=SCORE, atol=SCORE, equal_nan=True)
            if off := (older or {}).get(str(column)):
                by = np.abs(numbers - ours.to_numpy(float))
                early = other & kept & (numbers == numbers.astype(np.float32)) & (by <= off)
                other &= ~early
                if early.any() and notes is not None:
                    count = f"{name}: {int(early.sum())} values of {column}"
                    how = f"off by up to {by[early].max():.2g}; allowed: {off:.2g}"
                    notes.append(f"{count} are of an earlier version, in float32, {how}")
        else:
            other = (_texts(ours) != _texts(theirs)).to_numpy()
        for row in map(int, np.flatnonzero(other & kept)):
            yield f"{name} row {row} ({_row(given, row)}): {column} is {theirs.iloc[row]}, anew {ours.iloc[row]}"


def _texts(values: pd.Series) -> pd.Series:
    return values.astype(object).where(values.notna(), "").map(str)


def _row(frame: pd.DataFrame, row: int) -> str:
    named = ("prompt_id", "seed", "selection", "layer", "prompt_id_a", "seed_a", "prompt_id_b", "seed_b")
    return " ".join(str(frame[name].iloc[row]) for name in named if name in frame and str(frame[name].iloc[row]))


def exactly(given: pd.DataFrame, remembered: Mapping[tuple[int, str], float]) -> Iterator[str]:
    """Each score that is not to the last digit the one that the store remembers. remembered: by row and column."""
    for (row, column), value in remembered.items():
        found = float(given[column].iloc[row])
        if found != value:
            yield f"results.parquet row {row} ({_row(given, row)}): {column} is {found!r}, in the store {value!r}"


def files(folder: Path, anew: Path, made: Collection[Path], drawn: bool) -> Iterator[tuple[str, str]]:
    """Each file of a report with what differs from the same made anew, "" where nothing does.

    made: files of the new report below `anew`. drawn: whether figures are compared; other versions draw them otherwise.
    """
    names = sorted(path.relative_to(anew).as_posix() for path in made)
    for name in names:
        if not drawn and name.endswith(DRAWN):
            continue
        path = folder / name
        if not path.is_file():
            yield name, f"{name} is not there"
        elif path.read_bytes() == (anew / name).read_bytes():
            yield name, ""
        else:
            yield name, next(_differences(name, path, anew / name), "")
    for kind in ("tables", "figures", "grids", "thumbs"):
        for path in sorted((folder / kind).rglob("*")):
            if path.is_file() and (name := path.relative_to(folder).as_posix()) not in names:
                yield name, f"{name} is none of the files that the results give"


def _differences(name: str, given: Path, anew: Path) -> Iterator[str]:
    if given.suffix in (".png", ".jpg"):
        try:
            with Image.open(given) as one, Image.open(anew) as other:
                if one.size == other.size and np.array_equal(np.asarray(one), np.asarray(other)):
                    return
        except (OSError, ValueError):
            pass
        yield f"{name} shows something else than the figure made anew"
        return
    if given.suffix in DRAWN:
        yield f"{name} is not the figure made anew"
        return
    ours, theirs = (path.read_text(encoding="utf-8", errors="replace") for path in (anew, given))
    if given.suffix == ".csv":
        rows = list(itertools.zip_longest(*(csv.reader(io.StringIO(text)) for text in (theirs, ours)), fillvalue=[]))
        heads = rows[0][1] if rows else []
        for number, (row, wanted) in enumerate(rows):
            for place, (value, right) in enumerate(itertools.zip_longest(row, wanted, fillvalue="")):
                if value != right:
                    column = heads[place] if place < len(heads) else str(place + 1)
                    about = f"{name} row {number} ({wanted[0] if wanted else ''}), column {column}"
                    yield f"{about}: {value!r}, anew {right!r}"
    lines = itertools.zip_longest(theirs.splitlines(), ours.splitlines(), fillvalue="")
    for number, (line, wanted_line) in enumerate(lines, 1):
        if line != wanted_line:
            start = max(0, next((i for i, (a, b) in enumerate(zip(line, wanted_line)) if a != b), 0) - 30)
            yield f"{name} line {number}: {line[start : start + 80]!r}, anew {wanted_line[start : start + 80]!r}"
    yield f"{name} has other bytes"
