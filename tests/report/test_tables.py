"""Tables and sentences against planted effects; nothing that cannot be said becomes a number."""

from __future__ import annotations

import re
import sys

import numpy as np
import pandas as pd
import pytest

from lesion.analysis.estimates import layer_estimates
from lesion.analysis.order import ranks
from lesion.analysis.settings import settings
from lesion.report import contents, crossing, tables
from lesion.report.findings import findings
from lesion.report.tables import Column, Table
from lesion.report.text import markdown
from lesion.report.words import answer, comparison, summary
from planted import LAYERS, planted


@pytest.fixture(scope="module")
def full():
    frame, floor = planted(12, everything=True, noise="own")
    return frame, findings(frame, floor)


@pytest.fixture(scope="module")
def usual():
    frame, floor = planted()
    return frame, floor, findings(frame, floor)


def first(frame):
    return settings(frame)[0]


def of_zero(frame, *layers):
    """Its rows by zero, of some layers where they are named: each layer and replacement has tests of its own to pay."""
    kept = frame["replacement"] != "mean"
    return frame[kept & frame["layer"].isin(["", *layers])] if layers else frame[kept]


def cell(table: Table, layer: str, head: str):
    (row,) = [row for row in table.cells if row[0].text == layer]
    return row[[column.head for column in table.columns].index(head)]


def test_the_layer_table_says_what_the_analysis_says(full):
    frame, found = full
    one = first(frame)
    table = contents.layers(found, one)
    assert found.troubles == []
    estimates = layer_estimates(frame[(frame["strength"] == 1) & (frame["window_end"] - frame["window_start"] == 1)])
    expected = estimates[(estimates["measure"] == "importance") & (estimates["replacement"] == "zero")]
    np.testing.assert_allclose(table.raw["importance_low"], expected["low"])
    np.testing.assert_allclose(table.raw["importance"], expected["mean"])
    assert table.raw["rank"].tolist() == [4, 3, 1, 5, 2]
    order = ranks(frame, compared=found.comparisons, won=found.wins)  # corrected over the whole report
    assert table.raw["typical_high"].tolist() == order["typical_high"].tolist()[:5]
    assert table.raw["rank_low"].tolist() == order["rank_low"].tolist()[:5]
    middle = cell(table, LAYERS[2], "importance")
    assert (
        middle.bold
        and float(middle.text) == pytest.approx(0.3, abs=0.02)
        and re.fullmatch(r"\[0\.\d{3}, 0\.\d{3}\]", middle.interval)
    )
    # Another seed changes 0.15: the mid block changes more, the first layer less.
    assert cell(table, LAYERS[2], "vs another seed").marks == "***"
    assert cell(table, LAYERS[0], "vs another seed").marks == "†††"
    assert float(cell(table, LAYERS[2], "vs another seed").value) == pytest.approx(2, abs=0.2)
    # A layer without effect in 12 prompts may have one in others; what is not known to differ is not ranked.
    silent = cell(table, LAYERS[3], "importance")
    assert (silent.text, silent.interval) == ("0.000", "[0.000, 0.265]") and "Gaffke" in table.note
    assert cell(table, LAYERS[3], "rank").interval == "[2, 5]"
    touched = contents.affected(found, one)
    assert [cell(touched, LAYERS[3], head).text for head in ("affected", "share", "rests on")] == [
        "0",
        "0.000",
        "0.000",
    ]
    assert cell(touched, LAYERS[3], "share").interval == "[0.000, 0.221]"
    assert cell(touched, LAYERS[2], "share").text == "1.000" and cell(touched, LAYERS[2], "").text == "few"  # of 12


def test_every_kind_of_data_has_its_table(full):
    frame, found = full
    made = [table for one in settings(frame) for table in contents.of_setting(found, one)]
    made += crossing.over_settings(found)
    stems = {table.stem for table in made}
    kinds = (
        "layers",
        "prompts--leave_one_out",
        "prompts--only_one",
        "aspects",
        "order",
        "pairs",
        "cumulative",
        "shapley",
        "affected",
    )
    assert {f"{kind}--tiny--zero" for kind in kinds} <= stems
    assert {"agreement", "concordance", "stability", "floor", "doses", "windows--importance"} <= stems
    assert len(stems) == len(made)
    for table in made:
        text = tables.to_markdown(table) + tables.to_latex(table) + tables.to_latex(table, siunitx=True)
        assert not re.search(r"\b(nan|None|<NA>|inf)\b", text), table.stem
        assert "metric clip" in text and "prompts" in text
        assert all(len(row) == len(table.columns) for row in table.cells)


def test_without_a_floor_or_with_one_prompt_it_says_na():
    frame, _ = planted(prompts=1)
    found = findings(frame)
    table = contents.layers(found, first(frame))
    assert {cell(table, LAYERS[2], head).text for head in ("vs another seed", "vs another prompt", "p")} == {"n/a"}
    assert cell(table, LAYERS[2], "importance").interval == "[n/a]" and "n/a: one prompt" in table.note
    assert cell(table, LAYERS[2], "rank").interval == "[n/a]"
    assert "no pairs of baselines" in table.note
    assert table.raw["p_floor"].isna().all() and table.raw["importance_low"].isna().all()
    said = " ".join(summary(found, first(frame)))
    assert "How this compares with noise cannot be said" in said
    assert "No interval of importance for 5 layers: one prompt" in said and "nan" not in said
    assert "is first also" not in said and "not settled" not in said


def test_the_words_follow_the_planted_effects(full):
    frame, found = full
    said = summary(found, first(frame))
    text = " ".join(said)
    assert f"Most important by leave-one-out (1 - clip_similarity to the baseline): {LAYERS[2]} (0." in text
    assert f"{LAYERS[2]} is first also by its rank interval (1 to 1)." in text
    assert f"{LAYERS[3]} has no measurable effect" in text
    floor = r"another seed changes an image by 0\.1[45]\d and another prompt changes an image by 0\.(39|40)\d"
    assert re.search(floor, text)
    assert re.search(rf"2 layers change the image more \({LAYERS[2]} and {LAYERS[4]}\)", text)
    assert f"2 layers change it less ({LAYERS[1]} and {LAYERS[0]})" in text
    assert "1 layer cannot be told apart from it" in text and "Holm-corrected over all tests of this report" in text
    assert "up to 22.1 % of prompts may still be affected (95 %)" in text
    assert "Importance and sufficiency order the layers with Spearman" in text
    assert "Kendall's W = " in text and "Largest Shapley value" in text
    assert "Layers cannot be shown to matter differently for different aspects." in text
    over = " ".join(comparison(found))
    assert "replacements zero and mean of tiny order the layers with Spearman 1.00" in over


def test_an_aspect_that_has_a_layer_of_its_own_is_said():
    frame, floor = planted(prompts=12, noise="own")
    carried = (frame["layer"] == LAYERS[0]) & (frame["aspects"] == "colour") & (frame["selection"] == "leave_one_out")
    frame.loc[carried, "clip_similarity"] -= 0.2
    said = " ".join(summary(findings(frame, floor), first(frame)))
    assert "Layers matter differently for different aspects." in said


def test_ranks_and_the_first_place_rest_on_the_images_that_every_layer_has(usual):
    """The mid block is best where all have images; the last layer seems so by the prompts that only it has."""
    frame, floor = planted(prompts=16, noise="own")
    frame = of_zero(frame)
    late = frame["prompt_id"].isin(("p12", "p13", "p14", "p15"))
    frame = frame[~(late & (frame["selection"] == "leave_one_out") & (frame["layer"] != LAYERS[4]))]
    frame.loc[late & (frame["layer"] == LAYERS[4]), "clip_similarity"] = 0.0
    found = findings(frame, floor)
    table = found.summary(first(frame))
    assert table["importance"].idxmax() == 4 and table["rank"].tolist() == [4, 3, 1, 5, 2]
    assert table["n_rank_prompts"].tolist() == [12] * 5 and table["n_left_out"].tolist() == [8] * 5
    said = " ".join(summary(found, first(frame)))
    assert f"(1 - clip_similarity to the baseline): {LAYERS[2]} (0." in said
    assert f"{LAYERS[2]} is first also by its rank interval (1 to 1)." in said and "not settled" not in said
    where = "anks rest on the 12 prompts (8 images left out) that every layer has."
    assert where in said and where in contents.layers(found, first(frame)).note
    whole = usual[-1]
    assert where[:10] not in " ".join(summary(whole, first(whole.frame)))
    assert where[:10] not in contents.layers(whole, first(whole.frame)).note


def test_without_an_image_that_every_layer_has_there_is_no_rank():
    frame = of_zero(planted()[0])
    gone = frame["selection"].eq("leave_one_out") & (frame["layer"].eq(LAYERS[0]) == frame["prompt_id"].eq("p0"))
    found = findings(frame[~gone])
    assert found.summary(first(frame))["rank"].isna().all()
    said = " ".join(summary(found, first(frame)))
    assert f"to the baseline): {LAYERS[2]}" in said and "No ranks: no image is valid for every layer." in said
    assert "not settled" not in said and "is first also" not in said


def test_the_floor_is_that_of_the_metric_that_importance_is_computed_from(usual):
    frame, floor = of_zero(usual[0], *LAYERS[2:4]), usual[1]
    others = floor.assign(similarity=0.1, metric="ssim")
    found = findings(frame, pd.concat([others, floor.assign(metric="clip_similarity")]))
    expected = findings(frame, floor)
    for name in ("normalised", "tested", "floors"):
        pd.testing.assert_frame_equal(getattr(found, name), getattr(expected, name))
    alone = findings(frame, others)
    assert contents.layers(alone, first(frame)).raw["other_seeds"].isna().all()
    pd.testing.assert_frame_equal(findings(frame, floor.assign(metric=None)).normalised, expected.normalised)


def test_notes_name_the_intervals_there_are(usual):
    whole, floor, of_all = usual
    frame = of_zero(whole, *LAYERS[2:4])  # the second has no effect
    words = {method: contents.layers(findings(frame, floor, method), first(frame)) for method in ("t", "bca")}
    assert "Intervals: Student's t over prompts, delete-one-prompt jackknife, Gaffke's" in words["t"].note
    assert "Intervals: BCa bootstrap over prompts, " in words["bca"].note
    note = contents.layers(of_all, first(whole)).note
    assert (
        "Intervals: bootstrap-t over prompts, Student's t over prompts, delete-one-prompt jackknife, Gaffke's" in note
    )
    assert note.endswith("widened for seeds that all prompts share.")
    two_only = "What another seed changes, which only three seeds tell of others, is that of these two seeds."
    assert any(two_only in text for text in summary(of_all, first(whole)))
    assert not any(two_only in text for text in summary(findings(frame), first(frame)))
    assert "widened" not in contents.layers(findings(frame.assign(noise="own"), floor), first(frame)).note
    lone, _ = planted(prompts=1)
    assert "Intervals" not in contents.layers(findings(lone), first(lone)).note
    with pytest.raises(ValueError, match="bootstrap-t, bca, t"):
        findings(frame, floor, "percentile")


def test_every_interval_of_means_is_of_the_kind_that_is_asked_for():
    frame, floor = planted(12, everything=True, noise="own")
    frame["read_colour"] = (frame["clip_similarity"] > 0.908).astype(float)
    found = findings(frame, floor, "t")
    assert found.troubles == []
    names = ("layers", "neighbours", "tested", "floors", "aspects", "reading", "interactions", "cumulative", "areas")
    assert set(found.shapley["method"]) == {"n/a (fewer than 8 orders)"}
    for name in (*names, "doses"):
        methods = set(getattr(found, name)["method"])
        assert "t" in methods and not methods & {"bootstrap-t", "bca"}, (name, methods)
    assert set(found.normalised["normalised_other_seeds_method"]) == {"t", "bounded"}


def test_sets_of_layers_of_ones_own_have_a_table(usual):
    frame, floor = planted(12, noise="own")
    frame = of_zero(frame, *LAYERS[1:3])
    alone = frame[(frame["selection"] == "leave_one_out") & (frame["layer"] == LAYERS[2])]
    both = alone.assign(selection="custom", layer="", layer_index=-1, lesioned="+".join(LAYERS[1:3]))
    found = findings(pd.concat([frame, both], ignore_index=True), floor)
    assert found.troubles == []
    (table,) = [one for one in contents.of_setting(found, first(frame)) if one.title == "Layers lesioned together"]
    (only,) = table.cells
    assert only[0].text == "+".join(LAYERS[1:3]) and [one.text for one in only[1:3]] == ["2", "custom"]
    assert only[3].text == cell(contents.layers(found, first(frame)), LAYERS[2], "importance").text
    assert contents.groups(usual[-1], first(usual[0])) is None


def test_the_layer_table_says_what_a_budget_gave_each_layer():
    frame, floor = planted()
    frame = of_zero(frame, *LAYERS[2:4])
    lesioned, late = frame["selection"] != "none", ~frame["prompt_id"].isin(("p0", "p1"))
    frame["stopped"] = np.where(lesioned, "grid exhausted", "")
    early = (frame["layer"] == LAYERS[2]) & (frame["selection"] == "only_one")
    frame.loc[early, "stopped"] = "tight"
    frame.loc[frame["layer"] == LAYERS[3], "stopped"] = "budget spent"
    frame = frame[~(early & late)]
    table = contents.layers(findings(frame, floor), first(frame))
    heads = ("n, out", "n, only", "stopped")
    assert [cell(table, LAYERS[2], head).text for head in heads] == [
        "12", "4", "grid exhausted (leave-one-out), tight (only-one)"
    ]  # fmt: skip
    assert [cell(table, LAYERS[3], head).text for head in heads] == ["12", "12", "budget spent"]
    mixed = pd.concat([frame, frame.drop(columns="stopped").assign(model="other")])
    other = contents.layers(findings(mixed, floor), settings(mixed)[-1])
    assert "stopped" not in [column.head for column in other.columns]


def test_a_tie_for_the_first_place_is_not_hidden():
    frame, floor = planted()
    frame = of_zero(frame)
    same = frame["layer"].isin([LAYERS[2], LAYERS[4]])
    frame.loc[same, "clip_similarity"] = 0.7 + 0.05 * np.random.default_rng(1).normal(size=int(same.sum()))
    said = " ".join(summary(findings(frame, floor), first(frame)))
    assert "Who comes first by the mean is not settled" in said


def test_the_first_sentence_says_whether_the_mean_or_most_prompts_settle_the_first_place():
    """Means of a few prompts settle nothing; that a layer changes nearly every prompt more does, and is said."""
    frame, floor = planted(prompts=30)
    frame = of_zero(frame)
    layer, prompt = frame["layer"], frame["prompt_id"].str[1:].astype(int)
    effect = layer.map({LAYERS[0]: 0.001, LAYERS[1]: 0.002, LAYERS[2]: 0.01}).fillna(0.0)
    often = effect.where(frame["selection"] == "leave_one_out", 0.5)

    def first_said(extra):
        found = findings(frame.assign(clip_similarity=1 - often - extra), floor)
        return answer(found, first(frame)), " ".join(summary(found, first(frame)))

    few = 0.3 * ((prompt < 3) & frame["selection"].eq("leave_one_out"))
    (top, *rest), said = first_said(few * layer.eq(LAYERS[2]))
    assert f"`{LAYERS[2]}` changes images most" in top
    assert top.endswith("On most prompts it changes them more than any other layer does.")
    assert any("Whether its mean is the largest is not settled" in one for one in rest)
    assert "with the seeds of this study, ranks by which layer changes the image more" in said
    assert f"{LAYERS[2]} 1 to 1; {LAYERS[1]} 2 to 2; " in said
    (top, *rest), said = first_said(few * layer.eq(LAYERS[3]))
    assert f"`{LAYERS[3]}` changes images most" in top and "On most prompts" not in top
    assert any(one.startswith("On most prompts, though, ") and f"`{LAYERS[2]}`" in one for one in rest)


def test_what_the_analysis_refuses_is_named_and_costs_nothing_else():
    frame, floor = planted(2, everything=True)
    broken = frame[~((frame["selection"] == "coalitions") & (frame["lesioned"] == LAYERS[0]))]
    found = findings(broken, floor)
    assert len(found.troubles) == 1 and "is not a chain" in found.troubles[0]
    assert len(found.layers) and any("is not a chain" in text for text in comparison(found))


def test_another_metric_is_read_and_named():
    frame, floor = planted()
    frame = of_zero(frame).copy()
    frame["ssim"], frame["importance_metric"] = 1 - (1 - frame["clip_similarity"]) / 2, "ssim"
    table = contents.layers(findings(frame, floor), first(frame))
    assert "metric ssim" in table.caption
    assert table.raw["importance"].max() == pytest.approx(0.15, abs=0.02)


def test_long_and_wide_tables_are_split():
    frame = pd.DataFrame({"layer": ["a_b"] * 60, **{f"column {n}": np.arange(60) / 7 for n in range(30)}})
    columns = [Column("layer", "layer", "code"), *(Column(name, name) for name in frame.columns[1:])]
    table = Table.of("wide", "Wide", "100% of it", columns, frame)
    text = tables.to_latex(table)
    parts = text.count(r"\begin{longtable}")
    assert parts > 1 and f"Part {parts} of {parts}" in text and text.count(r"\texttt{a\_b}") == 60 * parts
    assert r"100\% of it" in text


def test_limits_of_bounded_measures_stay_within_their_bounds(monkeypatch):
    """Cosines are at most 1, so importance is at least 0; what the analysis estimates beyond is cut."""
    module = sys.modules["lesion.report.findings"]  # its name is also that of the function
    frame, _ = planted(prompts=3, seeds=1)
    wild = module.layer_estimates
    monkeypatch.setattr(
        module, "layer_estimates", lambda *a, **k: (t := wild(*a, **k)).assign(low=t["low"] - 3, high=t["high"] + 3)
    )
    table = findings(frame).summary(first(frame))
    known = table["importance_low"].notna()
    assert (
        known.any()
        and (table.loc[known, "importance_low"] == 0).all()
        and (table["importance_high"].dropna() == 2).all()
    )
    assert (table["sufficiency_high"].dropna() == 1).all() and (table["sufficiency_low"].dropna() == -1).all()


def test_ratios_to_a_tiny_floor_are_far_above():
    column = tables.Column("ratio", "vs another seed", "ratio", "low", "high")
    shown = column.cells(
        pd.DataFrame({"ratio": [73.2, 2.0, 0.4, -80.0], "low": [-109.3, 1.0, 0.3, -90], "high": [255.7, 12.0, 0.5, 3]})
    )
    assert [(cell.text, cell.interval) for cell in shown] == [
        ("far above", ""), ("2.000", "[1.000, > 10]"), ("0.400", "[0.300, 0.500]"), ("far below", "")
    ]  # fmt: skip
    assert shown[0].value == "73.2"  # the page sorts by the number


@pytest.mark.parametrize(
    ("values", "texts", "bold"),
    [
        ([0.2, 0.0301, 0.0], ["0.200", "0.030", "0.000"], [True, False, False]),
        ([0.2, 0.0003, 0.0], ["0.2000", "0.0003", "0.0000"], [True, False, False]),  # one number of decimals
        ([0.0, 0.00002, -0.00004], ["0.000"] * 3, [False] * 3),  # rounding errors tell no largest
        ([0.5001, 0.4999, 0.1], ["0.500", "0.500", "0.100"], [False] * 3),  # equal as shown
        ([-0.3, -0.2], ["-0.300", "-0.200"], [False] * 2),
        ([float("nan"), 0.1, 0.2], ["n/a", "0.100", "0.200"], [False, False, True]),
    ],
)
def test_a_column_has_one_number_of_decimals_and_its_largest_value_in_bold(values, texts, bold):
    cells = Column("v", "v", best=True).cells(pd.DataFrame({"v": values}))
    assert [cell.text for cell in cells] == texts and [cell.bold for cell in cells] == bold


def test_limits_have_the_decimals_of_their_column():
    frame = pd.DataFrame({"v": [0.2, 0.1], "low": [0.1, 0.0002], "high": [0.3, 0.2]})
    cells = Column("v", "v", "number", "low", "high").cells(frame)
    assert [(cell.text, cell.interval) for cell in cells] == [
        ("0.2000", "[0.1000, 0.3000]"), ("0.1000", "[0.0002, 0.2000]")
    ]  # fmt: skip


def test_the_compact_table_has_short_words_above_and_statistics_below(full):
    frame, found = full
    table = contents.compact(found, first(frame))
    assert [column.head for column in table.columns] == ["layer", "importance", "sufficiency"]
    whole = contents.layers(found, first(frame))
    for head in ("importance", "sufficiency"):
        assert cell(table, LAYERS[2], head) == cell(whole, LAYERS[2], head)
    assert len(table.caption.split()) < 25 and "bootstrap" in table.note and "bootstrap" not in table.caption
    source = tables.to_latex(table)
    assert (
        source.index(r"\caption")
        < source.index(r"\bottomrule")
        < source.index("bootstrap")
        < source.index(r"\end{table}")
    )
    assert tables.to_markdown(table).rstrip().endswith(markdown(table.note, 2000))
    assert len(whole.caption.split()) < 30 and "bootstrap" in whole.note and "bootstrap" not in whole.caption
    for other in contents.of_setting(found, first(frame)):
        assert len(other.caption.split()) < 35, other.caption
        assert not {"Intervals:", "Holm-corrected", "%"} & set(other.caption.split()), other.caption
    source = tables.to_latex(whole)
    assert "Part 2 of 2" in source and source.count("bootstrap-t over prompts") == 1, "the note stands once"
