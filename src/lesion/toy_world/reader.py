"""Reads an image of the toy world by rule: connected regions, nearest palette colour, best-fitting silhouette."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lesion.toy_world.grammar import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing
from lesion.toy_world.render import SIZE_BORDER, coverage, inside

SMALLEST = 40  # pixels: smaller regions are decoder noise, not objects (the smallest shape, a small star, covers 90)
FOREGROUND = 60.0  # Euclidean RGB distance (0-441) from the background at which a pixel belongs to an object
TEMPLATE = 48  # pixels: side of the grid on which silhouettes are compared
TEMPLATE_RADII = (8.0, 20.5, 0.5)  # pixels: from, to (exclusive), step


@dataclass(frozen=True)
class Found:
    """One region: what it looks like and where its bounding box is centred (pixels)."""

    thing: Thing
    x: float
    y: float
    fit: float  # soft intersection over union with the best silhouette, 0-1
    box: tuple[float, float, float, float]  # x_min, y_min, x_max, y_max as shares of the image


@dataclass(frozen=True)
class Reading:
    background: str
    found: tuple[Found, ...]


@dataclass(frozen=True)
class Judgement:
    """Whether an image shows what the scene asks; None where the scene does not ask."""

    background: bool | None
    colour: bool
    shape: bool
    count: bool
    size: bool | None
    binding: bool | None
    relation: bool | None

    @property
    def everything(self) -> bool:
        return all(value is not False for value in vars(self).values())


@lru_cache
def _silhouettes() -> tuple[list[tuple[str, float]], NDArray[np.float32]]:
    """Shape and radius (pixels) of each template, and the templates, (n, 48, 48): coverage, mass centred."""
    names = [(shape, float(radius)) for shape in SHAPES for radius in np.arange(*TEMPLATE_RADII)]
    fine = np.linspace(-1, 1, 201)
    x, y = np.meshgrid(fine, fine)
    centres = {shape: (x[inside(shape, x, y)].mean(), y[inside(shape, x, y)].mean()) for shape in SHAPES}
    half = TEMPLATE / 2
    masks = [
        coverage(shape, (half - radius * centres[shape][0], half - radius * centres[shape][1], radius), TEMPLATE)
        for shape, radius in names
    ]
    return names, np.stack(masks)


def _best_fit(cover: NDArray[np.float64]) -> tuple[str, float, float]:
    """Shape, radius (pixels) and soft intersection over union of the template nearest to this coverage."""
    total = cover.sum()
    rows, cols = np.indices(cover.shape)
    middle = (TEMPLATE - 1) / 2
    shift = (middle - (rows * cover).sum() / total, middle - (cols * cover).sum() / total)
    canvas = np.zeros((max(TEMPLATE, cover.shape[0]), max(TEMPLATE, cover.shape[1])))
    canvas[: cover.shape[0], : cover.shape[1]] = cover
    from scipy import ndimage

    own = ndimage.shift(canvas, shift, order=1)[:TEMPLATE, :TEMPLATE]
    names, masks = _silhouettes()
    fits = np.minimum(masks, own).sum(axis=(1, 2)) / np.maximum(masks, own).sum(axis=(1, 2))
    best = int(fits.argmax())
    return *names[best], float(fits[best])


def _nearest(colour: NDArray[np.float64], palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(colour - np.array(palette[name]))))


def read_image(image: NDArray[np.uint8]) -> Reading:
    """What is in an image: (height, width, 3) uint8, values 0-255."""
    background, regions = read_regions(image)
    return Reading(background, tuple(found for found, _ in regions))


def read_regions(image: NDArray[np.uint8]) -> tuple[str, list[tuple[Found, NDArray[np.bool_]]]]:
    """Background of an image, and each object with the pixels that it covers, (height, width)."""
    from scipy import ndimage

    pixels = image.astype(np.float64)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    labels, number = ndimage.label(np.linalg.norm(pixels - ground, axis=-1) > FOREGROUND)
    found = []
    for index in range(1, number + 1):
        mask = labels == index
        if mask.sum() < SMALLEST:
            continue
        core = ndimage.binary_erosion(mask)
        colour = np.median(pixels[core if core.any() else mask], axis=0)
        # How much of each pixel is object: where its colour lies between ground and object; edges are let in.
        near = ndimage.binary_dilation(mask, iterations=2) & ((labels == index) | (labels == 0))
        away = colour - ground
        cover = np.where(near, ((pixels - ground) @ away / (away @ away)).clip(0, 1), 0)
        shape, radius, fit = _best_fit(cover)
        rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        one = Found(
            Thing(_nearest(colour, COLOURS), shape, "large" if radius >= SIZE_BORDER else "small"),
            float(cols[0] + cols[-1] + 1) / 2,
            float(rows[0] + rows[-1] + 1) / 2,
            fit,
            (
                float(cols[0] / mask.shape[1]),
                float(rows[0] / mask.shape[0]),
                float((cols[-1] + 1) / mask.shape[1]),
                float((rows[-1] + 1) / mask.shape[0]),
            ),
        )
        found.append((one, mask))
    return _nearest(ground, BACKGROUNDS), found


def judge(reading: Reading, scene: Scene) -> Judgement:
    """Compare a reading with what was asked.

    colour, shape: the set of colours (shapes) seen is the set asked for. binding (pairs): the colour-shape pairs seen
    are those asked for. relation (pairs): two objects, told apart by colour and shape, stand as asked.
    """
    seen = [found.thing for found in reading.found]
    asked = scene.things
    pair = len(asked) == 2
    size = None
    if asked[0].size:
        size = bool(seen) and all(thing.size == asked[0].size for thing in seen)
    kinds = sorted((thing.colour, thing.shape) for thing in seen)
    return Judgement(
        background=reading.background == scene.background if scene.background else None,
        colour={thing.colour for thing in seen} == {thing.colour for thing in asked},
        shape={thing.shape for thing in seen} == {thing.shape for thing in asked},
        count=len(seen) == scene.number_of_objects,
        size=size,
        binding=kinds == sorted((thing.colour, thing.shape) for thing in asked) if pair else None,
        relation=_relation_holds(reading, scene) if pair and scene.relation else None,
    )


def _relation_holds(reading: Reading, scene: Scene) -> bool:
    if len(reading.found) != 2:
        return False
    first, second = scene.things

    def likeness(found: Found, thing: Thing) -> int:
        return int(found.thing.colour == thing.colour) + int(found.thing.shape == thing.shape)

    a, b = reading.found
    straight = likeness(a, first) + likeness(b, second)
    crossed = likeness(a, second) + likeness(b, first)
    if straight == crossed:
        return False  # the two cannot be told apart, so nothing is shown
    if crossed > straight:
        a, b = b, a
    dx, dy = b.x - a.x, b.y - a.y
    holds = {"left": dx > abs(dy), "right": -dx > abs(dy), "above": dy > abs(dx), "below": -dy > abs(dx)}
    return holds[scene.relation]
