"""Importance and its relatives against numbers worked out by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from lesion.analysis.estimates import layer_estimates
from lesion.analysis.importance import controls, importance_metric, layer_by_prompt, layer_table, status_counts
from lesion.analysis.settings import settings

DEEP, SHALLOW = "up_blocks.1.attentions.0", "down_blocks.0.attentions.0"  # alphabetical order is not depth order
MIDDLE = "mid_block.attentions.0"
DEPTH = {SHALLOW: 0, MIDDLE: 1, DEEP: 2}


def row(selection, layer="", similarity=1.0, prompt="p", seed=0, status="ok", **changes):
    values = {"model": "m", "prompt_id": prompt, "prompt": f"text of {prompt}", "seed": seed, "selection": selection}
    values |= {
        "replacement": "" if selection == "none" else "zero",
        "layer": layer,
        "layer_index": DEPTH.get(layer, -1),
    }
    values |= {"window_start": 0.0, "window_end": 1.0, "branch": "both", "strength": 1.0, "steps": 4, "guidance": 3.0}
    values |= {"status": status, "reason": "", "image": "", "cell": "c"}
    values |= {"clip_similarity": similarity if status == "ok" else math.nan}
    return {**values, **changes}


def test_importance_is_the_mean_over_seeds_then_prompts_with_unequal_counts():
    frame = pd.DataFrame(
        [
            row("leave_one_out", DEEP, 0.9, "p", 0),
            row("leave_one_out", DEEP, 0.7, "p", 1),  # prompt p: 0.8
            row("leave_one_out", DEEP, 0.2, "q", 0),  # prompt q: 0.2
            row("only_one", DEEP, 0.6, "p", 0),
        ]
    )
    (one,) = layer_table(frame).to_dict("records")
    assert one["importance"] == pytest.approx(1 - (0.8 + 0.2) / 2)  # the mean over images would give 0.4
    assert one["importance_sd"] == pytest.approx(math.sqrt(2 * 0.3**2))  # sample sd of 0.8 and 0.2
    assert one["sufficiency"] == pytest.approx(0.6)
    assert math.isnan(one["sufficiency_sd"])  # one prompt says nothing about spread
    assert (one["n_images"], one["n_invalid"], one["n_failed"], one["rank"], one["effect"]) == (4, 0, 0, 1, "yes")


def test_importance_is_computed_from_the_metric_that_the_study_chose():
    chosen = {"importance_metric": "ssim", "ssim": 0.4}
    frame = pd.DataFrame([row("leave_one_out", DEEP, 0.9, **chosen), row("only_one", DEEP, 0.8, **chosen)])
    assert importance_metric(frame) == "ssim"
    (one,) = layer_table(frame).to_dict("records")
    assert (one["importance"], one["sufficiency"]) == (pytest.approx(0.6), pytest.approx(0.4))
    assert layer_by_prompt(frame).to_numpy().tolist() == [[pytest.approx(0.6)]]
    assert layer_table(frame, "clip_similarity")["importance"].tolist() == [pytest.approx(0.1)]
    (estimate,) = layer_estimates(frame)["mean"][lambda column: column > 0.5]
    assert estimate == pytest.approx(0.6)


def test_without_a_choice_or_with_several_importance_is_computed_from_clip():
    old = pd.DataFrame([row("leave_one_out", DEEP, 0.9)])
    assert importance_metric(old) == "clip_similarity"
    assert importance_metric(old.head(0).assign(importance_metric="ssim")) == "clip_similarity"
    assert importance_metric(pd.concat([old, old.assign(importance_metric="ssim")])) == "clip_similarity"


def test_invalid_and_failed_rows_are_counted_not_averaged():
    frame = pd.DataFrame(
        [
            row("leave_one_out", DEEP, 0.8),
            row("leave_one_out", DEEP, seed=1, status="invalid") | {"clip_similarity": 0.0},
            row("leave_one_out", DEEP, seed=2, status="failed"),
            row("leave_one_out", DEEP, math.nan, seed=3),  # its baseline could not be scored
        ]
    )
    (one,) = layer_table(frame).to_dict("records")
    assert one["importance"] == pytest.approx(0.2)
    assert [one[f"n_{name}"] for name in ("images", "invalid", "failed", "unscored")] == [1, 1, 1, 1]
    (counts,) = status_counts(frame).to_dict("records")
    assert [counts[name] for name in ("ok", "invalid", "failed", "total")] == [2, 1, 1, 4]


def test_depth_order_ranks_with_ties_and_layers_without_effect():
    frame = pd.DataFrame(
        [
            row("leave_one_out", DEEP, 1.0 + 4e-7),
            row("leave_one_out", MIDDLE, 0.5),
            row("leave_one_out", SHALLOW, 0.99995),
            row("none"),
        ]
    )
    table = layer_table(frame)
    assert list(table["layer"]) == [SHALLOW, MIDDLE, DEEP]
    assert list(table["effect"]) == ["none", "yes", "none"]
    assert list(table["rank"]) == [2, 1, 2]
    just_measurable = frame.assign(clip_similarity=frame["clip_similarity"].replace(0.99995, 0.9998))
    assert layer_table(just_measurable)["effect"].iloc[0] == "yes"


def test_missing_modes_give_nan_not_errors():
    alone = layer_table(pd.DataFrame([row("none"), row("only_one", DEEP, 0.4)]))
    assert alone["importance"].isna().all() and alone["rank"].isna().all() and list(alone["effect"]) == ["n/a"]
    assert layer_table(pd.DataFrame([row("none")])).empty
    assert "importance" in layer_table(pd.DataFrame([row("none")])).columns


def test_settings_are_never_averaged_together():
    frame = pd.DataFrame(
        [
            row("leave_one_out", DEEP, 0.9),
            row("leave_one_out", DEEP, 0.5, replacement="mean"),
            row("leave_one_out", DEEP, 0.4, window_end=0.5),
            row("leave_one_out", DEEP, 0.3, model="n"),
            row("leave_one_out", DEEP, 0.2, steps=9),
        ]
    )
    table = layer_table(frame)
    assert sorted(table["importance"].round(6)) == [0.1, 0.5, 0.6, 0.7, 0.8]
    assert set(table["steps"]) == {4, 9}
    assert len({one.slug for one in settings(frame)}) == 5
    with pytest.raises(ValueError, match="exactly one setting"):
        layer_by_prompt(frame)


def test_layer_by_prompt():
    frame = pd.DataFrame(
        [
            row("leave_one_out", DEEP, 0.9, "q", 0),
            row("leave_one_out", DEEP, 0.7, "q", 1),
            row("leave_one_out", SHALLOW, 0.4, "p", 0),
            row("leave_one_out", SHALLOW, 0.1, "q", 0, "failed"),
            row("only_one", DEEP, 0.3, "q"),
            row("leave_one_out", DEEP, 0.0, "q", replacement="mean"),
        ]
    )
    table = layer_by_prompt(frame, replacement="zero")
    assert list(table.index) == [SHALLOW, DEEP] and list(table.columns) == ["q", "p"]
    assert table.loc[DEEP, "q"] == pytest.approx(0.2) and table.loc[SHALLOW, "p"] == pytest.approx(0.6)
    assert math.isnan(table.loc[SHALLOW, "q"]) and math.isnan(table.loc[DEEP, "p"])
    assert layer_by_prompt(frame, selection="only_one").loc[DEEP, "q"] == pytest.approx(0.3)
    assert layer_by_prompt(frame[:0]).empty


def test_controls():
    frame = pd.DataFrame([row("all", "", 0.5), row("all", "", 0.7, "q"), row("all", "", 0.9, "q", 1), row("none")])
    (one,) = controls(frame).to_dict("records")
    assert one["similarity"] == pytest.approx((0.5 + 0.8) / 2) and one["n_images"] == 3
    assert controls(frame[frame["selection"] == "none"]).empty


def test_metrics():
    frame = pd.DataFrame([row("leave_one_out", DEEP, 0.9, ssim=0.25, lpips=0.3, psnr=math.inf)])
    assert layer_table(frame, "ssim")["importance"].iloc[0] == pytest.approx(0.75)
    assert layer_table(frame, "lpips")["importance"].iloc[0] == pytest.approx(0.3)  # a distance already
    for metric in ("psnr", "nothing"):
        with pytest.raises(ValueError, match=metric):
            layer_table(frame, metric)
