"""Selections of growing sets of layers, from the study to Shapley values and curves, on games whose answer is known."""

from __future__ import annotations

import pandas as pd
import pytest

from conftest import settings
from lesion.analysis.interactions import cumulative_areas, cumulative_curves
from lesion.analysis.shapley import shapley_values
from lesion.study.columns import row
from lesion.study.grid import Cell, ModelIdentity, Study
from lesion.study.lesions import Lesion, Replacement
from lesion.study.prompts import Prompt

LAYERS = ("down", "mid", "up.0", "up.1")
WORTH = {"down": 0.05, "mid": 0.3, "up.0": 0.15, "up.1": 0.0}
ZERO = Replacement("zero")


def a_study(**selections):
    prompts = tuple(Prompt(text, id=text) for text in "pqr")
    return Study(ModelIdentity("m", "f", "float32"), settings(), prompts, (0, 1), LAYERS, selections, (ZERO,))


def played(study, game):
    """The results if lesioning a set of layers had the effect game(set, scale of the prompt)."""
    scale = {"p": 1.0, "q": 0.5, "r": 0.9}
    return pd.DataFrame(
        {
            **row(cell, LAYERS),
            "status": "ok",
            "clip_similarity": 1 - game(cell.lesion.layers if cell.lesion else (), scale[cell.prompt.id]),
        }
        for cell in study.cells()
    )


def additive(lesioned, scale):
    return scale * sum(WORTH[layer] for layer in lesioned)


def test_shapley_values_of_an_additive_game_are_its_weights():
    frame = played(a_study(coalitions={"permutations": 3, "seed": 1}), additive)
    table = shapley_values(frame).set_index("layer")
    assert table.shapley.to_dict() == pytest.approx({layer: 0.8 * worth for layer, worth in WORTH.items()})
    assert (table.n_orders == 3).all() and (table.n_left_out == 0).all() and table.se.max() < 1e-12


def test_shapley_values_add_up_to_the_effect_of_all_layers():
    def game(lesioned, scale):
        return scale * (sum(WORTH[layer] for layer in lesioned) * 0.6 + 0.3 * ({"mid", "up.1"} <= set(lesioned)))

    frame = played(a_study(coalitions={"permutations": 7, "seed": 0}), game)
    assert shapley_values(frame).shapley.sum() == pytest.approx(game(LAYERS, 0.8))


def test_a_set_that_several_orders_reach_is_one_image_and_several_rows():
    study = a_study(coalitions={"permutations": 20})
    frame = played(study, additive)
    lesioned = frame[frame.selection == "coalitions"]
    assert len(lesioned) == 20 * 4 * 6 and lesioned.cell.nunique() == 15 * 6  # all sets of four layers but the empty
    assert len(list(study.keys())) == len(set(study.keys())) == (15 + 1) * 6
    assert lesioned.groupby(["prompt_id", "seed", "permutation"]).position.apply(list).map(tuple).unique().tolist() == [
        (1, 2, 3, 4)
    ]
    assert shapley_values(frame).n_orders.tolist() == [20] * 4


def test_orders_drawn_with_different_seeds_are_different_orders():
    runs = [played(a_study(coalitions={"permutations": 2, "seed": seed}), additive) for seed in (0, 1)]
    both = pd.concat([runs[0], runs[1][runs[1].selection != "none"]])
    assert shapley_values(both).n_orders.tolist() == [4] * 4


@pytest.mark.parametrize(
    ("order", "added"),
    [("depth", list(LAYERS)), ("reverse", list(LAYERS[::-1])), (["mid", "down", "up.1", "up.0"], None)],
)
def test_cumulative_curves_of_an_additive_game(order, added):
    curve = cumulative_curves(played(a_study(cumulative={"order": order}), additive))
    added = added or order
    assert curve.added.tolist() == added and curve.n_lesioned.tolist() == [1, 2, 3, 4]
    sums = pd.Series([WORTH[layer] for layer in added]).cumsum() * 0.8
    assert curve["mean"].tolist() == pytest.approx(sums.tolist())


def test_curves_of_several_orders_stay_apart_in_one_table():
    orders = ("depth", ["mid", "down", "up.0", "up.1"], ["mid", "up.0", "down", "up.1"])
    both = pd.concat([played(a_study(cumulative={"order": order}), additive) for order in orders])
    areas = cumulative_areas(both)
    assert len(areas) == areas.order.nunique() == 3 and areas.order[0] == "depth"
    assert areas.area[0] < areas.area[1] < areas.area[2]


def test_places_are_labels_and_change_no_key():
    study = a_study(coalitions={"permutations": 1})
    cell = next(cell for cell in study.cells() if cell.lesion)
    plain = Lesion("pairs", "", cell.lesion.layers, ZERO)
    assert cell.lesion.place.position == 1
    assert Cell(cell.model, cell.prompt, cell.seed, cell.settings, plain).key == cell.key
    outside = row(Cell(cell.model, cell.prompt, cell.seed, cell.settings, None), LAYERS)
    assert (outside["order"], outside["permutation"], outside["position"]) == ("", -1, -1)
