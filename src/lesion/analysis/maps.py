"""What attention maps say in numbers, and whether layers that look at a word are layers that carry it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lesion.analysis.importance import LEAVE_ONE_OUT, similarity
from lesion.analysis.settings import BASELINE
from lesion.study.capture import REST, SPECIAL

LEVELS = 256  # thresholds between the least and the largest value of a map
MEASURES = ("share", "entropy", "mass", "iou", "average_precision")
Array = NDArray[np.float64]


def entropy(maps: Array) -> Array:
    """Spread of maps over their places: Shannon entropy over its maximum, in [0, 1]; 1 where all places are equal.

    maps: (n, height, width), >= 0. Returns (n,), NaN for a map of zeros.
    """
    flat = maps.reshape(len(maps), -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = flat / flat.sum(axis=1, keepdims=True)
        share[flat.sum(axis=1) == 0] = np.nan
        terms = np.where(share > 0, share * np.log(share), 0.0 * share)
    spread: Array = -terms.sum(axis=1) / np.log(flat.shape[1])
    return spread


def against_masks(maps: Array, masks: NDArray[np.bool_]) -> dict[str, Array]:
    """Compare maps with the pixels that their words speak of, both (n, height, width).

    mass: share of the map inside the mask. iou: intersection over union of the mask and the map above a threshold, at
    the best of `LEVELS` thresholds. average_precision: of the pixels ranked by the map, area under precision over
    recall as the sum of (R_k - R_k-1) P_k. All in [0, 1]. Returns (n,) each.
    """
    flat, inside = maps.reshape(len(maps), -1).astype(np.float64), masks.reshape(len(maps), -1)
    mass = (flat * inside).sum(axis=1) / flat.sum(axis=1)
    low, high = flat.min(axis=1, keepdims=True), flat.max(axis=1, keepdims=True)
    level = ((flat - low) / np.where(high > low, high - low, 1) * (LEVELS - 1)).astype(np.int64)
    index = (LEVELS - 1 - level) + LEVELS * np.arange(len(maps))[:, None]  # the largest values first
    size = LEVELS * len(maps)
    chosen = np.bincount(index.ravel(), minlength=size).reshape(len(maps), LEVELS).cumsum(axis=1)
    weights = inside.ravel().astype(np.float64)
    hits = np.bincount(index.ravel(), weights=weights, minlength=size).reshape(len(maps), LEVELS).cumsum(axis=1)
    wanted = inside.sum(axis=1, keepdims=True)
    iou = (hits / (chosen + wanted - hits)).max(axis=1)
    precision = hits / np.maximum(chosen, 1)
    gained = np.diff(hits, axis=1, prepend=0) / wanted
    return {"mass": mass, "iou": iou, "average_precision": (gained * precision).sum(axis=1)}


def speaking(maps: pd.DataFrame) -> pd.DataFrame:
    """Rows of the words that speak of the picture, those with an aspect; of a prompt without such, of all its words."""
    words = maps[~maps["word"].isin((SPECIAL, REST))]
    speaks = words["aspect"] != ""
    return words[speaks | ~speaks.groupby(words["prompt_id"]).transform("any")]


def _by_aspect(maps: pd.DataFrame) -> pd.DataFrame:
    """Rows of baselines' words of `speaking`: all of them as aspect `all`, then those with an aspect once more."""
    part = speaking(maps[maps["selection"] == BASELINE])
    return pd.concat([part.assign(aspect="all"), part[part["aspect"] != ""]])


def layer_means(maps: pd.DataFrame) -> pd.DataFrame:
    """Means of baselines' maps by layer and aspect, over words and seeds, then prompts; in the order of the layers.

    maps: as in maps.parquet. Columns: map_layer, aspect (all: every word of `speaking`), n_prompts, and the measures.
    """
    both = _by_aspect(maps)
    keys = ["map_layer", "map_index", "aspect"]
    by_prompt = both.groupby([*keys, "prompt_id"], sort=False)[list(MEASURES)].mean().reset_index()
    found = by_prompt.groupby(keys, sort=False)
    table = found[list(MEASURES)].mean().join(found["prompt_id"].nunique().rename("n_prompts")).reset_index()
    return table.sort_values(["aspect", "map_index"]).drop(columns="map_index").reset_index(drop=True)


def word_means(maps: pd.DataFrame) -> pd.DataFrame:
    """Means of baselines' maps by word, over layers, seeds and places in a prompt, then prompts.

    maps: as in maps.parquet. Columns: word, aspect, n_prompts, and the measures. Words are those of `speaking`.
    """
    part = speaking(maps[maps["selection"] == BASELINE])
    part = part.assign(word=part["word"].map(lambda word: word.partition("#")[0]))
    keys = ["aspect", "word"]
    by_prompt = part.groupby([*keys, "prompt_id"])[list(MEASURES)].mean().reset_index()
    found = by_prompt.groupby(keys)
    return found[list(MEASURES)].mean().join(found["prompt_id"].nunique().rename("n_prompts")).reset_index()


def with_measures(frame: pd.DataFrame, maps: pd.DataFrame) -> pd.DataFrame:
    """The results with columns of each image's maps: attention_MEASURE and attention_MEASURE_ASPECT.

    They are means over all layers that look and over the words of `speaking`, or of one aspect.
    maps: as in maps.parquet. NaN for images without maps.
    """
    if maps.empty:
        return frame
    words = speaking(maps)
    parts = [words.groupby("cell")[list(MEASURES)].mean().add_prefix("attention_")]
    for aspect, rows in words[words["aspect"] != ""].groupby("aspect"):
        means = rows.groupby("cell")[list(MEASURES)].mean()
        parts.append(means.rename(columns={name: f"attention_{name}_{aspect}" for name in MEASURES}))
    columns = pd.concat(parts, axis=1).reindex(frame["cell"])
    return pd.concat([frame, columns.set_axis(frame.index)], axis=1)


def maps_against_causes(
    maps: pd.DataFrame,
    frame: pd.DataFrame,
    metric: str,
    broken: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Does what a layer looks at in the baseline predict what its lesion does? One row an aspect and measure.

    Spearman's rank correlation, over layers, of a measure's mean and the lesion's mean effect; means over words and
    seeds, then prompts. The interval is the 2.5 % to 97.5 % of resamples of the prompts.
    maps: as in maps.parquet. frame: results of one setting with leave_one_out.
    metric: of importance. broken: a column that is 1 where the reader sees an aspect right; the effect is then how
        often a lesion breaks what the baseline of the same prompt and seed has right.
    Columns: aspect, measure, effect, correlation, low, high, n_prompts, n_layers.
    """
    effects = _effects(frame, metric, broken)
    both = _by_aspect(maps)
    dice = np.random.default_rng(seed)
    found = []
    for aspect, rows in both.groupby("aspect", sort=True):
        for measure in MEASURES:
            looks = rows.groupby(["prompt_id", "map_layer"])[measure].mean().unstack()
            layers = [layer for layer in looks if layer in effects]
            prompts = [one for one in looks.index if one in effects.index]
            if len(layers) < 3 or len(prompts) < 2:
                continue
            x = looks.loc[prompts, layers].to_numpy()
            y = effects.loc[prompts, layers].to_numpy()
            drawn = dice.integers(len(prompts), size=(resamples, len(prompts)))
            weights = np.stack([np.bincount(one, minlength=len(prompts)) for one in drawn]).astype(np.float64)
            many = _rank_correlations(x, y, weights)
            known = many[np.isfinite(many)]
            low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (float("nan"),) * 2
            found.append(
                {
                    "aspect": aspect,
                    "measure": measure,
                    "effect": broken or "importance",
                    "correlation": float(_rank_correlations(x, y, np.ones((1, len(prompts))))[0]),
                    "low": low,
                    "high": high,
                    "n_prompts": len(prompts),
                    "n_layers": len(layers),
                }
            )
    columns = ["aspect", "measure", "effect", "correlation", "low", "high", "n_prompts", "n_layers"]
    return pd.DataFrame(found, columns=columns)


def _effects(frame: pd.DataFrame, metric: str, broken: str | None) -> pd.DataFrame:
    """Effect of each layer's lesion, prompts x layers, mean over seeds."""
    lesioned = frame[(frame["selection"] == LEAVE_ONE_OUT) & (frame["status"] == "ok")]
    if broken is None:
        values: Any = 1 - similarity(lesioned, metric)
    else:
        right = frame[frame["selection"] == BASELINE].set_index(["prompt_id", "seed"])[broken]
        before = right.reindex(pd.MultiIndex.from_frame(lesioned[["prompt_id", "seed"]])).to_numpy()
        values = np.where(before == 1, 1 - lesioned[broken].to_numpy(), np.nan)
    return lesioned.assign(effect=values).groupby(["prompt_id", "layer"])["effect"].mean().unstack()


def _rank_correlations(x: Array, y: Array, weights: Array) -> Array:
    """Spearman's, of the layers' means over prompts; NaN where one side is the same in all layers.

    x, y: (prompts, layers), NaN where nothing is known. weights: of the prompts, (n, prompts). Returns (n,).
    """
    from scipy import stats  # when it is asked for: it takes a while to import

    ranks = []
    for values in (x, y):
        there = np.isfinite(values).astype(np.float64)
        mean = (weights @ np.nan_to_num(values)) / np.maximum(weights @ there, 1e-12)
        ranks.append(stats.rankdata(mean.round(12), axis=1))
    a, b = (one - one.mean(axis=1, keepdims=True) for one in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return found
