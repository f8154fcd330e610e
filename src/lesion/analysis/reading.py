"""Which lesion breaks what: how often images still show each aspect of their prompt, as a rule reads it from pixels.

Input: the `read_…` columns of results of the embedded model (1 right, 0 wrong, NaN where the prompt does not ask; see
`lesion.scoring._reader`). drop = read(baseline) - read(lesioned image) of the same prompt and seed, so -1, 0 or 1 for
an image: 1 where the lesion broke the aspect. Its mean is the loss of accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lesion.analysis.bootstrap import Interval, interval
from lesion.analysis.cells import nested, over_prompts, without_limits
from lesion.analysis.estimates import FIGURES
from lesion.analysis.importance import LEAVE_ONE_OUT, ONLY_ONE, left_out
from lesion.analysis.settings import BASELINE, in_order, layers_in_order, rows, settings
from lesion.scoring import known_metrics, metric_class
from lesion.study.columns import LESION

PREFIX = "read_"


def reading_columns(frame: pd.DataFrame) -> list[str]:
    """The columns of aspects that are read from pixels."""
    return [name for name in frame.columns if str(name).startswith(PREFIX)]


def reading_drops(frame: pd.DataFrame, selection: str = LEAVE_ONE_OUT, **options: Any) -> pd.DataFrame:
    """One row a setting, aspect and layer (in depth order; "" for a selection without layers, such as `all`).

    Columns: the setting's; aspect; layer; baseline, lesioned (accuracy, 0 to 1: share of images that show what is
    asked, means over seeds, then prompts, of the same images); drop (their difference), low, high, method, sd_prompts,
    sd_seeds, n_prompts, n_images (`bootstrap.Interval`, over prompts that ask for the aspect); n_invalid, n_failed,
    n_unscored (ok, asked, but without both values). An aspect that no prompt asks for has no row.
    Without limits: `n/a (no effect)` where no image changed from right to wrong or back, and what `interval` cannot
    say (one prompt). Where no baseline shows the aspect there is nothing to lose: drop NaN, `n/a (baseline is never
    right)`. options: those of `bootstrap.interval`.
    """
    records: list[dict[str, Any]] = []
    for named, group in _asked(frame, selection):
        found = {**_accuracies(group), **_within(_interval(group, **options), -1.0, 1.0).columns("drop")}
        records.append({**named, **found, **left_out(group, "_drop")})
    figures = ["baseline", "lesioned", "drop", *FIGURES[1:], "n_invalid", "n_failed", "n_unscored"]
    return pd.DataFrame(records, columns=[*_keys(frame), "aspect", "layer", *figures])


def prompt_columns(frame: pd.DataFrame) -> list[str]:
    """The columns of metrics that say how far an image shows what its prompt asks for; those read by rule too."""
    names = [str(name) for name in frame.columns if str(name) in known_metrics()]
    return [name for name in names if metric_class(name).direction == "prompt"]


def adherence_lost(frame: pd.DataFrame, selection: str = LEAVE_ONE_OUT, **options: Any) -> pd.DataFrame:
    """How much less an image shows of its prompt under a lesion: an image can change and lose nothing.

    One row a setting, metric (`prompt_columns`) and layer, in depth order. Columns: the setting's; metric; layer;
    baseline, lesioned (means over seeds, then prompts, of the same images); lost (baseline minus lesioned, below 0
    where the lesioned images fit their prompts better), low, high, method, sd_prompts, sd_seeds, n_prompts, n_images
    (`bootstrap.Interval`, paired, over prompts); verdict: `loses` or `gains` where the interval leaves out 0, `not
    settled` where it does not, `no interval` where it has no limits; n_invalid, n_failed, n_unscored. options: those of
    `bootstrap.interval`.
    """
    records: list[dict[str, Any]] = []
    for named, group in _asked(frame, selection, prompt_columns(frame)):
        found = over_prompts(group, "_drop", **options)
        verdict = "loses" if found.low > 0 else "gains" if found.high < 0 else "not settled"
        verdict = verdict if found.low == found.low else "no interval"
        record = {**named, **_accuracies(group), **found.columns("lost"), "verdict": verdict}
        name = record.pop("aspect")
        records.append({**record, "metric": name, **left_out(group, "_drop")})
    figures = ["baseline", "lesioned", "lost", *FIGURES[1:], "verdict", "n_invalid", "n_failed", "n_unscored"]
    return pd.DataFrame(records, columns=[*_keys(frame), "metric", "layer", *figures])


def reading_shares(frame: pd.DataFrame, selection: str = ONLY_ONE, **options: Any) -> pd.DataFrame:
    """What an image still shows under `selection`: for only_one, what a layer alone brings through.

    One row a setting, aspect and layer as in `reading_drops`; share (of images that show what is asked, 0 to 1, means
    over seeds, then prompts), low, high, method, sd_prompts, sd_seeds, n_prompts, n_images (`bootstrap.Interval`);
    control (the share with every layer lesioned, NaN without selection `all`); n_invalid, n_failed, n_unscored.
    """
    blind = {
        (*named.values(),): _mean(group, "_after") for named, group in _asked(frame, "all")
    }  # by the setting, the aspect and no layer
    records: list[dict[str, Any]] = []
    for named, group in _asked(frame, selection):
        found = _within(interval(nested(group, "_after"), **options), 0.0, 1.0).columns("share")
        control = blind.get((*{**named, "layer": ""}.values(),), float("nan"))
        records.append({**named, **found, "control": control, **left_out(group, "_after")})
    figures = ["share", *FIGURES[1:], "control", "n_invalid", "n_failed", "n_unscored"]
    return pd.DataFrame(records, columns=[*_keys(frame), "aspect", "layer", *figures])


def _keys(frame: pd.DataFrame) -> list[str]:
    """The columns of its settings."""
    return in_order(["model", *LESION, *(name for setting in settings(frame) for name in setting.columns())])


def _asked(
    frame: pd.DataFrame, selection: str, read_from: Sequence[str] | None = None
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """The images of each setting, aspect and layer whose prompts ask for the aspect, with _before, _after and _drop.

    read_from: columns of metrics in the place of the aspects', under their own names.
    """
    aspects = reading_columns(frame) if read_from is None else list(read_from)
    for setting in settings(frame):
        part, columns = rows(frame, setting), setting.columns()
        lesioned = part[part["selection"] == selection]
        few = ["prompt_id", "seed", "layer", "layer_index", "status", *aspects]  # they are taken apart
        lesioned = lesioned[few].assign(layer=lesioned["layer"].fillna(""))
        plain = part[part["selection"] == BASELINE].drop_duplicates(["prompt_id", "seed"])
        plain = plain.set_index(["prompt_id", "seed"])
        image = pd.MultiIndex.from_frame(lesioned[["prompt_id", "seed"]])
        for column in aspects:
            valid = plain[column].astype("float64").where(plain["status"] == "ok")
            read = lesioned[column].astype("float64").where(lesioned["status"] == "ok")
            asking = set(frame.loc[frame[column].notna(), "prompt_id"])
            asked = lesioned.assign(_before=valid.reindex(image).to_numpy(), _after=read)
            asked = asked[asked["prompt_id"].isin(asking)]
            asked["_drop"] = asked["_before"] - asked["_after"]
            named = {**columns, "aspect": column if read_from is not None else column.removeprefix(PREFIX)}
            groups = dict(iter(asked.groupby("layer", sort=False)))
            for layer in layers_in_order(asked) or in_order(asked["layer"]):
                yield {**named, "layer": layer}, groups[layer]


def _within(found: Interval, least: float, most: float) -> Interval:
    """Limits beyond what a share can be are cut."""
    low, high = (min(max(limit, least), most) if limit == limit else limit for limit in (found.low, found.high))
    return replace(found, low=low, high=high)


def _mean(group: pd.DataFrame, column: str) -> float:
    """Over seeds, then prompts."""
    cells = nested(group, column)
    return float(np.nanmean(cells, axis=1).mean()) if cells.size else float("nan")


def _accuracies(group: pd.DataFrame) -> dict[str, float]:
    both = group[group["_drop"].notna()]
    return {"baseline": _mean(both, "_before"), "lesioned": _mean(both, "_after")}


def _interval(group: pd.DataFrame, **options: Any) -> Interval:
    found = over_prompts(group, "_drop", **options)
    if found.n_images and not group.loc[group["_drop"].notna(), "_before"].any():
        return replace(without_limits(found, "baseline is never right"), mean=float("nan"))
    return found


def reading_table(drops: pd.DataFrame, value: str = "drop") -> pd.DataFrame:
    """Layers in depth order (index) x aspects (columns) of one setting's `reading_drops`.

    ValueError if they mix settings: a layer and aspect would have two values.
    """
    table = drops.pivot(index="layer", columns="aspect", values=value)
    order = list(dict.fromkeys(drops["layer"]))
    return table.reindex(index=order, columns=list(dict.fromkeys(drops["aspect"])))
