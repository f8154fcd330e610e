"""The statistics of a study against hand-made values, scipy, and planted models whose truth is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lesion.analysis import (
    affected,
    agreement,
    aspects,
    bootstrap,
    bounded,
    estimates,
    floor,
    interactions,
    order,
    paired,
    shapley,
    variance,
)
from lesion.analysis.bootstrap import interval

LAYERS = ("down.9", "down.10", "mid", "up")  # forward order is not alphabetical


def row(layer="", effect=0.0, prompt="p", seed=0, selection="leave_one_out", status="ok", **changes):
    values = {"model": "m", "prompt_id": prompt, "aspects": "", "seed": seed, "selection": selection}
    values |= {"replacement": "zero", "layer": layer, "layer_index": LAYERS.index(layer) if layer in LAYERS else -1}
    values |= {"window_start": 0.0, "window_end": 1.0, "branch": "both", "strength": 1.0, "steps": 4, "status": status}
    return {**values, "clip_similarity": 1.0 - effect if status == "ok" else math.nan, **changes}


def frame(*rows):
    return pd.DataFrame(list(rows))


def planted(effects, **changes):
    """effects: (L, P, S). Leave-one-out rows with just these effects."""
    return frame(
        *(
            row(LAYERS[layer], effects[layer, prompt, seed], f"p{prompt}", seed, **changes)
            for layer, prompt, seed in np.ndindex(effects.shape)
        )
    )


# Intervals


def test_students_t_on_prompt_means_is_scipys_in_the_flat_case():
    values = np.random.default_rng(0).gamma(2, size=9)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    found = interval(values[:, None], "t", 0.9)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert (found.mean, found.sd_prompts, found.n_prompts) == pytest.approx((values.mean(), values.std(ddof=1), 9))
    assert math.isnan(found.sd_seeds)  # one seed a prompt says nothing on seeds


def test_bca_is_scipys_in_the_flat_case_once_its_corrections_are_applied_by_hand():
    values = np.random.default_rng(1).gamma(2, size=12)
    wider = values.mean() + (values - values.mean()) * math.sqrt(12 / 11)
    level = 1 - 2 * stats.norm.sf(stats.t.ppf(0.975, 11))
    rng = np.random.default_rng(2)
    theirs = stats.bootstrap((wider,), np.mean, confidence_level=level, n_resamples=60_000, rng=rng).confidence_interval
    ours = interval(values[:, None], "bca", replicates=60_000)
    assert ours.method == "bca"
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02 * (ours.high - ours.low))


def test_bootstrap_t_is_what_two_plain_loops_give():
    cells = np.array([[1.0, 2, np.nan], [4, 4.5, 6], [2, 3, 2.5], [7, 9, np.nan], [1, 0.5, 0.2], [3, 5, 4]])
    rng = np.random.default_rng(3)
    prompts = [part[np.isfinite(part)] for part in cells]
    means = np.array([part.mean() for part in prompts])
    error = means.std(ddof=1) / math.sqrt(6)
    ts = []
    for _ in range(8_000):
        star = means[rng.integers(6, size=6)]
        ts.append((np.mean(star) - means.mean()) / (np.std(star, ddof=1) / math.sqrt(6)))
    low, high = means.mean() - np.quantile(ts, [0.975, 0.025]) * error
    found = interval(cells, replicates=7_999)
    assert found.method == "bootstrap-t"
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    within = sum(((part - part.mean()) ** 2).sum() for part in prompts) / (16 - 6)
    assert (found.mean, found.sd_seeds, found.n_images) == pytest.approx((means.mean(), math.sqrt(within), 16))


def nested_normal(rng, prompts, seeds, icc):
    return rng.normal(0, math.sqrt(icc), (prompts, 1)) + rng.normal(0, math.sqrt(1 - icc), (prompts, seeds))


def nested_gamma(rng, prompts, seeds, shape):
    return rng.gamma(shape, 1, (prompts, 1)) * rng.gamma(4, 1 / 4, (prompts, seeds)) - shape


@pytest.mark.parametrize(("large", "stands_in"), [((0.2, 0.3, 0.4), "bca"), ((0.4,), "t")])
def test_limits_that_run_away_give_way_to_bca_then_to_students(large, stands_in):
    # What most layers of a study look like: nearly all prompts do not need them.
    values = np.zeros((49, 4))
    values[:, 0] = np.random.default_rng(0).normal(0, 1e-5, 49)
    values[: len(large)] = np.array(large)[:, None]
    means = values.mean(axis=1)
    error = means.std(ddof=1) / 7
    star, spreads = bootstrap.resampled(means, bootstrap.REPLICATES)
    reach = stats.t.ppf(0.975, 48) * error
    _, high = bootstrap._student(star - means.mean(), spreads / 7, means.mean(), error, 0.025)
    assert high - means.mean() > 10 * reach  # it says nothing
    found, other = (interval(values, method, replicates=1999) for method in (bootstrap.METHODS[0], stands_in))
    assert found.method == stands_in
    assert means.mean() < found.high < means.mean() + bootstrap.STRETCH * reach
    assert (found.low, found.high) == (other.low, other.high)


@pytest.mark.parametrize(
    ("model", "prompts", "seeds", "parameter"),
    [
        (nested_normal, 10, 2, 0.7),
        (nested_normal, 10, 2, 0.1),
        (nested_normal, 20, 4, 0.5),
        (nested_gamma, 12, 3, 2.0),  # skewed: Student's t covers 92, percentiles 91 %
    ],
)
def test_nominal_95_percent_intervals_cover_a_planted_nested_mean(model, prompts, seeds, parameter):
    rng = np.random.default_rng(4)
    runs, covered = 1000, 0
    for run in range(runs):
        found = interval(model(rng, prompts, seeds, parameter), replicates=599, seed=run)
        covered += found.low <= 0 <= found.high
    assert 0.93 <= covered / runs <= 0.97


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.empty((0, 2)), "n/a (no data)"),
        ([[np.nan]], "n/a (no data)"),
        ([[0.1, 0.2, 0.4]], "n/a (one prompt)"),
        ([[0.1]], "n/a (one prompt)"),
        ([[0.3, 0.3], [0.1 + 0.2, 0.3]], "n/a (constant)"),
        (np.zeros((8, 2)), "n/a (constant)"),
    ],
)
@pytest.mark.parametrize("method", bootstrap.METHODS)
def test_what_cannot_be_said_is_not_a_false_zero(values, reason, method):
    found = interval(values, method)
    assert found.method == f"n/a ({found.reason})" == reason
    assert found.used == ""
    assert math.isnan(found.low) and math.isnan(found.high)


def _same(one, other):
    return (one.low, one.high, one.used) == (other.low, other.high, other.used)


def test_where_resampling_is_not_defined_students_t_stands_in():
    few = interval([[0.1], [0.2], [0.4]])
    assert few.method == "t" and few.low < 0.1
    lone = np.zeros((10, 1))  # a third of the replicates draw zeros only and have no standard error
    lone[0] = 1.0
    students = interval(lone, "t")
    assert _same(interval(lone, replicates=1999), students)
    assert _same(
        interval(lone, "bca", replicates=1999), students
    )  # its upper level lies beyond the outermost replicate
    even = interval(np.arange(10.0)[:, None], "bca")
    assert even.method == "bca" and even.low < 4.5 < even.high


def test_tests_are_scipys_t_but_where_few_prompts_decide():
    cells = np.random.default_rng(12).normal(0.03, 0.1, (30, 2))
    expected = stats.ttest_1samp(cells.mean(axis=1), 0).pvalue
    assert paired.p_against_zero(cells, False, effective=25.0) == pytest.approx(expected)
    assert paired.p_against_zero(cells, False, effective=3.0) > expected
    assert math.isnan(paired.p_against_zero(cells[:1], False, 25.0))
    # All alike: one more value at -1 has a weight of Beta(1, 30), and needs 0.3 / 1.3 to reach 0.
    assert paired.p_against_zero(np.full((30, 2), 0.3), False, 25.0) == pytest.approx(
        2 * (1 - 0.3 / 1.3) ** 30, abs=1e-7
    )
    # Five of 49 prompts hold all of a difference: Student's t is sure, the bound for any distribution is not.
    sparse = np.zeros((49, 1))
    sparse[:5] = 0.3
    assert stats.ttest_1samp(sparse[:, 0], 0).pvalue < 0.03 < 0.05 < paired.p_against_zero(sparse, False, 5.0)


def test_gaffkes_limits_are_those_of_weights_drawn_at_random():
    rng = np.random.default_rng(20)
    for values in (rng.random(12) * 0.1, np.r_[np.zeros(30), 0.2, 0.3], np.array([0.4, 0.5])):
        weights = rng.dirichlet(np.ones(len(values) + 1), 100_000)
        low, high = (np.quantile(weights @ np.append(values, end), level) for end, level in ((0, 0.025), (1, 0.975)))
        assert bounded.limits(values, (0.0, 1.0)) == pytest.approx((low, high), abs=0.004)
    # No effect in n prompts: one value at the bound has a Beta(1, n) weight.
    assert bounded.limits(np.zeros(12), (0.0, 1.0)) == pytest.approx((0.0, 1 - 0.025 ** (1 / 12)))
    low, _ = bounded.limits(np.r_[np.zeros(6), rng.random(14) * 0.4] - 0.1, (-1.0, 1.0), 0.9)
    shifted = np.r_[np.zeros(6), rng.random(14) * 0.4] - 0.1
    low, _ = bounded.limits(shifted, (-1.0, 1.0), 0.9)
    assert bounded.p_value(shifted - low, (-1.0 - low, 1.0 - low)) == pytest.approx(0.1, abs=1e-5)


def test_limits_move_out_for_seeds_that_prompts_share():
    rng = np.random.default_rng(21)
    seeds = np.array([0.3, 0.1, 0.4, 0.2])
    cells = 0.3 + rng.normal(0, 0.05, (40, 1)) + seeds + rng.normal(0, 0.02, (40, 4))
    nested_, both = interval(cells, "t"), interval(cells, "t", shared=True)
    assert (nested_.used, both.used, both.mean) == ("t", "t+seeds", nested_.mean)
    by_prompt, by_seed = cells.mean(axis=1).var(ddof=1) / 40, cells.mean(axis=0).var(ddof=1) / 4
    freedom = (by_prompt + by_seed) ** 2 / (by_prompt**2 / 39 + by_seed**2 / 3)
    reach = stats.t.ppf(0.975, freedom) * math.sqrt(by_prompt + by_seed)
    assert both.high - both.mean == pytest.approx(reach) == pytest.approx(both.mean - both.low)
    two = interval(cells[:, :2], "t", shared=True)
    apart = [interval(cells[:, :2].mean(axis=1, keepdims=True), "t"), interval(cells[:, :2].mean(axis=0)[:, None], "t")]
    assert two.high - two.mean == pytest.approx(math.hypot(*(one.high - one.mean for one in apart)))
    # A seed that no other prompt has is the prompt's own, and one seed says nothing of others.
    diagonal = np.where(np.eye(6, dtype=bool), cells[:6, :1], np.nan)
    assert interval(diagonal, "t", shared=True).used == interval(cells[:, :1], "t", shared=True).used == "t"


def test_the_variance_components_are_those_of_the_two_way_table():
    cells = (
        np.random.default_rng(22).normal(size=(30, 1))
        + 0.5 * np.arange(3)
        + np.random.default_rng(23).normal(size=(30, 3))
    )
    data = planted(cells[None] / 10)
    (one,) = variance.variance_components(data).to_dict("records")
    means = stats.f_oneway(*cells.T), cells.mean()
    rest = cells - cells.mean(axis=1, keepdims=True) - cells.mean(axis=0) + means[1]
    of_rest = (rest**2).sum() / (29 * 2)
    of_seeds = 30 * ((cells.mean(axis=0) - means[1]) ** 2).sum() / 2
    assert one["sd_rest"] == pytest.approx(math.sqrt(of_rest) / 10)
    assert one["sd_seeds"] == pytest.approx(math.sqrt((of_seeds - of_rest) / 30) / 10)
    assert one["sd_prompts"] == pytest.approx(math.sqrt(cells.mean(axis=1).var(ddof=1) - of_rest / 3) / 10)
    assert (one["f_seeds"], one["p"]) == pytest.approx((of_seeds / of_rest, stats.f.sf(of_seeds / of_rest, 2, 58)))
    assert variance.variance_components(data.assign(noise="own")).empty


def test_limits_depend_on_neither_the_order_of_rows_nor_chance():
    effects = np.random.default_rng(24).gamma(0.5, 0.1, (3, 25, 2))
    data = planted(effects)
    other = data.sample(frac=1, random_state=1).reset_index(drop=True)
    names = ["layer", "mean", "low", "high", "method"]
    pd.testing.assert_frame_equal(
        estimates.layer_estimates(data)[names], estimates.layer_estimates(other)[names], rtol=1e-12
    )
    tables = [order.ranks(one).set_index("layer")[["rank_low", "rank_high", "top_1"]] for one in (data, other)]
    pd.testing.assert_frame_equal(*tables)
    whole, again = (interval(effects[0], seed=seed) for seed in (0, 1))
    assert (whole.low, whole.high) == pytest.approx((again.low, again.high), abs=0.03 * (whole.high - whole.low))


def test_affected_prompts_have_exact_limits():
    touched = [0.0, 0.0, 5e-5, 0.2] + [0.0] * 8
    data = frame(
        *(row("mid", effect, f"p{n}") for n, effect in enumerate(touched)), row("up", 0.0), row("up", 0.0, "q")
    )
    mid, up = affected.affected_prompts(data).to_dict("records")
    exact = stats.binomtest(1, 12).proportion_ci()
    assert (mid["n_affected"], mid["mean_affected"]) == (1, pytest.approx(0.2))
    assert (mid["affected_low"], mid["affected_high"]) == pytest.approx((exact.low, exact.high))
    assert mid["n_effective"] == pytest.approx(1.0)
    assert (up["affected"], up["affected_low"], up["n_effective"]) == (0, 0, 0) and math.isnan(up["mean_affected"])
    assert affected.clopper_pearson(0, 12) == pytest.approx((0.0, 1 - 0.05 ** (1 / 12)))  # 22 %
    assert affected.clopper_pearson(12, 12) == pytest.approx((0.05 ** (1 / 12), 1.0))


def test_wrong_requests_name_what_is_allowed():
    with pytest.raises(ValueError, match="bootstrap-t, bca, t"):
        interval([[1.0], [2.0]], "percentile")
    with pytest.raises(ValueError, match="confidence"):
        interval([[1.0], [2.0]], confidence=95)
    with pytest.raises(ValueError, match="prompts x seeds"):
        interval([1.0, 2.0])


# Importance and sufficiency


def test_layers_are_averaged_over_seeds_then_prompts_and_bad_rows_counted():
    table = estimates.layer_estimates(
        frame(
            row("mid", 0.1, "p", 0),
            row("mid", 0.3, "p", 1),
            row("mid", 0.8, "q", 0),
            row("mid", 0.9, "q", 1, status="invalid", clip_similarity=0.1),
            row("mid", status="failed", prompt="r"),
            row("mid", math.nan, "r", 1),
            row("mid", 0.25, selection="only_one"),
            row("down.10", 3e-5, "p"),
            row("down.10", -2e-5, "q"),
            row("down.9", 0.2, "p", window_end=0.5),
        )
    )
    whole = table[table["window_end"] == 1]
    assert list(zip(whole["measure"], whole["layer"])) == [
        ("importance", "down.10"),
        ("importance", "mid"),
        ("sufficiency", "mid"),
    ]
    quiet, mid, alone = whole.to_dict("records")
    assert (quiet["method"], quiet["low"]) == ("bounded", 0.0) and quiet["high"] > 0.8  # two prompts
    assert (mid["mean"], mid["n_prompts"], mid["n_images"]) == pytest.approx((0.5, 2, 3))
    assert (mid["n_invalid"], mid["n_failed"], mid["n_unscored"]) == (1, 1, 1)
    reach = stats.t.ppf(0.975, 1) * np.std([0.2, 0.8], ddof=1) / math.sqrt(2)
    assert reach > 0.5 and (mid["low"], mid["high"]) == (0.0, 1.0)  # which is all that effects can be
    assert alone["mean"] == pytest.approx(0.75) and alone["method"] == "n/a (one prompt)"
    (early,) = table[table["window_end"] == 0.5].to_dict("records")
    assert (early["layer"], early["mean"]) == ("down.9", pytest.approx(0.2))


def test_sufficiency_has_its_interval_the_right_way_round():
    rows = [row("mid", effect, f"p{n}", selection="only_one") for n, effect in enumerate([0.2, 0.3, 0.5])]
    (one,) = estimates.layer_estimates(frame(*rows)).to_dict("records")
    low, high = stats.ttest_1samp([0.8, 0.7, 0.5], 0).confidence_interval()
    assert high > 1 and (one["low"], one["high"]) == pytest.approx((low, 1.0))


def test_one_prompts_interval_is_over_its_seeds():
    table = estimates.prompt_estimates(
        frame(row("mid", 0.1, "p", 0), row("mid", 0.3, "p", 1), row("mid", 0.4, "p", 2), row("mid", 0.8, "q", 0))
    )
    p, q = table.to_dict("records")
    assert (p["low"], p["high"]) == pytest.approx(stats.ttest_1samp([0.1, 0.3, 0.4], 0).confidence_interval())
    assert (q["prompt_id"], q["method"], q["mean"]) == ("q", "n/a (one seed)", pytest.approx(0.8))
    assert math.isnan(q["low"])


# Noise floor

PAIRS = pd.DataFrame(
    [
        ("p", 0, "p", 1, 0.9),
        ("p", 1, "p", 0, 0.9),  # the same pair again
        ("p", 0, "p", 0, 1.0),  # no pair
        ("q", 0, "q", 1, 0.7),
        ("p", 0, "q", 0, 0.4),
        ("p", 0, "q", 1, 0.6),
        ("p", 1, "r", 0, 0.2),
        ("q", 1, "r", 0, math.nan),
    ],
    columns=list(floor.PAIR),
)


def test_the_floor_of_each_prompt_by_hand():
    table = floor.floor_by_prompt(PAIRS)
    assert table["other_seeds"].to_dict() == pytest.approx({"p": 0.9, "q": 0.7, "r": math.nan}, nan_ok=True)
    assert table["other_prompts"].to_dict() == pytest.approx({"p": (0.5 + 0.2) / 2, "q": 0.5, "r": 0.2})
    seeds, prompts = floor.noise_floor(PAIRS).to_dict("records")
    assert (seeds["mean"], seeds["n_prompts"], seeds["n_pairs"]) == pytest.approx((0.8, 2, 2))
    assert (prompts["mean"], prompts["n_pairs"]) == pytest.approx((0.35, 3))
    assert floor.noise_floor(PAIRS.iloc[:0])["method"].tolist() == ["n/a (no data)"] * 2
    assert prompts["method"] == "n/a (fewer than 4 prompts)" and math.isnan(prompts["low"])


def test_floors_of_seeds_that_prompts_share_have_limits_for_other_seeds():
    """Two images differ by the mean of what each seed is worth: limits are those of a mean over crossed seeds."""
    worth = np.random.default_rng(32).normal([0.2, 0.3, 0.25, 0.15], 0.02, (10, 4))
    rows = [
        (f"p{n}", a, f"p{n}", b, 1 - (worth[n, a] + worth[n, b]) / 2)
        for n in range(10)
        for a, b in itertools.combinations(range(4), 2)
    ]
    pairs = pd.DataFrame(rows, columns=list(floor.PAIR))
    for shared in (True, False):
        one = floor.noise_floor(pairs, method="t", shared=shared).iloc[0]
        right = interval(worth, "t", shared=shared)
        assert (1 - one["high"], 1 - one["low"], one["method"]) == pytest.approx((right.low, right.high, right.method))
    assert right.high - right.low < 0.2 * (interval(worth, "t", shared=True).high - right.low)
    # The ratio to it, of effects that are worth half as much in every image: what seeds do is in both, and cancels.
    effects = worth[None] / 2 + np.random.default_rng(33).normal(0, 1e-3, (1, 10, 4))
    one = floor.normalised_importance(planted(effects), pairs, method="t").iloc[0]
    assert [one[f"normalised_other_seeds{end}"] for end in ("", "_low", "_high")] == pytest.approx([0.5] * 3, abs=0.01)


@pytest.mark.slow  # a simulation
def test_the_floor_of_other_prompts_covers_its_mean():
    # similarity = 1 - (a + b) / 2 with a, b of the two prompts: dependent pairs, mean 1 - E[a].
    rng, covered, runs = np.random.default_rng(5), 0, 100
    for _ in range(runs):
        own = rng.normal(0.4, 0.1, 12)
        rows = [(str(a), 0, str(b), 0, 1 - (own[a] + own[b]) / 2) for a, b in itertools.combinations(range(12), 2)]
        _, one = floor.noise_floor(pd.DataFrame(rows, columns=list(floor.PAIR))).to_dict("records")
        covered += one["low"] <= 0.6 <= one["high"]
    assert 0.9 <= covered / runs <= 0.99


def test_normalised_importance_is_a_ratio_of_means_beside_the_raw_value():
    table = floor.normalised_importance(
        frame(row("mid", 0.2, "p"), row("mid", 0.3, "q"), row("mid", 0.9, "r"), row("mid", status="failed")), PAIRS
    )
    (one,) = table.to_dict("records")
    assert one["importance"] == pytest.approx((0.2 + 0.3 + 0.9) / 3)
    # r has no floor of other seeds, and is in neither mean of that ratio
    assert one["other_seeds"] == pytest.approx(0.8)
    assert one["normalised_other_seeds"] == pytest.approx((0.2 + 0.3) / (0.1 + 0.3))
    assert one["normalised_other_prompts"] == pytest.approx((0.2 + 0.3 + 0.9) / (0.65 + 0.5 + 0.8))
    assert one["n_failed"] == 1
    nothing = floor.normalised_importance(frame(row("mid", 0.2, "p")), PAIRS.iloc[:0]).iloc[0]
    assert math.isnan(nothing["normalised_other_seeds"]) and nothing["normalised_other_seeds_method"] == "n/a (no data)"


@pytest.mark.slow  # a simulation
@pytest.mark.parametrize(("noise", "seeds", "of_seeds"), [("own", 2, 0.0), ("shared", 4, 0.03)])
def test_the_interval_of_the_ratio_covers_a_planted_ratio(noise, seeds, of_seeds):
    """Without an effect of the seeds that prompts share it covers more: limits allow for what seeds may do."""
    rng, covered, runs = np.random.default_rng(6), 0, 100
    for _ in range(runs):
        headroom = rng.uniform(0.1, 0.5, 15)
        effects = 0.6 * headroom[:, None] + rng.normal(0, 0.03, (15, seeds)) + rng.normal(0, of_seeds, seeds)
        pairs = pd.DataFrame(
            [(f"p{n}", 0, f"p{n}", 1, 1 - d) for n, d in enumerate(headroom)], columns=list(floor.PAIR)
        )
        (one,) = floor.normalised_importance(planted(effects[None], noise=noise), pairs, replicates=399).to_dict(
            "records"
        )
        covered += one["normalised_other_seeds_low"] <= 0.6 <= one["normalised_other_seeds_high"]
    assert 0.9 <= covered / runs <= 0.99


def test_sets_of_layers_lesioned_together_have_a_row_each():
    sets = {"a+b": [0.1, 0.3, 0.2, 0.2], "c": [0.5] * 4}
    rows = [row("", effect, f"p{n}") | {"selection": "custom", "lesioned": names}
            for names, effects in sets.items() for n, effect in enumerate(effects)]  # fmt: skip
    rows.append(row("", status="failed") | {"selection": "custom", "lesioned": "a+b"})
    rows.append(row("", 0.9, "p0") | {"selection": "neighbours", "lesioned": "a+b"})
    table = interactions.group_effects(frame(*rows, row("a", 0.7, "p0")), method="t")
    told = table[["selection", "lesioned", "n_lesioned", "n_images", "n_failed"]].to_numpy().tolist()
    assert told == [["custom", "a+b", 2, 4, 1], ["custom", "c", 1, 4, 0], ["neighbours", "a+b", 2, 1, 0]]
    assert table["mean"].tolist() == pytest.approx([0.2, 0.5, 0.9])
    low, high = stats.t.interval(0.95, 3, 0.2, np.std(sets["a+b"], ddof=1) / 2)
    assert table.loc[0, ["low", "high"]].tolist() == pytest.approx([low, high])


# Order


def of_pairs(own):
    """Similarities of baselines that are 1 - the mean of both prompts' own changes."""
    rows = [(f"p{a}", 0, f"p{b}", 0, 1 - (own[a] + own[b]) / 2) for a, b in itertools.combinations(range(len(own)), 2)]
    return pd.DataFrame(rows, columns=list(floor.PAIR))


@pytest.mark.slow  # a simulation
def test_the_interval_of_the_ratio_to_other_prompts_minds_that_prompts_share_pairs():
    rng, covered, runs = np.random.default_rng(13), 0, 100
    for _ in range(runs):
        effects = rng.normal(0.2, 0.01, (1, 20, 1))
        table = floor.normalised_importance(planted(effects), of_pairs(rng.normal(0.4, 0.1, 20)), method="t")
        one = table.iloc[0]
        assert one["normalised_other_prompts_method"] == "jackknife"
        covered += one["normalised_other_prompts_low"] <= 0.5 <= one["normalised_other_prompts_high"]
    assert 0.9 <= covered / runs <= 0.99


def fieller(top, top_reach, bottom, bottom_reach):
    """Limits of the ratio of two independent normal means: where |top - ratio bottom| is its own reach."""
    a, b, c = bottom**2 - bottom_reach**2, -2 * top * bottom, top**2 - top_reach**2
    return sorted(np.roots([a, b, c]))


def test_a_ratio_to_other_prompts_has_the_outermost_of_its_jackknife_and_fiellers_limits():
    rng = np.random.default_rng(14)
    effects, pairs = rng.normal(0.2, 0.05, (1, 6, 2)), of_pairs(rng.normal(0.4, 0.1, 6))
    pairs = pairs.drop(index=[0, 7])  # not every two prompts were compared

    def ratio(gone=None, noise="own", effects=effects):
        data = planted(effects, noise=noise)
        kept = pairs[(pairs["prompt_id_a"] != gone) & (pairs["prompt_id_b"] != gone)]
        return floor.normalised_importance(data[data["prompt_id"] != gone], kept, method="t").iloc[0]

    def limits(one):
        return [one[f"normalised_other_prompts_{end}"] for end in ("low", "high")]

    def reaches(effects, of_seeds=0.0):
        """Of the jackknife of the ratio, and the limits by Fieller. of_seeds: the half-width of their part."""
        deleted = [ratio(f"p{n}", effects=effects)["normalised_other_prompts"] for n in range(6)]
        t = stats.t.ppf(0.975, 5)
        jackknife = t * math.sqrt(5 / 6 * ((np.array(deleted) - np.mean(deleted)) ** 2).sum())
        top = math.hypot(t * effects[0].mean(axis=1).std(ddof=1) / math.sqrt(6), of_seeds)
        return jackknife, fieller(effects.mean(), top, 1 - below["mean"], below["high"] - below["mean"])

    below = floor.noise_floor(pairs).iloc[1]
    one = ratio()
    jackknife, parts = reaches(effects)
    middle = one["normalised_other_prompts"]
    assert middle == pytest.approx(effects.mean() / (1 - below["mean"]))
    assert limits(one) == pytest.approx([min(middle - jackknife, parts[0]), max(middle + jackknife, parts[1])])
    # Two seeds that all prompts share: what their means differ by counts with one degree of freedom.
    of_seeds = stats.t.ppf(0.975, 1) * effects.mean(axis=(0, 1)).std(ddof=1) / math.sqrt(2)
    jackknife, parts = reaches(effects, of_seeds)
    jackknife = math.hypot(jackknife, of_seeds / (1 - below["mean"]))
    shared = ratio(noise="shared")
    assert shared["normalised_other_prompts_method"] == "jackknife+seeds"
    assert limits(shared) == pytest.approx([min(middle - jackknife, parts[0]), max(middle + jackknife, parts[1])])
    few = floor.normalised_importance(planted(effects[:, :3]), pairs).iloc[0]
    assert few["normalised_other_prompts_method"] == "n/a (fewer than 4 prompts)"
    assert math.isnan(few["normalised_other_prompts_low"]) and few["normalised_other_prompts"] > 0


def test_the_floor_of_other_prompts_counts_what_seeds_do_that_prompts_share():
    rng = np.random.default_rng(40)
    own, of_seeds = rng.normal(0.4, 0.1, 8), np.array([0.0, 0.04, -0.02, 0.01])
    rows = [
        (str(a), seed, str(b), seed, 0.9 - (own[a] + own[b]) / 2 + of_seeds[seed])
        for a, b in itertools.combinations(range(8), 2)
        for seed in range(4)
    ]
    pairs = pd.DataFrame(rows, columns=list(floor.PAIR))
    _, nested = floor.noise_floor(pairs).to_dict("records")
    _, shared = floor.noise_floor(pairs, shared=True).to_dict("records")
    means = [pairs[(pairs["prompt_id_a"] != str(n)) & (pairs["prompt_id_b"] != str(n))] for n in range(8)]
    without = np.array([kept["similarity"].mean() for kept in means])
    error, part = 7 / 8 * ((without - without.mean()) ** 2).sum(), of_seeds.var(ddof=1) / 4
    freedom = (error + part) ** 2 / (error**2 / 7 + part**2 / 3)
    assert nested["high"] - nested["mean"] == pytest.approx(stats.t.ppf(0.975, 7) * math.sqrt(error))
    assert shared["high"] - shared["mean"] == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(error + part))
    assert shared["mean"] == pytest.approx(pairs["similarity"].mean()) and shared["method"] == "jackknife+seeds"


def test_a_ratio_of_a_sparse_layer_has_the_limits_of_its_parts():
    """Importance by Gaffke, the floors by theirs, each at 97.5 %."""
    rng, prompts = np.random.default_rng(41), 12
    effects = np.zeros((2, prompts, 1))
    effects[1, 3] = 0.3
    headroom = rng.uniform(0.1, 0.3, prompts)
    near = pd.DataFrame([(f"p{n}", 0, f"p{n}", 1, 1 - d) for n, d in enumerate(headroom)], columns=list(floor.PAIR))
    pairs = pd.concat([near, of_pairs(rng.normal(0.4, 0.1, prompts))])
    table = floor.normalised_importance(planted(effects, noise="own"), pairs).to_dict("records")
    close = interval(headroom[:, None], confidence=0.975, bounds=(0, 1))
    far = floor.noise_floor(pairs, 0.975).iloc[1]
    for one, values in zip(table, effects, strict=True):
        low, high = bounded.limits(values[:, 0], (0, 1), 0.975)
        found = [one[f"normalised_other_seeds_{end}"] for end in ("low", "high", "method")]
        assert found == [pytest.approx(low / close.high), pytest.approx(high / close.low), "bounded"]
        found = [one[f"normalised_other_prompts_{end}"] for end in ("low", "high", "method")]
        assert found == [pytest.approx(low / (1 - far["low"])), pytest.approx(high / (1 - far["high"])), "bounded"]
    assert table[0]["normalised_other_seeds"] == table[0]["normalised_other_seeds_low"] == 0.0
    # Where other seeds may change nothing at all, there is no share of it.
    alike = near.assign(similarity=1.0)
    one = floor.normalised_importance(planted(effects[1:], noise="own"), alike).iloc[0]
    assert one["normalised_other_seeds_method"] == "n/a (the floor may be 1)"


def test_holm_by_hand():
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.9, math.nan, 0.02]) == pytest.approx([0.9, math.nan, 0.04], nan_ok=True)
    assert len(paired.holm([])) == 0
    # 3 of 3 gives 0.25, 9 of 9 gives 0.004: neither could be significant among 20, so that 18 count.
    adjusted = paired.holm([0.001] * 18 + [0.25, 0.004], [0.0] * 18 + [0.25, 0.004])
    assert adjusted == pytest.approx([0.018] * 18 + [math.nan] * 2, nan_ok=True)


ORDERED = np.array([0.5, 0.1, 0.3, 0.1])[:, None, None] + np.random.default_rng(7).normal(0, 0.02, (4, 10, 2))


def test_ranks_of_a_planted_order_are_sure_and_those_of_a_tie_are_not():
    table = order.ranks(planted(ORDERED)).set_index("layer")
    assert list(table.index) == list(LAYERS)
    assert table.loc["down.9", ["rank", "rank_low", "rank_high"]].tolist() == [1, 1, 1]
    assert table.loc["mid", ["rank", "rank_low", "rank_high"]].tolist() == [2, 2, 2]
    assert table.loc[["down.10", "up"], "rank_low"].tolist() == [3, 3]
    assert table.loc[["down.10", "up"], "rank_high"].tolist() == [4, 4]
    assert table["top_1"].tolist() == [1, 0, 0, 0]
    assert table.loc[["down.10", "up"], "top_3"].sum() == pytest.approx(1.0)
    one, three = order.top_stability(planted(ORDERED)).to_dict("records")
    assert (one["layers"], one["overlap"], one["same"]) == ("down.9", 1.0, 1.0)
    assert 0 < three["same"] < 1 and three["overlap"] == pytest.approx((2 + three["same"]) / 3)


def test_which_layer_changes_most_prompts_more_is_a_sign_test_as_scipys():
    rng = np.random.default_rng(31)
    rare = np.where(np.arange(16) < 2, 0.9, 0.0)  # the largest mean, on two prompts
    effects = np.stack([rare, rng.uniform(0.01, 0.02, 16), rng.uniform(0.0, 0.014, 16), np.full(16, 4e-5)])
    table = paired.wins(planted(effects[:, :, None])).set_index(["layer", "other"])
    assert len(table) == 6
    for (layer, other), one in table.iterrows():
        apart = effects[LAYERS.index(layer)] - effects[LAYERS.index(other)]
        more, less = (apart > 1e-4).sum(), (apart < -1e-4).sum()
        assert (one["n_more"], one["n_less"], one["n_prompts"]) == (more, less, 16) and more >= less
        assert one["p"] == pytest.approx(stats.binomtest(int(more), int(more + less)).pvalue)
        assert one["p_least"] == pytest.approx(stats.binomtest(int(more + less), int(more + less)).pvalue)
    counted = table.drop((LAYERS[0], LAYERS[3]))  # 2 of 2 can show nothing, and do not count
    assert table.loc[(LAYERS[0], LAYERS[3]), ["p", "p_least"]].tolist() == [0.5, 0.5]
    assert table["p_holm"].isna().sum() == 1 and counted["p_holm"].tolist() == paired.holm(counted["p"]).tolist()
    ranked = order.ranks(planted(effects[:, :, None])).set_index("layer").loc[list(LAYERS)]
    assert ranked["rank"].tolist() == [1, 2, 3, 4] and ranked["rank_low"].tolist() == [1, 1, 1, 1]
    assert ranked["typical_rank"].tolist() == [3, 1, 2, 4]
    # 14 and 15 of 16 decide, 2 of 2 do not: the last layer may be the third.
    assert ranked["typical_low"].tolist() == [3, 1, 2, 3] and ranked["typical_high"].tolist() == [4, 1, 2, 4]


def test_ranks_compare_layers_on_the_same_images_and_say_nothing_for_one_prompt():
    data = planted(ORDERED[:3, :1])
    data.loc[(data["layer"] == "mid") & (data["seed"] == 1), "status"] = "failed"
    table = order.ranks(data)
    assert table["importance"].tolist() == pytest.approx(ORDERED[:3, 0, 0].tolist())
    assert table["n_left_out"].tolist() == [1, 1, 1]
    assert table["rank"].tolist() == [1, 3, 2] and table["rank_low"].isna().all() and table["top_1"].isna().all()


def test_layers_without_effect_tie_and_are_never_surely_on_top():
    table = order.ranks(planted(np.random.default_rng(8).normal(0, 1e-6, (3, 6, 2))))
    assert table["rank"].tolist() == [1, 1, 1] and table["rank_high"].tolist() == [3, 3, 3]
    assert table["top_1"].tolist() == [0, 0, 0]


def test_neighbouring_ranks_are_tested_in_pairs_as_scipy_does():
    table = paired.neighbours(planted(ORDERED).assign(noise="own"))
    means = ORDERED.mean(axis=2)
    sequence = np.argsort(-means.mean(axis=1))
    assert table["layer"].tolist() == [LAYERS[n] for n in sequence[:-1]]
    expected = [stats.ttest_rel(means[a], means[b]) for a, b in itertools.pairwise(sequence)]
    assert table["p"].tolist() == pytest.approx([one.pvalue for one in expected])
    assert table["p_holm"].tolist() == pytest.approx(paired.holm(table["p"]).tolist())
    assert (table["difference"] > 0).all() and table["p_holm"].iloc[0] < 1e-6 and table["p_holm"].iloc[2] > 0.05


def test_layers_against_the_floor_of_their_prompts():
    pairs = pd.DataFrame([(f"p{n}", 0, f"p{n}", 1, 0.7) for n in range(9)], columns=list(floor.PAIR))
    table = paired.against_floor(planted(ORDERED).assign(noise="own"), pairs).set_index("layer")
    expected = stats.ttest_1samp(ORDERED[:, :9].mean(axis=2) - 0.3, 0, axis=1)
    assert table["p"].tolist() == pytest.approx(expected.pvalue.tolist())
    assert table["p_holm"].tolist() == pytest.approx(paired.holm(expected.pvalue).tolist())
    assert (table["n_prompts"] == 9).all() and (table["n_left_out"] == 2).all()  # p9 has no floor


def test_kendalls_w_by_its_definition_with_ties():
    values = np.array([[1.0, 2, 1, 3], [2, 2, 3, 1], [3, 4, 2, 2], [4, 4, 4, 4]])  # layers x prompts
    ranked = stats.rankdata(values, axis=0)
    n, m = values.shape
    deviation = ((ranked.sum(axis=1) - m * (n + 1) / 2) ** 2).sum()
    ties = 2 * (2**3 - 2)  # prompt 1: two pairs of equal layers
    by_hand = 12 * deviation / (m**2 * (n**3 - n) - m * ties)
    found = order.kendalls_w(planted(values[:, :, None] / 10)).iloc[0]
    assert found["W"] == pytest.approx(by_hand)
    assert found["chi2"] == pytest.approx(by_hand * m * (n - 1))
    same = np.array([0.1, 0.2, 0.3])[:, None, None] * np.array([1.0, 2.0, 3.0])[None, :, None]
    assert order.kendalls_w(planted(same))["W"].iloc[0] == pytest.approx(1.0)
    for silent in (same[:, :1], same[:2], 0 * same):
        assert math.isnan(order.kendalls_w(planted(silent))["W"].iloc[0])


def test_rank_correlations_of_many_columns_are_scipys():
    a, b = np.random.default_rng(9).integers(0, 4, (2, 7, 20)).astype(float)
    for many, one in ((agreement.spearman, stats.spearmanr), (agreement.kendall, stats.kendalltau)):
        assert many(a, b) == pytest.approx([one(x, y).statistic for x, y in zip(a.T, b.T)])


def test_modes_and_models_are_compared_where_they_share_the_rest():
    zero, mean = planted(ORDERED), planted(ORDERED[::-1] * 0.5, replacement="mean")
    alone = planted(1 - ORDERED, selection="only_one")
    other = planted(ORDERED[:3], model="fewer layers")
    data = pd.concat([zero, mean, alone, other, zero.assign(model="twin")], ignore_index=True)
    (modes,) = agreement.correlations(data, "replacement").to_dict("records")
    means = ORDERED.mean(axis=(1, 2))
    assert (modes["a"], modes["b"], modes["n_layers"], modes["n_prompts"]) == ("zero", "mean", 4, 10)
    assert modes["spearman"] == pytest.approx(stats.spearmanr(means, means[::-1]).statistic)
    assert -1 <= modes["kendall_low"] <= modes["kendall"] <= modes["kendall_high"] <= 1
    (measures,) = agreement.correlations(data, "measure").to_dict("records")
    assert measures["spearman"] == pytest.approx(1.0) and measures["spearman_low"] == pytest.approx(1.0)
    (models,) = agreement.correlations(data, "model").to_dict("records")
    assert (models["a"], models["b"], models["spearman"]) == ("m", "twin", pytest.approx(1.0))
    apart = pd.concat([zero, zero.assign(model="twin", prompt_id=zero["prompt_id"] + "x")], ignore_index=True)
    (models,) = agreement.correlations(apart, "model").to_dict("records")
    assert models["n_prompts"] == 0 and models["kendall"] == pytest.approx(1.0) and math.isnan(models["kendall_low"])
    with pytest.raises(ValueError, match="measure, replacement, model"):
        agreement.correlations(data, "seed")


# Aspects


def test_sides_that_share_prompts_but_no_layer_are_no_pair():
    effects = np.random.default_rng(15).uniform(0.1, 0.4, (4, 6, 2))
    whole = planted(effects)
    one, other = whole[whole["layer"].isin(LAYERS[:2])], whole[whole["layer"].isin(LAYERS[2:])]
    apart = pd.concat([one, other.assign(replacement="mean")])
    assert agreement.correlations(apart, "replacement").empty
    assert len(agreement.correlations(pd.concat([whole, other.assign(replacement="mean")]), "replacement")) == 1
    broken = pd.concat([whole, whole.assign(model="n", status="failed", clip_similarity=np.nan)])
    assert agreement.correlations(broken, "model").empty


@pytest.mark.parametrize("missing", [np.nan, None, pd.NA, "", " , "])
def test_missing_aspects_are_no_aspect(missing):
    assert aspects.tags(missing) == []


def test_aspects_are_averaged_by_tag():
    data = frame(
        row("mid", 0.2, "p", aspects="colour"),
        row("mid", 0.4, "q", aspects="colour, count"),
        row("down.9", 0.1, "q", aspects="colour, count"),
        row("mid", 0.9, "r"),
    )
    table = aspects.aspect_table(aspects.aspect_estimates(data))
    assert list(table.index) == ["down.9", "mid"]
    assert table.loc["mid"].to_dict() == pytest.approx({"colour": 0.3, "count": 0.4})
    with pytest.raises(ValueError, match="aspects"):
        aspects.aspect_estimates(data.drop(columns="aspects"))


def test_r2_of_the_interaction_is_that_of_a_two_way_anova():
    values = np.random.default_rng(10).normal(size=(8, 4))  # prompts x layers, 4 prompts of each of 2 aspects
    member = np.repeat(np.eye(2), 4, axis=0)
    centred = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    cells = centred.reshape(2, 4, 4).mean(axis=1)
    expected = 4 * (cells**2).sum() / (centred**2).sum()
    assert aspects.interaction(values, member)[0] == pytest.approx(expected)


def test_a_planted_interaction_is_found_and_a_level_is_not_one():
    rng = np.random.default_rng(11)
    effects = rng.normal(0.4, 0.02, (4, 12, 2))
    tags = pd.Series({f"p{n}": "colour" if n < 6 else "shape" for n in range(12)})
    level = effects.copy()
    level[:, :6] += 0.3
    carried = effects.copy()
    carried[1, :6] += 0.05
    found = [planted(one).assign(aspects=lambda data: data["prompt_id"].map(tags)) for one in (level, carried)]
    none, some = (aspects.aspect_interaction(one, permutations=499).iloc[0] for one in found)
    assert none["p"] > 0.05 and some["p"] <= 0.01 and some["r2"] > 0.3
    assert (some["n_aspects"], some["n_prompts"], some["n_untagged"]) == (2, 12, 0)
    alike = aspects.aspect_interaction(found[0].assign(aspects="colour")).iloc[0]
    assert alike["method"].startswith("n/a") and math.isnan(alike["p"])


def test_the_interaction_test_rejects_a_true_null_about_as_often_as_it_says():
    rng, member = np.random.default_rng(100), np.repeat(np.eye(3), 4, axis=0)
    shared = rng.normal(size=(5, 5))  # layers of one prompt are correlated
    found = [
        aspects.interaction(rng.normal(size=(12, 5)) @ shared, member, permutations=99, seed=run)[1]
        for run in range(600)
    ]
    assert 0.03 <= np.mean(np.array(found) <= 0.05) <= 0.07


# Interactions, curves, windows


def test_pair_interactions_are_paired_by_image():
    rows = []
    for prompt, (a, b, both) in {"p": (0.1, 0.2, 0.5), "q": (0.3, 0.1, 0.5), "r": (0.2, 0.2, 0.4)}.items():
        rows += [row("mid", a, prompt), row("up", b, prompt)]
        rows += [row("", both, prompt, selection="pairs", lesioned="up+mid")]
    rows += [row("", 0.9, "s", selection="pairs", lesioned=("mid", "up")), row("mid", 0.4, "s")]  # no single of up
    (one,) = interactions.pair_interactions(frame(*rows)).to_dict("records")
    assert (one["layer_a"], one["layer_b"]) == ("mid", "up")
    expected = [0.2, 0.1, 0.0]
    assert (one["interaction"], one["both"], one["expected"]) == pytest.approx((0.1, 1.4 / 3, 1.1 / 3))
    assert (one["low"], one["high"]) == pytest.approx(stats.ttest_1samp(expected, 0).confidence_interval())
    assert one["n_left_out"] == 1
    with pytest.raises(ValueError, match="two different layers"):
        interactions.pair_interactions(frame(row("", 0.1, selection="pairs", lesioned="up+up")))


def test_cumulative_curves_and_their_area_by_hand():
    sets = {"mid": (0.2, 0.4), "mid+up": (0.4, 0.8), "up+mid+down.9": (0.4, 1.0)}
    rows = [
        row("", effect, prompt, selection="cumulative", lesioned=names)
        for names, effects in reversed(sets.items())
        for prompt, effect in zip("pq", effects)
    ]
    rows += [row("", 0.3, "r", selection="cumulative", lesioned="mid")]  # lacks the other points
    curve = interactions.cumulative_curves(frame(*rows))
    assert curve["n_lesioned"].tolist() == [1, 2, 3] and curve["added"].tolist() == ["mid", "up", "down.9"]
    assert curve["mean"].tolist() == pytest.approx([0.3, 0.6, 0.7])
    (area,) = interactions.cumulative_areas(frame(*rows)).to_dict("records")
    by_hand = [(0.2 + 0.4 + 0.4 / 2) / 3, (0.4 + 0.8 + 1.0 / 2) / 3]
    assert area["area"] == pytest.approx(np.mean(by_hand)) and (area["n_layers"], area["n_left_out"]) == (3, 1)
    with pytest.raises(ValueError, match="several sets of 1 layers"):
        interactions.cumulative_curves(frame(*rows, row("", 0.1, selection="cumulative", lesioned="up")))


def test_dose_response_by_hand():
    effects = {"mid": {0.25: 0.3, 0.5: 0.4, 1.0: 0.4}, "up": {0.25: 0.1, 0.5: 0.2, 1.0: 0.4}}
    rows = [
        row(layer, effect + shift, prompt, strength=strength)
        for layer, curve in effects.items()
        for strength, effect in curve.items()
        for prompt, shift in (("p", 0.0), ("q", 0.0 if strength < 1 else -0.1))
    ]
    table = interactions.dose_response(frame(*rows, row("down.9", 0.5))).set_index("layer")
    assert list(table.index) == ["mid", "up"]  # one strength makes no curve
    mid = 0.25 * 0.15 + 0.25 * 0.35 + 0.5 * (0.4 + 0.35) / 2
    assert table.loc["mid", "area"] == pytest.approx(mid)
    assert table.loc["mid", "bend"] == pytest.approx(mid / 0.35)
    assert table.loc["up", "bend"] == pytest.approx((0.2 * 0.5 - 0.5 * 0.05 / 2) / 0.35 + 0.5 * 0.2 / 0.35)
    assert table["rising"].to_dict() == {"mid": 0.5, "up": 1.0}
    broken = frame(*rows, row("mid", strength=2.0, status="failed"))
    found = interactions.dose_response(broken).set_index("layer").loc["mid"]
    assert math.isnan(found["area"]) and math.isnan(found["full"]) and found["n_left_out"] == 2
    assert (table["strengths"] == 3).all() and (table["full"] - 0.35).abs().max() < 1e-9


def test_window_map_holds_one_column_a_window():
    rows = [
        row("up", 0.1, window_start=0.5),
        row("mid", 0.3, window_end=0.5),
        row("mid", 0.2, window_start=0.5),
    ]
    table = interactions.window_map(frame(*rows)).set_index("layer")
    assert list(table.columns[-2:]) == ["0-0.5", "0.5-1"] and list(table.index) == ["mid", "up"]
    assert table.loc["mid", ["0-0.5", "0.5-1"]].tolist() == pytest.approx([0.3, 0.2])
    assert math.isnan(table.loc["up", "0-0.5"])


# Shapley values

WORTH = {"down.9": 0.05, "down.10": 0.1, "mid": 0.2, "up": 0.0}


def game(coalition):
    """Additive but for a bonus that needs both mid and up, and one that any of the first two brings."""
    bonus = 0.3 * ({"mid", "up"} <= set(coalition)) + 0.2 * bool({"down.9", "down.10"} & set(coalition))
    return sum(WORTH[layer] for layer in coalition) + bonus


KNOWN = {"down.9": 0.15, "down.10": 0.2, "mid": 0.35, "up": 0.15}  # bonuses are shared in halves


def chains(orders, prompt="p", scale=1.0):
    return [
        row(
            "", scale * game(sequence[:k]), prompt, selection="coalitions", permutation=number, lesioned="+".join(names)
        )
        for number, sequence in enumerate(orders)
        for k in range(1, 5)
        for names in [sorted(sequence[:k])]
    ]


def test_shapley_values_of_a_known_game_are_exact_over_all_orders():
    table = shapley.shapley_values(frame(*chains(itertools.permutations(LAYERS)))).set_index("layer")
    assert table["shapley"].to_dict() == pytest.approx(KNOWN)
    assert table.index[0] == "mid" and (table["n_orders"] == 24).all()


def test_sampled_shapley_values_lie_within_their_errors_and_add_up():
    rng, hits, total = np.random.default_rng(13), 0, 30
    for _ in range(total):
        table = shapley.shapley_values(frame(*chains([rng.permutation(LAYERS).tolist() for _ in range(25)])))
        assert table["shapley"].sum() == pytest.approx(game(LAYERS))
        mid = table.set_index("layer").loc["mid"]
        hits += abs(mid["shapley"] - KNOWN["mid"]) <= 2 * mid["se"]
    assert 0.88 <= hits / total <= 1.0
    (one,) = shapley.shapley_values(frame(*chains([LAYERS]))).query("layer == 'mid'").to_dict("records")
    assert math.isnan(one["se"]) and one["method"] == "n/a (one prompt)"


def test_shapley_values_vary_over_prompts_and_leave_broken_chains_out():
    orders = [list(one) for one in itertools.permutations(LAYERS)]
    data = frame(*chains(orders, "p", 1.0), *chains(orders, "q", 0.5), *chains(orders[:1], "r"))
    data.loc[data.index[-1], "status"] = "failed"
    mid = shapley.shapley_values(data).set_index("layer").loc["mid"]
    assert mid["shapley"] == pytest.approx(0.75 * KNOWN["mid"])
    reach = stats.t.ppf(0.975, 1) * KNOWN["mid"] / 4
    # Two prompts vary so much that what other orders would give adds nothing.
    assert mid["method"] == "t+orders" and 0.75 * KNOWN["mid"] - mid["low"] == pytest.approx(reach)
    alike = frame(*(one for n in range(4) for one in chains(orders, f"p{n}", 1.0 - 0.01 * n)))
    many = shapley.shapley_values(alike).set_index("layer").loc["mid"]
    by_prompt, by_order = (0.01 * KNOWN["mid"]) ** 2 * np.var(range(4), ddof=1) / 4, many["se"] ** 2
    freedom = (by_prompt + by_order) ** 2 / (by_prompt**2 / 3 + by_order**2 / 23)
    reach = stats.t.ppf(0.975, freedom) * math.sqrt(by_prompt + by_order)
    assert many["shapley"] - many["low"] == pytest.approx(reach) and by_order > 10 * by_prompt
    few = shapley.shapley_values(data[data["permutation"] < 7]).set_index("layer").loc["mid"]
    assert few["method"] == "n/a (fewer than 8 orders)" and math.isnan(few["low"])
    assert mid["n_left_out"] == 1
    with pytest.raises(ValueError, match="not a chain"):
        shapley.shapley_values(frame(*chains(orders[:1])[1:]))


# All of them


FUNCTIONS = [
    estimates.layer_estimates,
    estimates.prompt_estimates,
    aspects.aspect_estimates,
    aspects.aspect_interaction,
    order.ranks,
    order.top_stability,
    order.kendalls_w,
    paired.neighbours,
    paired.comparisons,
    affected.affected_prompts,
    variance.variance_components,
    lambda data: paired.against_floor(data, PAIRS),
    lambda data: floor.normalised_importance(data, PAIRS),
    *(lambda data, between=between: agreement.correlations(data, between) for between in agreement.BETWEEN),
    interactions.pair_interactions,
    interactions.cumulative_curves,
    interactions.cumulative_areas,
    interactions.dose_response,
    interactions.window_map,
    shapley.shapley_values,
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("number", range(len(FUNCTIONS)))
@pytest.mark.parametrize("what", ["nothing", "baselines", "failures"])
def test_frames_without_valid_lesions_give_no_figures_and_no_warnings(number, what):
    failed = [row(layer, status="failed", prompt=prompt) for layer in LAYERS[:2] for prompt in "pq"]
    rows = {"nothing": failed, "baselines": [row("", selection="none", replacement="")], "failures": failed}[what]
    data = frame(*rows).iloc[: 0 if what == "nothing" else None]
    before = data.copy()
    table = FUNCTIONS[number](data)
    pd.testing.assert_frame_equal(data, before)
    assert isinstance(table, pd.DataFrame)
    if what != "failures":
        assert table.empty and len(table.columns) > 3
    for name in {"mean", "low", "importance", "p", "W", "area", "shapley", "spearman"} & set(table.columns):
        assert table[name].isna().all()
