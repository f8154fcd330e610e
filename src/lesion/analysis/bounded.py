"""Limits and tests of a mean that hold whatever the distribution, for values that are known to lie between two bounds.

Effects of most layers are sparse: a few prompts hold all of the mean, and a sample may miss them. No method that looks
at the sample alone can say how much was missed; a bound on what one prompt can do can. Gaffke's limits ("Three test
statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative variable", Math. Methods Stat. 14,
2005) put one more value at the bound, weigh all n + 1 at random (Dirichlet(1, ..., 1)), and take a quantile of the
weighted mean. They are the tightest known ones that hold at every sample size in all cases tried (Learned-Miller &
Thomas, "A new confidence interval for the mean of a bounded random variable", arXiv 1905.06208).

The quantiles are exact, not simulated: a Dirichlet mean of x exceeds c with the probability that the sum of (x_i - c)
E_i with independent standard exponentials E_i exceeds 0, a quadratic form in normals (Imhof, Biometrika 48, 1961).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_LOG = np.linspace(np.log(1e-10), np.log(1e7), 781)  # of Imhof's integral, over the logarithm of its variable
_POINTS, _STEP = np.exp(_LOG), _LOG[1] - _LOG[0]
_FEW = 300  # values of which every other point tells as much, to 3e-8


def chance_above(values: ArrayLike) -> Floats:
    """Chance that a Dirichlet(1, ..., 1) mean of each row is above 0, to about 1e-7. values: (..., n); result: (...)"""
    values = np.asarray(values, dtype=np.float64)
    rows = values.reshape(-1, values.shape[-1])
    found = np.empty(len(rows))
    for place, row in enumerate(rows):
        if not (row > 0).any():
            found[place] = 0.0
        elif not (row < 0).any():
            found[place] = 1.0
        else:
            different, often = np.unique(row, return_counts=True)
            every = 1 if len(row) > _FEW else 2
            scaled = _POINTS[::every, None] * (different / np.abs(row).max())
            wave = np.sin(np.arctan(scaled) @ often)
            falling = np.exp(-0.5 * (np.log1p(scaled * scaled) @ often))
            found[place] = 0.5 + (wave * falling).sum() * every * _STEP / np.pi
    return found.reshape(values.shape[:-1]).clip(0.0, 1.0)


def limits(values: ArrayLike, bounds: tuple[float, float], confidence: float = 0.95) -> tuple[float, float]:
    """Lower and upper limit of the mean of what `values` (n,) are drawn from, which lies within `bounds`.

    Values beyond a bound count as the bound. ValueError without any value.
    """
    least, most = bounds
    x = np.sort(np.clip(np.asarray(values, dtype=np.float64), least, most))
    if not x.size:
        raise ValueError("limits need at least one value")
    return _limits(tuple(x.tolist()), least, most, confidence)


@lru_cache(maxsize=1024)  # of many layers the same few images are right or wrong
def _limits(ordered: tuple[float, ...], least: float, most: float, confidence: float) -> tuple[float, float]:
    x, tail = np.array(ordered), (1 - confidence) / 2
    low, high = least, most
    if x[-1] > least:
        low = _crossing(lambda c: float(chance_above(c - np.append(x, least))) - tail, least, float(x.mean()))
    if x[0] < most:
        high = _crossing(lambda c: tail - float(chance_above(np.append(x, most) - c)), float(x.mean()), most)
    return low, high


def _crossing(of, start: float, end: float) -> float:  # type: ignore[no-untyped-def]
    """Where the rising function `of` is 0; the end that is nearer where it is so nowhere between."""
    from scipy.optimize import brentq

    if of(start) >= 0:
        return start
    if of(end) <= 0:
        return end
    return float(brentq(of, start, end, xtol=1e-8, rtol=1e-7))


def p_value(values: ArrayLike, bounds: tuple[float, float]) -> Floats:
    """Two-sided p of each row (..., n) against a mean of 0; the limits at that level touch 0.

    bounds: of one value, the lower below 0 and the upper above.
    """
    x = np.clip(np.asarray(values, dtype=np.float64), *bounds)
    up = x.mean(axis=-1) > 0
    ends = np.where(up, bounds[0], bounds[1])[..., None]
    p: Floats = 2 * chance_above(np.concatenate([x, ends], axis=-1) * np.where(up, -1.0, 1.0)[..., None])
    return p.clip(1e-9, 1.0)
