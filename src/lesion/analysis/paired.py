"""Paired tests over prompts, corrected for how many there are.

All are t tests on differences of prompt means (P - 1 degrees of freedom): prompts are the independent units, seeds only
make a prompt's mean sharper. A test that cannot be made (one prompt, constant differences) has p = NaN and does not
count in the correction.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lesion.analysis.bootstrap import FLAT, Floats
from lesion.analysis.cells import cube, groups, images, lesioned_rows, matched, over_prompts, prompt_averages
from lesion.analysis.floor import floor_by_prompt, of_setting
from lesion.analysis.importance import LEAVE_ONE_OUT
from lesion.analysis.settings import layers_in_order

TEST = ("difference", "low", "high", "method", "t", "p", "p_holm", "n_prompts")


def holm(p: ArrayLike) -> Floats:
    """Adjusted p-values, NaN for NaN (Holm, Scand. J. Stat. 6, 1979): reject where they are at most alpha.

    statsmodels' `multipletests(p, method="holm")` does the same; these lines spare the dependency.
    """
    values = np.asarray(p, dtype=np.float64)
    adjusted = np.full(values.shape, np.nan)
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    steps = values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return adjusted


def t_test(differences: ArrayLike) -> tuple[Floats, Floats]:
    """t and two-sided p of each row of differences (..., P) against 0 (`scipy.stats.ttest_1samp`).

    NaN for one prompt, and for rows whose spread is rounding, of which any t would be made up.
    """
    values = np.asarray(differences, dtype=np.float64)
    t, p = (np.full(values.shape[:-1], np.nan) for _ in range(2))
    if values.shape[-1] < 2:
        return t, p
    varied = values.std(axis=-1, ddof=1) > FLAT * np.abs(values).max(axis=-1)
    if varied.any():
        from scipy import stats

        t[varied], p[varied] = stats.ttest_1samp(values[varied], 0.0, axis=-1)
    return t, p


def _tested(cells: Floats, **options: Any) -> dict[str, Any]:
    """cells: differences, prompts x seeds."""
    prompt, place = np.nonzero(np.isfinite(cells))
    part = pd.DataFrame({"prompt_id": prompt, "difference": cells[prompt, place]})
    found = over_prompts(part, "difference", **options)
    t, p = t_test(np.nanmean(cells, axis=1)) if cells.size else (np.nan, np.nan)
    if found.reason:
        t, p = np.nan, np.nan
    values = {"difference": found.mean, "low": found.low, "high": found.high, "method": found.method}
    return {**values, "t": float(t), "p": float(p), "n_prompts": found.n_prompts}


def neighbours(frame: pd.DataFrame, metric: str | None = None, **options: Any) -> pd.DataFrame:
    """Is a layer more important than the next one? One row a setting and pair of neighbouring ranks.

    Columns: the setting's; rank (of `layer`, the more important one), layer, next_layer, difference (mean of importance
    minus importance, >= 0 by construction), low, high, method, t, p, p_holm (over the setting's pairs), n_prompts,
    n_left_out (images not valid for every layer, which are in no difference). options: those of `bootstrap.interval`.
    """
    part, keys = lesioned_rows(frame, metric)
    part = part[part["selection"] == LEAVE_ONE_OUT]
    tables = []
    for setting, whole in groups(part, keys):
        wide = matched(whole)
        cells = cube(wide)
        order = np.argsort(-prompt_averages(cells).mean(axis=1), kind="stable").tolist() if len(wide) else []
        records: list[dict[str, Any]] = []
        for rank, (one, other) in enumerate(pairwise(order), start=1):
            names = {"rank": rank, "layer": wide.columns[one], "next_layer": wide.columns[other]}
            records.append({**setting, **names, **_tested(cells[one] - cells[other], **options)})
        table = pd.DataFrame(records, columns=[*keys, "rank", "layer", "next_layer", *TEST])
        tables.append(table.assign(p_holm=holm(table["p"]), n_left_out=images(whole) - len(wide)))
    names_ = [*keys, "rank", "layer", "next_layer", *TEST, "n_left_out"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=names_)


def against_floor(
    frame: pd.DataFrame,
    pairs: pd.DataFrame,
    metric: str | None = None,
    floor: str = "other_seeds",
    **options: Any,
) -> pd.DataFrame:
    """Does losing a layer change an image more than a new seed (or prompt) does? One row a setting and layer.

    difference: mean over prompts of importance - (1 - floor of the same prompt), negative where the lesion changes
    less. Columns as in `neighbours`, without rank and next_layer; p_holm over the setting's layers; prompts without a
    floor are left out. pairs, floor: see `lesion.analysis.floor`. The floor of a prompt counts as known: its own error
    is not in the test, beyond what it adds to the spread over prompts.
    """
    part, keys = lesioned_rows(frame, metric)
    part = part[part["selection"] == LEAVE_ONE_OUT]
    tables = []
    for setting, whole in groups(part, keys):
        floors = floor_by_prompt(of_setting(pairs, setting))[floor]
        headroom = 1.0 - whole["prompt_id"].map(floors).astype("float64")
        whole = whole.assign(beyond=whole["effect"] - headroom)
        records = []
        for layer in layers_in_order(whole):
            group = whole[whole["layer"] == layer]
            cells = cube(matched(group, value="beyond"))
            found = _tested(cells[0] if len(cells) else np.empty((0, 0)), **options)
            records.append({**setting, "layer": layer, **found, "n_left_out": int(group["beyond"].isna().sum())})
        table = pd.DataFrame(records, columns=[*keys, "layer", *TEST, "n_left_out"])
        tables.append(table.assign(p_holm=holm(table["p"])))
    return (
        pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=[*keys, "layer", *TEST, "n_left_out"])
    )
