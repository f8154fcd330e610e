"""docs/study.md: its numbers are those of the kept results, and what it says of them is so."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import study_doc
from lesion.report import tables
from lesion.report.findings import CLAIMS

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
    for aspect in ("colour", "count"):
        assert 0.05 < drops.loc[aspect]["drop"].max() < 0.1 and not (drops.loc[aspect]["low"] > 0).any()
    assert (drops.loc["relation"]["low"] < -0.3).all() and (drops.loc["relation"]["high"] > 0.4).all()
    for aspect in ("background", "size", "relation"):
        assert not (drops.loc[aspect]["low"] > 0).any()
    assert not (drops.xs(COLOURS[1], level="layer")["low"] > 0).any()
    sure = found.reading[found.reading["p_holm"] < 0.05]
    assert set(zip(sure["aspect"], sure["layer"], strict=True)) == {("shape", SHAPE), ("binding", SHAPE)}
    by_mean = of(found.reading, "mean")
    assert 0.4 < by_mean.loc[("relation", "down_blocks.1.attentions.0"), "drop"] < 0.5
    assert by_mean.loc[("relation", "down_blocks.1.attentions.0"), "low"] <= 0
    for aspect in ("colour", "binding"):
        assert by_mean.loc[(aspect, COUNT), "low"] > 0 and drops.loc[(aspect, COUNT), "drop"] <= 0


def test_change_and_loss_are_not_one_order(found):
    zero = found.summary(study_doc.settings(found.frame)[0]).set_index("layer")
    assert zero["adherence_lost"].round(6).corr(zero["importance"].round(6), method="spearman") == pytest.approx(
        0.35, abs=0.005
    )


def test_the_order_is_so(found):
    (zero, mean) = (found.summary(setting).set_index("layer") for setting in study_doc.settings(found.frame))
    assert list(zero.sort_values("rank").index[:2]) == [SHAPE, COLOURS[1]]
    assert zero.loc[SHAPE, ["rank_low", "rank_high", "top_1"]].tolist() == [1, 15, 1.0]
    assert (zero["rank_high"] >= 15).all() and (zero["rank_low"] <= 2).all()
    typical = zero[["typical_low", "typical_high"]]
    assert typical.loc[[SHAPE, COLOURS[1]]].to_numpy().tolist() == [[1, 2], [1, 3]]
    assert (typical["typical_low"] >= 8).sum() == 8 and mean.loc[[SHAPE, COLOURS[1]], "typical_high"].tolist() == [2, 2]
    few = zero[zero["importance_method"].str.startswith("bounded")]
    assert len(few) == 14 and few["importance_high"].between(0.07, 0.095).all()
    assert (zero.loc[SHAPE, ["sufficiency_low", "sufficiency_high"]] - [0.065, 0.355]).abs().max() < 0.0006
    above = zero[(zero["beyond_floor"] > 0) & (zero["p_floor"] < 0.05)]
    assert set(above.index) == {SHAPE, COLOURS[1]}
    neighbours = found.neighbours[found.neighbours["replacement"] == "zero"]
    assert (neighbours["p_holm"] < 0.05).tolist() == [True] + [False] * 14
    assert mean["rank_low"].loc[[SHAPE, COLOURS[1]]].tolist() == [1, 1]
    assert mean.loc[COLOURS[1], "importance"] > 2 * zero.loc[COLOURS[1], "importance"]
    assert list(zero.sort_values("sufficiency").index[-2:]) == list(COLOURS)


def test_the_control_agrees_within_its_intervals(found):
    kept = of(found.aspects[found.aspects["measure"] == "importance"])
    families = [kept.loc[(aspect, SHAPE)] for aspect in ("colour", "shape", "background")]
    assert max(one["low"] for one in families) < min(one["mean"] for one in families)
    assert max(one["mean"] for one in families) < min(one["high"] for one in families)
    (test,) = found.interaction[found.interaction["replacement"] == "zero"].to_dict("records")
    assert round(test["p"], 3) == 0.034 and test["p_holm"] == 1.0
    claims = [getattr(found, name) for name in CLAIMS]
    assert sum(table["p_holm"].notna().sum() for table in claims if len(table)) == 1052
