"""Writes conf/prompts/boxes.yaml: held-out scenes of the embedded model, each object with a box to stand in.

    python scripts/layout_prompts.py

A third has one object, which the model puts in the middle, with a box beside the middle; a third has two objects joined
by "and", which the model arranges as it likes, with boxes in one arrangement; a third has two objects in a relation,
with boxes in another arrangement than the prompt says. Objects of a pair differ in colour and in shape. Boxes are the
bounding boxes of objects as the renderer of the training images would draw them there.
"""

from __future__ import annotations

import random
from pathlib import Path

from lesion.config.schema import conf_dir
from lesion.toy_world import IMAGE_SIZE, RELATIONS, Scene, sample_scene
from lesion.toy_world.render import place

EACH = 24  # scenes of a kind
SEED = 20261126
RADII = {"small": 11.0, "large": 17.0, "": 12.0}  # pixels, of one object: half the box
AWAY = {"small": 10.0, "large": 8.0, "": 10.0}  # pixels from the middle of the image
FILE = conf_dir() / "prompts" / "boxes.yaml"
HEAD = """\
# Held-out scenes of the embedded model with a box for each object, for steering=layout: one object beside the middle,
# two objects joined by "and", two objects arranged against the relation in the prompt.
# Written by scripts/layout_prompts.py.
name: boxes
items:
"""

Circle = tuple[float, float, float]


def scenes(each: int = EACH, seed: int = SEED) -> list[tuple[str, Scene, list[Circle]]]:
    """Kind, scene, and centre and radius (pixels) of each of its objects."""
    rng = random.Random(seed)
    found: dict[str, list[tuple[str, Scene, list[Circle]]]] = {"one": [], "two": [], "against": []}
    seen = set()
    while any(len(some) < each for some in found.values()):
        scene = sample_scene(rng, held_out=True)
        first, last = scene.things[0], scene.things[-1]
        if len(scene.things) == 1:
            kind, circles = "one", [_beside(first.size, rng)]
        else:
            kind = "against" if scene.relation else "two"
            others = [relation for relation in RELATIONS if relation != scene.relation]
            circles = place(Scene(scene.things, 1, rng.choice(others), scene.background), rng)
        alike = len(scene.things) == 2 and (first.colour == last.colour or first.shape == last.shape)
        if scene.count > 1 or alike or scene in seen or len(found[kind]) == each:
            continue
        seen.add(scene)
        found[kind].append((kind, scene, circles))
    return [one for some in found.values() for one in some]


def _beside(size: str, rng: random.Random) -> Circle:
    away, middle = AWAY[size], IMAGE_SIZE / 2
    x, y = rng.choice(((-away, 0.0), (away, 0.0), (0.0, -away), (0.0, away)))
    return middle + x, middle + y, RADII[size]


def text() -> str:
    """The file's content."""
    lines = []
    for kind, scene, circles in scenes():
        lines += [f"  - text: {scene.caption()}", f"    aspects: [{kind}]", "    boxes:"]
        for thing, (x, y, radius) in zip(scene.things, circles, strict=True):
            sides = (x - radius, y - radius, x + radius, y + radius)
            shares = ", ".join(f"{min(1, max(0, side / IMAGE_SIZE)):.3f}" for side in sides)
            lines.append(f"      - {{words: {thing.colour} {thing.shape}, box: [{shares}]}}")
    return HEAD + "\n".join(lines) + "\n"


def main() -> None:
    Path(FILE).write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
