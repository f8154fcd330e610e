"""Confirmatory tests: layers chosen on one half of the prompts, tested on the other, by a plan made beforehand.

Of 16 layers and 7 aspects some drop is always the largest, and tested on the images that made it the largest it looks
real. On images that had no part in the choice it does not. One Holm correction covers all tests of the plan.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lesion.analysis.bootstrap import BOUNDED
from lesion.analysis.importance import importance_metric
from lesion.analysis.paired import against_floor, holm
from lesion.analysis.reading import (
    adherence_columns,
    adherence_lost,
    differences,
    reading_columns,
    reading_drops,
    with_right,
)
from lesion.study.confirmation import CONFIRMING, EXPLORING, Confirmation

POWER = 0.8
FOUND = ("explored", "estimate", "low", "high", "method", "p", "p_holm", "verdict", "n_units")
COLUMNS = ("hypothesis", "of", "layer", *FOUND, "mde", "seed_noise", "mde_in_seed_noise")


def confirmed(frame: pd.DataFrame, pairs: pd.DataFrame, plan: Confirmation, **options: Any) -> pd.DataFrame:
    """One row a hypothesis of the plan, setting, aspect or metric (`of`), and layer chosen.

    frame: results. pairs: similarities of baselines (see `floor`), for `changes`. Columns: the setting's; hypothesis;
    of; layer; explored (mean on the exploring half, by which the layer was chosen); estimate (mean on the confirming
    half: importance beyond what another seed changes, share of images in which the aspect breaks, adherence lost), low,
    high, method, p, p_holm (over all rows); verdict: `confirmed` if p_holm <= alpha and the estimate is above 0, else
    `not confirmed`; n_units (prompts, or clusters of paraphrases); mde: the smallest effect that would be found with a
    chance of 80 %, from the spread of the exploring half, and where few prompts decide not below what any of so many
    units could show; seed_noise: standard deviation over seeds within a unit; mde_in_seed_noise: their ratio, NaN
    without seed noise. ValueError where the results have another metric.
    """
    if (metric := importance_metric(frame)) != plan.metric:
        raise ValueError(f"the plan is for importance by {plan.metric}, these results have {metric}")
    half = frame["prompt_id"].map(plan.halves(list(dict.fromkeys(frame["prompt_id"]))))
    if plan.paraphrases:
        frame = frame.assign(cluster=frame["prompt_id"].map(plan.cluster))
    parts = {name: frame[half == name] for name in (EXPLORING, CONFIRMING)}
    chosen, tested = [], []
    for hypothesis in plan.hypotheses:
        explored, later = (_tests(hypothesis, part, pairs, **options) for part in parts.values())
        if explored.empty or later.empty:
            continue
        keys = _before_layer(explored)
        for _, group in explored.dropna(subset=["value"]).groupby(keys, sort=False, dropna=False):
            best = group.sort_values("value", ascending=False, kind="stable").head(plan.layers)
            chosen.append(best)
            tested.append(best[[*keys, "layer"]].merge(later, on=[*keys, "layer"], how="left"))
    if not chosen:
        return pd.DataFrame(columns=list(COLUMNS))
    before, table = pd.concat(chosen, ignore_index=True), pd.concat(tested, ignore_index=True)
    table["p_holm"] = holm(table["p"])
    sure = (table["p_holm"] <= plan.alpha) & (table["value"] > 0)
    table["verdict"] = np.where(sure, "confirmed", "not confirmed")
    table["explored"], table["seed_noise"] = before["value"], before["sd_seeds"]
    table["mde"] = _smallest(before, table["n_units"].to_numpy(), plan.alpha / len(table))
    noise = table["seed_noise"].where(table["seed_noise"] > 0)
    table["mde_in_seed_noise"] = table["mde"] / noise
    table = table.rename(columns={"value": "estimate"})
    return table[[*(name for name in table if name not in (*COLUMNS, "sd_seeds", "sd_units", "least")), *COLUMNS]]


def _tests(hypothesis: str, part: pd.DataFrame, pairs: pd.DataFrame, **options: Any) -> pd.DataFrame:
    """Of every layer: the setting's columns, hypothesis, of, layer, value, low, high, method, p, n_units, least, sd_…

    least: what a unit's value cannot be below, which the test takes as known where few prompts decide.
    """
    if hypothesis == "changes":
        table = against_floor(part, pairs, spread=True, **options).assign(of="another seed")
        table = table.rename(columns={"difference": "value"})
    elif hypothesis == "breaks":
        table = reading_drops(part, **options) if reading_columns(part) else pd.DataFrame()
        table = table.rename(columns={"aspect": "of", "drop": "value"})
    else:
        metrics = adherence_columns(part)
        table = adherence_lost(with_right(part), metrics=metrics, **options) if metrics else pd.DataFrame()
        table = table.rename(columns={"metric": "of", "lost": "value"})
    if table.empty:
        return table
    table = table.rename(columns={"n_prompts": "n_units", "sd_prompts": "sd_units"}).assign(hypothesis=hypothesis)
    if "least" not in table:
        table["least"] = [differences(name)[0] if hypothesis == "loses" else -1.0 for name in table["of"]]
    wanted = ["value", "low", "high", "method", "p", "n_units", "sd_units", "sd_seeds", "least"]
    keys = [name for name in _before_layer(table) if name != "of"]
    return table[[*keys, "hypothesis", "of", "layer", *wanted]]


def _before_layer(table: pd.DataFrame) -> list[str]:
    """The columns that say of what the rest of a row is, but for the layer."""
    return [str(name) for name in table.columns[: table.columns.get_loc("layer")]]


def _smallest(explored: pd.DataFrame, units: Any, alpha: float) -> Any:
    """The effect found with chance POWER by a two-sided t test at alpha, in the normal approximation of its power.

    Where few prompts decide (`bounded`) it is at least what makes n equal values significant: one more at `least` has a
    weight w of Beta(1, n), so that their mean reaches 0 with chance alpha / 2 at |least| w / (1 - w).
    """
    from scipy.special import ndtri, stdtrit

    freedom, count = np.maximum(units - 1, 1), np.maximum(units, 1)
    found = (stdtrit(freedom, 1 - alpha / 2) + ndtri(POWER)) * explored["sd_units"].to_numpy() / np.sqrt(count)
    weight = 1 - (alpha / 2) ** (1 / count)
    hard = np.abs(explored["least"].to_numpy()) * weight / (1 - weight)
    return np.where(explored["method"].str.startswith(BOUNDED), np.maximum(found, hard), found)
