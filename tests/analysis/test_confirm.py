"""Confirmatory tests: chosen on one half, tested on the other, by a plan whose hash is fixed beforehand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lesion.analysis import bounded
from lesion.analysis.confirm import confirmed
from lesion.errors import RequestError
from lesion.study.confirmation import CONFIRMING, EXPLORING, Confirmation
from planted import LAYERS, planted

PLAN = Confirmation("clip_similarity", ("changes", "breaks"))
ASKED = {"hypotheses": ["breaks"], "layers": 1, "alpha": 0.05, "paraphrases": None}


def study(prompts=40, broken=LAYERS[1], share=0.8, own=True, seed=0):
    """Own noise; the aspect `colour` is right in every baseline and broken by one layer in this share of images."""
    frame, floor = planted(prompts=prompts)
    frame = frame[frame["replacement"] != "mean"].assign(noise="own" if own else "shared")
    rng = np.random.default_rng(seed)
    frame["read_colour"] = 1.0
    hit = (frame["layer"] == broken) & (frame["selection"] == "leave_one_out") & (rng.random(len(frame)) < share)
    frame.loc[hit, "read_colour"] = 0.0
    return frame.reset_index(drop=True), floor


def test_what_is_planted_is_confirmed_on_the_other_half():
    frame, floor = study()
    table = confirmed(frame, floor, PLAN).set_index("hypothesis")
    assert table["layer"].to_dict() == {"changes": LAYERS[2], "breaks": LAYERS[1]}
    assert (table["verdict"] == "confirmed").all() and (table["n_units"] == 20).all()
    halves = PLAN.halves(frame["prompt_id"].unique())
    left_out = frame[(frame["selection"] == "leave_one_out") & (frame["layer"] == LAYERS[1])]
    drops = (1 - left_out["read_colour"]).groupby(left_out["prompt_id"]).mean()
    later = drops[[halves[one] == CONFIRMING for one in drops.index]]
    early = drops[[halves[one] == EXPLORING for one in drops.index]]
    row = table.loc["breaks"]
    assert (row["estimate"], row["explored"]) == pytest.approx((later.mean(), early.mean()))
    assert row["p"] >= stats.ttest_1samp(later, 0).pvalue * (1 - 1e-9)
    reach = stats.t.ppf(1 - 0.05 / 2 / 2, 19) + stats.norm.ppf(0.8)  # two tests
    assert row["mde"] == pytest.approx(reach * early.std(ddof=1) / np.sqrt(20))
    assert row["mde_in_seed_noise"] == pytest.approx(row["mde"] / row["seed_noise"])


def test_no_smaller_effect_is_promised_than_gaffkes_test_can_find():
    """Few images break, of which Student's t would promise to find 0.2; equal values tell what the bound takes."""
    frame, floor = study(prompts=24, share=0.15, seed=2)
    row = confirmed(frame, floor, Confirmation("clip_similarity", ("breaks",))).iloc[0]
    assert row["method"].startswith("bounded") and row["n_units"] == 12
    assert bounded.p_value(np.full(12, row["mde"]), (-1.0, 1.0)) == pytest.approx(0.05, abs=1e-4)


def test_the_confirming_half_has_no_part_in_the_choice():
    frame, floor = study(share=0.1)
    plan = Confirmation("clip_similarity", ("breaks",))
    halves = frame["prompt_id"].map(plan.halves(frame["prompt_id"].unique()))
    turned = frame.copy()
    late = (halves == CONFIRMING) & (frame["selection"] == "leave_one_out")
    turned.loc[late, "read_colour"] = np.where(frame.loc[late, "layer"] == LAYERS[4], 0.0, 1.0)
    table = confirmed(turned, floor, plan)
    assert table["layer"].tolist() == [LAYERS[1]] and table["estimate"].tolist() == [0.0]
    assert table["verdict"].tolist() == ["not confirmed"]


def test_paraphrases_are_one_unit_and_stay_together():
    frame, floor = study(prompts=12)
    number = frame["prompt_id"].str[1:].astype(int)
    frame["prompt_id"] = "c" + (number // 3).astype(str) + "." + (number % 3).astype(str)
    plan = Confirmation("clip_similarity", ("breaks",), paraphrases=".")
    halves = plan.halves(frame["prompt_id"].unique())
    assert all(len({halves[f"c{cluster}.{one}"] for one in range(3)}) == 1 for cluster in range(4))
    row = confirmed(frame, floor, plan).iloc[0]
    assert row["n_units"] == 2
    left_out = frame[(frame["selection"] == "leave_one_out") & (frame["layer"] == LAYERS[1])]
    late = left_out[left_out["prompt_id"].map(halves) == CONFIRMING]
    assert row["estimate"] == pytest.approx((1 - late["read_colour"]).mean())


def test_the_hash_is_that_of_the_plan_and_sets_the_halves():
    plan = Confirmation.of({**ASKED, "hypotheses": "breaks"}, "ssim")
    assert plan == Confirmation("ssim", ("breaks",)) and Confirmation.of({**ASKED, "hypotheses": []}, "ssim") is None
    written = plan.written(["a", "b", "c"])
    assert Confirmation.read(written) == plan and written["sha256"] == plan.sha256
    assert sorted(written["halves"].values()) == [CONFIRMING, CONFIRMING, EXPLORING]
    other = Confirmation("ssim", ("breaks",), alpha=0.01)
    ids = [f"p{number}" for number in range(30)]
    assert other.sha256 != plan.sha256 and other.halves(ids) != plan.halves(ids)
    with pytest.raises(ValueError, match="the plan is for importance by ssim"):
        confirmed(*study(4), plan)


@pytest.mark.parametrize(
    ("changes", "budget", "words"),
    [
        *(
            ({"hypotheses": wrong}, False, "confirm.hypotheses: must be different ones of changes, breaks, loses; got")
            for wrong in (0, 1, True, float("nan"), {"a": 1}, [None], [["changes"]], ["breaks", "breaks"])
        ),
        ({"hypotheses": ["mends"]}, False, "confirm.hypotheses: must be different ones of changes, breaks, loses"),
        ({"hypotheses": ["breaks", "breaks"]}, False, "confirm.hypotheses: must be different"),
        ({"layers": 0}, False, "confirm.layers: must be a whole number >= 1"),
        ({"alpha": 1}, False, "confirm.alpha: must be a number in"),
        ({"paraphrases": ""}, False, "confirm.paraphrases: must be text, or null"),
        ({}, True, "confirm.hypotheses: do not go with budget.ci_halfwidth"),
    ],
)
def test_refusals(changes, budget, words):
    with pytest.raises(RequestError, match=words):
        Confirmation.of({**ASKED, **changes}, "clip_similarity", budget)
