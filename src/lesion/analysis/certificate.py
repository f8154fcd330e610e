"""How far an attribution's order can be trusted, by the lesions that were made: those ranked highest, and a sample.

The lesions ranked highest are all made; of the rest a simple random sample without replacement, of which each lesion
stands for `rest / sample`. Correlations and precision are estimates, with these weights, of what the complete grid
would give, and equal to it where everything was made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_Measure = Callable[[Floats, Floats, Floats, NDArray[np.bool_]], float]  # estimates, real, weights, top
CONFIDENCE = 0.95
REPLICATES = 999


@dataclass(frozen=True)
class Bounded:
    """A value with its 95 % interval; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class HeldOut:
    """What prompts say on which no lesion was made to rank it; NaN where an image of them is not valid."""

    prompts: int
    spearman: float
    precision: float


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """spearman, kendall (tau-b): between estimate and what was seen, over the lesions.

    threshold: of importance, or of a change's size, from which a lesion counts as important.
    important_found: important ones among the top. important_sampled: among the sample.
    missed: at most so many important ones are among the rest, found in the sample or not, with confidence 0.95.
    """

    spearman: Bounded
    kendall: Bounded
    threshold: float
    important_found: int
    important_sampled: int
    missed: int
    confidence: float = CONFIDENCE

    def as_data(self) -> dict[str, Any]:
        """As JSON data, with null for what is not known."""
        return {name: _plain(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Certificate(_Judged):
    """lesions: of the grid. top: how many ranked highest were made. sampled: how many of the rest were made.

    precision: share of the `top` highest estimates that are among the `top` highest real ones.
    held_out: order and precision against importance on prompts that did not choose the top; None without such.
    """

    lesions: int
    top: int
    sampled: int
    precision: Bounded
    held_out: HeldOut | None = None


@dataclass(frozen=True, kw_only=True)
class Signed(_Judged):
    """How far estimated changes with their sign are right.

    prompts: that have values.
    same_sign: share of the lesions with a change whose estimate has its sign.
    """

    prompts: int
    same_sign: Bounded


def signed(
    estimates: Floats,
    real: Floats,
    top: NDArray[np.bool_],
    total: int,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Signed:
    """Judge estimated changes of a metric by those that the lesions made show; arguments and intervals of `certify`.

    A change counts as important from the median size of the top's changes.
    """
    share, common = _judged(
        estimates, real, top, total, lambda a, b, w, _: same_sign(a, b, w), None, replicates, seed, size=np.abs
    )
    return Signed(prompts=estimates.shape[1], same_sign=share, **common)


def certify(
    estimates: Floats,
    real: Floats,
    top: NDArray[np.bool_],
    total: int,
    threshold: float | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
    held_out: Sequence[int] = (),
) -> Certificate:
    """Judge the estimates of the lesions that were made.

    estimates: of each lesion and prompt, (made, prompts), by what was known before all prompts were made.
    real: importance of the same, NaN where an image is not valid.
    top: whether a lesion was made because its estimate ranks high, (made,); the others are the sample.
    total: lesions of the grid.
    threshold: real importance from which a lesion counts as important; None for the median of the top.
    held_out: places of prompts on which no lesion was made to choose the top, where it was chosen by such.

    The intervals are percentiles over resampled prompts and, where the sample is not all of the rest, a resampled
    sample, moved so that their median is the value: resampling adds noise of its own, which pulls rank correlations
    towards 0. Of less than 2 prompts there are none. Raises ValueError where there is no top.
    """
    share, common = _judged(
        estimates, real, top, total, lambda _, b, w, t: precision(b, w, t), threshold, replicates, seed
    )
    point, weights = estimates.mean(axis=1), _weights(top, total)
    return Certificate(
        lesions=total,
        top=int(top.sum()),
        sampled=int((~top).sum()),
        precision=share,
        held_out=_held_out(point, real[:, held_out], weights, top) if len(held_out) else None,
        **common,
    )


def _judged(
    estimates: Floats,
    real: Floats,
    top: NDArray[np.bool_],
    total: int,
    share: _Measure,
    threshold: float | None,
    replicates: int,
    seed: int,
    size: Callable[[Floats], Floats] = lambda values: values,
) -> tuple[Bounded, dict[str, Any]]:
    """A share of the lesions, and the fields of `_Judged`. size: of what was seen, by which it is important."""
    if not top.any():
        raise ValueError("a certificate needs the lesions that rank highest")
    rest, sampled, weights = total - int(top.sum()), int((~top).sum()), _weights(top, total)
    measures = (lambda a, b, w, _: spearman(a, b, w), lambda a, b, w, _: kendall(a, b, w), share)
    point, means = estimates.mean(axis=1), np.nanmean(real, axis=1)
    values = [measure(point, means, weights, top) for measure in measures]
    drawn = _resampled(estimates, real, weights, top, sampled < rest, measures, replicates, seed)
    order, pairs, third = map(_bounded, values, drawn.T, (-1, -1, 0))
    sizes = size(means)
    limit = float(np.median(sizes[top])) if threshold is None else threshold
    important = sizes >= limit if limit > 0 else sizes > 0
    seen = int((important & ~top).sum())
    return third, {
        "spearman": order,
        "kendall": pairs,
        "threshold": limit,
        "important_found": int((important & top).sum()),
        "important_sampled": seen,
        "missed": most_missed(rest, sampled, seen),
    }


def _weights(top: NDArray[np.bool_], total: int) -> Floats:
    """For how many lesions of the grid each of those made stands."""
    return np.where(top, 1.0, (total - int(top.sum())) / max(int((~top).sum()), 1))


def _held_out(point: Floats, real: Floats, weights: Floats, top: NDArray[np.bool_]) -> HeldOut:
    if not np.isfinite(real).any(axis=1).all():
        return HeldOut(real.shape[1], math.nan, math.nan)
    means = np.nanmean(real, axis=1)
    return HeldOut(real.shape[1], spearman(point, means, weights), precision(means, weights, top))


def _bounded(value: float, drawn: Floats, least: float) -> Bounded:
    """With the interval that resampled values say. least: what no value is below; none is above 1."""
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn) or not math.isfinite(value):
        return Bounded(value)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]) + value - np.median(drawn)
    return Bounded(value, max(float(low), least), min(float(high), 1.0))


def _resampled(
    estimates: Floats,
    real: Floats,
    weights: Floats,
    top: NDArray[np.bool_],
    resample: bool,
    measures: tuple[_Measure, ...],
    replicates: int,
    seed: int,
) -> Floats:
    """What each measure says in each replicate, (replicates, measures); none of less than 2 prompts."""
    prompts = estimates.shape[1]
    if prompts < 2:
        return np.empty((0, len(measures)))
    rng = np.random.default_rng(seed)
    high, low = np.flatnonzero(top), np.flatnonzero(~top)
    found = np.full((replicates, len(measures)), np.nan)
    for number in range(replicates):
        drawn = rng.integers(prompts, size=prompts)
        rows = np.concatenate([high, rng.choice(low, len(low)) if resample and len(low) else low])
        columns = real[np.ix_(rows, drawn)]
        valid = np.isfinite(columns)
        means = np.where(valid, columns, 0).sum(1) / np.maximum(valid.sum(1), 1)
        given = estimates[np.ix_(rows, drawn)].mean(axis=1), means, weights[rows], top[rows]
        found[number] = [measure(*given) for measure in measures]
    return found


def weighted_ranks(values: Floats, weights: Floats) -> Floats:
    """The rank of each value among all that the weights stand for, ties at their middle."""
    order, places = np.unique(values, return_inverse=True)
    mass = np.bincount(places, weights, minlength=len(order))
    middle: Floats = (np.cumsum(mass) - mass / 2)[places]
    return middle


def spearman(a: Floats, b: Floats, weights: Floats) -> float:
    """Weighted rank correlation; scipy's where all weights are 1. NaN where one side is constant."""
    x, y = weighted_ranks(a, weights), weighted_ranks(b, weights)
    x, y = x - np.average(x, weights=weights), y - np.average(y, weights=weights)
    both = float((weights * x * x).sum() * (weights * y * y).sum())
    return float((weights * x * y).sum()) / math.sqrt(both) if both > 0 else math.nan


def kendall(a: Floats, b: Floats, weights: Floats) -> float:
    """Weighted tau-b over pairs; scipy's where all weights are 1. NaN where one side is constant."""
    pairs = np.outer(weights, weights)
    np.fill_diagonal(pairs, 0)
    x, y = np.sign(a[:, None] - a), np.sign(b[:, None] - b)
    both = float((pairs * x * x).sum() * (pairs * y * y).sum())
    return float((pairs * x * y).sum()) / math.sqrt(both) if both > 0 else math.nan


def same_sign(a: Floats, b: Floats, weights: Floats) -> float:
    """Weighted share of those of b that are not 0 whose sign is that of a; NaN where all are 0."""
    changed = b != 0
    mass = float(weights[changed].sum())
    return float(weights[changed & (np.sign(a) == np.sign(b))].sum()) / mass if mass > 0 else math.nan


def precision(real: Floats, weights: Floats, top: NDArray[np.bool_]) -> float:
    """Share of the top estimates that are among as many highest real ones, of all that the weights stand for."""
    wanted = float(top.sum())
    order = np.lexsort((~top, -real))  # of equal ones, those ranked high first
    room = np.clip(wanted - (np.cumsum(weights[order]) - weights[order]), 0, weights[order])
    return float(room[top[order]].sum() / wanted)


def most_missed(rest: int, sampled: int, seen: int, confidence: float = CONFIDENCE) -> int:
    """The largest number of important ones among `rest` that a sample may have shown `seen` of, or fewer, by chance.

    The chance is hypergeometric: it is at most 1 - confidence for any larger number (Clopper and Pearson's bound for a
    sample without replacement).
    """
    from scipy.stats import hypergeom

    if sampled == 0:
        return rest
    for number in range(rest - (sampled - seen), seen, -1):
        if hypergeom.cdf(seen, rest, number, sampled) > 1 - confidence:
            return number
    return seen


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _plain(one) for name, one in data.items()}
    return None if isinstance(data, float) and not math.isfinite(data) else data


def spread(values: Floats, replicates: int = REPLICATES, seed: int = 0) -> tuple[Floats, Floats]:
    """Limits of 95 % intervals of means over prompts, percentiles over resampled prompts; NaN for one prompt.

    values: (rows, prompts).
    """
    rows, prompts = values.shape
    if prompts < 2:
        return np.full(rows, np.nan), np.full(rows, np.nan)
    drawn = np.random.default_rng(seed).multinomial(prompts, [1 / prompts] * prompts, size=replicates) / prompts
    sides = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    found = [np.quantile(part @ drawn.T, sides, axis=1) for part in np.array_split(values, -(-rows // 1024))]
    low, high = np.concatenate(found, axis=1)
    return low, high
