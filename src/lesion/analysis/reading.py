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

from lesion.analysis.bootstrap import Floats, Interval, effective_number, interval
from lesion.analysis.cells import nested, shared_noise, spread, without_limits
from lesion.analysis.estimates import FIGURES
from lesion.analysis.importance import LEAVE_ONE_OUT, ONLY_ONE, left_out
from lesion.analysis.paired import p_against_zero
from lesion.analysis.settings import BASELINE, in_order, layers_in_order, rows, settings
from lesion.scoring import known_metrics, metric_class
from lesion.study.columns import LESION

PREFIX = "read_"
RIGHT = "all_read"  # 1 where an image shows everything that its prompt asks for and that is read, else 0


def reading_columns(frame: pd.DataFrame) -> list[str]:
    """The columns of aspects that are read from pixels."""
    return [name for name in frame.columns if str(name).startswith(PREFIX)]


def reading_drops(frame: pd.DataFrame, selection: str = LEAVE_ONE_OUT, **options: Any) -> pd.DataFrame:
    """One row a setting, aspect and layer (in depth order; "" for a selection without layers, such as `all`).

    Columns: the setting's; aspect; layer; baseline, lesioned (accuracy, 0 to 1: share of images that show what is
    asked, means over seeds, then prompts, of the same images); drop (their difference), low, high, method, sd_prompts,
    sd_seeds, n_prompts, n_images, n_effective (`bootstrap.Interval`, over prompts that ask for the aspect); p (of drop
    against 0, `paired.p_against_zero`); n_invalid, n_failed, n_unscored (ok, asked, but without both values). An aspect
    that no prompt asks for has no row. Without limits: what `interval` cannot say (one prompt). Where no baseline shows
    the aspect there is nothing to lose: drop NaN, `n/a (baseline is never right)`. options: those of
    `bootstrap.interval`.
    """
    records: list[dict[str, Any]] = []
    for named, group in _asked(frame, selection):
        cells, shared = nested(group, "_drop"), shared_noise(group)
        one = _interval(group, cells, shared, **options)
        p = float("nan") if one.reason else p_against_zero(cells, shared, one.n_effective)
        found = {**_accuracies(group), **one.columns("drop"), "p": p}
        records.append({**named, **found, **left_out(group, "_drop")})
    figures = ["baseline", "lesioned", "drop", *FIGURES[1:], "p", "n_invalid", "n_failed", "n_unscored"]
    return pd.DataFrame(records, columns=[*_keys(frame), "aspect", "layer", *figures])


def prompt_columns(frame: pd.DataFrame) -> list[str]:
    """The columns of metrics that say how far an image shows what its prompt asks for; those read by rule too."""
    known = known_metrics()
    names = [str(name) for name in frame.columns if str(name) in known]
    return [name for name in names if metric_class(name).direction == "prompt"]


def adherence_columns(frame: pd.DataFrame) -> list[str]:
    """What adherence is told by: `prompt_columns`, with RIGHT in the place of those that are read by rule."""
    names = [name for name in prompt_columns(frame) if not name.startswith(PREFIX)]
    return [*names, RIGHT] if reading_columns(frame) else names


def with_right(frame: pd.DataFrame) -> pd.DataFrame:
    """The results with the column RIGHT, where aspects are read; NaN for prompts that ask for none of them."""
    aspects = frame[reading_columns(frame)].astype("float64")
    return frame.assign(**{RIGHT: aspects.min(axis=1)}) if aspects.shape[1] else frame


def adherence_lost(
    frame: pd.DataFrame, selection: str = LEAVE_ONE_OUT, metrics: Sequence[str] | None = None, **options: Any
) -> pd.DataFrame:
    """How much less an image shows of its prompt under a lesion: an image can change and lose nothing.

    One row a setting, metric (`prompt_columns`, or those of `metrics`) and layer, in depth order. Columns: the
    setting's; metric; layer; baseline, lesioned (means over seeds, then prompts, of the same images); lost (baseline
    minus lesioned, below 0 where the lesioned images fit their prompts better), low, high, method, sd_prompts,
    sd_seeds, n_prompts, n_images, n_effective (`bootstrap.Interval`, paired, over prompts); p (of lost against 0,
    `paired.p_against_zero`); verdict: `loses` or `gains` where the interval leaves out 0, `not settled` where it does
    not, `no interval` where it has no limits; n_invalid, n_failed, n_unscored. options: those of `bootstrap.interval`.
    """
    records: list[dict[str, Any]] = []
    for named, group in _asked(frame, selection, prompt_columns(frame) if metrics is None else metrics):
        name = named.pop("aspect")
        bounds, cells, shared = differences(name), nested(group, "_drop"), shared_noise(group)
        found = interval(cells, shared=shared, bounds=bounds, **options)
        verdict = "loses" if found.low > 0 else "gains" if found.high < 0 else "not settled"
        verdict = verdict if found.low == found.low else "no interval"
        p = p_against_zero(cells, shared, found.n_effective, bounds)
        record = {**named, "metric": name, **_accuracies(group), **found.columns("lost"), "p": p, "verdict": verdict}
        records.append({**record, **left_out(group, "_drop")})
    figures = ["baseline", "lesioned", "lost", *FIGURES[1:], "p", "verdict", "n_invalid", "n_failed", "n_unscored"]
    return pd.DataFrame(records, columns=[*_keys(frame), "metric", "layer", *figures])


def differences(metric: str) -> tuple[float, float]:
    """Between what differences of a metric lie."""
    least, most = (0.0, 1.0) if metric == RIGHT else metric_class(metric).range
    return least - most, most - least


def reading_shares(frame: pd.DataFrame, selection: str = ONLY_ONE, **options: Any) -> pd.DataFrame:
    """What an image still shows under `selection`: for only_one, what a layer alone brings through.

    One row a setting, aspect and layer as in `reading_drops`; share (of images that show what is asked, 0 to 1, means
    over seeds, then prompts), low, high, method, sd_prompts, sd_seeds, n_prompts, n_images, n_effective
    (`bootstrap.Interval`); control (the share with every layer lesioned, NaN without selection `all`), p (of share
    against control, paired: `paired.p_against_zero`); n_invalid, n_failed, n_unscored.
    """
    blind = {  # by setting, aspect and no layer: what is shown, by image
        (*named.values(),): (_mean(nested(group, "_after")), group.drop_duplicates(IMAGE).set_index(IMAGE)["_after"])
        for named, group in _asked(frame, "all")
    }
    records: list[dict[str, Any]] = []
    for named, group in _asked(frame, selection):
        cells, shared = nested(group, "_after"), shared_noise(group)
        sides = [effective_number(side.mean(axis=1)) for side in _filled(cells)]
        found = interval(cells, shared=shared, bounds=(0.0, 1.0), effective=min(sides, default=0.0), **options)
        record = {**named, **found.columns("share"), "control": float("nan"), "p": float("nan")}
        control = blind.get((*{**named, "layer": ""}.values(),))
        if control is not None:
            record["control"], beside = control
            more = group["_after"] - beside.reindex(pd.MultiIndex.from_frame(group[IMAGE])).to_numpy()
            apart = nested(group.assign(_more=more), "_more")
            effective = effective_number(np.nanmean(apart, axis=1)) if apart.size else 0.0
            record["p"] = p_against_zero(apart, shared, effective)
        records.append({**record, **left_out(group, "_after")})
    figures = ["share", *FIGURES[1:], "control", "p", "n_invalid", "n_failed", "n_unscored"]
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
    numbered = [name for name in (*IMAGE, "cluster") if name in frame]  # numbers are told apart faster than texts
    frame = frame.assign(**{name: pd.factorize(frame[name], sort=True)[0] for name in numbered})
    for setting in settings(frame):
        part, columns = rows(frame, setting), setting.columns()
        lesioned = part[part["selection"] == selection]
        names = ["prompt_id", "seed", "layer", "layer_index", "status", *aspects]  # they are taken apart
        names += [name for name in ("noise", "cluster") if name in frame]
        lesioned = lesioned[names].assign(layer=lesioned["layer"].fillna(""))
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


IMAGE = ["prompt_id", "seed"]


def _filled(cells: Floats) -> list[Floats]:
    """Shares and what they lack of 1, each prompt's mean where an image is missing; nothing for no cells."""
    if not cells.size:
        return []
    means = np.nanmean(cells, axis=1, keepdims=True)
    return [means, 1.0 - means]


def _mean(cells: Floats) -> float:
    """Over seeds, then prompts."""
    return float(np.nanmean(cells, axis=1).mean()) if cells.size else float("nan")


def _accuracies(group: pd.DataFrame) -> dict[str, float]:
    both = group["_drop"].notna().to_numpy()
    found = {}
    for side, column in (("baseline", "_before"), ("lesioned", "_after")):
        found[side] = _mean(spread(group, np.where(both, group[column].to_numpy(), np.nan)))
    return found


def _interval(group: pd.DataFrame, cells: Floats, shared: bool, **options: Any) -> Interval:
    found = interval(cells, shared=shared, bounds=(-1.0, 1.0), **options)
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
