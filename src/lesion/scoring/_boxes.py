"""What the `box_…` metrics share: the objects that the pixel reader sees, against the boxes asked for them.

An object belongs to a box if it has the colour and the shape that the box's words name; where several do, or several
boxes ask for the same, they are matched so that the sum of IoU is largest. A box without its object counts 0. NaN for
prompts without boxes, and where the words of a box name neither a colour nor a shape of the toy world.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lesion.scoring._metric import Metric, Shot
from lesion.scoring._reader import VERSION, reading
from lesion.study.boxes import Box, Corners
from lesion.toy_world.grammar import COLOURS, SHAPES
from lesion.toy_world.reader import Found

MOST = 8  # objects of one kind that are matched


def iou(a: Corners, b: Corners) -> float:
    """Intersection over union of two boxes, in [0, 1]."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def kind(words: str) -> tuple[str, str]:
    """Colour and shape that words name, "" where they name none."""
    found = words.lower().partition("#")[0].split()
    return next((w for w in found if w in COLOURS), ""), next((w for w in found if w in SHAPES), "")


def assigned(boxes: Sequence[Box], found: Sequence[Found]) -> list[Corners | None]:
    """Return where the object of each box is seen, None where it is not."""
    places: list[Corners | None] = [None] * len(boxes)
    for asked in dict.fromkeys(kind(box.words) for box in boxes):
        mine = [number for number, box in enumerate(boxes) if kind(box.words) == asked]
        colour, shape = asked
        fit = [one.box for one in found if colour in ("", one.thing.colour) and shape in ("", one.thing.shape)][:MOST]
        seen: list[Corners | None] = [*fit, *[None] * (len(mine) - len(fit))]
        best = max(
            itertools.permutations(seen, len(mine)),
            key=lambda order: sum(_filled(boxes[number], one) for number, one in zip(mine, order, strict=True)),
        )
        for number, one in zip(mine, best, strict=True):
            places[number] = one
    return places


def matched(boxes: Sequence[Box], found: Sequence[Found]) -> list[float]:
    """Return the IoU of each box with its object, 0 where it has none."""
    return [_filled(box, one) for box, one in zip(boxes, assigned(boxes, found), strict=True)]


def _filled(box: Box, place: Corners | None) -> float:
    return iou(box.box, place) if place else 0.0


class BoxMetric(Metric):
    """A mean over the boxes of an image, each judged by its IoU."""

    direction = "prompt"
    range = (0.0, 1.0)
    boxed = True
    least: ClassVar[float | None] = None
    """The IoU from which a box counts 1, else 0; None: the IoU itself."""

    def identity(self) -> str:
        return f"{self.name}/1, reader {VERSION}"

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        values = np.full(len(shots), np.nan)
        for number, shot in enumerate(shots):
            if shot.boxes and all(any(kind(box.words)) for box in shot.boxes):
                each = matched(shot.boxes, reading(shot.image).found)
                values[number] = np.mean(each if self.least is None else [one >= self.least for one in each])
        return values
