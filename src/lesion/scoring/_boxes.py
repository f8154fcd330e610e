"""What the `box_…` metrics share: objects that the pixel reader or a detector sees, against the boxes asked for them.

An object belongs to a box if it has the colour and the shape that the box's words name; where several do, or several
boxes ask for the same, they are matched so that the sum of IoU is largest. A box without its object counts 0. NaN for
prompts without boxes, and where the words of a box name neither a colour nor a shape of the toy world. A detector takes
the words as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lesion.scoring import _owlv2
from lesion.scoring._metric import Metric, OptionError, ScorerError, Shot
from lesion.scoring._owlv2 import Detector, iou
from lesion.scoring._reader import VERSION, reading
from lesion.study.boxes import Box, Corners
from lesion.toy_world.grammar import COLOURS, SHAPES
from lesion.toy_world.reader import Found

READER = "reader"
MOST = 8  # objects of one kind that are matched


def kind(words: str) -> tuple[str, str]:
    """Colour and shape that words name, "" where they name none."""
    found = words.lower().partition("#")[0].split()
    return next((w for w in found if w in COLOURS), ""), next((w for w in found if w in SHAPES), "")


def assigned(boxes: Sequence[Box], found: Sequence[Found]) -> list[Corners | None]:
    """Return where the pixel reader sees the object of each box, None where it does not."""

    def seen(asked: tuple[str, str]) -> list[Corners]:
        colour, shape = asked
        return [one.box for one in found if colour in ("", one.thing.colour) and shape in ("", one.thing.shape)]

    names = [kind(box.words) for box in boxes]
    return _paired(boxes, names, {name: seen(name) for name in names})


def detected(boxes: Sequence[Box], image: NDArray[np.uint8], detector: Detector) -> list[Corners | None]:
    """Return where a detector sees the object of each box, None where it does not.

    Of boxes with the same words as many detections count as there are boxes, the best ones.
    """
    names = [box.words.lower().partition("#")[0] for box in boxes]
    words = list(dict.fromkeys(names))
    found = zip(words, detector(image, words), strict=True)
    return _paired(boxes, names, {word: several[: names.count(word)] for word, several in found})


def _paired(
    boxes: Sequence[Box], names: Sequence[Hashable], candidates: Mapping[Any, Sequence[Corners]]
) -> list[Corners | None]:
    """Match the boxes of each name with the candidates of this name so that the sum of IoU is largest."""
    places: list[Corners | None] = [None] * len(boxes)
    for name, own in candidates.items():
        mine = [number for number, one in enumerate(names) if one == name]
        fit = own[:MOST]
        seen: list[Corners | None] = [*fit, *[None] * (len(mine) - len(fit))]
        best = max(
            itertools.permutations(seen, len(mine)),
            key=lambda order: sum(filled(boxes[number], one) for number, one in zip(mine, order, strict=True)),
        )
        for number, one in zip(mine, best, strict=True):
            places[number] = one
    return places


def filled(box: Box, place: Corners | None) -> float:
    """Return the IoU of a box with the place of its object, 0 without one."""
    return iou(box.box, place) if place else 0.0


class BoxMetric(Metric):
    """A mean over the boxes of an image, each judged by its IoU."""

    direction = "prompt"
    range = (0.0, 1.0)
    boxed = True
    least: ClassVar[float | None] = None
    """The IoU from which a box counts 1, else 0; None: the IoU itself."""

    def __init__(self, detector: str = READER):
        """detector: `reader`, the pixel reader of the embedded model's images, or an OWLv2: a name on the hub
        (ORG/REPO), or a folder.
        """
        self.detector = detector

    def identity(self) -> str:
        if self.detector == READER:
            return f"{self.name}/1, reader {VERSION}"
        folder = _owlv2.resolve(self.detector)
        return f"{self.name}/1, owlv2 ({self.detector.rstrip('/').rpartition('/')[2]} {_owlv2.weights_digest(folder)})"

    def check(self) -> None:
        try:
            if self.detector != READER:
                _owlv2.resolve(self.detector)
        except (ValueError, OSError) as error:
            raise OptionError("detector", f"{self.detector!r}: {error}") from None

    def load(self, device: str, batch_size: int) -> None:
        super().load(device, batch_size)
        self.loaded: Detector | None = None
        if self.detector != READER:
            try:
                self.loaded = _owlv2.detector(_owlv2.resolve(self.detector), device)
            except Exception as error:  # hub, file and device errors of many types
                raise ScorerError(f"cannot load OWLv2 {self.detector}: {error}") from error

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        values = np.full(len(shots), np.nan)
        for number, shot in enumerate(shots):
            if not shot.boxes:
                continue
            if self.detector != READER:
                assert self.loaded is not None  # after `load`
                places = detected(shot.boxes, shot.image, self.loaded)
            elif all(any(kind(box.words)) for box in shot.boxes):
                places = assigned(shot.boxes, reading(shot.image).found)
            else:
                continue
            each = [filled(box, place) for box, place in zip(shot.boxes, places, strict=True)]
            values[number] = np.mean(each if self.least is None else [one >= self.least for one in each])
        return values
