"""Boxes of a prompt: where in the image what some of its words name shall be. Imports nothing of torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lesion.errors import RequestError
from lesion.study.checks import shown
from lesion.study.words import named

FIELDS = ("words", "box")
SIDE = 512  # pixels: the side of the images in which published layout benchmarks give their boxes
_NAMED, _PLACED = re.compile(r"obj(\d{1,9})"), re.compile(r"bbox(\d{1,9})")

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Box:
    """words: of the prompt, as "red circle", or "red circle#2" for the second one. box: x_min, y_min, x_max, y_max
    as shares of the image's width and height, from its upper left corner.
    """

    words: str
    box: Corners


def parse_boxes(given: Any, text: str, key: str) -> tuple[Box, ...]:
    """Return the boxes of a prompt from a list of `{words: …, box: [x_min, y_min, x_max, y_max]}`.

    text: the prompt.

    Raises RequestError naming the prompt and the words for words that it lacks, words that have a box already, and a
    box that is outside of [0, 1], empty or reversed.
    """
    if given in (None, "", [], ()):
        return ()
    if not isinstance(given, list | tuple):
        raise RequestError(key, f"boxes of {text!r} are a list of {{words, box}}; got {shown(given)}")
    found: list[Box] = []
    for entry in given:
        if not isinstance(entry, Mapping) or sorted(map(str, entry)) != sorted(FIELDS):
            raise RequestError(
                key, f"a box of {text!r} is {{words: …, box: [x_min, y_min, x_max, y_max]}}; got {shown(entry)}"
            )
        words = entry["words"]
        if not isinstance(words, str):
            raise RequestError(key, f"the words of a box of {text!r} must be text; got {shown(words)}")
        try:
            own = named(text, words)
        except KeyError as error:
            raise RequestError(key, f"box of {words!r}: {error.args[0]}") from None
        if shared := [word for box in found for word in named(text, box.words) if word in own]:
            raise RequestError(key, f"{shared[0]!r} of {text!r} has two boxes; name a second one as {shared[0]}#2")
        found.append(Box(words, _corners(entry["box"], f"box of {words!r} in {text!r}", key)))
    return tuple(found)


def _corners(given: Any, what: str, key: str) -> Corners:
    numbers = isinstance(given, list | tuple) and all(
        isinstance(side, int | float) and not isinstance(side, bool) and side == side for side in given
    )
    if not numbers or len(given) != 4:
        raise RequestError(key, f"{what} must be [x_min, y_min, x_max, y_max], numbers in [0, 1]; got {shown(given)}")
    if not all(0 <= side <= 1 for side in given):  # before any becomes a float, which large whole numbers cannot
        raise RequestError(key, f"{what} lies outside of the image; allowed: numbers in [0, 1]; got {shown(given)}")
    x_min, y_min, x_max, y_max = map(float, given)
    for low, high, axis in ((x_min, x_max, "x"), (y_min, y_max, "y")):
        if low == high:
            raise RequestError(key, f"{what} is empty: {axis}_min = {axis}_max; got {shown(given)}")
        if low > high:
            raise RequestError(key, f"{what} is reversed: {axis}_min > {axis}_max; got {shown(given)}")
    return x_min, y_min, x_max, y_max


def has_boxes(names: Iterable[str]) -> bool:
    """Whether a table has columns of `boxes_of_row`."""
    return any(_NAMED.fullmatch(name) or _PLACED.fullmatch(name) for name in names)


def boxes_of_row(row: Mapping[str, Any], text: str, key: str) -> list[dict[str, Any]] | None:
    """Return the boxes in the columns `obj1, bbox1, obj2, bbox2, …` of a table, in the form of `parse_boxes`.

    Boxes are in pixels of an image of 512 x 512. An object whose words come a second time means the second of them.

    Raises RequestError for a number with only one of both columns filled and for a box that is no list of 4 numbers.
    """
    given: dict[int, dict[str, Any]] = {}
    for name, value in row.items():
        for pattern, field in ((_NAMED, "words"), (_PLACED, "box")):
            if (match := pattern.fullmatch(str(name))) and value not in (None, ""):
                given.setdefault(int(match[1]), {})[field] = value
    found: list[dict[str, Any]] = []
    for number, entry in sorted(given.items()):
        if entry.keys() != set(FIELDS):
            raise RequestError(key, f"obj{number} and bbox{number} of {text!r} belong together; got {shown(entry)}")
        words, box = str(entry["words"]).strip(), entry["box"]
        before = sum(one["words"].partition("#")[0].lower() == words.lower() for one in found)
        try:
            pixels = json.loads(box.replace("(", "[").replace(")", "]")) if isinstance(box, str) else box
            shares = [side / SIDE if type(side) is not bool else None for side in pixels]
        except (TypeError, ValueError, OverflowError, RecursionError):
            raise RequestError(
                key, f"bbox{number} of {text!r} must be [x_min, y_min, x_max, y_max] in pixels; got {shown(box)}"
            ) from None
        found.append({"words": f"{words}#{before + 1}" if before else words, "box": shares})
    return found or None


def as_text(boxes: Sequence[Box]) -> str:
    """Write boxes as the JSON text of a column of results, "" where there are none."""
    return json.dumps([{"words": box.words, "box": list(box.box)} for box in boxes]) if boxes else ""


def from_text(text: Any, prompt: str) -> tuple[Box, ...]:
    """Read `as_text`; nothing where it is no such text."""
    try:
        return parse_boxes(json.loads(text), prompt, "boxes") if text else ()
    except (TypeError, ValueError, RequestError):
        return ()
