"""Lesions of several layers, of part strength, or of part of the denoising.

Rows of the selections `pairs` and `cumulative` name their layers in a column `lesioned`: module paths joined by '+', or
a sequence of them. Effects are 1 - similarity to the baseline; every figure is worked out for each prompt and seed
first, from its own images, so that intervals are those of paired data.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lesion.analysis.cells import (
    MEASURES,
    counts,
    groups,
    images,
    lesioned_rows,
    matched,
    names_of,
    nested,
    no_effect,
    over_prompts,
    rests_on,
    shared_noise,
)
from lesion.analysis.estimates import FIGURES, LEFT_OUT, layer_estimates
from lesion.analysis.importance import LEAVE_ONE_OUT
from lesion.analysis.paired import p_against_zero
from lesion.analysis.settings import layers_in_order

PAIRS, CUMULATIVE = "pairs", "cumulative"
GROUPS = ("custom", "neighbours")  # selections of sets that are compared with one another as they are
IMAGE = ["prompt_id", "seed"]


def _with_layers(part: pd.DataFrame, selection: str) -> pd.DataFrame:
    part = part[part["selection"] == selection]
    if len(part) and "lesioned" not in part:
        raise ValueError(f"rows of selection {selection} need a column lesioned: module paths joined by '+'")
    return part.assign(_layers=part["lesioned"].map(names_of)) if len(part) else part.assign(_layers=None)


def pair_interactions(frame: pd.DataFrame, metric: str | None = None, **options: Any) -> pd.DataFrame:
    """Effect of losing two layers, minus the sum of losing each: one row a setting and pair.

    > 0: each can stand in for the other (redundant); < 0: they work on the same thing one after the other; 0: additive.
    Effects have a ceiling, so two large ones give a negative value of their own.
    Columns: the setting's; layer_a, layer_b (in depth order); both (mean effect of the pair), expected (sum of the
    singles), over the images that have all three; interaction, low, high, method, sd_prompts, sd_seeds, n_prompts,
    n_images, n_effective; p (of interaction against 0, `paired.p_against_zero`); n_invalid, n_failed, n_unscored of the
    pair's own rows; n_left_out (valid ones that lack a single). Needs rows of selection `pairs` (two layers each) and
    `leave_one_out` in the same setting. options: those of `bootstrap.interval`. ValueError when `lesioned` is missing
    or does not name two layers.
    """
    part, keys = lesioned_rows(frame, metric)
    records = []
    for setting, whole in groups(part, keys):
        pairs = _with_layers(whole, PAIRS)
        if pairs.empty:
            continue
        singles = whole[whole["selection"] == LEAVE_ONE_OUT]
        depth = {layer: number for number, layer in enumerate(layers_in_order(singles))}
        single = singles.groupby(["layer", *IMAGE])["effect"].mean()
        if (pairs["_layers"].map(len) != 2).any():
            raise ValueError("rows of selection pairs must name two different layers in lesioned")
        known = pd.Series([_by_depth(names, depth) for names in pairs["_layers"]], index=pairs.index)
        for names, group in groups(pairs.assign(_a=known.str[0], _b=known.str[1]), ["_a", "_b"]):
            a, b = names["_a"], names["_b"]
            alone = [_looked_up(single, layer, group) for layer in (a, b)]
            group = group.assign(expected=alone[0] + alone[1], alone_a=alone[0], alone_b=alone[1])
            group["interaction"] = group["effect"] - group["expected"]
            complete = group.dropna(subset=["interaction"])
            bounds = (-2.0, 1.0)
            number = min(rests_on(complete, side) for side in ("effect", "alone_a", "alone_b"))
            found = over_prompts(complete, "interaction", bounds=bounds, effective=number, **options)
            p = p_against_zero(nested(complete, "interaction"), shared_noise(complete), number, bounds)
            means = complete.groupby("prompt_id")[["effect", "expected"]].mean().mean()
            record = {**setting, "layer_a": a, "layer_b": b, "both": means["effect"], "expected": means["expected"]}
            left_out = int(group["effect"].notna().sum()) - len(complete)
            records.append({**record, **found.columns("interaction"), "p": p, **counts(group), "n_left_out": left_out})
    figures = ["interaction", *FIGURES[1:], "p", *LEFT_OUT, "n_left_out"]
    return pd.DataFrame(records, columns=[*keys, "layer_a", "layer_b", "both", "expected", *figures])


def group_effects(frame: pd.DataFrame, metric: str | None = None, **options: Any) -> pd.DataFrame:
    """Effect of losing several layers together: one row a setting, selection of `GROUPS` and set of layers.

    Columns: the setting's; selection; n_lesioned; lesioned (the layers, joined by '+'); mean effect, and its figures
    (`layer_estimates`). In the order of the frame. options: those of `bootstrap.interval`.
    """
    part, keys = lesioned_rows(frame, metric)
    part = part[part["selection"].isin(GROUPS)]
    records = []
    if len(part):
        part = part.assign(lesioned=["+".join(names_of(one)) for one in part["lesioned"]])
    for setting, group in groups(part, [*keys, "selection", "lesioned"]):
        record = {**setting, "n_lesioned": len(names_of(setting["lesioned"]))}
        records.append({**record, **over_prompts(group, **options).columns(), **counts(group)})
    return pd.DataFrame(records, columns=[*keys, "selection", "n_lesioned", "lesioned", *FIGURES, *LEFT_OUT])


def _by_depth(names: tuple[str, ...], depth: dict[str, int]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: (depth.get(name, len(depth)), name)))


def _looked_up(single: pd.Series, layer: str, group: pd.DataFrame) -> Any:
    index = pd.MultiIndex.from_arrays([[layer] * len(group), group["prompt_id"], group["seed"]])
    return single.reindex(index).to_numpy()


def _whole_curves(part: pd.DataFrame, x: str) -> pd.DataFrame:
    """Effects of the images (index) that have a valid one at every x (columns) of these rows."""
    wide = matched(part, x)
    # `matched` drops an x without any valid image: then no curve is whole.
    return wide if wide.shape[1] == part[x].nunique() else wide.iloc[:0]


def areas(part: pd.DataFrame, x: str, top: float) -> pd.DataFrame:
    """Area under effect over `x`, from 0 (no effect there) to `top`, as a share of its width: a mean effect.

    One row per image (prompt_id, seed) that has a valid effect for every x: prompt_id, seed, area (trapezoids).
    """
    wide = _whole_curves(part, x)
    points = wide.columns.to_numpy(dtype=np.float64)
    values = wide.to_numpy(dtype=np.float64)
    if not len(points) or points[0] > 0:
        points, values = np.insert(points, 0, 0.0), np.insert(values, 0, 0.0, axis=1)
    found = wide.index.to_frame(index=False).assign(area=np.trapezoid(values, points, axis=1) / top)
    return found.assign(noise=part["noise"].iloc[0]) if "noise" in part and len(part) else found


def cumulative_curves(frame: pd.DataFrame, metric: str | None = None, **options: Any) -> pd.DataFrame:
    """Effect against the number of lesioned layers: one row a setting, order and number.

    Columns: the setting's; order (which layers go first; a column of the frame, "" if it has none); n_lesioned; added
    (layers that the step before did not lesion, joined by '+'); mean effect, and its figures (`layer_estimates`).
    Needs rows of selection `cumulative`, one set of layers a number; ValueError otherwise.
    """
    part, keys = _cumulative(frame, metric)
    records = []
    for setting, whole in groups(part, [*keys, "order"]):
        before: tuple[str, ...] = ()
        for names, group in groups(whole.sort_values("n_lesioned", kind="stable"), ["n_lesioned"]):
            if group["_layers"].nunique() > 1:
                raise ValueError(f"order {setting['order']!r} has several sets of {names['n_lesioned']} layers")
            now = group["_layers"].iloc[0]
            added = [name for name in now if name not in before]
            before = now
            found = over_prompts(group, **options)
            record = {**setting, **names, "added": "+".join(added)}
            records.append({**record, **found.columns(), **counts(group)})
    return pd.DataFrame(records, columns=[*keys, "order", "n_lesioned", "added", *FIGURES, *LEFT_OUT])


def _cumulative(frame: pd.DataFrame, metric: str | None) -> tuple[pd.DataFrame, list[str]]:
    part, keys = lesioned_rows(frame, metric)
    part = _with_layers(part, CUMULATIVE)
    part["_layers"] = part["_layers"].map(lambda names: tuple(sorted(names)))
    order = part["order"].fillna("") if "order" in part else ""
    return part.assign(order=order, n_lesioned=part["_layers"].map(len)), keys


def cumulative_areas(frame: pd.DataFrame, metric: str | None = None, **options: Any) -> pd.DataFrame:
    """Area under each cumulative curve over the share of lesioned layers (0 to 1; 1 is the order's largest number).

    The mean effect along the way: higher if the layers that go first matter more. One row a setting and order; columns:
    the setting's; order; n_layers (the largest number); area, low, high, method, sd_prompts, sd_seeds, n_prompts,
    n_images (prompts and seeds with every point); n_left_out (those without).
    """
    part, keys = _cumulative(frame, metric)
    records = []
    for setting, whole in groups(part, [*keys, "order"]):
        largest = int(whole["n_lesioned"].max())
        found = areas(whole, "n_lesioned", largest)
        record = {
            **setting,
            "n_layers": largest,
            **over_prompts(found, "area", bounds=(0.0, 1.0), **options).columns("area"),
        }
        records.append({**record, "n_left_out": images(whole) - len(found)})
    names = ["order", "n_layers", "area", *FIGURES[1:], "n_left_out"]
    return pd.DataFrame(records, columns=[*keys, *names])


def dose_response(frame: pd.DataFrame, metric: str | None = None, **options: Any) -> pd.DataFrame:
    """How effect grows with strength under leave_one_out: one row a setting without strength, and layer.

    Layers lesioned at one strength only are left out.
    Columns: the setting's; layer; strengths (how many); top (the largest, where the curve ends); full (mean effect
    there); area under the curve as a share of its width (see `areas`), low, high, method...; bend = area / full (0.5
    for a straight line, more if weak lesions do most of it), NaN without effect; rising (share of images whose effect
    never falls as strength grows); n_left_out (prompts and seeds without a valid image at every strength).
    The curve itself is `layer_estimates`, which has a row for every strength.
    """
    part, keys = lesioned_rows(frame, metric)
    part = part[part["selection"] == LEAVE_ONE_OUT]
    keys = [key for key in keys if key != "strength"]
    records = []
    for setting, whole in groups(part, keys):
        for layer in layers_in_order(whole):
            group = whole[whole["layer"] == layer]
            if group["strength"].nunique() < 2:
                continue
            wide, top = _whole_curves(group, "strength"), float(group["strength"].max())
            found = over_prompts(areas(group, "strength", top), "area", bounds=(0.0, 1.0), **options)
            full = wide.iloc[:, -1].groupby("prompt_id").mean().mean() if len(wide) else np.nan
            steps = np.diff(wide.to_numpy(dtype=np.float64), axis=1, prepend=0.0)
            rising = (steps >= -1e-6).all(axis=1).mean() if len(wide) else np.nan
            record = {**setting, "layer": layer, "strengths": group["strength"].nunique(), "top": top, "full": full}
            record |= found.columns("area")
            record |= {"bend": np.nan if no_effect(wide) or not full else found.mean / full}
            records.append({**record, "rising": rising, "n_left_out": images(group) - len(wide)})
    names = ["layer", "strengths", "top", "full", "area", *FIGURES[1:], "bend", "rising", "n_left_out"]
    return pd.DataFrame(records, columns=[*keys, *names])


def window_map(
    frame: pd.DataFrame, metric: str | None = None, measure: str = "importance", value: str = "mean"
) -> pd.DataFrame:
    """Layers in depth order x windows of the denoising, one block of rows a setting without its window.

    Index: a number. Columns: the setting's; layer; then one a window, named `start-end` in fractions of the steps, in
    order of start and end. value: a column of `layer_estimates` (mean, low, high, n_images...). NaN where a window was
    not lesioned. ValueError for an unknown measure.
    """
    if measure not in MEASURES.values():
        raise ValueError(f"unknown measure {measure!r}; allowed: {', '.join(MEASURES.values())}")
    return by_window(layer_estimates(frame, metric), measure, value)


def by_window(estimates: pd.DataFrame, measure: str = "importance", value: str = "mean") -> pd.DataFrame:
    """`window_map` of ready-made `layer_estimates`."""
    table = estimates[estimates["measure"] == measure]
    windows = table[["window_start", "window_end"]].drop_duplicates().sort_values(["window_start", "window_end"])
    labels = [f"{start:g}-{end:g}" for start, end in windows.to_numpy()]
    keys = [name for name in table.columns[: table.columns.get_loc("measure")] if not name.startswith("window_")]
    records = []
    for names, group in groups(table, [*keys, "layer"]):
        found = {f"{row.window_start:g}-{row.window_end:g}": getattr(row, value) for row in group.itertuples()}
        records.append({**names, **found})
    return pd.DataFrame(records, columns=[*keys, "layer", *labels])
