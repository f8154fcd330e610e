"""Intervals for the mean over prompts of the means over seeds, prompts drawn from a population.

Prompts are resampled with replacement, each with all its seeds, whose variance its mean holds. The default,
`bootstrap-t`, studentises every replicate with the standard error of its own prompt means (Cameron, Gelbach & Miller,
"Bootstrap-based improvements for inference with clustered errors", Rev. Econ. Stat. 90, 2008; Efron & Tibshirani, "An
Introduction to the Bootstrap", 1993, ch. 12). What holds of it by simulation (`scripts/simulate_inference.py`) is in
docs/statistics.md. `bca` is corrected for few prompts: replicates are rescaled to the unbiased variance of the mean
(Davison & Hinkley, "Bootstrap Methods and their Application", 1997, sec. 3.8), and the levels are those of Student's t
(Hesterberg, "What teachers should know about the bootstrap", Am. Stat. 69, 2015, sec. 5.3).

Three things are not left to the bootstrap, since no resampling mends them:

- Seeds that are the same noise for every prompt are crossed with prompts: limits move out for them (`crossed`).
- Where a few prompts hold the mean, a sample is likely to lack others of their kind, and every interval made from the
  sample alone is too short. Where the effective number of prompts says so (`few`), and there are `bounds` for what one
  prompt can be, limits are Gaffke's, which hold whatever the distribution (`bounded`).
- Studentised limits run away where the standard errors of replicates come close to 0. Limits further from the mean than
  STRETCH times Student's are not used: BCa stands in where it is defined, else Student's t.

What cannot be said is NaN, with the reason in `Interval.reason`: one prompt, or data without any spread and without
bounds. Limits depend on neither the order of prompts nor that of seeds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lesion.analysis import bounded, crossed
from lesion.study.budget import FEWEST

Floats = NDArray[np.float64]

METHODS = ("bootstrap-t", "bca", "t")
BOUNDED = "bounded"
WIDENED = "+seeds"  # behind the name of a method whose limits were moved out for shared seeds
REPLICATES = 9999  # (replicates + 1) * 0.025 is whole: the limits are order statistics
STRETCH = 3.0  # times Student's: studentised limits further from the mean than that are not stable
FLAT = 1e-9  # spread, as a share of the largest value, that is rounding
ENOUGH = 20.0  # effective number of prompts from which the bootstrap is trusted,
EVEN = 0.75  # or this share of them all, which takes effects that differ little
SMALL = 0.004  # what a prompt's effect is beyond this counts for the effective number


@dataclass(frozen=True)
class Interval:
    """Of a mean over prompts of means over seeds.

    low, high: limits, NaN if there are none. used: the method of the limits (`bootstrap-t`, `bca`, `t`, `jackknife`,
    `bounded`), with `+seeds` where they were widened for shared seeds. sd_prompts: sample standard deviation of the
    prompt means, NaN for one prompt. sd_seeds: within prompts, pooled over them, NaN if none has two seeds. reason: why
    there are no limits; "" if there are. n_effective: see `effective_number`.
    """

    mean: float
    low: float
    high: float
    used: str
    sd_prompts: float
    sd_seeds: float
    n_prompts: int
    n_images: int
    reason: str = ""
    n_effective: float = float("nan")

    @property
    def method(self) -> str:
        """As tables name it: the method used, or `n/a (reason)`."""
        return f"n/a ({self.reason})" if self.reason else self.used

    def columns(self, name: str = "mean") -> dict[str, Any]:
        """As table columns; `name` is that of the mean."""
        figures = ("low", "high", "method", "sd_prompts", "sd_seeds", "n_prompts", "n_images", "n_effective")
        return {name: self.mean, **{figure: getattr(self, figure) for figure in figures}}


def effective_number(means: ArrayLike) -> float:
    """How many prompts a mean rests on: (sum m)^2 / sum m^2 of what their values (P,) are beyond +-SMALL.

    0 if none is (Kish, "Survey Sampling", 1965, sec. 11.7, for weights). Small effects do not count, or a sample of
    nothing else would look even, whatever rare large ones it lacks.
    """
    beyond = np.maximum(np.abs(np.asarray(means, dtype=np.float64)) - SMALL, 0.0)
    squares = float((beyond**2).sum())
    return float(beyond.sum()) ** 2 / squares if squares > 0 else 0.0


def few(effective: float, prompts: int) -> bool:
    """Whether the mean of so many prompts rests on too few of them to be judged by the sample alone."""
    return effective < min(ENOUGH, EVEN * prompts)


@lru_cache(maxsize=2)
def draws(prompts: int, replicates: int = REPLICATES, seed: int = 0) -> NDArray[np.uint16]:
    """How often each prompt is drawn in each replicate. (B, P)"""
    rng = np.random.default_rng(seed)
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=replicates).astype(np.uint16)


def resampled(means: Floats, replicates: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Mean and sample standard deviation of the prompt means (P,) in each replicate. (B,), (B,)"""
    count = len(means)
    off = means - means.mean()
    both = np.stack([off, off * off], axis=1)
    drawn = draws(count, replicates, seed)
    first, second = np.concatenate([part @ both / count for part in np.array_split(drawn, -(-drawn.size >> 22))]).T
    spread = np.sqrt(np.maximum(second - first**2, 0.0) * count / (count - 1))
    return means.mean() + first, spread


def interval(
    values: ArrayLike,
    method: str = "bootstrap-t",
    confidence: float = 0.95,
    replicates: int = REPLICATES,
    seed: int = 0,
    shared: bool = False,
    bounds: tuple[float, float] | None = None,
    effective: float | None = None,
) -> Interval:
    """Of the mean over prompts of the means over seeds; the same arguments give the same limits.

    values: (P, S), prompts x seeds, NaN where an image is missing; prompts may have different numbers of seeds.
    method: `bca` stands in where `bootstrap-t` is not stable, `t` (P - 1 degrees of freedom on the prompt means) where
    neither is defined; the one used is in the result.
    shared: each column is one seed, whose noise all prompts share. With one such seed nothing can be said on others:
    limits are of the mean at that seed.
    bounds: between which a prompt's value must lie. Limits do not leave them, and are those of `bounded` where the mean
    rests on `few` prompts or all are alike. A bound that a value lies beyond, by more than rounding, is none: limits
    are free there, and the outermost prompt takes its place in `bounded`.
    effective: that number, where other values than these decide (as for a difference, both of its sides).
    ValueError for an unknown method, a confidence outside (0, 1) or values that are not prompts x seeds.
    """
    if method not in METHODS:
        raise ValueError(f"unknown interval {method!r}; allowed: {', '.join(METHODS)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1; got {confidence}")
    cells = np.array(values, dtype=np.float64)
    if cells.ndim != 2:
        raise ValueError(f"cells are prompts x seeds, these have {cells.ndim} dimensions")
    held = np.isfinite(cells)
    cells = np.where(held, cells, np.nan)[held.any(axis=1)]
    if not cells.size:
        return Interval(np.nan, np.nan, np.nan, "", np.nan, np.nan, 0, 0, "no data")
    means = np.sort(np.nanmean(cells, axis=1))
    count, mean = len(means), float(means.mean())
    spread = float(means.std(ddof=1)) if count > 1 else np.nan
    number = effective_number(means) if effective is None else effective
    bare = Interval(mean, np.nan, np.nan, "", spread, _sd_seeds(cells), count, int(held.sum()), "", number)
    if count == 1:
        return replace(bare, reason="one prompt")
    flat = spread <= FLAT * np.nanmax(np.abs(cells))
    if bounds and (flat or few(number, count)):
        within = min(bounds[0], float(means[0])), max(bounds[1], float(means[-1]))
        used, (low, high) = BOUNDED, bounded.limits(means, within, confidence)
    elif flat:
        return replace(bare, reason="constant")
    else:
        used, (low, high) = _limits(means, method, confidence, replicates, seed)
    error = 0.0 if flat else spread / np.sqrt(count)
    more = crossed.widening(error, count, *crossed.seed_variance(cells), confidence) if shared else 0.0
    if not np.isfinite(more) and not bounds:
        return replace(bare, reason="no prompt has two seeds")
    if more:
        used = used + WIDENED
        low, high = mean - float(np.hypot(mean - low, more)), mean + float(np.hypot(high - mean, more))
    if bounds and np.nanmin(cells) >= bounds[0] - SMALL:
        low = max(low, min(bounds[0], mean))
    if bounds and np.nanmax(cells) <= bounds[1] + SMALL:
        high = min(high, max(bounds[1], mean))
    return replace(bare, low=low, high=high, used=used)


def _limits(
    means: Floats, method: str, confidence: float, replicates: int, seed: int
) -> tuple[str, tuple[float, float]]:
    """The method used and its limits, of prompt means (P,) that differ."""
    from scipy.special import stdtrit

    count, mean = len(means), float(means.mean())
    error, tail = float(means.std(ddof=1)) / np.sqrt(count), (1 - confidence) / 2
    reach = float(stdtrit(count - 1, 1 - tail)) * error
    if method != "t" and count >= FEWEST:
        star, spreads = resampled(means, replicates, seed)
        limits = None
        if method == "bootstrap-t":
            limits = _student(star - mean, spreads / np.sqrt(count), mean, error, tail)
            if limits is None or max(limits[1] - mean, mean - limits[0]) > STRETCH * reach:
                method, limits = "bca", None
        if method == "bca":
            limits = _bca(star, means, error, tail)
        if limits is not None:
            return method, limits
    return "t", (mean - reach, mean + reach)


def _sd_seeds(cells: Floats) -> float:
    freedom = int(np.isfinite(cells).sum()) - len(cells)
    off = cells - np.nanmean(cells, axis=1, keepdims=True)
    return float(np.sqrt(np.nansum(off**2) / freedom)) if freedom else np.nan


def _student(shift: Floats, errors: Floats, mean: float, error: float, tail: float) -> tuple[float, float] | None:
    """None where too many replicates draw nothing but equal prompts: they have no standard error."""
    replicates = len(shift)
    flat = errors <= 1e-6 * error
    shift, errors = shift.copy(), np.where(flat, 1.0, errors)
    shift[flat] = np.where(np.abs(shift[flat]) <= 1e-6 * error, 0.0, np.copysign(np.inf, shift[flat]))
    ordered = np.sort(shift / errors)
    rank = max(int((replicates + 1) * tail + 1e-9), 1)
    least, most = float(ordered[rank - 1]), float(ordered[-rank])
    if not np.isfinite([least, most]).all():
        return None
    return mean - most * error, mean - least * error


def _bca(replicated: Floats, means: Floats, error: float, tail: float) -> tuple[float, float] | None:
    """Bias-corrected and accelerated, with the corrections named above; None where it is not defined."""
    from scipy.special import ndtr, ndtri, stdtrit

    mean = float(means.mean())
    if not replicated.std() > FLAT * error:
        return None
    # All replicates have one scale, so that their spread can be set to the unbiased one.
    replicated = mean + (replicated - mean) * error / replicated.std()
    off_by = 1e-6 * error
    below = ((replicated < mean - off_by).mean() + (replicated <= mean + off_by).mean()) / 2
    off = means - mean
    acceleration = (off**3).sum() / (6 * (off**2).sum() ** 1.5)
    bias, reach = ndtri(below), float(stdtrit(len(means) - 1, 1 - tail))
    divisors = [1 - acceleration * (bias + z) for z in (-reach, reach)]
    if not np.isfinite(bias) or min(divisors) <= 0:
        return None
    levels = [ndtr(bias + (bias + z) / divisor) for z, divisor in zip((-reach, reach), divisors, strict=True)]
    if min(levels) * len(replicated) < 1 or (1 - max(levels)) * len(replicated) < 1:
        return None  # beyond the outermost replicate
    low, high = np.quantile(replicated, levels)
    return float(low), float(high)
