"""The noise floor: which baselines are compared, what the run folder gets, and that nothing is computed twice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import settings
from lesion import models, scoring
from lesion.analysis.floor import floor_by_prompt, noise_floor, normalised_importance
from lesion.scoring import ScorerSpec, make_scorer
from lesion.store.scores import Picture, Scores
from lesion.study.grid import ModelIdentity, Study
from lesion.study.lesions import Replacement
from lesion.study.pairs import COLUMNS, PROMPT_PAIRS, SEED_PAIRS, circle, pairs
from lesion.study.prompts import Prompt


def a_study(prompts=2, seeds=2):
    return Study(
        model=ModelIdentity("m", "f", "float32"),
        settings=settings(),
        prompts=tuple(Prompt(f"thing {number}", id=f"p{number}") for number in range(prompts)),
        seeds=tuple(range(seeds)),
        layers=("a",),
        selections={"leave_one_out": {}},
        replacements=(Replacement("zero"),),
    )


def names(study):
    return [((a.prompt.id, a.seed), (b.prompt.id, b.seed)) for a, b in pairs(study)]


def test_small_studies_compare_all_pairs_of_seeds_and_of_prompts():
    found = names(a_study(5, 4))
    unordered = {frozenset(pair) for pair in found}
    assert len(unordered) == len(found) == 5 * 6 + 10
    same = [pair for pair in found if pair[0][0] == pair[1][0]]
    assert Counter(pair[0][0] for pair in same) == {f"p{number}": 6 for number in range(5)}
    others = [pair for pair in found if pair[0][0] != pair[1][0]]
    assert all(a[1] == b[1] for a, b in others)  # the same seed on both sides
    assert len({frozenset((a[0], b[0])) for a, b in others}) == 10


def test_a_large_study_compares_a_few_pairs_a_prompt_evenly():
    found = names(a_study(200, 8))
    assert len(found) == len({frozenset(pair) for pair in found}) == 200 * SEED_PAIRS + 200 * PROMPT_PAIRS // 2
    others = Counter(side[0] for a, b in found if a[0] != b[0] for side in (a, b))
    assert set(others.values()) == {PROMPT_PAIRS}
    assert set(Counter(a[1] for a, b in found if a[0] != b[0])) == set(range(8))
    far = [abs(int(a[0][1:]) - int(b[0][1:])) for a, b in found if a[0] != b[0]]
    assert 50 < np.mean(far) < 85  # 67 for partners drawn at random: not the neighbours in the list


def test_the_choice_does_not_depend_on_the_order_of_the_prompts():
    study = a_study(30, 1)
    turned = replace(study, prompts=study.prompts[::-1])
    assert {frozenset(pair) for pair in names(study)} == {frozenset(pair) for pair in names(turned)}


def test_one_prompt_or_one_seed_have_no_such_pairs():
    assert names(a_study(1, 1)) == []
    assert names(a_study(1, 2)) == [(("p0", 0), ("p0", 1))]
    assert len(names(a_study(3, 1))) == 3


@pytest.mark.parametrize("count", range(9))
def test_a_circle_goes_through_every_pair_once(count):
    found = list(circle(count, 1000))
    assert len({frozenset(pair) for pair in found}) == len(found) == count * (count - 1) // 2
    assert list(circle(count, 3)) == found[:3]


def test_pairs_are_remembered_until_an_image_changes(tmp_path):
    scores = Scores(tmp_path, {"clip": "v1", "ssim": "v1"})
    scores.load()
    keys = [f"{number:032x}" for number in range(3)]
    for number, key in enumerate(keys):
        scores.add_picture(key, Picture(1, 1, f"{number + 7:032x}", ""))
    scores.add_pair("clip", keys[1], keys[0], 0.25)
    scores.add_pair("clip", keys[1], keys[2], float("nan"))
    scores.add_values(keys[1], keys[0], {"clip": 0.75})
    scores.flush()
    again = Scores(tmp_path, {"clip": "v1", "ssim": "v1"})
    again.load()
    assert again.pair("clip", keys[0], keys[1]) == again.pair("clip", keys[1], keys[0]) == 0.25
    assert again.values(keys[1], keys[0]) == {"clip": 0.75}  # scores of a lesion are apart
    assert again.pair("clip", keys[1], keys[2]) is None and again.pair("ssim", keys[0], keys[1]) is None
    again.add_picture(keys[0], Picture(1, 1, f"{99:032x}", ""))
    assert again.pair("clip", keys[0], keys[1]) is None
    other = Scores(tmp_path, {"clip": "v2"})
    other.load()
    assert other.pair("clip", keys[0], keys[1]) is None


def test_the_run_folder_holds_the_floor_and_a_second_run_computes_nothing(cli, tiny_clip, monkeypatch):
    wanted = ["seeds=[0,1,2]", "prompts.items=[a red circle, two stars, a cat]", "selection=leave_one_out"]
    assert cli(*wanted)[0] == 0
    folder = cli.newest()
    table, results = pd.read_parquet(folder / "floor.parquet"), pd.read_parquet(folder / "results.parquet")
    assert set(COLUMNS) <= set(table.columns) and len(table) == 3 * 3 + 3
    baselines = results[results.selection == "none"].set_index(["prompt_id", "seed"])
    for name in ("model", "task", "steps", "guidance", "height", "width", "scheduler", "negative_prompt", "noising"):
        assert set(table[name]) == set(baselines[name])

    # A direct computation: open_clip's own embeddings of the images in the run folder.
    clip = (
        make_scorer(ScorerSpec("tiny", f"local-dir:{tiny_clip}", None, ("clip_similarity",)), "cpu").metrics[0].embedder
    )

    def embedded(prompt, seed):
        image = Image.open(folder / baselines.loc[(prompt, seed), "image"]).convert("RGB")
        vector = clip.model.encode_image(clip.preprocess(image)[None]).detach().numpy()[0].astype(np.float64)
        return vector / np.linalg.norm(vector)

    for one in table.itertuples():
        direct = embedded(one.prompt_id_a, one.seed_a) @ embedded(one.prompt_id_b, one.seed_b)
        assert one.similarity == pytest.approx(direct, abs=1e-6)
    assert table.similarity.nunique() > 6 and (table.similarity < 1).all()

    # The analysis reads it.
    floors = noise_floor(table).set_index("floor")
    assert floors.n_pairs.to_dict() == {"other_seeds": 9, "other_prompts": 3}
    by_hand = table[table.prompt_id_a == table.prompt_id_b].groupby("prompt_id_a").similarity.mean()
    assert floor_by_prompt(table).other_seeds.to_dict() == pytest.approx(by_hand.to_dict())
    normalised = normalised_importance(results, table)
    assert np.isfinite(normalised.normalised_other_seeds).all()

    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("loaded a model for nothing"))
    monkeypatch.setattr(scoring, "make_scorer", lambda *args: pytest.fail("loaded a scorer for nothing"))
    assert cli(*wanted)[0] == 0
    assert cli.newest() != folder
    pd.testing.assert_frame_equal(pd.read_parquet(cli.newest() / "floor.parquet"), table)


def test_what_cannot_be_computed_is_absent(cli):
    assert cli("prompts.items=[a red circle]", "selection=none")[0] == 0
    table = pd.read_parquet(cli.newest() / "floor.parquet")
    assert table.empty and set(COLUMNS) <= set(table.columns)
    assert noise_floor(table)["mean"].isna().all()
    assert cli("selection=none")[0] == 0  # two prompts, one seed
    table = pd.read_parquet(cli.newest() / "floor.parquet")
    assert len(table) == 1 and floor_by_prompt(table).other_seeds.isna().all()
    assert floor_by_prompt(table).other_prompts.notna().all()
