"""The toy world of the embedded model: captions, a renderer, and a reader that judges pixels by rule.

`grammar` turns a scene into a caption and back, `render` draws it, `reader` looks at an image and says what is in it.
No learned part anywhere, so a reading is an independent judgement of a generated image.
"""

from lesion.toy_world.grammar import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    is_held_out,
    parse_caption,
    sample_scene,
)
from lesion.toy_world.reader import Judgement, Reading, judge, read_image
from lesion.toy_world.render import IMAGE_SIZE, render

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "IMAGE_SIZE",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Judgement",
    "Reading",
    "Scene",
    "Thing",
    "is_held_out",
    "judge",
    "parse_caption",
    "read_image",
    "render",
    "sample_scene",
]
