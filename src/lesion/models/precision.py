"""How float32 is multiplied on a GPU: in full, or with factors rounded to TF32's 10 bits.

torch knows one setting a process, so scoring in one thread and decoding in another take turns where they change it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

_turn = threading.RLock()


def _knobs() -> list[tuple[Any, str, Any, Any]]:
    """Of matrix products and convolutions: object, attribute, its value for TF32 and for full float32.

    torch 2.9 has `fp32_precision` in the place of `allow_tf32`, and raises where both are used.
    """
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    conv = getattr(cudnn, "conv", None)
    if hasattr(matmul, "fp32_precision") and hasattr(conv, "fp32_precision"):
        return [(one, "fp32_precision", "tf32", "ieee") for one in (matmul, conv)]
    return [(one, "allow_tf32", True, False) for one in (matmul, cudnn)]


def set_tf32(on: bool) -> None:
    """Choose for the whole process."""
    for one, name, tf32, full in _knobs():
        setattr(one, name, tf32 if on else full)


def full_float32() -> AbstractContextManager[None]:
    """No TF32 inside; afterwards as before."""
    return _chosen(False, False)


def tf32() -> AbstractContextManager[None]:
    """TF32 inside; afterwards as before."""
    return _chosen(True, True)


def stock() -> AbstractContextManager[None]:
    """What torch chooses by itself inside: TF32 in convolutions alone; afterwards as before."""
    return _chosen(False, True)


@contextmanager
def _chosen(*on: bool) -> Iterator[None]:
    """on: TF32 in matrix products, in convolutions."""
    knobs = _knobs()
    with _turn:
        before = [getattr(one, name) for one, name, _, _ in knobs]
        try:
            for (one, name, tf32, full), rough in zip(knobs, on, strict=True):
                setattr(one, name, tf32 if rough else full)
            yield
        finally:
            for (one, name, _, _), value in zip(knobs, before, strict=True):
                setattr(one, name, value)
