"""Where the variance of effects comes from, where seeds are the same noise for every prompt."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pandas as pd

from lesion.analysis.cells import MEASURES, groups, lesioned_rows, nested, shared_noise
from lesion.analysis.crossed import components
from lesion.analysis.settings import layers_in_order

PARTS = ("sd_prompts", "sd_seeds", "sd_rest", "f_seeds", "p", "n_prompts", "n_seeds")


def variance_components(frame: pd.DataFrame, metric: str | None = None) -> pd.DataFrame:
    """One row a setting, measure and layer, in depth order; only settings whose prompts share the noise of two seeds.

    Columns: the setting's; measure; layer; those of `crossed.Components`, its p_seeds as p.
    """
    part, keys = lesioned_rows(frame, metric)
    records: list[dict[str, Any]] = []
    for setting, whole in groups(part, keys):
        if not shared_noise(whole) or whole["seed"].nunique() < 2:
            continue
        for selection, measure in MEASURES.items():
            selected = whole[whole["selection"] == selection]
            for layer in layers_in_order(selected):
                found = asdict(components(nested(selected[selected["layer"] == layer])))
                records.append({**setting, "measure": measure, "layer": layer, **found, "p": found["p_seeds"]})
    return pd.DataFrame(records, columns=[*keys, "measure", "layer", *PARTS])
