"""Shards of a study: disjoint, together the whole, each with its baselines."""

from __future__ import annotations

import dataclasses

import pytest

from lesion.errors import RequestError
from lesion.study.grid import ModelIdentity, Study
from lesion.study.lesions import Replacement
from lesion.study.plan import tally
from lesion.study.prompts import Prompt
from lesion.study.settings import Settings
from lesion.study.shards import Shard

SETTINGS = Settings(task="txt2img", steps=4, guidance=3.0, height=16, width=16, scheduler="DDIMScheduler")
PROMPTS = tuple(
    Prompt(text, f"p{n}") for n, text in enumerate(["one", "two", "one", "three", "four"])
)  # one text twice
STUDY = Study(
    ModelIdentity("m", "f", "float32"),
    SETTINGS,
    PROMPTS,
    (3, 1, 2),
    ("a", "b", "c"),
    {"leave_one_out": {}, "only_one": {}, "all": {}},
    (Replacement("zero"), Replacement("null_prompt")),
)


def shards(count: int) -> list[Study]:
    return [dataclasses.replace(STUDY, shard=Shard(index, count)) for index in range(count)]


@pytest.mark.parametrize("count", [1, 2, 5, 7, 12])
def test_shards_are_disjoint_and_together_the_study(count):
    parts = shards(count)
    made = [{cell.key for cell in part.in_plan_order()} for part in parts]
    assert sum(map(len, made)) == len(set().union(*made))  # no two make one image
    assert set().union(*made) == {cell.key for cell in STUDY.cells()}
    placed = {place: cell for part in parts for place, cell in zip(part.places(), part.cells(), strict=True)}
    assert [placed[place] for place in sorted(placed)] == list(STUDY.cells())
    sizes = [len(images) for images in made]
    per_subject = len(set(STUDY.keys())) // 12  # 4 different prompts x 3 seeds
    assert max(sizes) - min(sizes) <= per_subject
    for part, keys in zip(parts, made, strict=True):
        assert all(cell.baseline.key in keys for cell in part.cells())
        counts = tally(part, lambda key: False)
        assert (counts.rows, counts.unique) == (len(part), len(keys)) == (len(list(part.cells())), counts.unique)
        assert part.whole == STUDY.whole and part.context == STUDY.context


def test_the_whole_names_what_is_asked_for():
    others = [
        dataclasses.replace(STUDY, seeds=(1, 2, 3)),
        dataclasses.replace(STUDY, prompts=PROMPTS[:3]),
        dataclasses.replace(STUDY, selections={"leave_one_out": {}}),
        dataclasses.replace(STUDY, replacements=(Replacement("zero"),)),
        dataclasses.replace(STUDY, model=ModelIdentity("n", "f", "float32")),
    ]
    assert len({STUDY.whole, *(other.whole for other in others)}) == 6


def test_wrong_shards_are_refused():
    for index, count, budget, key in ((0, 0, False, "count"), (2, 2, False, "index"), (-1, 2, False, "index"),
                                      (0, 2, True, "count")):  # fmt: skip
        with pytest.raises(RequestError, match=rf"^shard\.{key}: "):
            Shard.of({"index": index, "count": count}, budget)
    assert Shard.of({"index": 0, "count": 1}, True) == Shard()
    with pytest.raises(RequestError, match=r"^shard\.count: .*allowed: 1 to 12"):  # 4 different prompts
        len(shards(13)[0])
