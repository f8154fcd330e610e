"""Measures of attention maps against values worked out by hand, and planted causes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lesion.analysis.maps import (
    MEASURES,
    against_masks,
    entropy,
    layer_means,
    maps_against_causes,
    with_measures,
    word_means,
)
from lesion.toy_world import parse_caption, render
from lesion.toy_world.masks import masks, spoken


def test_entropy_runs_from_one_place_to_all():
    one, two, every = np.zeros((4, 4)), np.zeros((4, 4)), np.full((4, 4), 0.2)
    one[1, 2], two[0, :2] = 0.7, 0.3
    assert entropy(np.stack([one, two, every])) == pytest.approx([0, np.log(2) / np.log(16), 1], abs=1e-12)


def test_a_map_against_a_mask_by_hand():
    values = np.array([[[0.5, 0.3], [0.2, 0.0]]])
    mask = np.array([[[True, False], [True, False]]])
    found = {name: float(one[0]) for name, one in against_masks(values, mask).items()}
    # Ranked: hit, miss, hit, miss. Precision at the hits: 1 and 2/3. The best cut takes three: 2 of 3.
    assert found == pytest.approx({"mass": 0.7, "iou": 2 / 3, "average_precision": (1 + 2 / 3) / 2})
    same = against_masks(mask.astype(float), mask)
    assert {name: float(one[0]) for name, one in same.items()} == {"mass": 1, "iou": 1, "average_precision": 1}
    flat = {name: float(one[0]) for name, one in against_masks(np.full((1, 2, 2), 0.3), mask).items()}
    assert flat == pytest.approx({"mass": 0.5, "iou": 0.5, "average_precision": 0.5})  # says nothing


def test_words_of_a_caption_and_the_pixels_they_speak_of():
    caption = "a small red circle to the left of a blue star on a white background"
    about = [(word.name, word.aspect, word.thing) for word in spoken(caption)[:4]]
    assert about == [("small", "size", 0), ("red", "colour", 0), ("circle", "shape", 0), ("left", "relation", 0)]
    about = [(word.name, word.aspect, word.thing) for word in spoken(caption)[4:]]
    assert about == [("blue", "colour", 1), ("star", "shape", 1), ("white", "background", -1),
                     ("background", "background", -1)]  # fmt: skip
    assert spoken("two red stars on a black background")[0].aspect == "count"
    assert spoken("a photograph of a cat") == () and masks("a cat", np.zeros((64, 64, 3), np.uint8)) == {}

    caption = "a red circle to the left of a blue star on a white background"
    import random

    image = render(parse_caption(caption), random.Random(0))
    found = masks(caption, image)
    red, blue = (image.astype(int)[..., one] - image.astype(int)[..., 1] > 60 for one in (0, 2))
    for word, truth in (("red", red), ("circle", red), ("left", red), ("star", blue), ("white", ~(red | blue))):
        both = (found[word] & truth).sum() / (found[word] | truth).sum()
        assert both > 0.9, word
    assert set(masks(caption.replace("star", "ring"), image)) == {"red", "circle", "left", "white", "background"}


def planted(prompts=8, layers=6, seed=0):
    """Maps whose mass is the layer's importance, whose entropy is its opposite, and whose share is noise."""
    dice = np.random.default_rng(seed)
    strength = np.linspace(0.1, 0.6, layers)
    maps, rows = [], []
    for prompt in range(prompts):
        rows.append((f"p{prompt}", "none", "", 1.0))
        for layer, value in enumerate(strength + dice.normal(0, 0.01, layers)):
            rows.append((f"p{prompt}", "leave_one_out", f"l{layer}", 1 - value))
            maps.append({"prompt_id": f"p{prompt}", "selection": "none", "map_layer": f"l{layer}", "map_index": layer,
                         "aspect": "colour", "word": "red", **dict.fromkeys(MEASURES, 0.5), "mass": value,
                         "entropy": 1 - value, "share": dice.random()})  # fmt: skip
    frame = pd.DataFrame(rows, columns=["prompt_id", "selection", "layer", "clip_similarity"])
    return pd.DataFrame(maps), frame.assign(status="ok", seed=0, read_colour=(frame["clip_similarity"] > 0.5) * 1.0)


def test_planted_causes_are_found():
    maps, frame = planted()
    found = maps_against_causes(maps, frame, "clip_similarity", resamples=50).set_index(["aspect", "measure"])
    assert found.loc[("colour", "mass"), "correlation"] == pytest.approx(1)
    assert found.loc[("colour", "entropy"), "high"] < -0.9
    assert found.loc[("all", "share"), "low"] < 0.7
    assert np.isnan(found.loc[("colour", "iou"), "correlation"])  # the same in every layer
    assert set(found["n_prompts"]) == {8} and set(found["n_layers"]) == {6}
    broken = maps_against_causes(maps, frame, "clip_similarity", "read_colour", 50).set_index(["aspect", "measure"])
    assert broken.loc[("colour", "mass"), "correlation"] > 0.5
    table = layer_means(maps)
    assert table["map_layer"].tolist() == [f"l{n}" for n in range(6)] * 2
    first = table[(table["aspect"] == "all") & (table["map_layer"] == "l0")]["mass"].item()
    assert first == pytest.approx(maps[maps["map_layer"] == "l0"]["mass"].mean())


def test_the_script_fills_the_page(tmp_path, monkeypatch):
    import sys
    from pathlib import Path

    from lesion.store import tables

    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    attention_doc = __import__("attention_doc")
    monkeypatch.setattr(attention_doc, "maps_against_causes", lambda *given: maps_against_causes(*given, resamples=20))
    maps, frame = planted()
    reads = dict.fromkeys(attention_doc.READ.values(), frame["read_colour"])
    tables.write(tmp_path, {"maps": maps, "results": frame.assign(**reads)})
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- looks -->\nold\n<!-- end -->\n<!-- causes -->\n<!-- end -->\nafter\n")
    monkeypatch.setattr(attention_doc, "looks", lambda maps, frame: "looks")
    attention_doc.main([str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("before\n<!-- looks -->\nlooks\n<!-- end -->") and text.endswith("after\n")
    assert "| colour | importance | 8 |" in text and "1.00 [" in text
    del sys.modules["attention_doc"]


def test_measures_of_images_and_words_by_hand():
    def row(cell, layer, word, aspect, value, prompt="p"):
        mass = value if aspect else float("nan")
        return {
            "cell": cell, "prompt_id": prompt, "selection": "none", "map_layer": layer, "map_index": 0,
            "word": word, "aspect": aspect, "share": value, "entropy": 1.0, "mass": mass, "iou": mass,
            "average_precision": mass,
        }  # fmt: skip

    maps = pd.DataFrame(
        [
            *(row("x", layer, "red", "colour", value) for layer, value in (("one", 0.1), ("two", 0.3))),
            *(row("x", layer, "red#2", "colour", value) for layer, value in (("one", 0.2), ("two", 0.2))),
            *(row("x", layer, "circle", "shape", value) for layer, value in (("one", 0.5), ("two", 0.9))),
            *(row("x", "one", word, "", 0.9) for word in ("and", "<special>")),
            row("y", "one", "cat", "", 0.4, "q"),
            row("y", "one", "<rest>", "", 0.6, "q"),
        ]
    )
    frame = pd.DataFrame({"cell": ["y", "x", "z", "x"], "seed": [0, 1, 2, 3]}, index=[7, 8, 9, 10])
    found = with_measures(frame, maps)
    assert found[["cell", "seed"]].equals(frame)
    assert found["attention_share"].to_list() == pytest.approx([0.4, 2.2 / 6, np.nan, 2.2 / 6], nan_ok=True)
    assert found["attention_mass_colour"].to_list() == pytest.approx([np.nan, 0.2, np.nan, 0.2], nan_ok=True)
    assert found["attention_iou_shape"].to_list() == pytest.approx([np.nan, 0.7, np.nan, 0.7], nan_ok=True)
    assert len(found.columns) == 2 + 3 * len(MEASURES)
    assert with_measures(frame, maps[:0]) is frame
    words = word_means(maps).set_index("word")
    assert list(words.index) == ["cat", "red", "circle"]
    assert words["mass"].to_list() == pytest.approx([np.nan, 0.2, 0.7], nan_ok=True)
    foreign = maps[maps["prompt_id"] == "q"]  # no word of it speaks of the picture: all its words count
    (line,) = layer_means(foreign).to_dict("records")
    assert line["aspect"] == "all" and line["share"] == 0.4 and list(word_means(foreign)["word"]) == ["cat"]
    nothing = maps[maps["word"] == "<rest>"]
    assert layer_means(nothing).empty and word_means(nothing).empty
