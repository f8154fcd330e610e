"""Draws a scene as a small anti-aliased RGB image."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lesion.toy_world.grammar import BACKGROUNDS, COLOURS, Scene

IMAGE_SIZE = 64
SUPERSAMPLE = 4  # anti-aliasing: samples per pixel edge
GAP = 4  # pixels kept free between the bounding boxes of two objects
RADII = {"small": (10.0, 11.5), "large": (16.0, 19.0), "": (10.0, 19.0)}  # pixels, half the bounding box
SIZE_BORDER = 13.5  # pixels: a reader calls an object "large" from here on
PAIR_RADII = (10.0, 13.0)
COUNT_RADII = {2: (10.0, 13.0), 3: (10.0, 11.5)}

JITTER = 2.5  # pixels
SLOTS: dict[str, tuple[tuple[float, float], ...]] = {  # centres, in pixels
    "one": ((32, 32),),
    "beside": ((17, 32), (47, 32)),
    "stacked": ((32, 17), (32, 47)),
    "three": ((17, 18), (47, 18), (32, 46)),
}

Circle = tuple[float, float, float]  # centre x, centre y, radius, in pixels


def inside(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points of the square [-1, 1]^2 (y downwards) belong to a shape that fills it."""
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "ring":
        return (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.5**2)
    if shape == "square":
        return (np.abs(x) <= 0.9) & (np.abs(y) <= 0.9)
    if shape == "triangle":
        return (y <= 0.9) & (np.abs(x) <= (y + 0.95) / 1.85)
    if shape == "cross":
        return ((np.abs(x) <= 0.3) & (np.abs(y) <= 1)) | ((np.abs(y) <= 0.3) & (np.abs(x) <= 1))
    if shape == "star":
        return _in_star(x, y)
    raise ValueError(f"unknown shape {shape!r}")


def _in_star(x: NDArray[np.float64], y: NDArray[np.float64], inner: float = 0.42) -> NDArray[np.bool_]:
    """A five-pointed star, one point up; `inner` is the radius of the notches."""
    angle = (np.arctan2(x, -y)) % (2 * np.pi / 5)  # fold on one point
    angle = np.minimum(angle, 2 * np.pi / 5 - angle)  # and on its half, 0 at the tip
    radius = np.hypot(x, y)
    half = np.pi / 5
    # The edge runs from the tip (1, 0) to the notch (inner cos, inner sin) in polar form.
    px, py = radius * np.cos(angle), radius * np.sin(angle)
    nx, ny = inner * np.cos(half), inner * np.sin(half)
    within: NDArray[np.bool_] = (px - 1) * ny - py * (nx - 1) <= 0
    return within


def coverage(shape: str, circle: Circle, size: int = IMAGE_SIZE) -> NDArray[np.float32]:
    """Share of each pixel that the shape covers, (size, size), in [0, 1]."""
    cx, cy, radius = circle
    steps = (np.arange(size * SUPERSAMPLE) + 0.5) / SUPERSAMPLE
    cols = np.flatnonzero(np.abs(steps - cx) <= radius + 1)
    rows = np.flatnonzero(np.abs(steps - cy) <= radius + 1)
    fine = np.zeros((size * SUPERSAMPLE, size * SUPERSAMPLE), dtype=bool)
    if len(cols) and len(rows):
        x, y = np.meshgrid((steps[cols] - cx) / radius, (steps[rows] - cy) / radius)
        fine[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1] = inside(shape, x, y)
    blocks = fine.reshape(size, SUPERSAMPLE, size, SUPERSAMPLE)
    share: NDArray[np.float32] = blocks.mean(axis=(1, 3), dtype=np.float32)
    return share


def render(scene: Scene, rng: random.Random) -> NDArray[np.uint8]:
    """One image of a scene, (64, 64, 3) uint8; positions, sizes left unsaid and background left unsaid are drawn."""
    background = scene.background or rng.choice(list(BACKGROUNDS))
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    image[:] = BACKGROUNDS[background]
    things = scene.things if len(scene.things) == 2 else scene.things * scene.count
    for thing, circle in zip(things, place(scene, rng), strict=True):
        alpha = coverage(thing.shape, circle)[..., None]
        image = image * (1 - alpha) + np.array(COLOURS[thing.colour], np.float32) * alpha
    return image.round().astype(np.uint8)


def place(scene: Scene, rng: random.Random) -> list[Circle]:
    """Non-overlapping places for the objects of a scene, in the order of the caption: near fixed slots.

    One object stands in the middle, two or a pair side by side or (of a relation) one above the other, three as a
    triangle; each up to JITTER pixels off its slot in either direction. That is little to know about where, so that a
    small model's capacity is left for what.
    """
    if len(scene.things) == 2:
        relation = scene.relation or rng.choice(("left", "right", "above", "below"))
        slots = SLOTS["beside" if relation in ("left", "right") else "stacked"]
        if relation in ("right", "below"):
            slots = slots[::-1]
        radii: Callable[[], list[float]] = lambda: [rng.uniform(*PAIR_RADII) for _ in slots]  # noqa: E731
    else:
        slots = SLOTS[("one", "beside", "three")[scene.count - 1]]
        low, high = RADII[scene.things[0].size] if scene.count == 1 else COUNT_RADII[scene.count]
        radii = lambda: [rng.uniform(low, high)] * scene.count  # noqa: E731
    while True:
        circles = [
            (x + rng.uniform(-JITTER, JITTER), y + rng.uniform(-JITTER, JITTER), radius)
            for (x, y), radius in zip(slots, radii(), strict=True)
        ]
        if all(_apart(a, b) for i, a in enumerate(circles) for b in circles[:i]):
            return circles


def _apart(a: Circle, b: Circle) -> bool:
    return max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= a[2] + b[2] + GAP
