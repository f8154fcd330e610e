"""Attention maps on disk: one safetensors file an image and way of capturing, made once.

Format: maps/<first 2 digits>/<cell's key>-<16 digits of `Capture.digest`>.safetensors. A tensor `branch/layer path` has
(steps, heads, entries, height, width), float32; steps and heads are one where they are averaged. Where a layer is
lesioned, nothing of it is used: those steps and heads are in no mean, NaN where they stand apart, and a layer that is
lesioned throughout has no tensor. The metadata has `maps` (name of the file), `cell` and `capture` (identities
as JSON), and `entries`: for each branch the numbers of each word's entries. Entries of one image token add up to 1, or
in joint attention to the text's share.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lesion.store import tensors
from lesion.study.capture import Capture
from lesion.study.grid import Cell

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageMaps:
    """Maps of one image.

    layers: branch -> layer path -> (steps, heads, entries, height, width), float32.
    entries: branch -> word, or what is beside the words -> numbers of its entries.
    """

    layers: Mapping[str, Mapping[str, NDArray[np.float32]]]
    entries: Mapping[str, Mapping[str, list[int]]]

    def of(
        self,
        layer: str,
        word: str,
        branch: str = "cond",
        step: int | None = None,
        head: int | None = None,
    ) -> NDArray[np.float32]:
        """Return how much each place looks at a word, (height, width), in [0, 1]; NaN where the layer is lesioned.

        step, head: number of one that was kept apart; None for the mean over all.

        Raises KeyError for a layer, word or branch that was not captured.
        """
        if word not in self.entries[branch]:
            raise KeyError(f"{word!r} is not here; there are: {', '.join(self.entries[branch])}")
        values = self.layers[branch][layer][:, :, self.entries[branch][word]].sum(axis=2)
        chosen = values[slice(None) if step is None else [step]][:, slice(None) if head is None else [head]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing is NaN
            found: NDArray[np.float32] = np.nanmean(chosen, axis=(0, 1))
        return found


class Maps:
    """The maps of one store that are captured in one way. capture: of `Capture.chosen`."""

    def __init__(self, folder: Path, capture: Capture):
        self.folder, self.capture = folder / "maps", capture
        self._ending = f"-{capture.digest}.safetensors"

    def path(self, key: str) -> Path:
        """Where the maps of a cell are."""
        return self.folder / key[:2] / f"{key}{self._ending}"

    def has(self, key: str) -> bool:
        """Whether there is a file; whether it is whole shows when it is read."""
        return self.path(key).is_file()

    @cached_property
    def listed(self) -> frozenset[str]:
        """Keys of the cells that had maps when this was first asked for."""
        found = []
        for folder in os.scandir(self.folder) if self.folder.is_dir() else ():
            names = os.listdir(folder.path) if folder.is_dir() else []
            found += [name.removesuffix(self._ending) for name in names if name.endswith(self._ending)]
        return frozenset(found)

    def put(self, cell: Cell, maps: ImageMaps) -> None:
        """Write the maps of a cell. Raises OSError."""
        path = self.path(cell.key)
        values = {f"{branch}/{layer}": one for branch, of in maps.layers.items() for layer, one in of.items()}
        metadata = {
            "maps": path.stem,
            "cell": json.dumps(cell.identity()),
            "capture": json.dumps(self.capture.identity()),
            "entries": json.dumps(maps.entries),
        }
        tensors.write(path, values, metadata)

    def get(self, key: str) -> ImageMaps | None:
        """The maps of a cell; None where there are none. Damaged ones are removed and told of.

        Raises OSError if a file that is there cannot be read.
        """
        return read(self.path(key), key)


def beside_image(image: str) -> str:
    """Where in a run folder the maps of an image are, by the path of the image: maps/ beside images/."""
    above, found, name = image.rpartition("images/")
    return f"{above}maps/{name.removesuffix('.png')}.safetensors" if found else ""


def read(path: Path, key: str) -> ImageMaps | None:
    """The maps of a cell in a file; None where there is none, or a damaged one, which is removed and told of."""
    kept = tensors.read_arrays(path, lambda carried: carried["maps"].partition("-")[0] == key)
    if kept is None:
        return None
    values, metadata = kept
    layers: dict[str, dict[str, NDArray[np.float32]]] = {}
    for name, value in values.items():
        branch, _, layer = name.partition("/")
        layers.setdefault(branch, {})[layer] = value
    order = json.loads(metadata["capture"])["layers"]  # a file has them by name
    return ImageMaps(
        {branch: {layer: of[layer] for layer in order if layer in of} for branch, of in layers.items()},
        json.loads(metadata["entries"]),
    )
