"""Attention maps of the images of a run: found beside them, of one layer or of all merged."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lesion.errors import RequestError
from lesion.store.maps import ImageMaps, beside_image, read
from lesion.study.words import named


def kept(folder: Path, row: Any) -> ImageMaps | None:
    """The maps of a row of the results; None where the run kept none of it. folder: that image paths begin at."""
    place = beside_image(str(row["image"] or ""))
    return read(folder / place, str(row["cell"])) if place else None


def of_image(
    folder: Path,
    row: Any,
    layer: str | None,
    word: str | None,
    branch: str = "cond",
    step: int | None = None,
    head: int | None = None,
) -> NDArray[np.float32]:
    """The map of one word, or phrase, in one image: see `Results.attention`.

    Raises RequestError naming what there is.
    """
    maps = kept(folder, row)
    if maps is None:
        raise RequestError("attention", "there are no maps of this image; runs with capture=maps keep them")
    if branch not in maps.layers:
        raise RequestError("branch", f"{branch!r} was not captured; there is: {', '.join(maps.layers)}")
    layers, entries = maps.layers[branch], maps.entries[branch]
    if layer is not None and layer not in layers:
        raise RequestError("layer", f"{layer!r} has no map here; there are: {', '.join(layers)}")
    words: tuple[str, ...] = ()
    if word in entries:
        words = (str(word),)
    else:
        with suppress(KeyError):
            words = named(str(row["prompt"]), word or "")
    if not words or not set(words) <= set(entries):
        raise RequestError("word", f"{word!r} has no map here; there are: {', '.join(entries)}")
    some = next(iter(layers.values()))
    for name, number, apart in (("step", step, some.shape[0]), ("head", head, some.shape[1])):
        if number is not None and (apart == 1 or not 0 <= number < apart):
            there = f"0 to {apart - 1}" if apart > 1 else "null (capture.reduce, capture.heads: mean)"
            raise RequestError(name, f"got {number!r}; allowed: {there}")
    if layer is None:
        return merged(maps, words, branch, step, head)
    return _added(maps, layer, words, branch, step, head)


def _added(
    maps: ImageMaps, layer: str, words: tuple[str, ...], branch: str, step: int | None, head: int | None
) -> NDArray[np.float32]:
    total: NDArray[np.float32] = np.sum([maps.of(layer, word, branch, step, head) for word in words], axis=0)
    return total


def merged(
    maps: ImageMaps,
    words: tuple[str, ...],
    branch: str = "cond",
    step: int | None = None,
    head: int | None = None,
) -> NDArray[np.float32]:
    """Mean over all layers of the words' maps, each brought to the size of the largest by linear interpolation."""
    found = [_added(maps, layer, words, branch, step, head) for layer in maps.layers[branch]]
    form = max((one.shape for one in found), key=lambda shape: shape[0] * shape[1])
    mean: NDArray[np.float32] = np.nanmean([resized(one, form) for one in found], axis=0)
    return mean


def resized(values: NDArray[np.float32], form: tuple[int, ...]) -> NDArray[np.float32]:
    """A map at another (height, width), by linear interpolation."""
    if values.shape == form:
        return values
    picture = Image.fromarray(np.asarray(values, dtype=np.float32))
    return np.asarray(picture.resize((form[1], form[0]), Image.Resampling.BILINEAR))
