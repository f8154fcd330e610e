"""Which candidates are lesioned on which prompts, and what the certificate says of lesions that real ones chose."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import settings
from lesion.errors import RequestError
from lesion.run.attribution import Estimates, Screening, certified
from lesion.study.attribution import Attribution
from lesion.study.grid import ModelIdentity, Study
from lesion.study.lesions import Replacement
from lesion.study.prompts import Prompt

FACTS = {"seconds": "3.0", "seconds_per_image": "0.5", "images": "8", "identical": "yes"}


def study_of(lesions, prompts, seeds=(0,), windows=((0.0, 1.0),)):
    return Study(
        ModelIdentity("m", "f", "float32"),
        settings(),
        tuple(Prompt(f"a {number}", id=f"p{number}") for number in range(prompts)),
        seeds,
        tuple(f"layer{number:03}" for number in range(lesions // len(windows))),
        {"leave_one_out": {}},
        (Replacement("zero"),),
        windows,
    )


def planted(real, noise, seed, asked, **study):
    """A screening of estimates that are wrong by `noise`, and what a metric says of an image."""
    drawn = np.random.default_rng(seed)
    study = study_of(*real.shape, **study)
    factors = np.exp(noise * (drawn.normal(size=(len(real), 1)) + 0.5 * drawn.normal(size=real.shape)))
    effects = np.repeat(real * factors, len(study.seeds), axis=1)
    found = Estimates(asked, study, effects, {}, FACTS)
    places = {lesion.digest: number for number, lesion in enumerate(study.lesions())}

    def value(cell, metric):
        return 1 - real[places[cell.lesion.digest], study.prompts.index(cell.prompt)] if cell.lesion else 1.0

    return Screening(found), value


def effects_of(lesions, prompts, seed):
    drawn = np.random.default_rng(seed)
    return 0.01 * np.exp(drawn.normal(0, 1, (lesions, 1)) + drawn.normal(0, 0.7, (lesions, prompts)))


@pytest.mark.parametrize(
    ("candidates", "top", "prompts", "rungs"),
    [
        (30, 10, 8, [(30, 1), (15, 3)]),
        (50, 5, 8, [(50, 1), (25, 3), (13, 7)]),
        (11, 10, 8, [(11, 1)]),
        (80, 2, 4, [(80, 1), (40, 3)]),
        (0, 10, 8, []),
    ],
)
def test_half_as_many_go_on_to_twice_as_many_further_prompts(candidates, top, prompts, rungs):
    assert Attribution(top=top, candidates=candidates).rungs(prompts) == rungs


def test_each_rung_makes_those_that_rank_highest_on_the_prompts_it_adds():
    real = effects_of(30, 8, 1)
    screening, value = planted(real, 1.0, 2, Attribution(top=3, sample=4, candidates=12), seeds=(0, 1))
    highest = {*np.argsort(-screening.estimates.mean(axis=1))[:12]}
    parts = []
    while True:
        lesions, prompts = [lesion.layer for lesion in screening.part.lesions()], screening.part.prompts
        parts.append(({int(layer[5:]) for layer in lesions}, len(prompts), screening.number))
        if not screening.look(value):
            break
    assert [(len(lesions), prompts, number) for lesions, prompts, number in parts] == [
        (12, 1, 1), (6, 3, 2), (7, 8, 3)
    ]  # fmt: skip
    assert parts[0][0] == highest and parts[1][0] < highest
    assert screening.prompts.sum() == 12 * 1 + 6 * 2 and len(screening.held_out) == 5
    known = np.isfinite(screening.real)
    np.testing.assert_allclose(screening.adjusted[known], real[known])
    assert not known[:, screening.held_out].any()
    top, sample = screening.chosen
    assert parts[2][0] == {*top, *sample}
    assert top == np.argsort(-screening.adjusted.mean(axis=1), kind="stable")[:3].tolist()


def test_the_certificate_counts_what_candidates_cost_and_judges_prompts_that_did_not_choose():
    real = effects_of(30, 8, 3)
    screening, value = planted(real, 1.0, 4, Attribution(top=3, sample=27, candidates=12))
    assert certified(screening, value) is None
    while screening.look(value):
        pass
    judged = certified(screening, value, replicates=9)
    assert judged
    table, data = judged
    assert table["screened"].sum() == 24 and data["candidates"]["images"] == 24
    # 8 baselines and all 30 lesions on 8 prompts: those of candidates are among them.
    assert data["share_of_grid"]["in_all"] == pytest.approx((3 + 31 * 8 * 0.5) / (31 * 8 * 0.5), abs=1e-4)
    assert data["share_of_grid"]["order"] == pytest.approx((3 + 24 * 0.5) / (31 * 8 * 0.5), abs=1e-4)
    apart = real[:, screening.held_out].mean(axis=1)
    best = {*np.argsort(-apart)[:3]}
    assert data["held_out"]["prompts"] == 5
    assert data["held_out"]["precision"] == pytest.approx(len(best & {*screening.chosen[0]}) / 3)


def test_lesions_in_late_windows_count_by_their_share_of_the_steps():
    real = effects_of(6, 4, 3)
    windows = ((0.0, 0.25), (0.5, 1.0))  # of 4 steps: all of them, and half
    screening, value = planted(real, 0.0, 4, Attribution(top=2, sample=4, candidates=3), windows=windows)
    while screening.look(value):
        pass
    data = certified(screening, value, replicates=1)[1]
    late = int((screening.prompts[3:] > 0).sum())
    assert data["grid"] == {"images": 28, "seconds": (4 + 3 * 4 + 3 * 4 / 2) * 0.5}
    assert data["made"] == data["grid"]
    assert data["candidates"] == {"images": 3, "seconds": (3 - late / 2) * 0.5}


def test_lesions_chosen_by_real_ones_leave_a_fair_sample_of_the_rest():
    """The bound on what is missed holds, and precision is right on average, although some prompts chose the top."""
    real, held, errors = effects_of(60, 6, 5), [], []
    truth = real.mean(axis=1)
    for seed in range(60):
        asked = Attribution(top=5, sample=15, candidates=20, seed=seed)
        screening, value = planted(real, 0.8, seed, asked)
        while screening.look(value):
            pass
        top = screening.chosen[0]
        data = certified(screening, value, replicates=1)[1]
        held.append(data["missed"] >= int((np.delete(truth, top) >= data["threshold"]).sum()))
        errors.append(data["precision"]["value"] - len({*np.argsort(-truth)[:5]} & {*top}) / 5)
    assert np.mean(held) >= 0.95
    assert abs(np.mean(errors)) < 3 * np.std(errors) / np.sqrt(len(errors)) + 0.02


def test_the_ranking_is_by_the_mean_that_is_asked_for():
    effects = np.array([[1.0, 16.0], [5.0, 5.0], [0.1, 0.1], [0.2, 0.2]])  # squared mean of roots: 6.25 before 5
    for mean, highest in (("root", [0, 1]), ("geometric", [1, 0])):  # geometric: 4 after 5
        screening, _ = planted(effects, 0.0, 1, Attribution(top=2, sample=2, mean=mean))
        assert screening.chosen[0] == highest


def test_images_that_are_not_valid_leave_the_estimates():
    screening, _ = planted(effects_of(10, 4, 1), 0.5, 1, Attribution(top=2, sample=2, candidates=4))
    while screening.look(lambda cell, metric: float("nan")):
        pass
    assert np.array_equal(screening.adjusted, screening.estimates) and screening.prompts.sum() == 4


def test_what_is_refused():
    with pytest.raises(RequestError, match=r"attribution.candidates: are lesioned on some prompts, and there is 1"):
        Attribution(top=2, candidates=8).check(study_of(12, 1))
    with pytest.raises(RequestError, match=r"attribution.candidates: the study has 12 lesions"):
        Attribution(top=2, candidates=13).check(study_of(12, 3))
