"""Estimates corrected by the lesions made to rank them."""

from __future__ import annotations

import numpy as np

from lesion.analysis.candidates import adjusted, steadied

NAN = np.nan


def test_nothing_made_leaves_the_estimates():
    estimates = np.array([[0.1, 0.2], [0.0, 0.0]])
    assert np.array_equal(adjusted(estimates, np.full((2, 2), NAN)), estimates)


def test_the_mean_over_prompts_is_the_squared_mean_of_roots():
    found = steadied(np.array([[1.0, 9.0], [0.0, 0.0], [0.0, 4.0]]))
    np.testing.assert_allclose(found.mean(axis=1), [4, 0, 1])
    np.testing.assert_allclose(found[0], [0.8, 7.2])


def test_the_mean_over_prompts_may_be_the_geometric_one():
    found = steadied(np.array([[1.0, 9.0], [0.0, 0.0], [0.0, 4.0]]), "geometric")
    np.testing.assert_allclose(found.mean(axis=1), [3, 0, 0])
    np.testing.assert_allclose(found[0], [0.6, 5.4])


def test_ratios_by_hand():
    estimates = np.array([[2.0, 4.0], [1.0, 1.0], [3.0, 5.0]])
    real = np.array([[4.0, NAN], [0.5, NAN], [NAN, NAN]])
    of_all = 4.5 / 3
    first = (4 + of_all * 3) / (2 + 3)  # its mean estimate, 3, as a further prompt with the ratio of all
    second = (0.5 + of_all * 1) / (1 + 1)
    expected = [[4, 4 * first], [0.5, second], [3 * of_all, 5 * of_all]]
    np.testing.assert_allclose(adjusted(estimates, real), expected)


def test_a_lesion_without_an_estimate_stays_at_nothing_where_it_was_not_made():
    found = adjusted(np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([[0.3, NAN], [1.0, NAN]]))
    np.testing.assert_allclose(found[0], [0.3, 0.0])


def test_few_prompts_with_ratios_tell_the_order_better_than_alone():
    """Estimates that are wrong by a factor of each lesion, on prompts that differ by more than lesions do."""
    drawn = np.random.default_rng(0)
    wins = 0
    for _ in range(20):
        truth = np.exp(drawn.normal(0, 0.5, (40, 1)) + drawn.normal(0, 1, 16) + drawn.normal(0, 0.5, (40, 16)))
        estimates = truth * np.exp(drawn.normal(0, 0.7, (40, 1)) + drawn.normal(0, 0.3, (40, 16)))
        real = np.where(np.arange(16) < 3, truth, NAN)
        best = {*np.argsort(-truth.mean(1))[:8]}
        ways = (adjusted(estimates, real).mean(1), np.nanmean(real, axis=1), estimates.mean(1))
        found = [len(best & {*np.argsort(-way)[:8]}) for way in ways]
        wins += (found[0] > found[1]) - (found[0] < found[1]) + (found[0] > found[2]) - (found[0] < found[2])
    assert wins > 10
