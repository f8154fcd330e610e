"""Importance and sufficiency of layers.

importance of a layer = 1 - similarity(baseline, image with this layer lesioned)         (leave-one-out)
sufficiency of a layer = similarity(baseline, image with every other layer lesioned)     (only-one)
The similarity is the study's choice (`scorer.importance`, see `importance_metric`).
Means are taken over the seeds of a prompt first, then over prompts, so a prompt with more seeds weighs no more.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pandas as pd

from lesion.analysis.settings import in_order, layers_in_order, only_setting, rows, settings
from lesion.scoring import Metric, known_metrics, metric_class
from lesion.study.columns import GENERATION, LESION

LEAVE_ONE_OUT = "leave_one_out"
ONLY_ONE = "only_one"
NO_EFFECT = 1e-4  # similarities this close to 1 are float32 and batch-size noise, not an effect
IMPORTANCE_METRIC = "importance_metric"  # the column that names a study's choice
DEFAULT_METRIC = "clip_similarity"
STATUSES = ("ok", "invalid", "failed")
_READ = ("prompt_id", "selection", "layer", "layer_index", "status")
Values = TypeVar("Values", float, pd.Series)


def importance_metric(frame: pd.DataFrame) -> str:
    """The metric that importance is computed from: the column `importance_metric`, written by `scorer.importance`.

    "clip_similarity", which every study has, where there is no such column (results of earlier versions), no row, or
    where studies that chose differently lie in one frame.
    """
    if IMPORTANCE_METRIC not in frame:
        return DEFAULT_METRIC
    chosen = frame[IMPORTANCE_METRIC].fillna(DEFAULT_METRIC).unique()
    return str(chosen[0]) if len(chosen) == 1 else DEFAULT_METRIC


def _facts(metric: str) -> type[Metric] | None:
    """None for a column that no metric of this version has."""
    return metric_class(metric) if metric in known_metrics() else None


def as_similarity(values: Values, metric: str) -> Values:
    """A metric's values as similarities, 1 for identical images: 1 - distance; others as they are."""
    facts = _facts(metric)
    return 1.0 - values if facts is not None and facts.direction == "distance" else values


def similarity(frame: pd.DataFrame, metric: str | None = None) -> pd.Series:
    """Similarity to the baseline, 1 for identical images; NaN unless the image is ok. (rows,)

    metric: a column, by default the study's own choice. A distance (lpips) becomes 1 - distance. ValueError for a
    metric that is absent or not such a similarity.
    """
    metric = metric or importance_metric(frame)
    facts = _facts(metric)
    if facts is not None and facts.direction != "distance" and (why := facts.why_unsuited()):
        raise ValueError(f"importance cannot be read from {metric}: {why}")
    if metric not in frame:
        raise ValueError(f"metric {metric} is not in these results (columns: {', '.join(map(str, frame.columns))})")
    values = as_similarity(frame[metric].astype("float64"), metric)
    return values.where((frame["status"] == "ok") & np.isfinite(values))


def _with_similarity(frame: pd.DataFrame, metric: str | None) -> pd.DataFrame:
    """What the tables below read, and _similarity: of a million rows every further column takes long to take apart."""
    keep = ("model", *LESION, *GENERATION, *_READ)
    return frame[[name for name in keep if name in frame]].assign(_similarity=similarity(frame, metric))


def _over_prompts(part: pd.DataFrame) -> tuple[float, float]:
    """Mean over seeds, then mean and sample standard deviation over prompts; NaN where there is nothing to say."""
    by_prompt = part.groupby("prompt_id")["_similarity"].mean().dropna()
    if by_prompt.empty:
        return np.nan, np.nan
    return float(by_prompt.mean()), float(by_prompt.std(ddof=1)) if len(by_prompt) > 1 else np.nan


def left_out(part: pd.DataFrame, column: str) -> dict[str, int]:
    """Rows that no mean of `column` takes in: n_invalid, n_failed, n_unscored (ok, but without a value)."""
    status, unknown = part["status"].to_numpy(dtype=object), part[column].isna().to_numpy()
    return {
        "n_invalid": int((status == "invalid").sum()),
        "n_failed": int((status == "failed").sum()),
        "n_unscored": int(((status == "ok") & unknown).sum()),
    }


def _counts(part: pd.DataFrame) -> dict[str, int]:
    return {
        "n_images": int(part["_similarity"].notna().sum()),
        **left_out(part, "_similarity"),
    }


def _effect(similarities: pd.Series) -> str:
    valid = similarities.dropna()
    if valid.empty:
        return "n/a"
    return "none" if bool(((1.0 - valid).abs() <= NO_EFFECT).all()) else "yes"


def layer_table(frame: pd.DataFrame, metric: str | None = None) -> pd.DataFrame:
    """One row a setting and layer, in depth order.

    Columns: those of the setting, layer, importance, importance_sd, sufficiency, sufficiency_sd (sd over prompts, NaN
    for one prompt), n_images (valid images behind both figures), n_invalid, n_failed, n_unscored (ok, but without this
    metric), rank (1 = most important, ties share, <NA> without leave-one-out), effect ("yes", "none" when every
    leave-one-out similarity is within 1e-4 of 1, "n/a" without data).
    """
    frame = _with_similarity(frame, metric)
    frame = frame[frame["selection"].isin(("none", LEAVE_ONE_OUT, ONLY_ONE, "all"))]
    tables = []
    for setting in settings(frame):
        part = rows(frame, setting)
        part = part[part["selection"].isin((LEAVE_ONE_OUT, ONLY_ONE))]
        records = []
        for layer in layers_in_order(part):
            of_layer = part[part["layer"] == layer]
            left_out = of_layer[of_layer["selection"] == LEAVE_ONE_OUT]
            mean, spread = _over_prompts(left_out)
            alone, alone_spread = _over_prompts(of_layer[of_layer["selection"] == ONLY_ONE])
            records.append(
                {
                    **setting.columns(),
                    "layer": layer,
                    "importance": 1.0 - mean,
                    "importance_sd": spread,
                    "sufficiency": alone,
                    "sufficiency_sd": alone_spread,
                    **_counts(of_layer),
                    "effect": _effect(left_out["_similarity"]),
                }
            )
        if records:
            table = pd.DataFrame(records)
            # Layers without effect tie: their order would be that of rounding errors.
            key = table["importance"].round(6).mask(table["effect"] == "none", 0.0)
            table["rank"] = key.rank(method="min", ascending=False).astype("Int64")
            table["effect"] = table.pop("effect")  # stays the last column
            tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else _empty_layer_table()


def _empty_layer_table() -> pd.DataFrame:
    setting = ["model", "replacement", "window_start", "window_end", "branch", "strength"]
    figures = ["importance", "importance_sd", "sufficiency", "sufficiency_sd"]
    counts = ["n_images", "n_invalid", "n_failed", "n_unscored", "rank", "effect"]
    return pd.DataFrame(columns=[*setting, "layer", *figures, *counts])


def layer_by_prompt(
    frame: pd.DataFrame,
    metric: str | None = None,
    selection: str = LEAVE_ONE_OUT,
    replacement: str | None = None,
) -> pd.DataFrame:
    """Layers in depth order (index) x prompt_id (columns): 1 - mean similarity over seeds; for only_one the similarity.

    A cell without a valid image is NaN. ValueError when the rows mix settings (models, windows...): filter them first.
    """
    part = _with_similarity(frame, metric)
    part = part[part["selection"] == selection]
    if replacement is not None:
        part = part[part["replacement"] == replacement]
    if not part.empty:
        only_setting(part)
    table = part.pivot_table(index="layer", columns="prompt_id", values="_similarity", aggfunc="mean", dropna=False)
    table = table.reindex(index=layers_in_order(part), columns=in_order(part["prompt_id"]))
    table.index.name, table.columns.name = "layer", "prompt_id"
    return table if selection == ONLY_ONE else 1.0 - table


def status_counts(frame: pd.DataFrame) -> pd.DataFrame:
    """How many images are ok, invalid and failed: one row a model, selection and replacement."""
    keys = ["model", "selection", "replacement"]
    if frame.empty:
        return pd.DataFrame(columns=[*keys, *STATUSES, "total"])
    counts = frame.groupby([*keys, "status"], sort=False, dropna=False).size().unstack("status", fill_value=0)
    others = [name for name in counts.columns if name not in STATUSES]
    counts = counts.reindex(columns=[*STATUSES, *others], fill_value=0)
    counts = counts.reindex(pd.MultiIndex.from_tuples(in_order(map(tuple, frame[keys].to_numpy())), names=keys))
    counts["total"] = counts.sum(axis=1)
    counts.columns.name = None
    return counts.reset_index()


def controls(frame: pd.DataFrame, metric: str | None = None) -> pd.DataFrame:
    """The text-blind control (selection "all"), one row a setting: mean similarity, its sd over prompts, the counts."""
    frame = _with_similarity(frame, metric)
    records = []
    for setting in settings(frame):
        part = rows(frame, setting)
        part = part[part["selection"] == "all"]
        if not part.empty:
            mean, spread = _over_prompts(part)
            records.append({**setting.columns(), "similarity": mean, "similarity_sd": spread, **_counts(part)})
    names = ["model", "similarity", "similarity_sd", "n_images", "n_invalid", "n_failed", "n_unscored"]
    return pd.DataFrame(records) if records else pd.DataFrame(columns=names)
