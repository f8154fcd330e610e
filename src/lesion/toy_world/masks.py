"""Which pixels of an image the words of its caption speak of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lesion.study.words import words_in
from lesion.toy_world.grammar import BACKGROUNDS, COLOURS, COUNTS, RELATIONS, SHAPES, SIZES, Scene, parse_caption
from lesion.toy_world.reader import Found, read_regions

_COUNTS = tuple(COUNTS.values())
_SHAPES = {form: shape for shape in SHAPES for form in (shape, f"{shape}s", f"{shape}es")}


@dataclass(frozen=True)
class Spoken:
    """A word of a caption that says something of the picture.

    aspect: colour, shape, size, count, relation or background.
    thing: place of the object that it is about among the caption's, -1 for the background, None for all objects.
    """

    name: str
    aspect: str
    thing: int | None


def spoken(caption: str) -> tuple[Spoken, ...]:
    """The words of a caption that say something, in their order; none for a text that is no caption.

    A relation is about the first object, which stands where it says.
    """
    if parse_caption(caption) is None:
        return ()
    found: list[Spoken] = []
    thing, behind = 0, False
    for word in words_in(caption):
        plain = word.plain
        if plain == "on":
            behind = True
        elif plain in RELATIONS:
            found.append(Spoken(word.name, "relation", 0))
            thing = 1
        elif plain == "and":
            thing = 1
        elif behind and (plain in BACKGROUNDS or plain == "background"):
            found.append(Spoken(word.name, "background", -1))
        elif plain in _COUNTS:
            found.append(Spoken(word.name, "count", None))
        elif not behind:
            for aspect, names in (("size", SIZES), ("colour", COLOURS), ("shape", _SHAPES)):
                if plain in names:
                    found.append(Spoken(word.name, aspect, thing))
    return tuple(found)


def masks(caption: str, image: NDArray[np.uint8]) -> dict[str, NDArray[np.bool_]]:
    """The pixels that each such word speaks of, as the reader sees them, (height, width).

    image: (height, width, 3) uint8. A word whose object the reader does not see, in its colour and shape, has none.
    """
    scene = parse_caption(caption)
    if scene is None:
        return {}
    _, regions = read_regions(image)
    found = {}
    for word in spoken(caption):
        mask = _mask(word, scene, regions)
        if mask is not None and mask.any() and not mask.all():
            found[word.name] = mask
    return found


def _mask(word: Spoken, scene: Scene, regions: Sequence[tuple[Found, NDArray[np.bool_]]]) -> NDArray[np.bool_] | None:
    if not regions:
        return None
    everything: NDArray[np.bool_] = np.logical_or.reduce([mask for _, mask in regions])
    if word.thing is None:
        return everything
    if word.thing < 0:
        return ~everything
    asked = scene.things[word.thing]
    own = [mask for one, mask in regions if (one.thing.colour, one.thing.shape) == (asked.colour, asked.shape)]
    return np.logical_or.reduce(own) if own else None
