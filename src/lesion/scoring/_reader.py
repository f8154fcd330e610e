"""What the `read_…` metrics share: images read by rule (`lesion.toy_world.reader`), each once, and judged.

A value is 1 where the image shows what the prompt asks of that aspect, 0 where it does not, and NaN where the prompt
does not ask: a caption of the toy world that leaves the aspect open, or any other text. No baseline is looked at, so
baselines have values of their own: those of the un-ablated model. The reader knows sizes in pixels of 64x64 images.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lesion.scoring._metric import Metric, Shot
from lesion.toy_world import Reading, Scene, judge, parse_caption, read_image
from lesion.toy_world.grammar import RELATIONS

VERSION = 1  # raise it when the reader or its judgement changes
KEPT = 4096  # readings

_kept: OrderedDict[bytes, Reading] = OrderedDict()
_scene = lru_cache(maxsize=4096)(parse_caption)


class Read(Metric):
    """aspect: named as in `lesion.toy_world.Judgement`."""

    direction = "prompt"
    range = (0.0, 1.0)
    aspect: ClassVar[str]

    def identity(self) -> str:
        return f"{self.name}/{VERSION}"

    def asks(self, prompt: str) -> bool:
        scene = _scene(prompt)
        return scene is not None and asks_of(scene, self.aspect)

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        values = np.full(len(shots), np.nan)
        for number, shot in enumerate(shots):
            scene = _scene(shot.prompt)
            if scene and asks_of(scene, self.aspect):
                values[number] = float(getattr(judge(reading(shot.image), scene), self.aspect))
        return values


def asks_of(scene: Scene, aspect: str) -> bool:
    """Where `judge` does not say None; every caption asks for colours, shapes and a number of objects."""
    return {
        "background": bool(scene.background),
        "size": bool(scene.things[0].size),
        "binding": len(scene.things) == 2,
        "relation": len(scene.things) == 2 and scene.relation in RELATIONS,
    }.get(aspect, True)


def reading(image: NDArray[np.uint8]) -> Reading:
    """What the reader sees in an image; each is read once."""
    name = repr(image.shape).encode() + hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
    if name not in _kept:
        _kept[name] = read_image(image)
        if len(_kept) > KEPT:
            _kept.popitem(last=False)
    return _kept[name]
