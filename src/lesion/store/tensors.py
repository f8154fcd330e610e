"""Safetensors files that show damage and whom they belong to: calibration means and snapshots.

Format: the caller's tensors and metadata (texts), and in the metadata `digest`, of both (`digest_of`). What they hold
decides pixels, so a file counts as not there if its digest is missing or wrong, or if its metadata names another owner
than the one that asks: it is removed with a warning, and its owner makes it again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_arrays

from lesion.store.files import atomically, clear

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
_DIGEST = "digest"


def digest_of(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """blake2b-128 of names, dtypes, shapes, values and metadata, 32 hex digits.

    tensors: of torch, or numpy arrays, whose digest is the same.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        values = tensors[name]
        if isinstance(values, np.ndarray):
            dtype, bytes_of = f"torch.{values.dtype}", np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        else:
            import torch

            values = values.detach().cpu().contiguous()
            dtype, bytes_of = str(values.dtype), values.reshape(-1).view(torch.uint8).numpy()
        digest.update(repr((name, dtype, tuple(values.shape))).encode())
        digest.update(bytes_of.data)
    return digest.hexdigest()


def write(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """In one step, in place of any that is there; numpy arrays, all or none, without torch. Raises OSError."""
    arrays = _are_arrays(tensors)
    held = {name: np.ascontiguousarray(one) if arrays else one.contiguous() for name, one in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomically(path) as temporary:
            _save(held, temporary, {**metadata, _DIGEST: digest_of(held, metadata)})
    except SafetensorError as error:  # how its writer tells of a full disk
        raise OSError(str(error)) from error


def _are_arrays(tensors: Mapping[str, Any]) -> bool:
    return all(isinstance(one, np.ndarray) for one in tensors.values())


def _save(tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
    """Write from where the values lie: nothing is copied."""
    if _are_arrays(tensors):
        save_arrays(tensors, path, metadata)
    else:
        from safetensors.torch import save_file

        save_file(tensors, path, metadata)


def read(path: Path, belongs: Callable[[Mapping[str, str]], bool]) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata; None where there is no file, or a damaged or foreign one, which is reported and removed.

    belongs: whether the metadata is that of the owner who asks; KeyError, TypeError and ValueError mean no.
    """
    return _read(path, belongs, "pt")


def read_arrays(
    path: Path, belongs: Callable[[Mapping[str, str]], bool]
) -> tuple[dict[str, NDArray[Any]], dict[str, str]] | None:
    """`read` as numpy arrays, without torch: for files of types that numpy has."""
    return _read(path, belongs, "np")


def _read(
    path: Path, belongs: Callable[[Mapping[str, str]], bool], framework: str
) -> tuple[dict[str, Any], dict[str, str]] | None:
    """See `read`.

    Raises OSError if a file that is there cannot be read.
    """
    if not path.is_file():
        if os.path.lexists(path):
            _remove(path, "it is no file")
        return None
    try:
        with safe_open(path, framework=framework) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = dict(file.metadata() or {})
    except FileNotFoundError:  # removed in this moment
        return None
    except (SafetensorError, ValueError, TypeError) as error:
        _remove(path, str(error))
        return None
    carried = metadata.pop(_DIGEST, None)
    if carried != digest_of(tensors, metadata):
        _remove(path, "its content has changed" if carried else "it carries no digest")
        return None
    try:
        ours = belongs(metadata)
    except (KeyError, TypeError, ValueError):
        ours = False
    if not ours:
        _remove(path, "its content is of another owner")
        return None
    return tensors, metadata


def _remove(path: Path, why: str) -> None:
    log.warning("%s is damaged and removed; it is made again (%s)", path, why)
    with suppress(OSError):  # where it cannot be removed it is written over, or told of again
        clear(path)
