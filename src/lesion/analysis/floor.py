"""Noise floor: how similar images are that share nothing but the prompt, or nothing at all.

Raw similarities have little headroom (two images of noise can score 0.99 by CLIP), so importance is also given as a
share of what another seed, or another prompt, changes: normalised importance = (1 - s) / (1 - floor). 1 means that the
lesion changes the image as much as a new seed (or prompt) does.

Input, from whoever holds the images: a frame of similarities between baselines, one row an unordered pair, with columns
prompt_id_a, seed_a, prompt_id_b, seed_b, similarity (1 for identical images; NaN where there is none) and, if several
models or ways of generating are in the results, the columns that tell them apart (model, steps...).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from lesion.analysis import crossed
from lesion.analysis.bootstrap import WIDENED, Floats, Interval, effective_number, few, interval
from lesion.analysis.cells import (
    counts,
    flipped,
    groups,
    lesioned_rows,
    nested,
    no_effect,
    over_prompts,
    shared_noise,
    without_limits,
)
from lesion.analysis.importance import LEAVE_ONE_OUT
from lesion.analysis.settings import layers_in_order

PAIR = ("prompt_id_a", "seed_a", "prompt_id_b", "seed_b", "similarity")
FEW = "few affected prompts"  # a ratio has no bounds that would give limits
FLOORS = ("other_seeds", "other_prompts")


def _both_ways(pairs: pd.DataFrame) -> pd.DataFrame:
    """Each valid pair once from either side; an image with itself is no pair."""
    if missing := [name for name in PAIR if name not in pairs]:
        raise ValueError(f"pairs of baselines lack the columns {', '.join(missing)}")
    valid = pairs[list(PAIR)].dropna(subset=["similarity"])
    valid = valid[(valid["prompt_id_a"] != valid["prompt_id_b"]) | (valid["seed_a"] != valid["seed_b"])]
    turned = valid.rename(columns=_turned)
    both = pd.concat([valid, turned[list(PAIR)]])
    return both.drop_duplicates(list(PAIR[:4]))


def _turned(name: str) -> str:
    return {"_a": name[:-1] + "b", "_b": name[:-1] + "a"}.get(name[-2:], name)


def floor_by_prompt(pairs: pd.DataFrame) -> pd.DataFrame:
    """One row a prompt (index prompt_id): other_seeds, other_prompts (mean similarities, NaN without such pairs).

    other_seeds: over pairs of two seeds of this prompt. other_prompts: over pairs with one other prompt, then over the
    other prompts. ValueError when a column is missing.
    """
    both = _both_ways(pairs)
    same = both["prompt_id_a"] == both["prompt_id_b"]
    seeds = both[same].groupby("prompt_id_a", sort=False)["similarity"].mean()
    others = both[~same].groupby(["prompt_id_a", "prompt_id_b"], sort=False)["similarity"].mean()
    table = pd.DataFrame(index=pd.Index(list(dict.fromkeys(both["prompt_id_a"])), name="prompt_id"), dtype="float64")
    table["other_seeds"] = seeds
    table["other_prompts"] = others.groupby(level=0, sort=False).mean()
    return table.astype("float64")


def seed_floors(pairs: pd.DataFrame) -> pd.Series:
    """What each image's seed makes of the floor of other seeds of its prompt; index prompt_id, seed.

    Jackknife pseudo-values of the mean over pairs of seeds: their mean over a prompt's seeds is its floor, and their
    spread is the error of it. Prompts with fewer than three seeds are not in it.
    """
    both = _both_ways(pairs)
    both = both[both["prompt_id_a"] == both["prompt_id_b"]]
    by_seed = both.groupby(["prompt_id_a", "seed_a"], sort=False)["similarity"].agg(["mean", "size"])
    per_prompt = both.groupby("prompt_id_a", sort=False)["similarity"].mean()
    prompts = by_seed.index.get_level_values(0)
    seeds = by_seed.groupby(level=0, sort=False)["size"].transform("size")
    found = (2 * (seeds - 1) * by_seed["mean"] - seeds * per_prompt.reindex(prompts).to_numpy()) / (seeds - 2)
    # The formula is that of complete pairs.
    found = found[(seeds > 2) & (by_seed["size"] == seeds - 1)]
    return pd.Series(found.rename_axis(["prompt_id", "seed"]), dtype="float64")


def noise_floor(
    pairs: pd.DataFrame,
    confidence: float = 0.95,
    method: str = "bootstrap-t",
    shared: bool = False,
) -> pd.DataFrame:
    """Two rows, floor = other_seeds, other_prompts: mean over prompts, low, high, method, n_prompts, n_pairs.

    shared: all prompts share the noise of their seeds; limits of other_seeds are then widened for seeds, by what each
    adds (`seed_floors`), where all prompts have three or more. Limits: other_seeds `bootstrap.interval` by `method`
    over prompts. A pair of two prompts belongs to both, so
    other_prompts takes the delete-one-prompt jackknife with Student's t (Arvesen, Ann. Math. Stat. 40, 1969); it needs
    4 prompts.
    """
    both, by_prompt = _both_ways(pairs), floor_by_prompt(pairs)
    same = both["prompt_id_a"] == both["prompt_id_b"]
    cells = 1.0 - by_prompt[["other_seeds"]].to_numpy()
    by_seed = 1.0 - seed_floors(pairs).unstack()
    if shared and len(by_seed) == np.isfinite(cells).sum():
        cells = by_seed.to_numpy()
    found_ = interval(cells, method, confidence, shared=shared, bounds=(0.0, 1.0))
    seeds = flipped(replace(found_, low=max(found_.low, 0.0), high=min(found_.high, 1.0)))
    found = {"other_seeds": (seeds, same), "other_prompts": (_of_other_prompts(both[~same], confidence), ~same)}
    records = []
    for name, (one, kept) in found.items():
        figures = {key: getattr(one, key) for key in ("mean", "low", "high", "method", "n_prompts")}
        records.append({"floor": name, **figures, "n_pairs": int(kept.sum()) // 2})
    return pd.DataFrame(records)


def _of_other_prompts(both: pd.DataFrame, confidence: float) -> Interval:
    _, floors, without = _leave_one_prompt_out(both)
    n = len(floors)
    spread = float(floors.std(ddof=1)) if n > 1 else np.nan
    bare = Interval(float(floors.mean()) if n else np.nan, np.nan, np.nan, "", spread, np.nan, n, len(both))
    if not n:
        return without_limits(bare, "no data")
    left = np.isfinite(without).any(axis=0)  # with one of two prompts gone there is no pair
    return _jackknife(bare, np.nanmean(without[:, left], axis=0), n, confidence)


def _leave_one_prompt_out(both: pd.DataFrame) -> tuple[pd.Index, Floats, Floats]:
    """Prompts (P), the floor of each by its pairs with other prompts (P,), and the same with one prompt gone (P, P).

    [i, k]: the floor of prompt i by its partners but k; NaN for k itself, and where k is the only partner.
    """
    pairs = both.groupby(["prompt_id_a", "prompt_id_b"], sort=False)["similarity"].mean().unstack()
    square = pairs.reindex(columns=pairs.index).to_numpy(dtype=np.float64)
    known = np.isfinite(square)
    values = np.where(known, square, 0.0)
    sums, held = values.sum(axis=1), known.sum(axis=1)
    left = (held[:, None] - known).astype(np.float64)
    left[np.diag_indices(len(left))] = 0.0
    without = np.where(left > 0, (sums[:, None] - values) / np.maximum(left, 1.0), np.nan)
    return pairs.index, sums / np.maximum(held, 1), without


def _jackknife(
    bare: Interval, without: Floats, n: int, confidence: float, seed_part: tuple[float, int] = (0.0, 1)
) -> Interval:
    """Student's t (n - 1 degrees of freedom) on the delete-one values (P,) of a mean or ratio.

    n: prompts that are in it; where partners of these are deleted too there are more values. Needs 4 prompts.
    seed_part: of `crossed.seed_variance`, for seeds that all prompts share.
    """
    if n < 4:
        return without_limits(bare, "fewer than 4 prompts")
    count = len(without)
    error = float(np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum()))
    if not error > 1e-12:
        return without_limits(bare, "constant")
    more = crossed.widening(error, n, *seed_part, confidence)
    if not np.isfinite(more):
        return without_limits(bare, "no prompt has two seeds")
    reach = float(np.hypot(stdtrit(n - 1, (1 + confidence) / 2) * error, more))
    used = "jackknife" + (WIDENED if more else "")
    return replace(bare, low=bare.mean - reach, high=bare.mean + reach, used=used, reason="")


def of_setting(pairs: pd.DataFrame, setting: dict[str, Any]) -> pd.DataFrame:
    """The pairs of this setting's model and way of generating, as far as the pairs name them."""
    for name, value in setting.items():
        if name in pairs:
            pairs = pairs[pairs[name].isna() if pd.isna(value) else pairs[name] == value]
    return pairs


def normalised_importance(
    frame: pd.DataFrame, pairs: pd.DataFrame, metric: str | None = None, **options: Any
) -> pd.DataFrame:
    """One row a setting and layer: raw importance beside both normalised ones, each with its interval.

    Columns: the setting's; layer; importance, low, high, method; for each floor (other_seeds, other_prompts) NAME (mean
    similarity of its prompts), normalised_NAME, normalised_NAME_low, _high, _method; n_prompts, n_images, and the rows
    left out. The normalised value is a ratio of means over the prompts that have both, never a mean of ratios, which
    one prompt with a floor near 1 would rule. With other_seeds its interval is that of the linearised ratio (Cochran,
    "Sampling Techniques", 1977, ch. 6): R + ((1 - s) - R (1 - floor)) / mean(1 - floor) for each image,
    with what its seed makes of the floor (`seed_floors`) where there are three or more. A pair of two prompts is in the
    floors of both, so that the terms of other_prompts are not independent: there it is the
    delete-one-prompt jackknife of the ratio (as in `noise_floor`; 4 prompts or n/a). `pairs` must be scored by the same
    metric. NaN where no prompt has a floor, or the mean floor is 1. options: those of `bootstrap.interval`.
    """
    part, keys = lesioned_rows(frame, metric)
    part = part[part["selection"] == LEAVE_ONE_OUT]
    records = []
    for setting, whole in groups(part, keys):
        of = of_setting(pairs, setting)
        floors, both = floor_by_prompt(of), _both_ways(of)
        gone = _leave_one_prompt_out(both[both["prompt_id_a"] != both["prompt_id_b"]])
        by_seed = seed_floors(of)
        for layer in layers_in_order(whole):
            group = whole[whole["layer"] == layer]
            raw = over_prompts(group, **options)
            record = {**setting, "layer": layer, "importance": raw.mean}
            record |= {"low": raw.low, "high": raw.high, "method": raw.method}
            for name in FLOORS:
                more = {"gone": gone} if name == "other_prompts" else {"by_seed": by_seed}
                record |= _normalised(group, floors[name], name, **more, **options)
            records.append({**record, "n_prompts": raw.n_prompts, "n_images": raw.n_images, **counts(group)})
    ratios = [f"{prefix}{name}{suffix}" for name in FLOORS for prefix, suffix in _RATIO]
    names = ["layer", "importance", "low", "high", "method", *ratios, "n_prompts", "n_images"]
    return pd.DataFrame(records, columns=[*keys, *names, "n_invalid", "n_failed", "n_unscored"])


_RATIO = (("", ""), *(("normalised_", suffix) for suffix in ("", "_low", "_high", "_method")))


def _normalised(
    group: pd.DataFrame,
    floor: pd.Series,
    name: str,
    gone: tuple[pd.Index, Floats, Floats] | None = None,
    by_seed: pd.Series | None = None,
    **options: Any,
) -> dict[str, Any]:
    """gone: `_leave_one_prompt_out` where prompts share pairs. by_seed: `seed_floors` where they do not."""
    group = group.assign(headroom=1.0 - group["prompt_id"].map(floor).astype("float64"))
    group = group.dropna(subset=["effect", "headroom"])
    means = group.groupby("prompt_id")[["effect", "headroom"]].mean()
    effect, headroom = (float(means[column].mean()) for column in ("effect", "headroom"))
    ratio = effect / headroom if headroom > 1e-9 else np.nan
    own = group["headroom"]
    if by_seed is not None and len(group):
        images = pd.MultiIndex.from_frame(group[["prompt_id", "seed"]])
        own = (1.0 - pd.Series(by_seed.reindex(images).to_numpy(), index=group.index)).fillna(own)
    linear = group.assign(linear=ratio + (group["effect"] - ratio * own) / headroom)
    # The jackknife's limits replace those of this interval: no need to resample for them.
    found = interval(
        nested(linear, "linear"),
        shared=gone is None and shared_noise(group),
        **(options if gone is None else {**options, "method": "t"}),
    )
    if gone is not None and found.n_prompts:
        part = crossed.seed_variance(nested(linear, "linear")) if shared_noise(group) else (0.0, 1)
        found = _jackknife(found, _ratios(means["effect"], *gone), len(means), options.get("confidence", 0.95), part)
    if no_effect(group["effect"]):
        found = without_limits(found, "no effect")
    elif few(effective_number(means["effect"]), len(means)):
        found = without_limits(found, FEW)
    limits = {"": ratio, "_low": found.low, "_high": found.high, "_method": found.method}
    return {name: 1.0 - headroom, **{f"normalised_{name}{suffix}": value for suffix, value in limits.items()}}


def _ratios(effects: pd.Series, prompts: pd.Index, _: Floats, without: Floats) -> Floats:
    """Mean effect by mean headroom with each prompt gone, finite ones. effects: of the prompts that have one (index)"""
    effect = effects.reindex(prompts).to_numpy(dtype=np.float64)[:, None]
    both = np.isfinite(effect) & np.isfinite(without)
    tops = np.where(both, effect, 0.0).sum(axis=0)
    bottoms = np.where(both, 1.0 - without, 0.0).sum(axis=0)
    ratios: Floats = tops[bottoms > 1e-9] / bottoms[bottoms > 1e-9]
    return ratios
