"""Boxes over images: where objects were asked to be, and where they are seen."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from lesion.scoring._boxes import assigned, filled
from lesion.scoring._reader import reading
from lesion.study.boxes import Corners, from_text

# Okabe and Ito's colours without those that are hard to see on black or white: told apart by all kinds of sight.
COLOURS = {"orange": "#e69f00", "sky blue": "#56b4e9", "green": "#009e73", "purple": "#cc79a7", "vermilion": "#d55e00"}
DASH = 6  # px, of a dashed line and of the gap behind it
LEGEND = "boxes: asked for solid, as the reader sees the object dashed"


@dataclass(frozen=True)
class Mark:
    """A box of a prompt in one image. seen: where the reader sees its object; None where it does not."""

    words: str
    asked: Corners
    seen: Corners | None
    colour: str  # a key of COLOURS


def marks(record: Mapping[Hashable, Any], picture: Image.Image | None) -> tuple[Mark, ...]:
    """Return the boxes of a row of the results; none where its prompt has none.

    picture: the row's image. Objects are looked for only where the row's `box_iou` is what the pixel reader finds.
    """
    boxes = from_text(record.get("boxes"), str(record.get("prompt") or ""))
    scored = record.get("box_iou")
    seen: Sequence[Corners | None] = [None] * len(boxes)
    if picture is not None and isinstance(scored, float) and math.isfinite(scored):
        found = assigned(boxes, reading(np.asarray(picture)).found)
        each = [filled(box, place) for box, place in zip(boxes, found, strict=True)]
        if boxes and math.isclose(float(np.mean(each)), scored, abs_tol=1e-6):
            seen = found
    names = list(COLOURS)
    return tuple(
        Mark(box.words, box.box, place, names[number % len(names)])
        for number, (box, place) in enumerate(zip(boxes, seen, strict=True))
    )


def legend(record: Mapping[Hashable, Any]) -> str:
    """Say what the lines are, with the colour of each box; "" for a prompt without boxes."""
    found = marks(record, None)
    return f"{LEGEND}; " + ", ".join(f"{mark.colour} lines: {mark.words}" for mark in found) if found else ""


def draw_box(
    draw: ImageDraw.ImageDraw,
    box: Corners,
    at: tuple[int, int],
    size: tuple[int, int],
    colour: str,
    dashed: bool = False,
) -> None:
    """Draw the outline of a box, 2 px wide with a dark edge, inside an image on a canvas.

    box: as shares of the image. at: of the image's upper left corner, size: its width and height, px.
    """
    (left, top), (width, height) = at, size
    x_min, y_min, x_max, y_max = box
    x0, y0 = left + round(x_min * width), top + round(y_min * height)
    x1, y1 = left + round(x_max * width) - 1, top + round(y_max * height) - 1
    if x1 <= x0 or y1 <= y0:
        return
    for offset, fill in ((0, colour), (1, colour), (2, "#000000")):
        if x1 - offset <= x0 + offset or y1 - offset <= y0 + offset:
            return
        _outline(draw, (x0 + offset, y0 + offset, x1 - offset, y1 - offset), fill, dashed)


def _outline(draw: ImageDraw.ImageDraw, corners: tuple[int, int, int, int], fill: str, dashed: bool) -> None:
    x0, y0, x1, y1 = corners
    if not dashed:
        draw.rectangle(corners, outline=fill)
        return
    for x in range(x0, x1 + 1, 2 * DASH):
        for y in (y0, y1):
            draw.line((x, y, min(x + DASH - 1, x1), y), fill=fill)
    for y in range(y0, y1 + 1, 2 * DASH):
        for x in (x0, x1):
            draw.line((x, y, x, min(y + DASH - 1, y1)), fill=fill)


def draw_marks(draw: ImageDraw.ImageDraw, found: tuple[Mark, ...], at: tuple[int, int], size: tuple[int, int]) -> None:
    """Draw asked and seen boxes over an image on a canvas, see `draw_box`."""
    for mark in found:
        draw_box(draw, mark.asked, at, size, COLOURS[mark.colour])
    for mark in found:
        if mark.seen:
            draw_box(draw, mark.seen, at, size, COLOURS[mark.colour], dashed=True)
