"""Noise floor: how similar images are that share nothing but the prompt, or nothing at all.

Raw similarities have little headroom (two images of noise can score 0.99 by CLIP), so importance is also given as a
share of what another seed, or another prompt, changes: normalised importance = (1 - s) / (1 - floor). 1 means that the
lesion changes the image as much as a new seed (or prompt) does.

Input, from whoever holds the images: a frame of similarities between baselines, one row an unordered pair, with columns
prompt_id_a, seed_a, prompt_id_b, seed_b, similarity (1 for identical images; NaN where there is none) and, if several
models or ways of generating are in the results, the columns that tell them apart (model, steps...).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    over_prompts,
    shared_noise,
    without_limits,
)
from lesion.analysis.importance import LEAVE_ONE_OUT
from lesion.analysis.settings import layers_in_order

Gone = tuple[pd.Index, Floats, Floats]  # of `_leave_one_prompt_out`
NO_SEEDS = (0.0, 1)  # what `crossed.seed_variance` says where seeds add nothing
PAIR = ("prompt_id_a", "seed_a", "prompt_id_b", "seed_b", "similarity")
NEAR_ONE = "the floor may be 1"  # there is no share of nothing
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


def _other_prompts_by_seed(pairs: pd.DataFrame) -> pd.Series:
    """The floor of other prompts of each image, by the pairs of two prompts at its seed; index prompt_id, seed."""
    both = _both_ways(pairs)
    both = both[(both["prompt_id_a"] != both["prompt_id_b"]) & (both["seed_a"] == both["seed_b"])]
    found = both.groupby(["prompt_id_a", "seed_a"], sort=False)["similarity"].mean()
    return pd.Series(found.rename_axis(["prompt_id", "seed"]), dtype="float64")


def noise_floor(
    pairs: pd.DataFrame,
    confidence: float = 0.95,
    method: str = "bootstrap-t",
    shared: bool = False,
) -> pd.DataFrame:
    """Two rows, floor = other_seeds, other_prompts: mean over prompts, low, high, method, n_prompts, n_pairs.

    shared: all prompts share the noise of their seeds; limits are then widened for seeds (`crossed`): those of
    other_seeds by what each seed adds (`seed_floors`), where all prompts have three or more, and those of other_prompts
    by how pairs at one seed differ from those at another. The method is then named with `+seeds`; limits without it
    speak of these seeds only. Limits: other_seeds `bootstrap.interval` by `method` over prompts. A pair of two prompts
    belongs to both, so other_prompts takes the delete-one-prompt jackknife with Student's t (Arvesen, Ann. Math. Stat.
    40, 1969); it needs 4 prompts.
    """
    both, by_prompt = _both_ways(pairs), floor_by_prompt(pairs)
    same = both["prompt_id_a"] == both["prompt_id_b"]
    cells = 1.0 - by_prompt[["other_seeds"]].to_numpy()
    by_seed = 1.0 - seed_floors(pairs).unstack()
    if shared and len(by_seed) == np.isfinite(cells).sum():
        cells = by_seed.to_numpy()
    of_seeds = interval(cells, method, confidence, shared=shared, bounds=(0.0, 1.0))
    of_seeds = flipped(replace(of_seeds, low=max(of_seeds.low, 0.0), high=min(of_seeds.high, 1.0)))
    part = crossed.seed_variance(_other_prompts_by_seed(pairs).unstack()) if shared else NO_SEEDS
    of_prompts = _of_other_prompts(_leave_one_prompt_out(both[~same]), int((~same).sum()), confidence, part)
    found = {"other_seeds": (of_seeds, same), "other_prompts": (of_prompts, ~same)}
    records = []
    for name, (one, kept) in found.items():
        figures = {key: getattr(one, key) for key in ("mean", "low", "high", "method", "n_prompts")}
        records.append({"floor": name, **figures, "n_pairs": int(kept.sum()) // 2})
    return pd.DataFrame(records)


def _of_other_prompts(gone: Gone, pairs: int, confidence: float, seed_part: tuple[float, int]) -> Interval:
    _, floors, without = gone
    n = len(floors)
    spread = float(floors.std(ddof=1)) if n > 1 else np.nan
    bare = Interval(float(floors.mean()) if n else np.nan, np.nan, np.nan, "", spread, np.nan, n, pairs)
    if not n:
        return without_limits(bare, "no data")
    left = np.isfinite(without).any(axis=0)  # with one of two prompts gone there is no pair
    return _jackknife(bare, np.nanmean(without[:, left], axis=0), n, confidence, seed_part)


def _leave_one_prompt_out(both: pd.DataFrame) -> Gone:
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


def _jackknife(bare: Interval, without: Floats, n: int, confidence: float, seed_part: tuple[float, int]) -> Interval:
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
    floors of both, so that the terms of other_prompts are not independent. There it is the delete-one-prompt jackknife
    of the ratio (as in `noise_floor`; 4 prompts or n/a), which is too short for few prompts with uneven effects: its
    limits move out to those that follow from the limits of both parts (`_from_parts`). Where few prompts hold the
    importance or what another seed changes, or none is affected, limits are those of importance divided by those of the
    floor (`bounded` where few prompts hold them), each at
    half of the error (Bonferroni). `pairs` must be scored by the same metric. NaN where no prompt has a floor, or the
    mean floor is 1. options: those of `bootstrap.interval`.
    """
    part, keys = lesioned_rows(frame, metric)
    part = part[part["selection"] == LEAVE_ONE_OUT]
    records = []
    for setting, whole in groups(part, keys):
        of = of_setting(pairs, setting)
        floors = [(one, one.beside(whole)) for one in _floors(of)]
        for layer in layers_in_order(whole):
            group = whole[whole["layer"] == layer]
            raw = over_prompts(group, **options)
            record = {**setting, "layer": layer, "importance": raw.mean}
            record |= {"low": raw.low, "high": raw.high, "method": raw.method}
            for one, beside in floors:
                record |= _normalised(beside[beside["layer"] == layer], one, **options)
            records.append({**record, "n_prompts": raw.n_prompts, "n_images": raw.n_images, **counts(group)})
    ratios = [f"{prefix}{name}{suffix}" for name in FLOORS for prefix, suffix in _RATIO]
    names = ["layer", "importance", "low", "high", "method", *ratios, "n_prompts", "n_images"]
    return pd.DataFrame(records, columns=[*keys, *names, "n_invalid", "n_failed", "n_unscored"])


_RATIO = (("", ""), *(("normalised_", suffix) for suffix in ("", "_low", "_high", "_method")))


@dataclass(frozen=True)
class _Floor:
    """One floor. by_prompt: index prompt_id. by_seed: index prompt_id, seed. gone: None unless prompts share pairs."""

    name: str
    by_prompt: pd.Series
    by_seed: pd.Series
    gone: Gone | None = None

    def beside(self, group: pd.DataFrame) -> pd.DataFrame:
        """Images with an effect and a floor: headroom = 1 - floor of the prompt, own = the same of prompt and seed."""
        group = group.assign(headroom=1.0 - group["prompt_id"].map(self.by_prompt).astype("float64"))
        group = group.dropna(subset=["effect", "headroom"])
        if not len(group):
            return group.assign(own=group["headroom"])
        images = pd.MultiIndex.from_frame(group[["prompt_id", "seed"]])
        own = pd.Series(1.0 - self.by_seed.reindex(images).to_numpy(), index=group.index)
        return group.assign(own=own.fillna(group["headroom"]))

    def headroom(self, group: pd.DataFrame, **options: Any) -> Interval:
        """The mean of 1 - floor over the prompts of `beside`."""
        shared = shared_noise(group)
        if self.gone is None:
            return interval(nested(group, "own"), shared=shared, bounds=(0.0, 1.0), **options)
        prompts, floors, without = self.gone
        kept = prompts.isin(group["prompt_id"])
        part = crossed.seed_variance(nested(group, "own")) if shared else NO_SEEDS
        gone = prompts[kept], floors[kept], without[kept]
        return flipped(_of_other_prompts(gone, 0, options.get("confidence", 0.95), part))


def _floors(pairs: pd.DataFrame) -> tuple[_Floor, _Floor]:
    """Of other seeds, of other prompts."""
    by_prompt, both = floor_by_prompt(pairs), _both_ways(pairs)
    gone = _leave_one_prompt_out(both[both["prompt_id_a"] != both["prompt_id_b"]])
    seeds, prompts = FLOORS
    return (
        _Floor(seeds, by_prompt[seeds], seed_floors(pairs)),
        _Floor(prompts, by_prompt[prompts], _other_prompts_by_seed(pairs), gone),
    )


def _normalised(group: pd.DataFrame, floor: _Floor, **options: Any) -> dict[str, Any]:
    """group: the images of one layer, of `beside`."""
    means = group.groupby("prompt_id")[["effect", "headroom"]].mean()
    effect, headroom = (float(means[column].mean()) for column in ("effect", "headroom"))
    ratio = effect / headroom if headroom > 1e-9 else np.nan
    linear = nested(group.assign(linear=ratio + (group["effect"] - ratio * group["own"]) / headroom), "linear")
    shared = shared_noise(group)
    if any(few(effective_number(means[name]), len(means)) for name in ("effect", "headroom")):
        found = _divided(group, floor, **options)
    elif floor.gone is None:
        found = interval(linear, shared=shared, **options)
    else:
        # The jackknife's limits replace those of this interval: no need to resample for them.
        found = interval(linear, **{**options, "method": "t"})
        if found.n_prompts:
            part = crossed.seed_variance(linear) if shared else NO_SEEDS
            without = _ratios(means["effect"], *floor.gone)
            found = _jackknife(found, without, len(means), options.get("confidence", 0.95), part)
        if not found.reason:
            found = _outermost(found, over_prompts(group, **options), floor.headroom(group, **options))
    limits = {"": ratio, "_low": found.low, "_high": found.high, "_method": found.method}
    names = {f"normalised_{floor.name}{suffix}": value for suffix, value in limits.items()}
    return {floor.name: 1.0 - headroom, **names}


def _divided(group: pd.DataFrame, floor: _Floor, confidence: float = 0.95, **options: Any) -> Interval:
    """Limits of importance by those of the headroom, each at half of the error (Bonferroni), however these depend."""
    each = {**options, "confidence": (1 + confidence) / 2}
    top, bottom = over_prompts(group, **each), floor.headroom(group, **each)
    reason = top.reason or bottom.reason or ("" if bottom.low > 1e-9 else NEAR_ONE)
    if reason:
        return without_limits(top, reason)
    used = top.used if WIDENED in top.used or WIDENED not in bottom.used else top.used + WIDENED
    return replace(top, low=top.low / bottom.high, high=top.high / bottom.low, used=used)


def _outermost(found: Interval, top: Interval, bottom: Interval) -> Interval:
    """The limits of a ratio moved out to those that follow from the limits of both parts."""
    if top.reason or bottom.reason or not bottom.low > 1e-9:
        return without_limits(found, top.reason or bottom.reason or NEAR_ONE)
    low, high = _from_parts(top, bottom)
    return replace(found, low=min(found.low, low), high=max(found.high, high))


def _from_parts(top: Interval, bottom: Interval) -> tuple[float, float]:
    """Limits of a ratio of independent means by the limits of each, uneven ones too; bottom.low > 0.

    Donner & Zou, "Closed-form confidence intervals for functions of the normal mean and standard deviation", Stat.
    Methods Med. Res. 21, 2012; the lower one in a form that divides by no difference.
    """
    product = top.mean * bottom.mean
    least, most = top.low * (2 * top.mean - top.low), top.high * (2 * top.mean - top.high)
    close, far = bottom.low * (2 * bottom.mean - bottom.low), bottom.high * (2 * bottom.mean - bottom.high)
    low = least / (product + np.sqrt(product**2 - least * far)) if product > 0 else 0.0
    return float(low), float((product + np.sqrt(product**2 - most * close)) / close)


def _ratios(effects: pd.Series, prompts: pd.Index, _: Floats, without: Floats) -> Floats:
    """Mean effect by mean headroom with each prompt gone, finite ones. effects: of the prompts that have one (index)"""
    effect = effects.reindex(prompts).to_numpy(dtype=np.float64)[:, None]
    both = np.isfinite(effect) & np.isfinite(without)
    tops = np.where(both, effect, 0.0).sum(axis=0)
    bottoms = np.where(both, 1.0 - without, 0.0).sum(axis=0)
    ratios: Floats = tops[bottoms > 1e-9] / bottoms[bottoms > 1e-9]
    return ratios
