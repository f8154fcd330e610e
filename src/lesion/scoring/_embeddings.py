"""Embeddings of images and prompts as unit vectors, each computed once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lesion.scoring._metric import Shot

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
Vectors = NDArray[np.float64]
KEPT = 4096  # embeddings that a memory holds, 32 MB at 1024 dimensions; baselines are asked for again and again


class Kept(Generic[Key, Value]):
    """What was worked out, each once; of more than `most` the first goes."""

    def __init__(self, most: int):
        self.most = most
        self._kept: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, work_out: Callable[[], Value]) -> Value:
        if key not in self._kept:
            self._kept[key] = work_out()
            if len(self._kept) > self.most:
                self._kept.popitem(last=False)
        return self._kept[key]


class Memory(Generic[Item]):
    """Computes the vectors of items it has not seen lately; forgets the least recently used beyond `KEPT`."""

    def __init__(self, name_of: Callable[[Item], str], compute: Callable[[list[Item]], Vectors]):
        self.name_of, self.compute = name_of, compute
        self.kept: OrderedDict[str, NDArray[np.float64]] = OrderedDict()

    def __call__(self, items: Sequence[Item], batch_size: int) -> Vectors:
        names = [self.name_of(item) for item in items]
        found = {name: self.kept[name] for name in names if name in self.kept}
        missing = list({name: item for name, item in zip(names, items, strict=True) if name not in found}.items())
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            vectors = self.compute([item for _, item in batch])
            # Copies: a row would keep its whole batch in memory.
            found.update((name, row.copy()) for (name, _), row in zip(batch, vectors, strict=True))
        for name in names:
            self.kept[name] = found[name]
            self.kept.move_to_end(name)
        while len(self.kept) > KEPT:
            self.kept.popitem(last=False)
        return np.stack([found[name] for name in names])


def cosine(a: Vectors, b: Vectors) -> NDArray[np.float64]:
    """Cosines (n,) of unit vectors (n, d); rounding cannot take them out of [-1, 1]."""
    cosines: NDArray[np.float64] = np.einsum("nd,nd->n", a, b)
    return cosines.clip(-1.0, 1.0)


class ImageEmbedder(Protocol):
    """images(images, batch_size) are their embeddings as unit vectors (n, d)."""

    images: Memory[NDArray[np.uint8]]


def with_baselines(embedder: ImageEmbedder, shots: Sequence[Shot], batch_size: int) -> NDArray[np.float64]:
    """Cosines (n,) of the embeddings of images and their baselines."""
    embedded = embedder.images([s.image for s in shots] + [s.baseline for s in shots], batch_size)
    return cosine(embedded[: len(shots)], embedded[len(shots) :])


def unit(vectors: torch.Tensor) -> Vectors:
    """The vectors (n, d), scaled to length 1 in float64."""
    wide = vectors.cpu().double()  # not all devices have float64
    ones: Vectors = (wide / wide.norm(dim=1, keepdim=True)).numpy()
    return ones


def digest(image: NDArray[np.uint8]) -> str:
    """Names an image by its pixels."""
    return f"{image.shape}{hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()}"
