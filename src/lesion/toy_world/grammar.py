"""Scenes as data, and the captions that describe them."""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass

# sRGB, 0-255. Chosen far apart, so that a reader can tell them from one another after a lossy decoder.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (35, 60, 215),
    "yellow": (250, 225, 40),
    "orange": (250, 135, 20),
    "purple": (135, 40, 170),
    "cyan": (50, 215, 230),
    "pink": (250, 130, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (10, 10, 10),
    "gray": (128, 128, 128),
    "brown": (105, 65, 35),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
COUNTS = {2: "two", 3: "three"}
HELD_OUT_SHARE = 8  # one caption in eight is never trained on


@dataclass(frozen=True)
class Thing:
    """One kind of object: its colour, shape and, if the caption says so, its size ("" = unsaid)."""

    colour: str
    shape: str
    size: str = ""

    def words(self, plural: bool = False) -> str:
        noun = {"cross": "crosses"}.get(self.shape, self.shape + "s") if plural else self.shape
        return " ".join(word for word in (self.size, self.colour, noun) if word)

    def one(self) -> str:
        words = self.words()
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """What a caption says.

    `things` holds one or two kinds of object; `count` (1-3) applies when there is one kind; `relation` says where the
    first of two stands to the second ("left", "right", "above", "below", or "" for "and"); `background` may be "".
    """

    things: tuple[Thing, ...]
    count: int = 1
    relation: str = ""
    background: str = ""

    @property
    def number_of_objects(self) -> int:
        return self.count if len(self.things) == 1 else 2

    def caption(self) -> str:
        first = self.things[0]
        if len(self.things) == 2:
            link = RELATIONS.get(self.relation, "and")
            text = f"{first.one()} {link} {self.things[1].one()}"
        else:
            text = first.one() if self.count == 1 else f"{COUNTS[self.count]} {first.words(plural=True)}"
        return f"{text} on a {self.background} background" if self.background else text


_THING = (
    rf"(?:(?P<size{{n}}>{'|'.join(SIZES)}) )?(?P<colour{{n}}>{'|'.join(COLOURS)}) "
    rf"(?P<shape{{n}}>{'|'.join(SHAPES)})(?:es|s)?"
)
_LINK = "|".join([*RELATIONS.values(), "and"])
_CAPTION = re.compile(
    rf"(?P<count>an?|two|three) {_THING.format(n=1)}(?: (?P<link>{_LINK}) an? {_THING.format(n=2)})?"
    rf"(?: on a (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
)


def parse_caption(caption: str) -> Scene | None:
    """The scene that a caption of this grammar describes, or None for any other text."""
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        return None
    part = match.groupdict(default="")
    things = [Thing(part["colour1"], part["shape1"], part["size1"])]
    if part["link"]:
        things.append(Thing(part["colour2"], part["shape2"], part["size2"]))
    relation = next((name for name, words in RELATIONS.items() if words == part["link"]), "")
    count = next((number for number, word in COUNTS.items() if word == part["count"]), 1)
    scene = Scene(tuple(things), count, relation, part["background"])
    return scene if scene.caption() == caption.strip() else None  # "two red circle", "two … above a …"


def is_held_out(caption: str) -> bool:
    """True for the captions kept out of every training stage: one in eight, by a hash of the text (articles aside)."""
    text = caption.replace("an orange", "a orange")
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_SHARE == 0


def sample_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene whose caption is in (or out of) the held-out set.

    30% single objects, 22% counts of two or three, 38% pairs with a relation, 10% pairs joined by "and".
    """
    while True:
        scene = _draw(rng)
        if is_held_out(scene.caption()) == held_out:
            return scene


def _draw(rng: random.Random) -> Scene:
    background = rng.choice(list(BACKGROUNDS)) if rng.random() < 0.95 else ""
    kind = rng.random()
    first = Thing(rng.choice(list(COLOURS)), rng.choice(SHAPES))
    if kind < 0.30:
        size = rng.choice(("", *SIZES))
        return Scene((Thing(first.colour, first.shape, size),), 1, "", background)
    if kind < 0.52:
        return Scene((first,), rng.choice((2, 3)), "", background)
    second = first
    while second == first:
        second = Thing(rng.choice(list(COLOURS)), rng.choice(SHAPES))
    relation = rng.choice(list(RELATIONS)) if kind < 0.90 else ""
    return Scene((first, second), 1, relation, background)
