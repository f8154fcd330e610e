"""Rounds: who takes part, when a layer stops, that all is deterministic, and what it saves on planted effects."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from conftest import settings
from lesion import models, scoring
from lesion.analysis.bootstrap import interval
from lesion.errors import RequestError
from lesion.rounds import Part, Rounds
from lesion.study.budget import Budget
from lesion.study.grid import ModelIdentity, Study
from lesion.study.lesions import Replacement
from lesion.study.plan import batches, tally
from lesion.study.prompts import Prompt
from lesion.study.steering import Layout

LAYERS = tuple(f"down.{number}" for number in range(4))


def a_study(prompts=20, seeds=3, selections=("leave_one_out",), replacements=("zero",), **changes):
    values = {
        "model": ModelIdentity("m", "f", "float32"),
        "settings": settings(noise="own"),
        "prompts": tuple(Prompt(f"thing {number}", id=f"p{number}") for number in range(prompts)),
        "seeds": tuple(range(seeds)),
        "layers": LAYERS,
        "selections": {name: {} for name in selections},
        "replacements": tuple(map(Replacement, replacements)),
    }
    return Study(**{**values, **changes})


def planted(sd_prompts, sd_seeds=0.0, mean=0.3):
    """Similarities whose spread differs by layer: sd_prompts by the layer's number. The same for a cell at any time."""

    def score(cell):
        if cell.lesion is None:
            return 1.0
        layer = LAYERS.index(cell.lesion.layer)
        prompt = np.random.default_rng([layer, int(cell.prompt.id[1:])]).normal()
        seed = np.random.default_rng([layer, int(cell.prompt.id[1:]), cell.seed]).normal()
        return 1 - mean - sd_prompts[layer] * prompt - sd_seeds * seed

    return score


def play(study, budget, score):
    rounds, parts = Rounds(study, budget), []
    while True:
        parts.append(rounds.part)
        if not rounds.look(score):
            return rounds, parts


def keys(cells):
    return [cell.key for cell in cells]


def test_a_part_of_everything_is_the_study_in_cells_order_plan_and_counts():
    study = a_study(6, 2, ("leave_one_out", "only_one", "all"), ("zero", "mean"), strengths=(0.0, 1.0))
    whole = Part.of(study, [(0, 12)] * (1 + len(list(study.lesions()))))
    assert list(whole.cells()) == list(study.cells()) and keys(whole.cells()) == keys(study.cells())
    assert list(whole.in_plan_order()) == list(study.in_plan_order()) and list(whole.keys()) == list(study.keys())
    assert len(whole) == len(study)
    assert tally(whole, lambda key: False) == tally(study, lambda key: False)
    everything = [list(batches(part, 4, lambda key: False)) for part in (whole, study)]
    assert everything[0] == everything[1]
    layout = Layout(LAYERS, 30.0, 0.2, 5, 10, "noise_share", "covered")
    steered = replace(study, settings=replace(study.settings, steering=layout))
    some = Part.of(steered, [(2, 6), *[(2, 4)] * len(list(study.lesions()))])
    assert len(list(some.unsteered.keys())) == 4
    assert set(some.unsteered.keys()) == {cell.unsteered.key for cell in some.cells() if cell.lesion is None}


def test_rounds_take_prompts_first_then_seeds_and_never_a_cell_twice():
    study = a_study(8, 2)
    rounds, parts = play(study, Budget(1e-6, start=6, round=4), planted([0.1] * 4))
    assert [len(part) for part in parts] == [6 * 5, 4 * 5, 4 * 5, 2 * 5]
    made = [key for part in parts for key in part.keys()]  # noqa: SIM118
    assert len(made) == len(set(made)) and set(made) == set(study.keys()) == set(rounds.whole.keys())
    assert keys(rounds.whole.cells()) == keys(study.cells())
    first = {(cell.prompt.id, cell.seed) for part in parts[:1] for cell in part.cells()}
    assert len({prompt for prompt, _ in first}) == 6 and {seed for _, seed in first} == {0}
    second = Counter(cell.prompt.id for part in parts[:3] for cell in part.cells() if cell.lesion is None)
    assert set(second) == {f"p{number}" for number in range(8)} and max(second.values()) - min(second.values()) <= 1
    assert (rounds.table().reason == "grid exhausted").all()
    for part in parts:  # the baseline of a round's image is in it
        assert {cell.baseline.key for cell in part.cells()} <= set(part.keys())


def test_each_layer_stops_when_its_own_interval_is_tight():
    study, score = a_study(60, 2), planted([0.0, 0.02, 0.08, 0.4], 0.01)
    rounds, parts = play(study, Budget(0.03, start=8, round=4), score)
    table = rounds.table().set_index("layer")
    assert table.images.is_monotonic_increasing and table.images.iloc[0] == 8
    assert table.reason.tolist() == ["tight"] * 3 + ["grid exhausted"]
    assert table.images.iloc[1] < table.images.iloc[2] < table.images.iloc[3] == 120
    for layer, one in table.iterrows():
        # An independent look at the same images.
        cells = [cell for cell in rounds.whole.cells() if cell.lesion and cell.lesion.layer == layer]
        assert len(cells) == one.images == one.n_images
        found = interval(wide(cells, score))
        width = found.high - found.low
        assert (one.low, one.high) == pytest.approx((found.low, found.high), abs=0.06 * width)  # other resamples
        assert one.halfwidth == pytest.approx((one.high - one.low) / 2)
        assert one["mean"] == pytest.approx(found.mean)
        # As wide as the interval of a spread that is 90 % sure not to be exceeded.
        assert (one.halfwidth * spread(one.n_prompts) <= 0.03) == (one.reason == "tight")
        if one.rounds > 1:  # one round before: not tight yet
            last = set(rounds_of(parts, layer)[-1])
            before = interval(wide([cell for cell in cells if cell.key not in last], score))
            assert before.n_images == one.images - 4
            assert spread(before.n_prompts) * (before.high - before.low) / 2 > 0.95 * 0.03
    assert table.rounds.iloc[0] == 1 and (table.rounds.iloc[1:] > 1).all()
    assert sum(len(part) for part in parts) == len(rounds.whole) == 120 + table.images.sum()


def spread(prompts):
    """The upper 90 % limit of a standard deviation, as a multiple of that of so many prompts."""
    return math.sqrt((prompts - 1) / stats.chi2.ppf(0.1, prompts - 1))


def rounds_of(parts, layer):
    """Keys of the layer's cells, round by round."""
    found = [[cell.key for cell in part.cells() if cell.lesion and cell.lesion.layer == layer] for part in parts]
    return [keys for keys in found if keys]


def wide(cells, score):
    part = pd.DataFrame([{"p": cell.prompt.id, "s": cell.seed, "v": 1 - score(cell)} for cell in cells])
    return part.pivot(index="p", columns="s", values="v").to_numpy()


def test_it_is_the_same_study_again():
    found = [play(a_study(40, 2), Budget(0.03, start=8, round=5), planted([0.02, 0.05, 0.1, 0.2])) for _ in range(2)]
    pd.testing.assert_frame_equal(found[0][0].table(), found[1][0].table())
    assert [part.spans for part in found[0][1]] == [part.spans for part in found[1][1]]


def test_the_budget_is_never_exceeded_and_used_as_far_as_it_goes():
    for most in range(40, 101, 7):
        rounds, parts = play(a_study(20, 2), Budget(1e-6, most, start=8, round=6), planted([0.1] * 4))
        assert most - 5 < len(rounds.whole) == sum(map(len, parts)) <= most
        assert set(rounds.table().reason) == {"budget spent"}
    with pytest.raises(RequestError, match="the first round alone takes 40 images"):
        Rounds(a_study(), Budget(0.1, 39, start=8))


def test_a_layer_without_effect_stops_and_one_without_scores_does_not():
    def score(cell):
        return {"down.0": 1.0 - 1e-6, "down.1": math.nan}.get(cell.lesion.layer, planted([0.005] * 4)(cell))

    rounds, _ = play(a_study(95, 1), Budget(0.02, start=6, round=30), score)
    table = rounds.table().set_index("layer")
    assert table.reason.tolist() == ["no effect", "grid exhausted", "tight", "tight"]
    assert table.n_images["down.1"] == 0 and table.images["down.2"] == 6
    # Six prompts without any effect allow for a mean of 0.46; it takes 91 to be within +-0.02 of what is seen.
    assert table.images["down.0"] == 95 and table.high["down.0"] == pytest.approx(1 - 0.025 ** (1 / 95), abs=1e-5)


def test_where_prompts_share_noise_no_layer_stops_before_a_second_seed():
    """Two seeds 0.2 apart, prompts all alike: what the first seed says of the others looks sure and is wrong."""

    def score(cell):
        return 0.5 + 0.2 * cell.seed + 0.01 * np.random.default_rng(int(cell.prompt.id[1:])).normal()

    budget = Budget(0.05, start=6, round=3)
    for noise, images in (("own", 6), ("shared", 24)):
        rounds, _ = play(a_study(12, 2, settings=settings(noise=noise)), budget, score)
        assert rounds.table().images.tolist() == [images] * 4
    assert rounds.table().method.tolist() == ["bootstrap-t+seeds"] * 4 and (rounds.table().halfwidth == 0.5).all()
    one_seed, _ = play(a_study(12, 1, settings=settings(noise="shared")), budget, score)  # speaks of that seed only
    assert one_seed.table().images.tolist() == [6] * 4


def test_other_selections_are_made_in_full_in_the_first_round():
    study = a_study(10, 2, ("leave_one_out", "only_one", "all"), ("zero", "mean"))
    rounds, parts = play(study, Budget(0.5, start=6), planted([0.01] * 4))
    assert len(parts) == 1 and len(parts[0]) == 20 + 2 * 20 + 2 * 2 * 4 * 6
    table = rounds.table()
    assert len(table) == 16 and set(table.selection) == {"leave_one_out", "only_one"}
    frame = rounds.marked(
        pd.DataFrame({"selection": [c.lesion.selection if c.lesion else "none" for c in parts[0].cells()]})
    )
    assert frame.groupby("selection").images_taken.unique().map(list).to_dict() == {
        "all": [20], "leave_one_out": [6], "none": [20], "only_one": [6],
    }  # fmt: skip
    assert frame.groupby("selection").stopped.unique().map(list).to_dict() == {
        "all": [""], "leave_one_out": ["tight"], "none": [""], "only_one": ["tight"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"selections": ("all", "cumulative")}, "is for selection=leave_one_out or only_one; all, cumulative"),
        ({"selections": ("leave_one_out", "pairs")}, "does not go with pairs"),
        ({"prompts": 4}, "needs at least 5 prompts"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(RequestError, match="ci_halfwidth") as error:
        Rounds(a_study(**changes), Budget(0.1))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("budget.ci_halfwidth=0", "budget.ci_halfwidth: must be null or a number in (0, 1)"),
        ("budget.ci_halfwidth=wide", "budget.ci_halfwidth: must be null or a number in (0, 1)"),
        ("budget.max_images=10", "budget.max_images: needs budget.ci_halfwidth"),
        ("budget.start=4", "budget.start: must be a whole number >= 5"),
        ("budget.round=0", "budget.round: must be a whole number >= 1"),
        ("budget.ci_halfwidth=0.1", "budget.ci_halfwidth: needs at least 5 prompts"),
    ],
)
def test_wrong_requests_are_one_line_and_leave_no_trace(cli, override, words):
    code, _, err = cli(override)
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1
    assert list(cli.folder.iterdir()) == []


def test_from_command_to_tables_and_again_from_the_store(cli, monkeypatch):
    wanted = [
        f"prompts.items=[{','.join(f'thing {number}' for number in range(9))}]",
        "seeds=[0,1]",
        "generation.noise=own",
        "selection=[leave_one_out,all]",
        "budget.start=5",
        "budget.round=3",
    ]
    code, out, _ = cli(*wanted, "budget.ci_halfwidth=0.02", "dry_run=true")
    assert code == 0 and f"the first round takes {18 + 18 + 15} images" in out and not cli.frames()
    assert cli(*wanted)[0] == 0  # the whole grid
    (whole,) = cli.frames()
    width = "budget.ci_halfwidth=0.2"  # effects are that small that their limits are those of no effect: 8 prompts
    before = len(list((cli.folder / "store" / "cells").rglob("*.png")))
    assert cli(*wanted, width)[0] == 0
    folder = cli.newest()
    frame, table = pd.read_parquet(folder / "results.parquet"), pd.read_parquet(folder / "budget.parquet")
    assert len(list((cli.folder / "store" / "cells").rglob("*.png"))) == before  # it is a part of the grid
    assert len(frame) == 18 + 18 + table.images.sum() and (frame.status == "ok").all()
    assert table.images.tolist() == [8] * 3 and set(table.reason) == {"tight"}
    taken = frame[frame.selection == "leave_one_out"].groupby("layer").agg({"images_taken": "first", "cell": "size"})
    assert (taken.images_taken == taken.cell).all()
    assert taken.cell.to_dict() == table.set_index("layer").images.to_dict()
    same = whole.merge(frame[["cell", "clip_similarity"]], on="cell")
    assert len(same) == len(frame) and (same.clip_similarity_x == same.clip_similarity_y).all()
    assert not {"images_taken", "stopped"} & set(whole.columns)

    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("loaded a model for nothing"))
    monkeypatch.setattr(scoring, "make_scorer", lambda *args: pytest.fail("loaded a scorer for nothing"))
    assert cli(*wanted, width)[0] == 0
    assert cli.newest() != folder
    for name in ("results", "budget", "floor"):
        again = pd.read_parquet(cli.newest() / f"{name}.parquet")
        pd.testing.assert_frame_equal(again, pd.read_parquet(folder / f"{name}.parquet"))


def test_a_fresh_budgeted_run_makes_only_what_its_rounds_take(cli):
    wanted = [
        f"prompts.items=[{','.join(f'thing {number}' for number in range(12))}]",
        "selection=only_one",
        "budget.start=5",
        "budget.round=2",
        "budget.ci_halfwidth=1e-9",
        "budget.max_images=33",
    ]
    assert cli(*wanted)[0] == 0
    folder = cli.newest()
    frame, table = pd.read_parquet(folder / "results.parquet"), pd.read_parquet(folder / "budget.parquet")
    assert len(frame) == 4 * 8 == len(list((cli.folder / "store" / "cells").rglob("*.png")))
    assert table.images.tolist() == [8] * 3 and set(table.reason) == {"budget spent"}
    floor = pd.read_parquet(folder / "floor.parquet")
    assert set(floor.prompt_id_a) | set(floor.prompt_id_b) <= set(frame.prompt_id)


def test_equal_conclusions_for_fewer_images():
    """Planted effects of 4 layers: the rounds find the same order as the whole grid with a good deal fewer images."""
    worth = dict(zip(LAYERS, (0.05, 0.3, 0.15, 0.6)))
    spread = planted([0.02, 0.05, 0.05, 0.1], 0.03, mean=0.0)

    def score(cell):
        return spread(cell) - worth[cell.lesion.layer]

    study = a_study(80, 2)
    rounds, _ = play(study, Budget(0.03, start=12, round=6), score)
    table = rounds.table().set_index("layer")
    assert len(rounds.whole) < 0.5 * len(study)
    assert table["mean"].sort_values().index.tolist() == sorted(LAYERS, key=worth.__getitem__)
    assert all(abs(table["mean"][layer] - worth[layer]) < 0.03 for layer in LAYERS)
    ordered = table.sort_values("mean")
    assert all(a.high < b.low for a, b in itertools.pairwise(ordered.itertuples()))
