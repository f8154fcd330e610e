"""Boxes over images in grids and on the page: where objects were asked for, and where the reader sees them."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lesion.report.boxes import marks
from lesion.report.data import page_data
from lesion.report.grids import comparison, layers_by_prompts
from lesion.report.pictures import page_marks
from lesion.study.boxes import Box, as_text, from_text
from lesion.toy_world.grammar import COLOURS as PAINTS
from test_report import study

PROMPT = "a red square and a green star"
ASKED, SEEN = (0.25, 0.25, 0.75, 0.75), (20 / 64, 12 / 64, 44 / 64, 36 / 64)
OVERLAP = 24 * 20 / (32 * 32 + 24 * 24 - 24 * 20)
ORANGE, SKY_BLUE = (0xE6, 0x9F, 0x00), (0x56, 0xB4, 0xE9)


@pytest.fixture
def boxed(tmp_path):
    """A study of one prompt whose images all show a red square of 24 pixels, and no star."""
    frame = study(tmp_path, ("p",), (0,))
    pixels = np.full((64, 64, 3), 250, np.uint8)
    pixels[12:36, 20:44] = PAINTS["red"]
    for name in frame["image"]:
        Image.fromarray(pixels).save(tmp_path / name)
    boxes = (Box("red square", ASKED), Box("green star", (0.0, 0.0, 0.25, 0.25)))
    return frame.assign(prompt=PROMPT, boxes=as_text(boxes), box_iou=OVERLAP / 2)


def has_line(picture: Image.Image, corner: tuple[int, int], box: tuple[float, ...], colour: tuple[int, ...]) -> float:
    """Which share of a box's upper edge has a colour, in an image of 128 pixels."""
    x0, y0, x1, _ = (round(128 * side) for side in box)
    edge = np.asarray(picture)[corner[1] + y0, corner[0] + x0 : corner[0] + x1]
    return float((edge == colour).all(axis=1).mean())


def test_grids_have_the_asked_box_solid_and_the_seen_one_dashed(boxed, tmp_path):
    for draw in (lambda: comparison(boxed, tmp_path, "p", 0, "zero"), lambda: layers_by_prompts(boxed, tmp_path, 0)):
        picture = draw()
        star = (np.asarray(picture) == SKY_BLUE).all(axis=2)  # its box begins in the image's corner
        corner = (int(np.argwhere(star)[0][1]), int(np.argwhere(star)[0][0]))
        assert has_line(picture, corner, ASKED, ORANGE) > 0.9
        assert 0.3 < has_line(picture, corner, SEEN, ORANGE) < 0.8
        assert has_line(picture, corner, (0.0, 0.0, 0.25, 0.25), SKY_BLUE) == 1


def test_objects_are_drawn_only_where_the_score_is_the_readers(boxed, tmp_path):
    row = boxed.iloc[0].to_dict()
    picture = Image.open(tmp_path / row["image"])
    square, star = marks(row, picture)
    assert (square.asked, square.seen, star.seen) == (ASKED, pytest.approx(SEEN), None)
    assert [mark.seen for mark in marks({**row, "box_iou": 0.9}, picture)] == [None, None]  # another detector's
    assert marks({**row, "boxes": ""}, picture) == () == marks({**row, "boxes": float("nan")}, picture)


def test_the_page_has_the_boxes_of_every_row(boxed, tmp_path):
    found = page_marks(tmp_path, boxed)
    assert len(found) == len(boxed) and all(len(one) == 2 for one in found)
    assert found[0][0] == {"words": "red square", "asked": ASKED, "seen": pytest.approx(SEEN), "colour": "#e69f00"}
    assert json.dumps(page_data(boxed, {}, marks=found)["marks"])
    assert page_marks(tmp_path, boxed.drop(columns="boxes")) == []


def test_boxes_are_a_column_that_reads_back():
    boxes = (Box("red square", ASKED), Box("star", (0.0, 0.0, 0.25, 0.25)))
    assert from_text(as_text(boxes), PROMPT) == boxes
    assert as_text(()) == "" and from_text("", PROMPT) == from_text("[1", PROMPT) == from_text(pd.NA, PROMPT) == ()
