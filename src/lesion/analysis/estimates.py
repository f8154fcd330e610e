"""Importance and sufficiency with their intervals: per setting and layer, and per prompt."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lesion.analysis.cells import MEASURES, counts, flipped, groups, lesioned_rows, over_prompts, over_seeds
from lesion.analysis.settings import layers_in_order

FIGURES = ("mean", "low", "high", "method", "sd_prompts", "sd_seeds", "n_prompts", "n_images", "n_effective")
LEFT_OUT = ("n_invalid", "n_failed", "n_unscored")


def layer_estimates(frame: pd.DataFrame, metric: str | None = None, **options: Any) -> pd.DataFrame:
    """One row a setting (model, replacement, window, branch, strength...), measure and layer, in depth order.

    Columns: those of the setting; measure (importance: 1 - similarity under leave_one_out; sufficiency: similarity
    under only_one); layer; mean (over seeds, then prompts); low, high, method, sd_prompts, sd_seeds, n_prompts,
    n_images, n_effective (`bootstrap.Interval`); n_invalid, n_failed, n_unscored (rows left out).
    options: those of `bootstrap.interval`. ValueError for a metric that is no similarity to the baseline.
    """
    return measured(*lesioned_rows(frame, metric), [], **options)


def prompt_estimates(frame: pd.DataFrame, metric: str | None = None, confidence: float = 0.95) -> pd.DataFrame:
    """Like `layer_estimates`, one row a prompt too (prompt_id); limits are Student's t over the prompt's seeds."""
    return measured(*lesioned_rows(frame, metric), ["prompt_id"], confidence=confidence)


def measured(part: pd.DataFrame, keys: list[str], by: list[str], **options: Any) -> pd.DataFrame:
    """`layer_estimates` of rows that have effects (`cells.lesioned_rows`), split by further columns."""
    records = []
    for setting, whole in groups(part, keys):
        for selection, measure in MEASURES.items():
            selected = whole[whole["selection"] == selection]
            for layer in layers_in_order(selected):
                of_layer = selected[selected["layer"] == layer]
                for names, group in groups(of_layer, by) if by else [({}, of_layer)]:
                    found = over_seeds(group, **options) if by == ["prompt_id"] else over_prompts(group, **options)
                    if measure == "sufficiency":
                        found = flipped(found)
                    named = {**setting, "measure": measure, "layer": layer, **names}
                    records.append({**named, **found.columns(), **counts(group)})
    return pd.DataFrame(records, columns=[*keys, "measure", "layer", *by, *FIGURES, *LEFT_OUT])
