"""Layers side by side: models, replacements and modes in one table, and their paired differences."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import lesion
from lesion.analysis.estimates import layer_estimates
from lesion.analysis.side_by_side import over_replacements, paired_differences, relative_depth
from lesion.audit import merged
from lesion.cli.report import report
from lesion.errors import RequestError
from lesion.report import beside, crossing, curves, illustrations, tables
from lesion.report.findings import Findings, findings
from planted import LAYERS, planted

OWN = "up_blocks.7.attentions.3"  # a layer that only one model has


def two_models() -> pd.DataFrame:
    """`tiny`, and `other` whose layers matter 0.05 more, lacks the second layer and calls its last by another name."""
    one, _ = planted(prompts=5, seeds=1)
    one = one[one["replacement"] != "mean"]
    other = one[one["layer"] != LAYERS[1]].assign(model="other")
    other["layer"] = other["layer"].replace(LAYERS[4], OWN)
    noise = np.random.default_rng(1).normal(0.05, 0.01, len(other))
    left_out = other["selection"] == "leave_one_out"
    other.loc[left_out, "clip_similarity"] -= noise[left_out]
    return pd.concat([one, other], ignore_index=True)


def estimated(frame: pd.DataFrame) -> Findings:
    """Only what stands side by side."""
    found = Findings(frame, pd.DataFrame(), "clip_similarity", layers=layer_estimates(frame))
    found.differences = paired_differences(frame)
    return found


@pytest.fixture(scope="module")
def found():
    return findings(two_models(), planted(prompts=5)[1])


def test_differences_are_those_of_the_same_images(found):
    frame = two_models()
    table = paired_differences(frame, method="t")
    assert set(table["layer"]) == set(LAYERS) - {LAYERS[1], LAYERS[4]}, "only layers that both models have"
    assert set(table["between"]) == {"model"} and set(table["replacement"]) == {"zero"} and set(table["model"]) == {""}
    left_out = frame[(frame["selection"] == "leave_one_out") & (frame["layer"] == LAYERS[2])]
    wide = left_out.pivot(index="prompt_id", columns="model", values="clip_similarity")
    expected = wide["tiny"] - wide["other"]  # importance of other less that of tiny
    (row,) = table[(table["measure"] == "importance") & (table["layer"] == LAYERS[2])].to_dict("records")
    assert (row["one"], row["other"], row["n_prompts"]) == ("tiny", "other", 5)
    assert row["difference"] == pytest.approx(expected.mean())
    limits = stats.ttest_1samp(expected, 0.0).confidence_interval(0.95)
    assert (row["low"], row["high"]) == pytest.approx(tuple(limits))
    alone = table[table["measure"] == "sufficiency"]
    assert np.allclose(alone["difference"], 0)
    # What the other model has no valid image of is in no difference.
    frame.loc[(frame["model"] == "other") & (frame["prompt_id"] == "p0"), "status"] = "failed"
    again = paired_differences(frame, method="t")
    assert set(again["n_prompts"]) == {4}


def test_models_share_a_row_where_names_exist_in_both_and_a_depth_where_they_do_not(found):
    (one,) = beside.side_by_side(found)
    table = one.table.set_index("layer")
    assert one.differ == ["model"] and one.names == ["tiny", "other"] and one.alike == "replacement zero"
    # tiny has five layers, other four of which the last stands for tiny's last.
    assert table["depth tiny"].to_dict() == pytest.approx(
        {**{layer: place / 4 for place, layer in enumerate(LAYERS)}, OWN: float("nan")}, nan_ok=True
    )
    assert table.loc[[LAYERS[0], LAYERS[2], LAYERS[3], OWN], "depth other"].tolist() == pytest.approx(
        [0, 1 / 3, 2 / 3, 1]
    )
    assert list(table.index) == [LAYERS[0], LAYERS[1], LAYERS[2], LAYERS[3], LAYERS[4], OWN]
    estimates = layer_estimates(found.frame)
    expected = estimates[(estimates["model"] == "other") & (estimates["measure"] == "importance")].set_index("layer")
    for end, column in (("", "mean"), (" low", "low"), (" high", "high")):
        np.testing.assert_allclose(table[f"importance other{end}"].dropna(), expected[column].dropna())
    shown, differences = beside.tables(found)
    heads = [(column.over, column.head) for column in shown.columns]
    assert (
        heads[:3] == [("", "layer"), ("depth", "tiny"), ("depth", "other")]
        and ("sufficiency (only-one)", "other") in heads
    )
    lacking = shown.cells[1][heads.index(("importance (leave-one-out)", "other"))]
    assert lacking.text == "–" and "–: it has no such layer" in shown.note
    assert [row[0].text for row in differences.cells] == [LAYERS[0], LAYERS[2], LAYERS[3]]
    assert differences.columns[1].head == "other – tiny"
    # Each interval is for itself, so that none is marked for leaving out 0.
    assert not any(cell.bold for row in differences.cells for cell in row) and "some leave out 0 by chance" in (
        differences.note
    )
    text = tables.to_latex(shown)
    assert r" & \multicolumn{2}{c}{depth} & \multicolumn{2}{c}{importance (leave-one-out)} \\" in text
    assert r"\cmidrule(lr){2-3}\cmidrule(lr){4-5}" in text
    assert "| depth: tiny |" in tables.to_markdown(shown)
    assert {"side-by-side", "differences"} <= {table.stem for table in crossing.over_settings(found)}


def test_replacements_of_one_model_and_windows_apart():
    frame, _ = planted(prompts=2, everything=True)
    every = beside.side_by_side(estimated(frame))
    assert [(one.differ, one.names) for one in every] == [(["replacement"], ["zero", "mean"])], "not windows, strengths"
    assert not every[0].depths and every[0].table["layer"].tolist() == LAYERS
    single = frame[frame["replacement"] != "mean"]
    assert beside.side_by_side(estimated(single)) == [] and beside.tables(estimated(single)) == []
    assert relative_depth(single[single["layer"] == LAYERS[1]])["depth"].tolist() == [0.0]


def test_importance_is_a_range_over_replacements():
    frame, _ = planted(prompts=5)
    found = estimated(frame)
    table = over_replacements(found.layers).set_index(["measure", "layer"])
    for layer in LAYERS[:3]:
        of = found.layers[(found.layers["measure"] == "importance") & (found.layers["layer"] == layer)]
        of = of.set_index("replacement")
        row = table.loc["importance", layer]
        assert row["replacements"] == len(of) > 1
        assert (row["lowest_by"], row["highest_by"]) == (of["mean"].idxmin(), of["mean"].idxmax())
        assert row[["lowest", "highest"]].tolist() == [of["mean"].min(), of["mean"].max()]
        assert row["low"] <= of["low"].min() and row["high"] >= of["high"].max()
    (made,) = (one for one in crossing.over_settings(found) if one.stem == "range")
    assert len(made.raw) == len(table)
    assert over_replacements(found.layers[found.layers["replacement"] == "zero"]).empty


def test_figures_by_layer_by_depth_and_of_many_models():
    one, _ = planted(prompts=2, seeds=1)
    frame = pd.concat([one[one["replacement"] != "mean"].assign(model=f"m{n}") for n in range(6)], ignore_index=True)
    drawn = illustrations._besides(estimated(frame))
    assert [stem for _, stem, _ in drawn] == ["side-by-side--importance", "side-by-side--sufficiency"]
    assert [tick.get_text() for tick in drawn[0][0]().axes[0].get_xticklabels()] == [f"m{n}" for n in range(6)]
    ((build, stem, _),) = illustrations._besides(estimated(two_models()))
    lines = {line.get_label(): line for line in build().axes[0].containers}
    assert stem == "side-by-side" and list(lines) == ["tiny", "other"]  # along their depths
    assert lines["other"][0].get_xdata().tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    (one_figure,) = beside.side_by_side(estimated(two_models()))
    turned = replace(one_figure, table=one_figure.table.iloc[::-1].reset_index(drop=True))
    (line, _, _), *_ = curves.side_by_side(turned, "m").axes[0].containers  # from layer to layer in each one's order
    assert line.get_xdata().tolist() == [0, 0.25, 0.5, 0.75, 1]
    # Settings of one model lie at the same depths, and no point or bar over another on the paper.
    both = pd.concat([two_models(), two_models().assign(replacement="mean")], ignore_index=True)
    ((build, _, _),) = illustrations._besides(estimated(both))
    figure = build()
    figure.draw_without_rendering()
    axes, (table,) = figure.axes[0], beside.side_by_side(estimated(both))
    assert all(-0.1 < low < 0 and 1 < high < 1.1 for low, high in [axes.get_xlim()])  # all that is drawn is seen
    limits = table.table[[f"importance {name} {end}" for name in table.names for end in ("low", "high")]]
    low, high = axes.get_ylim()
    assert low < limits.min().min() and limits.max().max() < high
    drawn_lines = [line[0] for line in figure.axes[0].containers]
    held = [line.get_transform().transform(line.get_xydata())[:, 0] for line in drawn_lines]
    places = [place for line in held for place in np.round(line * 72 / figure.dpi, 3)]
    assert len(drawn_lines) == 4 and len(set(places)) == len(places) == 18
    first = sorted(line[0] for line in held)  # all four at depth 0
    zero = figure.axes[0].transData.transform((0, 0))[0]
    assert np.array(first) * 72 / figure.dpi - zero * 72 / figure.dpi == pytest.approx([-4.5, -1.5, 1.5, 4.5])
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn_lines}) == 4
    ((build, _, _),) = illustrations._besides(estimated(one))
    assert [tick.get_text() for tick in build().axes[0].get_yticklabels()] == LAYERS  # a row a layer


@pytest.mark.slow
def test_a_multirun_has_the_table_everywhere_and_the_audit_knows_it(tmp_path, no_pictures):
    frame = two_models().assign(aspects="")
    for number, (_, part) in enumerate(frame.groupby("model", sort=False)):
        (tmp_path / str(number)).mkdir()
        part.to_parquet(tmp_path / str(number) / "results.parquet")
    runs = [tmp_path / "0", tmp_path / "1"]
    assert not merged.is_there(tmp_path, runs)
    report(runs, tmp_path, mix=True)
    for ending in ("csv", "md", "tex"):
        assert (tmp_path / "tables" / f"side-by-side.{ending}").is_file()
    page = (tmp_path / "report.html").read_text()
    assert "How do settings compare, layer by layer?" in page and "Paired differences" in page
    results = lesion.open(tmp_path)
    wide = results.side_by_side(window=(0, 1))
    with (tmp_path / "tables" / "side-by-side.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["layer", *wide.columns]
    assert float(rows[1][rows[0].index("importance tiny")]) == wide["importance tiny"].iloc[0]
    assert len(results.differences()) == 6
    with pytest.raises(RequestError, match="must fit one of these groups of settings: replacement zero"):
        results.side_by_side(strength=0.5)

    def audited(name):
        (tmp_path / name).mkdir()
        return merged.report(tmp_path, runs, tmp_path / name)

    assert merged.is_there(tmp_path, runs) and not merged.is_there(tmp_path / "0", runs)
    check, made = audited("work")
    assert (check.verdict, check.undone) == (
        "as made",
        "",
    ) and tmp_path / "work" / "tables" / "side-by-side.csv" in made
    rows[1][3] = rows[1][3][:-1] + str((int(rows[1][3][-1]) + 1) % 10)
    with (tmp_path / "tables" / "side-by-side.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    check, _ = audited("again")
    (differs,) = check.differs
    assert differs.startswith(f"tables/side-by-side.csv row 1 ({LAYERS[0]}), column importance tiny: ")
    (tmp_path / "report.json").write_text("not JSON")
    assert "Expecting value" in audited("third")[0].undone
