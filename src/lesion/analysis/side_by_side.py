"""Layers side by side: what models, kinds of lesion and replacements say of the same layer, and paired differences.

Settings stand side by side where they differ in nothing else (window, branch, strength, way of generating).
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pandas as pd

from lesion.analysis.cells import MEASURES, groups, lesioned_rows, over_prompts
from lesion.analysis.importance import ONLY_ONE
from lesion.analysis.settings import in_order, layers_in_order
from lesion.study.lesions import Lesion

SIDES = ("model", "kind", "replacement")  # what stands side by side
FIGURES = ("difference", "low", "high", "method", "n_prompts", "n_images")


def paired_differences(frame: pd.DataFrame, metric: str | None = None, **options: Any) -> pd.DataFrame:
    """How much more a layer matters on one side than on another: over the same prompts and seeds.

    One row a pair of settings that differ in just one of SIDES, measure and layer that both have, in depth order.
    Columns: those of the setting, "" in the one that differs; measure (importance, sufficiency); layer; between (the
    column that differs), one, other (its values); difference (other minus one, mean over seeds, then prompts); low,
    high, method, n_prompts, n_images: as of `layer_estimates`, over images that are valid on both sides. Layers
    without such an image are left out. options: those of `bootstrap.interval`; each interval is for itself.
    """
    part, keys = lesioned_rows(frame, metric)
    part = part[part["selection"].isin(list(MEASURES))]
    value = part["effect"].mask(part["selection"] == ONLY_ONE, 1.0 - part["effect"])
    part = part.assign(measure=part["selection"].map(MEASURES), value=value)
    records: list[dict[str, Any]] = []
    for between in SIDES:
        for setting, whole in groups(part, [*(key for key in keys if key != between), "measure"]):
            for one, other in combinations(in_order(whole[between]), 2):
                named = {**setting, between: "", "between": between, "one": one, "other": other}
                records += [named | row for row in _differences(whole, between, one, other, **options)]
    columns = [*keys, "measure", "layer", "between", "one", "other", *FIGURES]
    return pd.DataFrame(records, columns=columns)


def _differences(whole: pd.DataFrame, between: str, one: Any, other: Any, **options: Any) -> list[dict[str, Any]]:
    at = ["layer", "prompt_id", "seed"]
    noise = ["noise"] if "noise" in whole else []
    first, second = (
        whole[whole[between] == side].groupby([*at, *noise], sort=False, dropna=False)["value"].mean().dropna()
        for side in (one, other)
    )
    both = (second - first).dropna().rename("difference").reset_index()
    found = []
    for layer in layers_in_order(whole):
        of_layer = both[both["layer"] == layer]
        if len(of_layer):
            figures = over_prompts(of_layer, "difference", **options).columns("difference")
            found.append({"layer": layer, **{name: figures[name] for name in FIGURES}})
    return found


def over_replacements(layers: pd.DataFrame) -> pd.DataFrame:
    """What a layer is worth whatever takes its place: the range over replacements of `layer_estimates`.

    One row a setting without its replacement, measure and layer that several replacements have. Columns: the setting's;
    measure; layer; lowest, highest (means) and lowest_by, highest_by (the replacement of each); low, high: the
    outermost limits of all, so that they hold each replacement's true mean as surely as its own interval does, NaN
    where one has none; replacements (how many).
    """
    names = ["lowest", "lowest_by", "highest", "highest_by", "low", "high", "replacements"]
    if layers.empty:
        return pd.DataFrame(columns=["measure", "layer", *names])
    keys = [str(key) for key in layers.columns[: list(layers.columns).index("measure")] if key != "replacement"]
    records = []
    for of, part in groups(layers[layers["mean"].notna()], [*keys, "measure", "layer"]):
        if part["replacement"].nunique() > 1:
            ordered = part.sort_values("mean", kind="stable")
            least, most = ordered.iloc[0], ordered.iloc[-1]
            found = {"lowest": least["mean"], "lowest_by": least["replacement"]}
            found |= {"highest": most["mean"], "highest_by": most["replacement"]}
            found |= {"low": part["low"].min(skipna=False), "high": part["high"].max(skipna=False)}
            records.append({**of, **found, "replacements": part["replacement"].nunique()})
    return pd.DataFrame(records, columns=[*keys, "measure", "layer", *names])


def relative_depth(frame: pd.DataFrame) -> pd.DataFrame:
    """Where the layers of each model and kind lie: 0 for the first that is lesioned, 1 for the last, evenly between.

    Columns: model, kind, layer, depth; layers in the order of the forward pass.
    """
    frame = frame if "kind" in frame else frame.assign(kind=Lesion.kind)
    named = frame[["model", "kind", "layer", "layer_index"]][frame["layer"].fillna("") != ""]
    records = []
    for sides, part in groups(named, ["model", "kind"]):
        layers = layers_in_order(part)
        last = max(1, len(layers) - 1)
        records += [{**sides, "layer": layer, "depth": place / last} for place, layer in enumerate(layers)]
    return pd.DataFrame(records, columns=["model", "kind", "layer", "depth"])


def beside(layers: pd.DataFrame) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """Groups of `layer_estimates` in which several settings stand side by side, and what each group shares.

    A single setting of a group is none.
    """
    if layers.empty:
        return []
    keys = [str(key) for key in layers.columns[: list(layers.columns).index("measure")] if key not in SIDES]
    found = groups(layers, keys) if keys else [({}, layers)]
    return [(shared, part) for shared, part in found if len(part[list(SIDES)].drop_duplicates()) > 1]
