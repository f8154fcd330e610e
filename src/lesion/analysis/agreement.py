"""Do two ways of measuring put the layers in the same order? Spearman's and Kendall's rank correlations."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from lesion.analysis.bootstrap import REPLICATES, Floats
from lesion.analysis.cells import MEASURES, cube, groups, lesioned_rows, matched, prompt_averages, shared_noise
from lesion.analysis.importance import ONLY_ONE
from lesion.analysis.order import replicated
from lesion.analysis.settings import in_order

BETWEEN = ("measure", "replacement", "model")


def correlations(
    frame: pd.DataFrame,
    between: str = "measure",
    metric: str | None = None,
    confidence: float = 0.95,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank correlations over layers, one row for every two values of `between` that share everything else.

    between: `measure` (importance under leave_one_out with sufficiency under only_one), `replacement` (zero with mean),
    or `model`, where only models with the same layers (module paths) are compared. Two sides without a layer that has
    valid images on both are no pair. Columns: what the two share
    (setting, and measure unless between them); between, a, b; n_layers, n_prompts; spearman, spearman_low,
    spearman_high, spearman_p; kendall (tau-b), kendall_low, kendall_high, kendall_p.
    Values are means over the images (prompt_id, seed) that are valid for every layer on both sides; where there are
    none (models asked different prompts), over each side's own, with n_prompts 0. Limits: percentiles over resampled
    prompts and seeds, the same for both sides; noise pulls them towards 0, and for fewer than 2 prompts they are NaN.
    p: scipy's, with the layers as independent units, which is a rough guide only. ValueError for another `between`.
    """
    if between not in BETWEEN:
        raise ValueError(f"no comparison between {between!r}; allowed: {', '.join(BETWEEN)}")
    part, keys = lesioned_rows(frame, metric)
    part = part[part["selection"].isin(list(MEASURES))]
    part = part.assign(measure=part["selection"].map(MEASURES))
    # Both measures are high for a layer that matters.
    part["effect"] = part["effect"].mask(part["selection"] == ONLY_ONE, 1.0 - part["effect"])
    shared = [key for key in [*keys, "measure"] if key != between]
    records = []
    for setting, whole in groups(part, shared):
        for a, b in combinations(in_order(whole[between]), 2):
            sides = [whole[whole[between] == name] for name in (a, b)]
            if between == "model" and set(sides[0]["layer"]) != set(sides[1]["layer"]):
                continue
            wide = [matched(side) for side in sides]
            if set(wide[0]).isdisjoint(wide[1]):
                continue
            record: dict[str, Any] = {**setting, "between": between, "a": a, "b": b}
            records.append(
                {**record, **_correlation(wide[0], wide[1], shared_noise(whole), confidence, replicates, seed)}
            )
    return pd.DataFrame(records, columns=[*shared, "between", "a", "b", "n_layers", "n_prompts", *_FIGURES])


_FIGURES = [f"{name}{suffix}" for name in ("spearman", "kendall") for suffix in ("", "_low", "_high", "_p")]


def _correlation(
    first: pd.DataFrame, second: pd.DataFrame, shared: bool, confidence: float, replicates: int, seed: int
) -> dict[str, Any]:
    from scipy import stats

    layers = [layer for layer in first.columns if layer in second.columns]
    both = first[layers].join(second[layers], how="inner", lsuffix="|a", rsuffix="|b")
    n = len(layers)
    star = np.empty((2 * n, 0))
    if len(both):
        cells = cube(both)
        means = prompt_averages(cells).mean(axis=1)
        if cells.shape[1] > 1:
            star = replicated(cells, shared, replicates, seed)
    else:
        means = np.concatenate([_means(side, layers) for side in (first, second)])
    n_prompts = both.index.get_level_values("prompt_id").nunique()
    record: dict[str, Any] = {"n_layers": n, "n_prompts": n_prompts}
    means, star = np.round(means, 6), np.round(star, 6)  # rounding errors tie
    for name, test, many in (
        ("spearman", stats.spearmanr, spearman),
        ("kendall", stats.kendalltau, kendall),
    ):
        value = p = low = high = np.nan
        if n > 2 and len(means) and np.ptp(means[:n]) > 0 and np.ptp(means[n:]) > 0:
            value, p = map(float, test(means[:n], means[n:]))
            found = many(star[:n], star[n:])
            found = found[np.isfinite(found)]  # a replicate in which all layers tie has none
            if found.size:
                low, high = map(float, np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2]))
        record |= {name: value, f"{name}_low": low, f"{name}_high": high, f"{name}_p": p}
    return record


def _means(wide: pd.DataFrame, layers: list[str]) -> Floats:
    found: Floats = wide[layers].groupby(level="prompt_id").mean().mean().to_numpy(dtype=np.float64)
    return found


def spearman(a: Floats, b: Floats) -> Floats:
    """Of each column. a, b: (layers, B); result: (B,), NaN where a column is constant."""
    from scipy import stats

    ranked = [stats.rankdata(values, axis=0) for values in (a, b)]
    x, y = (values - values.mean(axis=0) for values in ranked)
    return _ratio((x * y).sum(axis=0), (x * x).sum(axis=0) * (y * y).sum(axis=0))


def kendall(a: Floats, b: Floats) -> Floats:
    """Tau-b of each column. a, b: (layers, B); result: (B,), NaN where a column is constant."""
    i, j = np.triu_indices(len(a), 1)
    x, y = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
    return _ratio((x * y).sum(axis=0), (x * x).sum(axis=0) * (y * y).sum(axis=0))


def _ratio(shared: Floats, product: Floats) -> Floats:
    ratio: Floats = shared / np.sqrt(np.where(product > 0, product, np.nan))
    return ratio
