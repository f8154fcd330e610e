"""Paired tests over prompts, corrected for how many there are.

All are of differences of prompt means: prompts are the independent units, seeds only make a prompt's mean sharper, and
where they are the same noise for every prompt cost what `crossed` says. The p-value is that of Student's t, and where
one of the two sides rests on few prompts (`bootstrap.effective_number`), the larger one of that and of `bounded`, which
holds whatever the distribution: t tests find differences in up to 69 % of studies without any where effects are that
sparse (`scripts/simulate_inference.py`). So it is where all differences are alike. A test that cannot be made (one
prompt) has p = NaN and does not count in the correction.

`wins` asks something else of two layers: which changes the image more on most prompts. That needs no mean, so that few
prompts say something whatever the distribution.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lesion.analysis import bounded, crossed
from lesion.analysis.bootstrap import FLAT, Floats, effective_number, few, interval
from lesion.analysis.cells import (
    cube,
    groups,
    images,
    lesioned_rows,
    matched,
    nested,
    prompt_averages,
    rests_on,
    shared_noise,
)
from lesion.analysis.floor import floor_by_prompt, of_setting, seed_floors
from lesion.analysis.importance import LEAVE_ONE_OUT, NO_EFFECT
from lesion.analysis.settings import layers_in_order

TEST = ("difference", "low", "high", "method", "p", "p_holm", "n_prompts")


def holm(p: ArrayLike, least: ArrayLike = 0.0, alpha: float = 0.05) -> Floats:
    """Adjusted p-values, NaN for NaN (Holm, Scand. J. Stat. 6, 1979): reject where they are at most alpha.

    least: the smallest p that each test could have given. Tests that could not be significant among so many, whatever
    came, do not count (Tarone, Biometrics 46, 1990) and are NaN. Without them statsmodels' `multipletests(p,
    method="holm")` does the same; these lines spare the dependency.
    """
    values = np.asarray(p, dtype=np.float64)
    adjusted = np.full(values.shape, np.nan)
    known = np.isfinite(values)
    known = np.flatnonzero(known & (np.asarray(least) <= alpha / max(int(known.sum()), 1)))
    order = known[np.argsort(values[known], kind="stable")]
    steps = values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return adjusted


def p_against_zero(cells: Floats, shared: bool, effective: float, bounds: tuple[float, float] = (-1.0, 1.0)) -> float:
    """p of differences (P, S), NaN where an image is missing, against a mean of 0.

    shared: each column is one seed, whose noise all prompts share. effective: number of prompts that the sides rest on,
    the smaller one. bounds: of a prompt's difference.
    """
    cells = cells[np.isfinite(cells).any(axis=1)]
    if len(cells) < 2:
        return float("nan")
    means = np.nanmean(cells, axis=1)
    spread = float(means.std(ddof=1))
    flat = spread <= FLAT * float(np.abs(means).max())
    part, seeds = crossed.seed_variance(cells) if shared else (0.0, 1)
    p = 0.0 if flat else crossed.p_value(float(means.mean()), spread / np.sqrt(len(means)), len(means), part, seeds)
    return max(p, float(bounded.p_value(means, bounds))) if flat or few(effective, len(means)) else p


def _compared(
    cells: Floats, shared: bool, effective: float, bounds: tuple[float, float], **options: Any
) -> dict[str, Any]:
    """cells: differences, prompts x seeds."""
    found = interval(cells, shared=shared, effective=effective, bounds=bounds, **options)
    p = p_against_zero(cells, shared, effective, bounds)
    values = {"difference": found.mean, "low": found.low, "high": found.high, "method": found.method}
    return {**values, "p": p, "n_prompts": found.n_prompts}


def comparisons(frame: pd.DataFrame, metric: str | None = None) -> pd.DataFrame:
    """Every two layers of a setting compared: is one more important than the other?

    One row a setting and pair. Columns: the setting's; layer (the more important one), other, difference (of
    importance, >= 0), p, p_holm (over the setting's pairs), n_prompts. Over the images that are valid for every layer;
    those of a layer without effect count as 0. Where a layer rests on few prompts, the test takes as known that no
    layer changes a prompt by more than the `largest` effect of any layer on any prompt of the setting.
    """
    part, keys = lesioned_rows(frame, metric)
    part = part[part["selection"] == LEAVE_ONE_OUT]
    tables = []
    for setting, whole in groups(part, keys):
        wide = matched(whole)
        cells, shared = without_noise(cube(wide)), shared_noise(whole)
        by_prompt = prompt_averages(cells)
        numbers, order, bounds = _ranked(by_prompt)
        records = []
        for one, other in combinations(order, 2):
            p = p_against_zero(cells[one] - cells[other], shared, min(numbers[one], numbers[other]), bounds)
            names = {"layer": wide.columns[one], "other": wide.columns[other]}
            difference = float((by_prompt[one] - by_prompt[other]).mean())
            records.append({**setting, **names, "difference": difference, "p": p, "n_prompts": by_prompt.shape[1]})
        table = pd.DataFrame(records, columns=[*keys, "layer", "other", "difference", "p", "p_holm", "n_prompts"])
        tables.append(table.assign(p_holm=holm(table["p"])))
    names_ = [*keys, "layer", "other", "difference", "p", "p_holm", "n_prompts"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=names_)


def _ranked(by_prompt: Floats) -> tuple[list[float], list[int], tuple[float, float]]:
    """Of effects of layers on prompts (L, P): the number of prompts that each layer rests on, the layers from the most
    important one on, and the bounds of differences between them.
    """
    order = np.argsort(-by_prompt.mean(axis=1), kind="stable").tolist() if by_prompt.size else []
    most = largest(by_prompt)
    return [effective_number(layer) for layer in by_prompt], order, (-most, most)


def wins(frame: pd.DataFrame, metric: str | None = None) -> pd.DataFrame:
    """Every two layers of a setting compared: does one change the image more on most prompts where they differ?

    One row a setting and pair. Columns: the setting's; layer (the one that does so more often), other; n_more, n_less
    (prompts on which it changes the image more, less, means over seeds; differences up to 1e-4 are rounding and none);
    p (exact two-sided sign test), p_least (had all of n_more + n_less prompts agreed), p_holm (over the setting's
    pairs); n_prompts. Over the images that are valid for every layer. Where prompts share
    the noise of their seeds, it speaks of these seeds.
    """
    from scipy.special import bdtr

    part, keys = lesioned_rows(frame, metric)
    part = part[part["selection"] == LEAVE_ONE_OUT]
    names = [*keys, "layer", "other", "n_more", "n_less", "p", "p_least", "p_holm", "n_prompts"]
    tables = []
    for setting, whole in groups(part, keys):
        wide = matched(whole)
        by_prompt, layers = prompt_averages(cube(wide)), np.array(wide.columns, dtype=object)
        one, other = np.triu_indices(len(layers), 1)
        apart = by_prompt[one] - by_prompt[other]
        more, less = (apart > NO_EFFECT).sum(axis=1), (apart < -NO_EFFECT).sum(axis=1)
        one, other = np.where(more >= less, (one, other), (other, one))
        most, least = np.maximum(more, less), np.minimum(more, less)
        p = np.minimum(2 * bdtr(least.astype(float), most + least, 0.5), 1.0)
        table = pd.DataFrame({"layer": layers[one], "other": layers[other], "n_more": most, "n_less": least, "p": p})
        table["p_least"] = np.minimum(2.0 ** (1 - (most + least)), 1.0)
        tables.append(table.assign(**setting, p_holm=holm(p, table["p_least"]), n_prompts=by_prompt.shape[1])[names])
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=names)


def largest(by_prompt: Floats) -> float:
    """The largest effect of any layer on any prompt (L, P), at most 1: bounds of differences between layers."""
    return float(np.clip(np.abs(by_prompt).max(initial=NO_EFFECT), NO_EFFECT, 1.0))


def neighbours(frame: pd.DataFrame, metric: str | None = None, **options: Any) -> pd.DataFrame:
    """Is a layer more important than the next one? One row a setting and pair of neighbouring ranks.

    Columns: the setting's; rank (of `layer`, the more important one), layer, next_layer, difference (mean of importance
    minus importance, >= 0 by construction), low, high, method, p, p_holm (over the setting's pairs), n_prompts,
    n_left_out (images not valid for every layer, which are in no difference). options: those of `bootstrap.interval`.
    """
    part, keys = lesioned_rows(frame, metric)
    part = part[part["selection"] == LEAVE_ONE_OUT]
    tables = []
    for setting, whole in groups(part, keys):
        wide = matched(whole)
        cells, shared = cube(wide), shared_noise(whole)
        numbers, order, bounds = _ranked(prompt_averages(cells))
        records: list[dict[str, Any]] = []
        for rank, (one, other) in enumerate(pairwise(order), start=1):
            names = {"rank": rank, "layer": wide.columns[one], "next_layer": wide.columns[other]}
            number = min(numbers[one], numbers[other])
            records.append(
                {**setting, **names, **_compared(cells[one] - cells[other], shared, number, bounds, **options)}
            )
        table = pd.DataFrame(records, columns=[*keys, "rank", "layer", "next_layer", *TEST])
        tables.append(table.assign(p_holm=holm(table["p"]), n_left_out=images(whole) - len(wide)))
    names_ = [*keys, "rank", "layer", "next_layer", *TEST, "n_left_out"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=names_)


def without_noise(cells: Floats) -> Floats:
    """Layers (L, P, S) without effect at exactly 0, so that they tie: their order would be that of rounding errors."""
    silent = np.nanmax(np.abs(cells), axis=(1, 2), initial=0.0, keepdims=True) <= NO_EFFECT
    return np.where(silent, 0.0 * cells, cells)


def against_floor(
    frame: pd.DataFrame,
    pairs: pd.DataFrame,
    metric: str | None = None,
    floor: str = "other_seeds",
    spread: bool = False,
    **options: Any,
) -> pd.DataFrame:
    """Does losing a layer change an image more than a new seed (or prompt) does? One row a setting and layer.

    difference: mean over prompts of importance - (1 - floor of the same prompt), negative where the lesion changes
    less. Columns as in `neighbours`, without rank and next_layer; p_holm over the setting's layers; prompts without a
    floor are left out. pairs, floor: see `lesion.analysis.floor`. An image's floor is the jackknife pseudo-value of its
    seed (Arvesen, Ann. Math. Stat. 40, 1969), so that what a seed is worth in the floor counts among the errors of
    shared seeds; with fewer than three seeds, that of its prompt. Where few prompts decide, a difference is taken to
    lie between minus what another seed changes of any prompt, and 1. spread: add sd_prompts, sd_seeds of
    differences, and least, the least that one is taken to be.
    """
    part, keys = lesioned_rows(frame, metric)
    part = part[part["selection"] == LEAVE_ONE_OUT]
    tables = []
    for setting, whole in groups(part, keys):
        of = of_setting(pairs, setting)
        floors = floor_by_prompt(of)[floor]
        headroom = 1.0 - whole["prompt_id"].map(floors).astype("float64")
        if floor == "other_seeds":
            images_ = pd.MultiIndex.from_frame(whole[["prompt_id", "seed"]])
            by_seed = pd.Series(seed_floors(of).reindex(images_).to_numpy(), index=whole.index, dtype="float64")
            headroom = (1.0 - by_seed).fillna(headroom)
        whole = whole.assign(beyond=whole["effect"] - headroom, headroom=headroom)
        rest = effective_number((1.0 - floors.dropna()).to_numpy())
        records = []
        for layer in layers_in_order(whole):
            group = whole[whole["layer"] == layer]
            valid = group[group["beyond"].notna()]
            number = min(rests_on(valid), rest)
            most = float((1.0 - floors).max()) if len(valid) else 1.0
            bounds = (-min(max(most, NO_EFFECT), 1.0), 1.0)
            cells = nested(valid, "beyond")
            found = _compared(cells, shared_noise(whole), number, bounds, **options)
            if spread:
                both = interval(cells, "t")
                found |= {"sd_prompts": both.sd_prompts, "sd_seeds": both.sd_seeds, "least": bounds[0]}
            records.append({**setting, "layer": layer, **found, "n_left_out": int(group["beyond"].isna().sum())})
        more = ["sd_prompts", "sd_seeds", "least"] if spread else []
        table = pd.DataFrame(records, columns=[*keys, "layer", *TEST, *more, "n_left_out"])
        tables.append(table.assign(p_holm=holm(table["p"])))
    return (
        pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=[*keys, "layer", *TEST, "n_left_out"])
    )
