"""docs/study.md: its numbers are those of the kept results, and what it says of them is so."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import study_doc
from lesion.report import tables

pytestmark = pytest.mark.slow  # 13,132 rows are worked out

SHAPE, COUNT = "up_blocks.2.attentions.2", "up_blocks.2.attentions.1"
COLOURS = ("up_blocks.3.attentions.1", "up_blocks.3.attentions.2")
EMPTY = (
    *("down_blocks.0.attentions.1", "down_blocks.1.attentions.0", "down_blocks.1.attentions.1"),
    *("down_blocks.2.attentions.0", "down_blocks.2.attentions.1", "mid_block.attentions.0"),
    *("up_blocks.1.attentions.0", "up_blocks.1.attentions.1", "up_blocks.1.attentions.2"),
)


@pytest.fixture(scope="module")
def found():
    return study_doc.worked_out()


def test_the_page_and_the_tables_are_those_of_the_results(found):
    text = study_doc.PAGE.read_text(encoding="utf-8")
    # Pictures of another machine may differ in the last digit; tables are rounded.
    assert study_doc.filled(text, found) == text
    made = study_doc.made(found)
    assert {path.stem for path in (study_doc.KEPT / "tables").iterdir()} == set(made)
    for stem, table in made.items():
        assert tables.to_markdown(table) == (study_doc.KEPT / "tables" / f"{stem}.md").read_text(encoding="utf-8")
    for line in text.splitlines():
        for link in [part.split(")")[0] for part in line.split("](")[1:]]:
            assert (study_doc.PAGE.parent / link).exists(), link


def test_the_study_has_the_size_it_says(found):
    frame = found.frame
    assert (len(frame), frame["prompt_id"].nunique(), frame["seed"].nunique()) == (13_132, 49, 4)
    assert (frame["status"] == "ok").all()
    assert set(frame["replacement"]) == {"", "zero", "mean"}


def of(table: pd.DataFrame, replacement: str = "zero") -> pd.DataFrame:
    return table[table["replacement"] == replacement].set_index(["aspect", "layer"])


def test_who_carries_what_is_so(found):
    for replacement in ("zero", "mean"):
        alone = of(found.alone, replacement)
        carriers = {"shape": [SHAPE], "count": [COUNT], "size": [COUNT], "colour": COLOURS, "background": COLOURS}
        for aspect, layers in carriers.items():
            others = alone.loc[aspect].drop(list(layers))
            for layer in layers:
                assert alone.loc[(aspect, layer), "share"] > others["share"].max() - 0.02
                assert not alone.loc[(aspect, layer), "low"] <= alone.loc[(aspect, layer), "control"]
        for aspect in ("relation", "binding"):
            assert alone.loc[aspect]["share"].max() < 0.5
    zero = of(found.alone)
    for layer in EMPTY:
        beyond = zero.xs(layer, level="layer")["share"] - zero.xs(layer, level="layer")["control"]
        assert beyond.max() < 0.12


def test_what_breaks_is_so(found):
    drops = of(found.reading)
    assert drops.loc[("shape", SHAPE), "low"] > 0.5 < drops.loc[("binding", SHAPE), "low"]
    assert drops.loc[("colour", COLOURS[0]), "low"] > 0 and drops.loc["colour"]["drop"].max() < 0.1
    assert drops.loc[("count", COUNT), "low"] > 0 and drops.loc["count"]["drop"].max() < 0.1
    for aspect in ("background", "size", "relation"):
        assert not (drops.loc[aspect]["low"] > 0).any()
    assert not (drops.xs(COLOURS[1], level="layer")["low"] > 0).any()
    by_mean = of(found.reading, "mean")
    assert 0.4 < by_mean.loc[("relation", "down_blocks.1.attentions.0"), "drop"] < 0.5
    assert by_mean.loc[("relation", "down_blocks.1.attentions.0"), "low"] <= 0
    for aspect in ("colour", "binding"):
        assert by_mean.loc[(aspect, COUNT), "low"] > 0 and drops.loc[(aspect, COUNT), "drop"] <= 0


def test_the_order_is_so(found):
    (zero, mean) = (found.summary(setting).set_index("layer") for setting in study_doc.settings(found.frame))
    assert list(zero.sort_values("rank").index[:2]) == [SHAPE, COLOURS[1]]
    assert zero.loc[SHAPE, ["rank_low", "rank_high", "top_1"]].tolist() == [1, 1, 1.0]
    above = zero[(zero["beyond_floor"] > 0) & (zero["p_floor"] < 0.05)]
    assert set(above.index) == {SHAPE, COLOURS[1]}
    neighbours = found.neighbours[found.neighbours["replacement"] == "zero"]
    assert (neighbours["p_holm"] < 0.05).tolist() == [True, True] + [False] * 13
    assert mean["rank_low"].eq(1).sum() == 2
    assert mean.loc[COLOURS[1], "importance"] > 2 * zero.loc[COLOURS[1], "importance"]
    assert list(zero.sort_values("sufficiency").index[-2:]) == list(COLOURS)


def test_the_control_agrees_within_its_intervals(found):
    kept = of(found.aspects[found.aspects["measure"] == "importance"])
    families = [kept.loc[(aspect, SHAPE)] for aspect in ("colour", "shape", "background")]
    assert max(one["low"] for one in families) < min(one["mean"] for one in families)
    assert max(one["mean"] for one in families) < min(one["high"] for one in families)
    (test,) = found.interaction[found.interaction["replacement"] == "zero"].to_dict("records")
    assert test["p"] < 0.05
