"""What a study is read from: comparison pictures, tables, figures and a page, made from the results frame."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pandas as pd
from PIL import Image

from lesion.analysis.importance import LEAVE_ONE_OUT, ONLY_ONE, controls, layer_by_prompt, layer_table
from lesion.analysis.settings import Setting, in_order, rows, settings, slug
from lesion.report import figures, grids, html, tables
from lesion.report.words import ranking_lines, summary

__all__ = ["ranking_lines", "write_report"]


def _picture(path: Path, root: Path, text: str) -> html.Picture:
    with Image.open(path) as picture:
        width, height = picture.size
    return html.Picture(quote(path.relative_to(root).as_posix()), text, width, height)


def _save(picture: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def _comparisons(run_dir: Path, part: pd.DataFrame, setting: Setting) -> Iterator[tuple[Path, str]]:
    """Writes one comparison picture a prompt and seed; yields its path and a text for those who cannot see it."""
    for prompt_id, seed in in_order(zip(part["prompt_id"], part["seed"], strict=True)):
        picture = grids.comparison(part, run_dir, prompt_id, seed)
        name = f"comparison--{setting.slug}--{slug(str(prompt_id))}--seed{seed}.png"
        yield _save(picture, run_dir / "grids" / name), f"Comparison for prompt {prompt_id}, seed {seed}"


def _layer_grids(run_dir: Path, part: pd.DataFrame, setting: Setting) -> list[Path]:
    """Layers x prompts, one picture a selection and seed, more where the prompts do not fit side by side."""
    written = []
    room = grids.prompts_a_picture(part, run_dir)
    ids = in_order(part["prompt_id"])
    pages = [ids[start : start + room] for start in range(0, len(ids), room)]
    for selection in (name for name in (LEAVE_ONE_OUT, ONLY_ONE) if (part["selection"] == name).any()):
        for seed in in_order(part["seed"]):
            for index, page in enumerate(pages, 1):
                picture = grids.layers_by_prompts(part, run_dir, seed, selection, prompt_ids=page)
                suffix = f"--page{index}" if len(pages) > 1 else ""
                name = f"layers-by-prompts--{selection}--{setting.slug}--seed{seed}{suffix}.png"
                written.append(_save(picture, run_dir / "grids" / name))
    return written


def _figures(run_dir: Path, part: pd.DataFrame, setting: Setting, table: pd.DataFrame) -> list[Path]:
    written = []
    for selection, meaning in (
        (LEAVE_ONE_OUT, "importance: 1 - clip_similarity (leave-one-out)"),
        (ONLY_ONE, "sufficiency: clip_similarity (only-one)"),
    ):
        by_prompt = layer_by_prompt(part, selection=selection)
        if by_prompt.size:
            figure = figures.heat_map(by_prompt, meaning, setting.label, from_zero=selection == LEAVE_ONE_OUT)
            written += figures.save(figure, run_dir / "figures" / f"heatmap--{selection}--{setting.slug}")
    if len(table):
        blind = controls(part)["similarity"]
        figure = figures.layer_figure(table, setting.label, float(blind.iloc[0]) if len(blind) else float("nan"))
        written += figures.save(figure, run_dir / "figures" / f"layers--{setting.slug}")
    return written


def write_report(run_dir: Path, frame: pd.DataFrame) -> list[Path]:
    """Write grids/, tables/, figures/ and report.html below `run_dir`; image paths in the frame are relative to it.

    Every setting (model, replacement, window, branch, strength) has files of its own. Returns the paths, the page last.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    sections = []
    for setting in settings(frame):
        part = rows(frame, setting)
        table = layer_table(part)
        comparisons = list(_comparisons(run_dir, part, setting))
        drawn = _figures(run_dir, part, setting, table)
        written += [path for path, _ in comparisons]
        written += _layer_grids(run_dir, part, setting) + drawn
        written += tables.write_layers(run_dir / "tables", part, setting)
        written += tables.write_prompts(run_dir / "tables", part, setting)
        sections.append(
            html.Section(
                setting.label,
                setting.slug,
                summary(frame, setting),
                table,
                [_picture(path, run_dir, path.stem) for path in drawn if path.suffix == ".png"],
                [_picture(path, run_dir, text) for path, text in comparisons],
            )
        )
    written += tables.write_status(run_dir / "tables", frame)
    written.append(html.write(run_dir / "report.html", html.page(frame, sections)))
    return written
