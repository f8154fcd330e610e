"""Intervals for the mean of nested data: seeds within prompts, prompts drawn from a population.

Both levels are resampled: prompts with replacement, then seeds with replacement within each drawn prompt. The default,
`bootstrap-t`, studentises every replicate with the standard error of its own prompt means (Cameron, Gelbach & Miller,
"Bootstrap-based improvements for inference with clustered errors", Rev. Econ. Stat. 90, 2008; Efron & Tibshirani, "An
Introduction to the Bootstrap", 1993, ch. 12). It was chosen by simulation (`scripts/interval_coverage.py`, which has
more cases; 1000 data sets each, so +- 1.4; ICC = share of the variance that lies between prompts; nominal 95 %):

    prompts x seeds, distribution          t    BCa, corrected   bootstrap-t
    6 x 2, normal, ICC 0.7              95.8              95.1          95.5
    10 x 2, normal, ICC 0.1             95.6              95.2          95.1
    20 x 4, normal, ICC 0.7             95.4              94.7          95.1
    7 x 4, gamma, skewness 1.4          92.3              92.5          95.0
    20 x 4, gamma, skewness 2           90.5              91.9          93.3
    49 x 4, gamma, skewness 2           93.6              94.2          94.7
    49 x 4, nine of ten prompts alike   81.6              86.9          87.8

Plain percentile and BCa intervals are too short for few prompts and, since the resampling of seeds adds variance that
the prompt means already hold, too long where seeds dominate (Davison & Hinkley, "Bootstrap Methods and their
Application", 1997, sec. 3.8). `bca` here corrects both: replicates are rescaled to the unbiased variance of the mean,
and the levels are those of Student's t (Hesterberg, "What teachers should know about the bootstrap", Am. Stat. 69,
2015, sec. 5.3).

The standard errors of replicates come close to 0 where a few prompts hold all of the spread, as with a layer that most
prompts do not need; studentised limits then run away (up to 1000 times Student's). Limits further from the mean than
STRETCH times Student's are therefore not used: BCa stands in where it is defined, else Student's t, at no measurable
cost in coverage. Where nine prompts of ten are exactly alike no interval covers what it should.

What cannot be said is NaN, with the reason in `Interval.reason`: one prompt, or data without any spread. One seed a
prompt gives an interval over prompts, as their means hold the variance of seeds too, but no `sd_seeds`. Seeds count as
nested: a seed's number says nothing across prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lesion.study.budget import FEWEST

Floats = NDArray[np.float64]

METHODS = ("bootstrap-t", "bca", "t")
REPLICATES = 1999  # (replicates + 1) * 0.025 is whole: the limits are order statistics
STRETCH = 3.0  # times Student's: studentised limits further from the mean than that are not stable
FLAT = 1e-9  # spread, as a share of the largest value, that is rounding


@dataclass(frozen=True)
class Interval:
    """Of a mean over prompts of means over seeds.

    low, high: limits, NaN if there are none. used: the method of the limits (`bootstrap-t`, `bca`, `t`, `jackknife`).
    sd_prompts: sample standard deviation of the prompt means, NaN for one prompt. sd_seeds: within prompts, pooled over
    them, NaN if none has two seeds. reason: why there are no limits; "" if there are.
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

    @property
    def method(self) -> str:
        """As tables name it: the method used, or `n/a (reason)`."""
        return f"n/a ({self.reason})" if self.reason else self.used

    def columns(self, name: str = "mean") -> dict[str, Any]:
        """As table columns; `name` is that of the mean."""
        figures = ("low", "high", "method", "sd_prompts", "sd_seeds", "n_prompts", "n_images")
        return {name: self.mean, **{figure: getattr(self, figure) for figure in figures}}


@dataclass(frozen=True)
class Draws:
    """Resampled cells, and which of them count (None: all), as (B, P, S); cells are numbered row by row, S a row."""

    cells: NDArray[np.intp]
    used: NDArray[np.bool_] | None


@lru_cache(maxsize=4)
def draws(counts: tuple[int, ...], replicates: int = REPLICATES, seed: int = 0) -> Draws:
    """counts: of seeds, one a prompt, all positive."""
    rng = np.random.default_rng(seed)
    of, most = np.asarray(counts), max(counts)
    prompts = rng.integers(len(of), size=(replicates, len(of)))
    drawn = of[prompts][..., None]  # (B, P, 1)
    seeds = (rng.random((*prompts.shape, most)) * drawn).astype(np.intp)
    return Draws(prompts[..., None] * most + seeds, None if (of == most).all() else np.arange(most) < drawn)


def prompt_means(cells: Floats, drawn: Draws) -> Floats:
    """Means over resampled seeds. (B, P)

    cells: (P, S), the seeds of a prompt first, then NaN; as many as `counts` of the draws.
    """
    values = np.take(cells[:, : drawn.cells.shape[2]], drawn.cells)
    if drawn.used is None:
        means: Floats = values.sum(axis=2) / values.shape[2]
        return means
    means = np.where(drawn.used, values, 0.0).sum(axis=2) / drawn.used.sum(axis=2)
    return means


def tidy(values: ArrayLike) -> Floats:
    """Cells (P, S) with every prompt's valid values first, then NaN; prompts without any are dropped.

    ValueError unless values have two dimensions.
    """
    cells = np.array(values, dtype=np.float64)
    if cells.ndim != 2:
        raise ValueError(f"cells are prompts x seeds, these have {cells.ndim} dimensions")
    cells = np.sort(np.where(np.isfinite(cells), cells, np.nan), axis=1)
    return cells[np.isfinite(cells).any(axis=1)]


def seed_counts(cells: Floats) -> tuple[int, ...]:
    """Valid values of each prompt."""
    return tuple(np.isfinite(cells).sum(axis=1).tolist())


def interval(
    values: ArrayLike,
    method: str = "bootstrap-t",
    confidence: float = 0.95,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Interval:
    """Of the mean over prompts of the means over seeds; the same arguments give the same limits.

    values: (P, S), prompts x seeds, NaN where an image is missing; prompts may have different numbers of seeds.
    method: `bca` stands in where `bootstrap-t` is not stable, `t` (P - 1 degrees of freedom on the prompt means) where
    neither is defined; the one used is in the result.
    ValueError for an unknown method, a confidence outside (0, 1) or values that are not prompts x seeds.
    """
    if method not in METHODS:
        raise ValueError(f"unknown interval {method!r}; allowed: {', '.join(METHODS)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1; got {confidence}")
    cells = tidy(values)
    if not cells.size:
        return Interval(np.nan, np.nan, np.nan, "", np.nan, np.nan, 0, 0, "no data")
    means = np.nanmean(cells, axis=1)
    count, mean = len(means), float(means.mean())
    spread = float(means.std(ddof=1)) if count > 1 else np.nan
    why = "one prompt" if count == 1 else "constant" if spread <= FLAT * np.nanmax(np.abs(cells)) else ""
    limits = None
    if not why:
        from scipy.special import stdtrit

        error, tail = spread / np.sqrt(count), (1 - confidence) / 2
        reach = float(stdtrit(count - 1, 1 - tail)) * error
        if method != "t" and count >= FEWEST:
            star = prompt_means(cells, draws(seed_counts(cells), replicates, seed))
            if method == "bootstrap-t":
                limits = _student(star, means, error, tail)
                if limits is None or max(limits[1] - mean, mean - limits[0]) > STRETCH * reach:
                    method, limits = "bca", None
            if method == "bca":
                limits = _bca(star, means, error, tail)
        if limits is None:
            method, limits = "t", (mean - reach, mean + reach)
    low, high = limits or (np.nan, np.nan)
    images = int(np.isfinite(cells).sum())
    return Interval(mean, low, high, "" if why else method, spread, _sd_seeds(cells), count, images, why)


def _sd_seeds(cells: Floats) -> float:
    freedom = int(np.isfinite(cells).sum()) - len(cells)
    off = cells - np.nanmean(cells, axis=1, keepdims=True)
    return float(np.sqrt(np.nansum(off**2) / freedom)) if freedom else np.nan


def _student(star: Floats, means: Floats, error: float, tail: float) -> tuple[float, float] | None:
    """None where too many replicates draw nothing but equal prompts: they have no standard error."""
    replicates, count = star.shape
    shift = star.mean(axis=1) - means.mean()
    errors = star.std(axis=1, ddof=1) / np.sqrt(count)
    flat = errors <= FLAT * error
    shift[flat] = np.where(np.abs(shift[flat]) <= FLAT * error, 0.0, np.copysign(np.inf, shift[flat]))
    errors[flat] = 1.0
    ordered = np.sort(shift / errors)
    rank = max(int((replicates + 1) * tail + 1e-9), 1)
    least, most = float(ordered[rank - 1]), float(ordered[-rank])
    if not np.isfinite([least, most]).all():
        return None
    mean = float(means.mean())
    return mean - most * error, mean - least * error


def _bca(star: Floats, means: Floats, error: float, tail: float) -> tuple[float, float] | None:
    """Bias-corrected and accelerated, with the corrections named above; None where it is not defined."""
    from scipy.special import ndtr, ndtri, stdtrit

    mean, replicated = float(means.mean()), star.mean(axis=1)
    if not replicated.std() > FLAT * error:
        return None
    # All replicates have one scale, so that their spread can be set to the unbiased one.
    replicated = mean + (replicated - mean) * error / replicated.std()
    below = ((replicated < mean).mean() + (replicated <= mean).mean()) / 2
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
