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


def matched(boxes: Sequence[Box], found: Sequence[Found]) -> list[float]:
    """The IoU of each box with its object, 0 where it has none."""
    values = [0.0] * len(boxes)
    for asked in dict.fromkeys(kind(box.words) for box in boxes):
        mine = [number for number, box in enumerate(boxes) if kind(box.words) == asked]
        colour, shape = asked
        seen = [one.box for one in found if colour in ("", one.thing.colour) and shape in ("", one.thing.shape)][:MOST]
        seen += [(2.0, 2.0, 3.0, 3.0)] * (len(mine) - len(seen))  # outside of the image: no object
        best = max(
            itertools.permutations(seen, len(mine)),
            key=lambda order: sum(iou(boxes[number].box, one) for number, one in zip(mine, order, strict=True)),
        )
        for number, one in zip(mine, best, strict=True):
            values[number] = iou(boxes[number].box, one)
    return values


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
