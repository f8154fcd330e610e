"""Where a seed is the same noise for every prompt, seeds are crossed with prompts: what that adds to errors.

effect = mean + prompt + seed + rest, with prompts and seeds drawn from populations. Averaging over more prompts does
not reduce the part of the seeds, of which there are few. The variance of a mean over S seeds and P prompts is the sum
of that of prompt means, as if seeds were nested in prompts, and that of seed means (Cameron, Gelbach & Miller, "Robust
inference with multiway clustering", J. Bus. Econ. Stat. 29, 2011). Their third term, which takes off the rest that is
in both, is left out: with four seeds it can make a variance that is far too small.

Degrees of freedom were chosen by simulation (`scripts/simulate_inference.py`, docs/statistics.md): Satterthwaite's
(Biometrics Bull. 2, 1946) for four seeds or more; for two or three, each part has its own t quantile, and the squares
of the half-widths add up (Zou & Donner, "Construction of confidence limits about effect measures", Stat. Med. 27,
2008).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
FEW_SEEDS = 4  # from here on degrees of freedom are Satterthwaite's


@dataclass(frozen=True)
class Components:
    """Standard deviations of the parts of an effect, and the F test of seeds; NaN where there is nothing to tell.

    Estimated from the mean squares of the prompts that have every seed, and 0 where a variance comes out negative.
    """

    sd_prompts: float
    sd_seeds: float
    sd_rest: float
    f_seeds: float
    p_seeds: float
    n_prompts: int
    n_seeds: int


def components(cells: ArrayLike) -> Components:
    """Of effects (P, S), one column a seed."""
    values = np.asarray(cells, dtype=np.float64)
    values = values[np.isfinite(values).all(axis=1)]
    prompts, seeds = values.shape
    if prompts < 2 or seeds < 2:
        nan = float("nan")
        return Components(nan, nan, nan, nan, nan, prompts, seeds)
    mean = values.mean()
    by_prompt, by_seed = values.mean(axis=1) - mean, values.mean(axis=0) - mean
    rest = values - mean - by_prompt[:, None] - by_seed
    freedom = (prompts - 1) * (seeds - 1)
    of_prompts = seeds * float((by_prompt**2).sum()) / (prompts - 1)
    of_seeds = prompts * float((by_seed**2).sum()) / (seeds - 1)
    of_rest = float((rest**2).sum()) / freedom
    f = p = float("nan")
    if of_rest > 0:
        from scipy.special import fdtrc

        f = of_seeds / of_rest
        p = float(fdtrc(seeds - 1, freedom, f))
    sd_prompts, sd_seeds = (
        (max(of_prompts - of_rest, 0.0) / seeds) ** 0.5,
        (max(of_seeds - of_rest, 0.0) / prompts) ** 0.5,
    )
    return Components(sd_prompts, sd_seeds, of_rest**0.5, f, p, prompts, seeds)


def seed_variance(cells: ArrayLike) -> tuple[float, int]:
    """Variance that seeds add to the mean over prompts of means over seeds, and how many seeds there are.

    cells: (P, S), one column a seed, NaN where an image is missing. With every image it is the sample variance of seed
    means by S. Else the spread of what each seed adds to the mean is set against what a unit seed effect would give
    there, and weighed as the seeds are. (0, 1) for one seed; infinite where no prompt has two seeds.
    """
    values = np.asarray(cells, dtype=np.float64)
    held = np.isfinite(values)
    values, held = values[held.any(axis=1)][:, held.any(axis=0)], held[held.any(axis=1)][:, held.any(axis=0)]
    prompts, seeds = values.shape
    if seeds < 2 or held.sum(axis=0).max() < 2:  # a seed of one prompt alone is part of what prompts vary by
        return 0.0, 1
    counts = held.sum(axis=1, keepdims=True)
    weights = held / (prompts * counts)
    off = np.where(held, values - np.nanmean(values, axis=1, keepdims=True), 0.0)
    adds = (weights * off).sum(axis=0)
    response = np.diag(weights.sum(axis=0)) - weights.T @ (held / counts)
    unit = float((response**2).sum())
    if not unit > 0:
        return float("inf"), seeds
    return float((adds**2).sum()) / unit * float((weights.sum(axis=0) ** 2).sum()), seeds


def widening(error: float, prompts: int, seed_part: float, seeds: int, confidence: float = 0.95) -> float:
    """By how much limits move out for the seeds; add it in quadrature to their distance from the mean.

    error: of the mean over prompts, seeds as nested. seed_part, seeds: of `seed_variance`.
    """
    from scipy.special import stdtrit

    if seeds < 2 or not seed_part > 0:
        return 0.0
    if not np.isfinite(seed_part):
        return float("inf")
    level = (1 + confidence) / 2
    if seeds < FEW_SEEDS:
        return float(stdtrit(seeds - 1, level) * np.sqrt(seed_part))
    total, freedom = _satterthwaite(error, prompts, seed_part, seeds)
    more = stdtrit(freedom, level) ** 2 * total - stdtrit(prompts - 1, level) ** 2 * error**2
    return float(np.sqrt(max(more, 0.0)))


def _satterthwaite(error: float, prompts: int, seed_part: float, seeds: int) -> tuple[float, float]:
    """Variance of a mean with the part of the seeds, and its degrees of freedom."""
    total = error**2 + seed_part
    return total, total**2 / (error**4 / (prompts - 1) + seed_part**2 / (seeds - 1))


def p_value(mean: float, error: float, prompts: int, seed_part: float, seeds: int) -> float:
    """Two-sided p of a mean against 0: that of t limits, widened for the seeds, that touch 0; NaN without an error."""
    from scipy.special import stdtr, stdtrit

    if prompts < 2 or not error > 0:
        return float("nan")
    if seeds < 2 or not seed_part > 0:
        return float(2 * stdtr(prompts - 1, -abs(mean) / error))
    if not np.isfinite(seed_part):
        return 1.0
    if seeds >= FEW_SEEDS:
        total, freedom = _satterthwaite(error, prompts, seed_part, seeds)
        return float(2 * stdtr(freedom, -abs(mean) / np.sqrt(total)))
    low, high = -80.0, 0.0  # of log p; the half-width falls as p rises
    for _ in range(60):
        middle = (low + high) / 2
        tail = np.exp(middle) / 2
        width = stdtrit(prompts - 1, tail) ** 2 * error**2 + stdtrit(seeds - 1, tail) ** 2 * seed_part
        low, high = (middle, high) if width > mean**2 else (low, middle)
    return float(np.exp((low + high) / 2))
