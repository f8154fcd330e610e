"""The results in words: the lines a run ends with, and the summary of the report."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pandas as pd

from lesion.analysis.importance import NO_EFFECT, controls, layer_table
from lesion.analysis.settings import Setting, rows, settings
from lesion.report.text import clean, number

HEADER = ("rank", "layer", "importance (leave-one-out)", "sufficiency (only-one)", "images", "")


def _images(record: dict[Hashable, Any]) -> str:
    left_out = [f"{record[f'n_{name}']} {name}" for name in ("invalid", "failed", "unscored") if record[f"n_{name}"]]
    return str(record["n_images"]) + (f" (+ {', '.join(left_out)})" if left_out else "")


def ranking_lines(frame: pd.DataFrame, metric: str = "clip_similarity") -> list[str]:
    """A plain text table a setting, most important layer first (depth order without leave-one-out), no colours."""
    lines: list[str] = []
    for setting in settings(frame):
        table = layer_table(rows(frame, setting), metric)
        if table.empty:
            continue
        table = table.sort_values("rank", kind="stable", na_position="last")
        cells = [HEADER]
        for record in table.to_dict("records"):
            figures = (number(record["importance"], 4), number(record["sufficiency"], 4))
            note = "no effect" if record["effect"] == "none" else ""
            cells.append((number(record["rank"]), clean(record["layer"]), *figures, _images(record), note))
        widths = [max(len(cell[column]) for cell in cells) for column in range(len(HEADER))]
        lines += ["", clean(setting.label)] if lines else [clean(setting.label)]
        for cell in cells:
            aligned = [
                text.ljust(width) if column in (1, 4, 5) else text.rjust(width)
                for column, (text, width) in enumerate(zip(cell, widths, strict=True))
            ]
            lines.append("  ".join(aligned).rstrip())
    return lines


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def summary(frame: pd.DataFrame, setting: Setting, metric: str = "clip_similarity") -> list[str]:
    """Sentences computed from one setting's results (plain text, not escaped)."""
    part = rows(frame, setting)
    table = layer_table(part, metric)
    counts = part["status"].value_counts()
    bad = [f"{counts[name]} {name}" for name in ("invalid", "failed") if counts.get(name, 0)]
    sentences = [
        f"{_count(len(part), 'image')} of {_count(part['prompt_id'].nunique(), 'prompt')} and "
        f"{_count(part['seed'].nunique(), 'seed')}, {_count(len(table), 'layer')} lesioned; "
        + (f"{_listed(bad)}, left out of every mean." if bad else "none invalid or failed.")
    ]
    ranked = table[table["importance"].notna()].sort_values("rank", kind="stable")
    effective = ranked[ranked["effect"] == "yes"]
    if len(effective):
        top = [f"{clean(one.layer)} ({one.importance:.3f})" for one in effective.head(3).itertuples()]
        sentences.append(f"Most important by leave-one-out (1 - {metric} to the baseline): {_listed(top)}.")
    none = [clean(name) for name in table.loc[table["effect"] == "none", "layer"]]
    if none:
        verb = "has" if len(none) == 1 else "have"
        sentences.append(f"{_listed(none)} {verb} no measurable effect (every similarity within {NO_EFFECT:g} of 1).")
    alone = table[table["sufficiency"].notna()].sort_values("sufficiency", ascending=False, kind="stable")
    if len(alone):
        best = alone.iloc[0]
        sentences.append(
            f"Alone, {clean(best['layer'])} keeps the image closest to the baseline "
            f"(sufficiency {best['sufficiency']:.3f})."
        )
    blind = controls(part, metric)
    if len(blind) and blind["n_images"].iloc[0]:
        value, images = blind["similarity"].iloc[0], int(blind["n_images"].iloc[0])
        sentences.append(f"With every layer lesioned the similarity is {value:.3f} ({_count(images, 'image')}).")
    return sentences
