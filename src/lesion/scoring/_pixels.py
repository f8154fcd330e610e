"""Pixels of shots as tensors, in batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lesion.scoring._metric import Shot

if TYPE_CHECKING:
    import torch


def batches(shots: Sequence[Shot], size: int) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Positions of at most `size` shots of one image size, their images and baselines, uint8 (n, 3, height, width)."""
    alike: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for position, shot in enumerate(shots):
        alike[shot.image.shape].append(position)
    for positions in alike.values():
        for start in range(0, len(positions), size):
            rows = positions[start : start + size]
            yield rows, _stack([shots[row].image for row in rows]), _stack([shots[row].baseline for row in rows])


def _stack(images: list[np.ndarray]) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
