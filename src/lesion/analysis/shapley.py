"""Shapley values of layers: their share of the effect of losing all layers, whatever else is lost.

Estimated from sampled orders (Castro, Gómez & Tejada, "Polynomial calculation of the Shapley value based on sampling",
Comput. Oper. Res. 36, 2009): along an order of the layers, each is worth what the effect grows by when it is lesioned
on top of those before it. The mean over random orders is unbiased, and the values of every order add up to the effect
of lesioning all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lesion.analysis.bootstrap import Interval
from lesion.analysis.cells import groups, lesioned_rows, names_of, over_prompts, without_limits
from lesion.analysis.crossed import widening
from lesion.analysis.estimates import FIGURES

COALITIONS = "coalitions"
FEWEST_ORDERS = 8  # of fewer, the spread says too little of the sampling


def contributions(part: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """What each layer adds in each order, and how many chains (prompt, seed, permutation) lack an image.

    part: rows with prompt_id, seed, permutation (number of the order), lesioned (layers joined by '+', or a sequence;
    only the set counts) and effect. A chain holds sets of 1, 2, ... n layers, each with one layer more than the last;
    the empty set, of effect 0, may be missing. Result: prompt_id, seed, permutation, layer, worth.
    A chain with a set that is not valid is left out whole. ValueError when sets do not make a chain.
    """
    sets = part["lesioned"].map(names_of).map(frozenset)
    part = part.assign(_set=sets, _size=sets.map(len))
    layers = frozenset().union(*sets)
    parts, left_out = [], 0
    for names, chain in groups(part, ["prompt_id", "seed", "permutation"]):
        chain = chain[chain["_size"] > 0].sort_values("_size", kind="stable")
        if chain["effect"].isna().any():
            left_out += 1
            continue
        before = [frozenset(), *chain["_set"].iloc[:-1]]
        added = [now - last for last, now in zip(before, chain["_set"], strict=True)]
        if list(chain["_size"]) != list(range(1, len(layers) + 1)) or any(len(one) != 1 for one in added):
            raise ValueError(f"permutation {names['permutation']!r} of prompt {names['prompt_id']!r} is not a chain")
        worth = np.diff(chain["effect"].to_numpy(dtype=np.float64), prepend=0.0)
        parts.append(pd.DataFrame({**names, "layer": [next(iter(one)) for one in added], "worth": worth}))
    columns = ["prompt_id", "seed", "permutation", "layer", "worth"]
    return (pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)), left_out


def shapley_values(frame: pd.DataFrame, metric: str | None = None, **options: Any) -> pd.DataFrame:
    """One row a setting and layer, most valuable first.

    Needs rows of selection `coalitions` with the columns of `contributions`, and if orders were drawn with several
    seeds, `order`, which tells these apart; effect = 1 - similarity. Columns: the
    setting's; layer; shapley (mean over orders of each prompt and seed, then seeds, then prompts); se: standard error
    of the sampling of orders, from the spread over orders of their means over prompts, NaN for one order (it holds if
    orders are drawn independently; where prompts have orders of their own, give these different numbers of
    `permutation`, and se is that of all of them); low, high, method, sd_prompts, sd_seeds, n_prompts, n_images,
    n_effective: over prompts (`bootstrap.interval`), moved out for the sampling of orders that prompts share, of which
    it takes 8; n_orders; n_left_out (chains with an image that is not valid). ValueError when a column is missing or
    sets do not make chains.
    """
    part, keys = lesioned_rows(frame, metric)
    part = part[part["selection"] == COALITIONS]
    if missing := [name for name in ("permutation", "lesioned") if len(part) and name not in part]:
        raise ValueError(f"rows of selection {COALITIONS} lack the columns {', '.join(missing)}")
    if len(part) and "order" in part:
        part = part.assign(permutation=part["order"].fillna("") + " " + part["permutation"].astype(str))
    figures = [*FIGURES[1:], "n_orders", "n_left_out"]
    tables = []
    for setting, whole in groups(part, keys):
        found, left_out = contributions(whole)
        records = []
        for names, group in groups(found, ["layer"]):
            by_image = group.groupby(["prompt_id", "seed"], sort=False)["worth"].mean().reset_index()
            if "noise" in whole:
                by_image["noise"] = whole["noise"].iloc[0]
            by_order = group.groupby(["permutation", "prompt_id"])["worth"].mean()
            own = (
                len(by_order) == by_order.index.get_level_values("permutation").nunique()
            )  # each prompt has its orders
            by_order = by_order.groupby("permutation").mean()
            error = float(by_order.std(ddof=1) / np.sqrt(len(by_order))) if len(by_order) > 1 else np.nan
            found_ = over_prompts(by_image, "worth", **options)
            if not found_.reason and not own:
                found_ = _with_orders(found_, error, len(by_order), options.get("confidence", 0.95))
            record = {**setting, **names, **found_.columns("shapley"), "se": error}
            records.append({**record, "n_orders": len(by_order), "n_left_out": left_out})
        table = pd.DataFrame(records, columns=[*keys, "layer", "shapley", "se", *figures])
        tables.append(table.sort_values("shapley", ascending=False, kind="stable"))
    return pd.concat(tables, ignore_index=True) if tables else _empty(keys, figures)


def _with_orders(found: Interval, error: float, orders: int, confidence: float) -> Interval:
    """Limits that hold for other orders too: as seeds that all prompts share, they are a second source of error."""
    if orders < FEWEST_ORDERS:
        return without_limits(found, f"fewer than {FEWEST_ORDERS} orders")
    of_prompts = found.sd_prompts / float(np.sqrt(found.n_prompts))
    more = widening(of_prompts, found.n_prompts, error**2, orders, confidence)
    low, high = (
        found.mean - np.hypot(found.mean - found.low, more),
        found.mean + np.hypot(found.high - found.mean, more),
    )
    return replace(found, low=max(float(low), -1.0), high=min(float(high), 1.0), used=f"{found.used}+orders")


def _empty(keys: list[str], figures: list[str]) -> pd.DataFrame:
    return pd.DataFrame(columns=[*keys, "layer", "shapley", "se", *figures])
