"""The pixel reader as metrics, and the table of which lesion breaks which aspect."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pandas as pd
import pytest

from lesion import models, scoring
from lesion.analysis.reading import adherence_lost, reading_columns, reading_drops, reading_shares, reading_table
from lesion.analysis.settings import settings
from lesion.report import contents
from lesion.report.findings import findings
from lesion.report.words import summary
from lesion.scoring import ScorerSpec, Shot, make_scorer
from lesion.toy_world import judge, parse_caption, read_image, render, sample_scene

ASPECTS = ("colour", "shape", "count", "size", "relation", "background", "binding")
METRICS = tuple(f"read_{aspect}" for aspect in ASPECTS)
SPEC = ScorerSpec("reader", "embedded", None, METRICS)


def shot(caption, shown=None, key="a"):
    image = render(parse_caption(shown or caption), random.Random(0))
    return Shot(key, image, "b", image * 0, caption)


def values(*shots):
    found = make_scorer(SPEC, "cpu").score(shots)
    return {column.removeprefix("read_"): list(array) for column, array in found.items()}


@pytest.mark.parametrize(
    ("asked", "shown", "wrong"),
    [
        ("a red circle on a white background", "a red circle on a white background", set()),
        ("a red circle on a white background", "a blue circle on a white background", {"colour"}),
        ("a red circle on a white background", "a red star on a white background", {"shape"}),
        ("a red circle on a white background", "two red circles on a white background", {"count"}),
        ("a red circle on a white background", "a red circle on a black background", {"background"}),
        ("a large red circle on a white background", "a small red circle on a white background", {"size"}),
        (
            "a red circle above a blue star on a white background",
            "a red circle below a blue star on a white background",
            {"relation"},
        ),
        (
            "a red circle above a blue star on a white background",
            "a blue circle above a red star on a white background",
            {"binding", "relation"},  # the two cannot be told apart: each has one property of either
        ),
    ],
)
def test_a_value_is_whether_the_image_shows_what_the_prompt_asks(asked, shown, wrong):
    found = {aspect: value for aspect, (value,) in values(shot(asked, shown)).items()}
    always = {"colour", "shape", "count", "background"}
    asks = (
        always | ({"relation", "binding"} if " above " in asked else set()) | ({"size"} if "large" in asked else set())
    )
    assert {aspect for aspect, value in found.items() if value == 0.0} == wrong
    assert {aspect for aspect, value in found.items() if value == 1.0} == asks - wrong
    assert {aspect for aspect, value in found.items() if math.isnan(value)} == set(ASPECTS) - asks


def test_metrics_say_what_the_reader_says_and_which_prompts_they_are_for():
    rng = random.Random(3)
    captions = [sample_scene(rng).caption() for _ in range(40)]
    images = [render(sample_scene(rng), rng) for _ in captions]
    shots = [Shot(str(i), image, "b", image, text) for i, (image, text) in enumerate(zip(images, captions))]
    found = values(*shots)
    for number, (image, caption) in enumerate(zip(images, captions)):
        judged = judge(read_image(image), parse_caption(caption))
        expected = {aspect: getattr(judged, aspect) for aspect in ASPECTS}
        for aspect, truth in expected.items():
            value = found[aspect][number]
            assert math.isnan(value) if truth is None else value == float(truth)
        asked = {f"read_{aspect}" for aspect, truth in expected.items() if truth is not None}
        assert scoring.columns_for(SPEC, caption) == asked
    assert scoring.columns_for(SPEC, "a photo of a dog") == frozenset()
    assert scoring.columns_for(ScorerSpec("s", "embedded", None, ("ssim", "read_size")), "a dog") == {"ssim"}
    assert all(math.isnan(value) for (value,) in values(Shot("a", images[0], "b", images[0], "a dog")).values())


def test_a_prompt_that_does_not_ask_is_not_scored_again_and_again(cli, monkeypatch):
    wanted = ["scorer.metrics=[clip_similarity,read_colour,read_size]", "selection=leave_one_out"]
    assert cli(*wanted, "prompts.items=[a red circle,a dog]")[0] == 0
    (frame,) = cli.frames()
    of = frame.groupby("prompt").first()
    assert frame[frame.prompt == "a red circle"].read_colour.isin([0.0, 1.0]).all()
    assert frame[frame.prompt == "a dog"].read_colour.isna().all() and frame.read_size.isna().all()
    assert len(of) == 2 and (frame.status == "ok").all()
    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("loaded a model for nothing"))
    monkeypatch.setattr(scoring, "make_scorer", lambda *args: pytest.fail("loaded a scorer for nothing"))
    assert cli(*wanted, "prompts.items=[a red circle,a dog]")[0] == 0


# Which lesion breaks what


def rows(layers, read, prompts=8, seeds=2, **changes):
    """read(layer, prompt, seed) -> columns; layer "" is the baseline."""
    records = []
    for layer in ("", *layers):
        for prompt in range(prompts):
            for seed in range(seeds):
                record = {"model": "m", "prompt_id": f"p{prompt}", "seed": seed, "status": "ok", "clip_similarity": 1.0}
                record |= {"selection": "leave_one_out" if layer else "none", "layer": layer, "steps": 4}
                record |= {"layer_index": layers.index(layer) if layer else -1}
                record |= {"replacement": "zero" if layer else "", "kind": "cross_attention" if layer else ""}
                record |= {"window_start": 0.0, "window_end": 1.0, "branch": "both", "strength": 1.0 if layer else 0.0}
                records.append({**record, **read(layer, prompt, seed), **changes})
    return pd.DataFrame(records)


def planted(layer, prompt, seed):
    """mid breaks colours (of three prompts in four, one seed of two), up breaks relations, which half the prompts ask;
    counts are never right."""
    colour = 0.0 if layer == "mid" and prompt % 4 and seed == 0 else 1.0
    relation = math.nan if prompt % 2 else float(layer != "up")
    return {"read_colour": colour, "read_relation": relation, "read_count": 0.0, "read_size": math.nan}


def test_the_table_finds_what_was_planted():
    frame = rows(["up", "mid"], planted)  # forward order is not alphabetical
    drops = reading_drops(frame)
    assert reading_columns(frame) == ["read_colour", "read_relation", "read_count", "read_size"]
    assert drops.aspect.unique().tolist() == ["colour", "relation", "count"]  # nobody asks for a size
    table = reading_table(drops)
    assert table.index.tolist() == ["up", "mid"]
    assert table.colour.to_dict() == {"up": 0.0, "mid": 0.375} and table.relation.to_dict() == {"up": 1.0, "mid": 0.0}
    at = drops.set_index(["layer", "aspect"])
    colour = at.loc[("mid", "colour")]
    assert (colour.baseline, colour.lesioned, colour.n_prompts, colour.n_images) == (1.0, 0.625, 8, 16)
    assert colour.method == "bca+seeds" and colour.low < 0 < 0.375 < colour.high  # all broken by seed 0
    assert at.loc[("up", "relation")].n_prompts == 4
    # All alike, so that the limits are those of one more prompt at the other end, of weight Beta(1, n).
    assert at.loc[("up", "relation"), ["low", "high"]].tolist() == pytest.approx([2 * 0.025 ** (1 / 4) - 1, 1])
    assert at.loc[("up", "colour"), ["low", "high"]].tolist() == pytest.approx(
        [0.025 ** (1 / 8) - 1, 1 - 0.025 ** (1 / 8)]
    )
    count = at.loc[("mid", "count")]
    assert count.method == "n/a (baseline is never right)" and math.isnan(count["drop"]) and count.baseline == 0.0


def test_the_interval_is_that_of_the_paired_differences():
    from lesion.analysis.bootstrap import interval

    rng = np.random.default_rng(5)
    frame = rows(["mid"], lambda *cell: {"read_shape": float(rng.random() < 0.6)}, prompts=12, seeds=3)
    (one,) = reading_drops(frame).to_dict("records")
    cells = {
        layer: part.pivot(index="prompt_id", columns="seed", values="read_shape")
        for layer, part in frame.groupby("layer")
    }
    apart = (cells[""] - cells["mid"]).loc[frame.prompt_id.unique()].to_numpy()
    found = interval(apart, shared=True, bounds=(-1.0, 1.0))
    assert (one["drop"], one["low"], one["high"]) == pytest.approx((found.mean, found.low, found.high))


def test_rows_left_out_are_counted_and_one_prompt_has_no_interval():
    frame = rows(["mid"], planted)
    frame.loc[(frame.layer == "mid") & (frame.prompt_id == "p1"), "status"] = "failed"
    frame.loc[(frame.layer == "") & (frame.prompt_id == "p2"), ["status", "read_colour"]] = ["invalid", math.nan]
    one = reading_drops(frame).set_index("aspect").loc["colour"]
    assert (one.n_failed, one.n_unscored, one.n_prompts) == (2, 2, 6)
    single = reading_drops(rows(["mid"], planted, prompts=2)[lambda f: f.prompt_id == "p1"]).set_index("aspect")
    assert single.loc["colour"].method == "n/a (one prompt)" and math.isnan(single.loc["colour"].low)


def test_settings_and_selections_stay_apart():
    zero, mean = rows(["mid"], planted), rows(["mid"], lambda *cell: {"read_colour": 1.0}, replacement="mean")
    both = pd.concat([zero, mean[mean.selection != "none"]], ignore_index=True)
    drops = reading_drops(both).query("aspect == 'colour'")
    assert drops.set_index("replacement")["drop"].to_dict() == {"zero": 0.375, "mean": 0.0}
    everything = zero.assign(selection=zero.selection.replace("leave_one_out", "all"), layer="")
    assert reading_drops(everything, "all").set_index("aspect").loc["colour"].layer == ""
    assert reading_drops(zero, "only_one").empty and reading_drops(zero.drop(columns=reading_columns(zero))).empty


def test_what_a_layer_alone_brings_through_stands_beside_the_control():
    """up brings the colour through for every prompt; mid in one image of four, and every relation; nothing for both."""

    def kept(layer, prompt, seed):
        brings = {"": (1.0, 1.0), "up": (1.0, 0.0), "mid": (float(prompt % 2 and seed), 1.0)}[layer]
        return {"read_colour": brings[0], "read_relation": brings[1] if prompt < 12 else math.nan}

    alone = rows(["up", "mid"], kept, prompts=24, noise="own")
    alone["selection"] = alone["selection"].replace("leave_one_out", "only_one")
    control = alone[alone["layer"] == "up"].assign(selection="all", layer="", layer_index=-1, read_colour=0.0)
    control.loc[control["prompt_id"] == "p0", "read_colour"] = 1.0
    frame = pd.concat([alone, control], ignore_index=True)
    shares = reading_shares(frame)
    at = shares.set_index(["layer", "aspect"])
    assert reading_table(shares, "share").to_dict() == {
        "colour": {"up": 1.0, "mid": 0.25},
        "relation": {"up": 0.0, "mid": 1.0},
    }
    assert set(at.loc[(slice(None), "colour"), "control"]) == {1 / 24}
    assert set(at.loc[(slice(None), "relation"), "control"]) == {0.0}
    one = at.loc[("mid", "colour")]
    assert (one.n_prompts, one.n_images) == (24, 48) and 0 <= one.low < 0.25 < one.high
    assert at.loc[("up", "colour"), ["low", "high"]].tolist() == pytest.approx([0.025 ** (1 / 24), 1])
    assert reading_shares(alone)["control"].isna().all()
    nothing = alone.assign(read_relation=alone["read_relation"].where(alone["selection"] == "none", 0.0))
    said = " ".join(summary(findings(nothing), settings(nothing)[0]))
    # Of what none brings through nothing is said.
    assert "Largest shares that a layer alone brings through, without a control: colour up (1.000)." in said

    found = findings(frame)
    (setting,) = settings(frame)
    said = " ".join(summary(found, setting))
    assert (
        "Of the layers that can be shown to bring more through alone than none does, the first: colour up (1.000, "
        "0.042 with every layer lesioned) and "
        "relation mid (1.000, 0.000 with every layer lesioned)." in said
    )
    (table,) = [table for table in contents.of_setting(found, setting) if table.stem.startswith("alone--")]
    assert "colour 0.042, relation 0.000" in table.note
    assert [[cell.text for cell in row] for row in table.cells] == [["up", "1.000", "0.000"], ["mid", "0.250", "1.000"]]
    assert [[cell.bold for cell in row] for row in table.cells] == [[False, True, False], [False, False, True]]


def test_the_words_say_what_is_broken_and_what_cannot_be_shown_to_be():
    frame = rows(["up", "mid"], planted, prompts=24, noise="own")
    said = " ".join(summary(findings(frame), settings(frame)[0]))
    assert "absence can be shown to break something, the first: colour mid (0.375) and relation up (1.000)." in said
    assert "No single layer's absence can be shown to break count." in said


def test_adherence_lost_is_signed_paired_and_apart_from_change():
    """A layer that changes every image and loses nothing, one that loses 0.2 in each, and one that gains: it helps when
    it is removed."""
    effects = {"still": 0.0, "worse": 0.2, "better": -0.1}
    records = []
    for prompt, seed in itertools.product(range(6), range(2)):
        base = 0.5 + 0.05 * prompt + 0.01 * seed
        for index, (layer, lost) in enumerate([("", 0.0), *effects.items()]):
            wobble = 0.01 * (prompt % 2 * 2 - 1) if layer else 0.0
            record = {
                "model": "m",
                "prompt_id": f"p{prompt}",
                "prompt": "x",
                "aspects": "",
                "seed": seed,
                "layer": layer,
            }
            record |= {"selection": "leave_one_out" if layer else "none", "replacement": "zero" if layer else ""}
            record |= {"window_start": 0.0, "window_end": 1.0, "branch": "both", "strength": 1.0 if layer else 0.0}
            record |= {"layer_index": index - 1, "status": "ok", "clip_similarity": 0.5 if layer else 1.0}
            records.append({**record, "clip_text": base - lost + wobble, "read_colour": 1.0 - (layer == "worse")})
    data = pd.DataFrame(records).assign(noise="own")
    found = adherence_lost(data).set_index(["metric", "layer"])
    assert list(found.loc["clip_text"].index) == list(effects)
    assert found.loc["clip_text", "lost"].round(9).tolist() == [0.0, 0.2, -0.1]
    assert found.loc["clip_text", "verdict"].tolist() == ["not settled", "loses", "gains"]
    worse = found.loc[("clip_text", "worse")]
    assert worse["low"] < 0.2 < worse["high"] and worse["n_images"] == 12
    assert worse["baseline"] == pytest.approx(0.63) and worse["lesioned"] == pytest.approx(0.43)
    assert found.loc[("read_colour", "worse"), ["lost", "low", "verdict"]].tolist() == [
        1.0,
        pytest.approx(2 * 0.025 ** (1 / 6) - 1, abs=1e-5),
        "loses",
    ]

    report = findings(data)
    (setting,) = settings(data)
    table = contents.adherence(report, setting)
    assert [column.head for column in table.columns][3:] == ["clip_text", "all that is asked and read is right"]
    assert [(row[0].text, row[3].text, row[3].marks) for row in table.cells] == [
        ("still", "0.000", ""),
        ("worse", "0.200", "***"),
        ("better", "-0.100", "†††"),
    ]
    layers = contents.layers(report, setting)
    (place,) = [place for place, column in enumerate(layers.columns) if column.head == "lost"]
    assert [row[place].text for row in layers.cells] == ["0.000", "0.200", "-0.100"]
    words = "Of layers left out, by clip_text: 1 cost adherence (worse); 1 mend it (better); 1 change images and"
    assert words in " ".join(summary(report, setting))
