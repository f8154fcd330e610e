"""Full float32 for scores, whatever the generating side has set for speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from lesion.models.precision import full_float32

if TYPE_CHECKING:
    import torch


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, and on CUDA no TF32: it is on for convolutions by default and costs three digits."""
    import torch

    full = full_float32() if device.type == "cuda" else nullcontext()
    with full, torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield
