"""Pixels of shots as tensors, in batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lesion.scoring._metric import Shot

if TYPE_CHECKING:
    import torch

PIXELS = 2 << 20  # of a batch: SSIM takes some 560 bytes a pixel, and shares the card with generation


def batches(shots: Sequence[Shot], size: int) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Positions of at most `size` shots of one image size, their images and baselines, uint8 (n, 3, height, width).

    Of large images fewer, at least one: no more than PIXELS in all.
    """
    alike: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for position, shot in enumerate(shots):
        alike[shot.image.shape].append(position)
    for (height, width, _), positions in alike.items():
        most = max(1, min(size, PIXELS // (height * width)))
        for start in range(0, len(positions), most):
            rows = positions[start : start + most]
            yield rows, _stack([shots[row].image for row in rows]), _stack([shots[row].baseline for row in rows])


def _stack(images: list[np.ndarray]) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
