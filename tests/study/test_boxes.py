"""Boxes of prompts: as they are written, as published tables have them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from lesion.errors import RequestError
from lesion.scoring import Shot
from lesion.scoring.box_iou import BoxIou
from lesion.scoring.box_mass import BoxMass
from lesion.scoring.box_success import BoxSuccess
from lesion.study.boxes import Box
from lesion.study.grid import Cell, ModelIdentity
from lesion.study.prompts import Prompt, parse_prompts
from lesion.study.settings import Settings
from lesion.study.steering import Layout
from lesion.toy_world import COLOURS, is_held_out

TEXT = "a red circle and a blue circle"


def parsed(boxes, text=TEXT):
    return parse_prompts({"items": [{"text": text, "boxes": boxes}]}).prompts[0].boxes


def test_boxes_are_shares_of_the_image_and_words_of_the_prompt():
    assert parsed([{"words": "Red circle", "box": [0, 0.25, 0.5, 1]}]) == (Box("Red circle", (0.0, 0.25, 0.5, 1.0)),)
    both = [{"words": "circle", "box": [0, 0, 0.5, 1]}, {"words": "circle#2", "box": [0.5, 0, 1, 1]}]
    assert len(parsed(both)) == 2


@pytest.mark.parametrize(
    ("words", "box", "told"),
    [
        ("green", [0, 0, 1, 1], "'green' is not in"),
        ("circle#3", [0, 0, 1, 1], "'circle#3' is not in"),
        ("red circle", [0, 0, 1.2, 1], "outside of the image"),
        ("red circle", [-0.1, 0, 1, 1], "outside of the image"),
        ("red circle", [0.5, 0, 0.5, 1], "is empty: x_min = x_max"),
        ("red circle", [0, 0.9, 1, 0.1], "is reversed: y_min > y_max"),
        ("red circle", [0, 0, 1], "must be [x_min, y_min, x_max, y_max]"),
        ("red circle", [0, 0, 1, True], "must be [x_min, y_min, x_max, y_max]"),
        ("red circle", [0, 0, 1, float("nan")], "must be [x_min, y_min, x_max, y_max]"),
        ("red circle", [0, 0, 1, float("inf")], "outside of the image"),
        ("red circle", [0, 0, 1, 10**400], "outside of the image"),
    ],
)
def test_what_is_no_box_is_refused_by_name(words, box, told):
    with pytest.raises(RequestError, match=told.replace("[", r"\[").replace("]", r"\]")) as refused:
        parsed([{"words": words, "box": box}])
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "box", ["[0, 0, 1e999, 1]", f"[0, 0, {'9' * 400}, 1]", "[" * 50_000, "[true, 0, 9, 9]", "{}", "5"]
)
def test_what_is_no_box_in_a_table_is_one_line(box, tmp_path):
    (tmp_path / "a.csv").write_text(f'prompt,obj1,bbox1\n{TEXT},red circle,"{box}"\n')
    with pytest.raises(RequestError, match=r"must be .x_min, y_min, x_max, y_max|outside of the image") as refused:
        parse_prompts({"path": str(tmp_path / "a.csv")})
    assert len(str(refused.value)) < 400


def test_a_number_of_columns_that_no_table_has_is_no_number(tmp_path):
    (tmp_path / "a.csv").write_text(f"prompt,obj{'1' * 5000}\n{TEXT},red circle\n")
    assert parse_prompts({"path": str(tmp_path / "a.csv")}).prompts[0].boxes == ()


def test_a_word_has_one_box():
    with pytest.raises(RequestError, match=r"'red' of .* has two boxes"):
        parsed([{"words": "red circle", "box": [0, 0, 1, 1]}, {"words": "red", "box": [0, 0, 1, 1]}])


def test_files_have_boxes_as_lists_or_in_the_columns_of_the_public_benchmarks(tmp_path):
    lines, table = tmp_path / "boxes.jsonl", tmp_path / "bench.csv"
    boxes = [{"words": "red circle", "box": [0, 0.5, 0.25, 1]}, {"words": "blue circle", "box": [0.5, 0, 1, 0.5]}]
    lines.write_text(json.dumps({"text": TEXT, "boxes": boxes}) + "\n")
    table.write_text(
        "id,category,prompt,obj1,bbox1,obj2,bbox2,obj3,bbox3\n"
        f'1,x,{TEXT},red circle,"[0, 256, 128, 512]",blue circle,"[256, 0, 512, 256]",,\n'
        '2,x,a cat and a cat,cat,"(0, 0, 256, 512)",cat,"(256, 0, 512, 512)",,\n'
    )
    (one,) = parse_prompts({"path": str(lines)}).prompts
    first, second = parse_prompts({"path": str(table)}).prompts
    assert one.boxes == first.boxes == tuple(Box(box["words"], tuple(map(float, box["box"]))) for box in boxes)
    assert [box.words for box in second.boxes] == ["cat", "cat#2"]
    table.write_text(f"id,prompt,obj1,bbox1\n1,{TEXT},red circle,\n")
    with pytest.raises(RequestError, match=r"obj1 and bbox1 .* belong together"):
        parse_prompts({"path": str(table)})


def test_boxes_and_steering_are_part_of_a_cell_only_where_they_are():
    def key(prompt, **changes):
        settings = Settings("txt2img", 4, 3.0, 16, 16, "DDIMScheduler", **changes)
        return Cell(ModelIdentity("m", "f", "float32"), prompt, 0, settings, None).key

    box, other = Box("red circle", (0.0, 0.0, 0.5, 1.0)), Box("red circle", (0.0, 0.0, 0.5, 0.9))
    layout = Layout(("mid_block.attentions.0",), 30.0, 0.2, 5, 10, "noise_share", "covered")
    keys = [key(Prompt(TEXT, boxes=boxes), steering=one) for boxes in ((), (box,), (other,)) for one in (None, layout)]
    assert len(set(keys)) == 6
    assert keys[0] == key(Prompt(TEXT))
    again = Layout(**{**vars(layout), "checkpointing": True})
    assert key(Prompt(TEXT, boxes=(box,)), steering=again) == keys[3]


def test_the_shipped_set_with_boxes_is_what_its_script_writes(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import layout_prompts

    assert layout_prompts.FILE.read_text() == layout_prompts.text()
    prompts = parse_prompts(yaml.safe_load(layout_prompts.FILE.read_text())).prompts
    assert len(prompts) >= 64 and all(is_held_out(prompt.text) for prompt in prompts)
    assert {len(prompt.boxes) for prompt in prompts if prompt.aspects == ("one",)} == {1}
    assert {len(prompt.boxes) for prompt in prompts if prompt.aspects != ("one",)} == {2}


def test_boxes_are_judged_by_the_objects_that_the_reader_sees():
    image = np.full((64, 64, 3), 250, np.uint8)
    image[8:28, 4:24], image[36:56, 40:60] = COLOURS["red"], COLOURS["blue"]  # two squares of 20 pixels
    whole = (4 / 64, 8 / 64, 24 / 64, 28 / 64)
    half = (40 / 64, 36 / 64, 50 / 64, 56 / 64)
    boxes = (Box("red square", whole), Box("blue square", half))
    one = Shot("a", image, "b", image, "", boxes, box_mass=0.25)
    swapped = Shot("a", image, "b", image, "", (Box("red square", half), Box("blue square", whole)))
    alike = Shot("a", image, "b", image, "", (Box("square", half), Box("square#2", whole)))
    absent = Shot("a", image, "b", image, "", (Box("green square", whole),))
    shots = [one, swapped, alike, absent]
    assert BoxIou()(shots).tolist() == pytest.approx([0.75, 0, 0.75, 0])
    assert BoxSuccess()(shots).tolist() == [1, 0, 1, 0]
    assert BoxMass()([one]).tolist() == [0.25]
    assert np.isnan(
        BoxIou()([Shot("a", image, "b", image, "", (Box("cat", whole),)), Shot("a", image, "b", image, "")])
    ).all()


@pytest.mark.parametrize(
    ("key", "values", "possible"),
    [
        *(
            (key, (-1, 0.5, True, "3", None, 1001, 10**30), "a whole number from 0 to 1000")
            for key in ("iterations", "steps")
        ),
        *(
            (key, (-1, True, "3", None, float("nan"), float("inf"), 1e308, 10**400), "a number from 0 to 1000000")
            for key in ("scale", "threshold")
        ),
    ],
)
def test_numbers_of_steering_have_bounds(key, values, possible):
    config = {"name": "layout", "layers": ["mid_block.*"], "scale": 30.0, "threshold": 0.2, "iterations": 5,
              "steps": 10, "step_size": "noise_share", "mask": "covered", "checkpointing": False}  # fmt: skip
    assert Layout.of(config | {key: 1000}) and Layout.of(config | {key: 0})
    for value in values:
        with pytest.raises(RequestError, match=f"^steering.{key}: must be {possible}; got "):
            Layout.of(config | {key: value})
