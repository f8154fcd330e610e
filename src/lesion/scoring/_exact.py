"""Full float32 for scores, whatever the generating side has set for speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, and on CUDA no TF32: it is on for convolutions by default and costs three digits."""
    import torch

    backends: tuple[Any, ...] = ()
    if device.type == "cuda":
        backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
