"""What a study is read from: comparison pictures, tables, figures and a page, made from the results frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd
from PIL import Image

from lesion.analysis.importance import layer_table
from lesion.analysis.settings import rows, settings
from lesion.report import html, pictures, tables
from lesion.report.data import inside, page_data
from lesion.report.pictures import Drawn
from lesion.report.text import clean
from lesion.report.words import ranking_lines, summary

__all__ = ["ranking_lines", "write_report"]


def _link(path: Path, root: Path) -> str:
    return quote(path.relative_to(root).as_posix())


def _shown(drawn: Sequence[tuple[Path, str]], root: Path) -> list[html.Picture]:
    found = []
    for path, text in drawn:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                found.append(html.Picture(_link(path, root), text, *picture.size))
    return found


def _left_out(kind: str, drawn: Drawn) -> list[str]:
    """A line that says so where not every picture is drawn."""
    done = len(drawn.pictures)
    if done == drawn.possible:
        return []
    return [
        f"Only the first {done} of {drawn.possible} {kind} are drawn; lesion-report --all-grids draws all. "
        "The heat map, the images below and every number cover the whole study."
    ]


def _thumbnails(run_dir: Path, frame: pd.DataFrame) -> dict[str, str]:
    """Of the images that may be large: without recorded sizes each file is asked."""
    names = frame["image"].fillna("").map(inside)
    large = names != ""
    if {"height", "width"} <= set(frame.columns):
        large &= ~(frame[["height", "width"]].max(axis=1) <= pictures.THUMB)
    return pictures.thumbnails(run_dir, names[large])


def write_report(run_dir: Path, frame: pd.DataFrame, *, all_grids: bool = False) -> list[Path]:
    """Write grids/, tables/, figures/, thumbs/ and report.html below `run_dir`; image paths are relative to it.

    Every setting (model, replacement, window, branch, strength) has files of its own. A large study gets its first
    comparison pictures only, and a line that says so, unless `all_grids`. Returns the paths, the page last.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    sections = []
    found = settings(frame)
    most, sheets = (
        None if all_grids else max(1, n // max(1, len(found))) for n in (pictures.COMPARISONS, pictures.SHEETS)
    )
    for setting in found:
        part = rows(frame, setting)
        table = layer_table(part)
        comparisons = pictures.comparisons(run_dir, part, setting, most)
        layer_grids = pictures.layer_grids(run_dir, part, setting, sheets)
        figures = pictures.draw_figures(run_dir, part, setting, table)
        listed = tables.write_layers(run_dir / "tables", part, setting)
        listed += tables.write_prompts(run_dir / "tables", part, setting)
        written += [path for path, _ in (*comparisons.pictures, *layer_grids.pictures, *figures)] + listed
        sections.append(
            html.Section(
                clean(setting.label),
                setting.slug,
                summary(frame, setting),
                table,
                _shown(figures, run_dir),
                _shown(comparisons.pictures, run_dir),
                [_link(path, run_dir) for path in [*listed, *(path for path, _ in figures)]],
                [
                    *_left_out("comparison pictures (one a prompt and seed)", comparisons),
                    *_left_out("pictures of layers by prompts", layer_grids),
                ],
            )
        )
    written += tables.write_status(run_dir / "tables", frame)
    thumbs = _thumbnails(run_dir, frame)
    written += [run_dir / path for path in thumbs.values()]
    return written + html.write(run_dir, frame, sections, page_data(frame, thumbs))
