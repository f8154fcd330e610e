"""The certificate against scipy, counted by hand and by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lesion.analysis import certificate as judging


def grid(noise, lesions=40, prompts=6, seed=0):
    rng = np.random.default_rng(seed)
    real = rng.exponential(0.1, lesions)[:, None] * rng.uniform(0.5, 1.5, (lesions, prompts))
    return real * np.exp(noise * rng.normal(size=real.shape)), real


def certified(estimates, real, top, sample, seed=0, replicates=1, **options):
    order = np.argsort(-estimates.mean(1))
    places = [*order[:top], *np.random.default_rng(seed).choice(order[top:], sample, replace=False)]
    is_top = np.arange(len(places)) < top
    return judging.certify(estimates[places], real[places], is_top, len(real), replicates=replicates, **options)


def test_where_everything_is_made_it_says_what_scipy_says_of_the_grid():
    estimates, real = grid(1.0)
    found = certified(estimates, real, 10, 30, replicates=99, threshold=0.1)
    a, b = estimates.mean(1), real.mean(1)
    assert found.spearman.value == pytest.approx(stats.spearmanr(a, b).statistic)
    assert found.kendall.value == pytest.approx(stats.kendalltau(a, b).statistic)
    assert found.precision.value == pytest.approx(len({*np.argsort(-a)[:10]} & {*np.argsort(-b)[:10]}) / 10)
    assert found.spearman.low <= found.spearman.value <= found.spearman.high
    outside = int((b[np.argsort(-a)[10:]] >= 0.1).sum())
    assert (found.important_sampled, found.missed) == (outside, outside)
    assert found.important_found == int((b[np.argsort(-a)[:10]] >= 0.1).sum())


def test_a_sample_estimates_what_the_grid_would_say_and_perfect_estimates_get_full_marks():
    estimates, real = grid(1.0, lesions=200)
    truth = stats.spearmanr(estimates.mean(1), real.mean(1)).statistic
    tau = stats.kendalltau(estimates.mean(1), real.mean(1)).statistic
    found = [certified(estimates, real, 20, 40, seed) for seed in range(40)]
    assert np.mean([one.spearman.value for one in found]) == pytest.approx(truth, abs=0.03)
    assert np.mean([one.kendall.value for one in found]) == pytest.approx(tau, abs=0.03)
    perfect = certified(real, real, 10, 10)
    assert (perfect.spearman.value, perfect.precision.value, perfect.important_found) == (pytest.approx(1), 1.0, 5)
    ties = certified(np.ones_like(real), real, 10, 10)
    assert ties.as_data()["spearman"]["value"] is None  # nothing is ordered


def test_the_bound_on_what_is_missed_is_the_largest_number_that_chance_allows():
    for rest, sampled, seen in itertools.product((5, 12), (2, 5), (0, 1)):
        fits = [
            number
            for number in range(seen, rest - (sampled - seen) + 1)
            if sum(
                math.comb(number, x) * math.comb(rest - number, sampled - x) for x in range(seen + 1)
            ) / math.comb(rest, sampled) > 0.05
        ]  # fmt: skip
        assert judging.most_missed(rest, sampled, seen) == max(fits)
    assert judging.most_missed(9, 0, 0) == 9


def test_it_covers_what_is_missed_as_often_as_it_says():
    rng = np.random.default_rng(0)
    important = np.arange(60) < 11
    bounds = [judging.most_missed(60, 15, seen) for seen in range(12)]
    held = [bounds[rng.choice(important, 15, replace=False).sum()] >= 11 for _ in range(2000)]
    assert 0.95 <= np.mean(held) < 1


def test_changes_with_a_sign_are_missed_by_their_size_as_often_as_the_bound_says():
    """The top is chosen by something else, so large changes, down as well as up, are among the others."""
    rng = np.random.default_rng(3)
    change = rng.normal(0, 0.1, (60, 4)) + rng.normal(0, 0.3, (60, 1))
    top, sizes = np.arange(5), np.abs(change.mean(axis=1))
    limit, held = float(np.median(sizes[top])), []
    outside = int((sizes[5:] >= limit).sum())
    assert (change.mean(axis=1)[5:] <= -limit).any() and (change.mean(axis=1)[5:] >= limit).any()
    for _ in range(300):
        places = [*top, *5 + rng.choice(55, 15, replace=False)]
        found = judging.signed(change[places], change[places], np.arange(20) < 5, 60, replicates=1)
        held.append(found.missed >= outside)
        assert found.important_sampled == (sizes[places[5:]] >= limit).sum()
    assert (found.threshold, found.important_found, found.same_sign.value) == (limit, 3, 1.0)
    assert 0.95 <= np.mean(held) < 1
    assert {"missed", "threshold", "important_found", "important_sampled", "confidence"} < found.as_data().keys()


def test_limits_of_means_over_prompts():
    values = np.random.default_rng(0).normal(1, 1, (3, 40))
    low, high = judging.spread(values)
    exact = stats.t.interval(0.95, 39, values.mean(1), stats.sem(values, axis=1))
    np.testing.assert_allclose([low, high], exact, atol=0.06)
    assert np.isnan(judging.spread(values[:, :1])).all()
