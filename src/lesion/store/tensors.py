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

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lesion.store.files import atomically, clear

log = logging.getLogger(__name__)
_DIGEST = "digest"


def digest_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """blake2b-128 of names, dtypes, shapes, values and metadata, 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """In one step, in place of any that is there. Raises OSError."""
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomically(path) as temporary:
            save_file(held, temporary, metadata={**metadata, _DIGEST: digest_of(held, metadata)})
    except SafetensorError as error:  # how its writer tells of a full disk
        raise OSError(str(error)) from error


def read(path: Path, belongs: Callable[[Mapping[str, str]], bool]) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata; None where there is no file, or a damaged or foreign one, which is reported and removed.

    belongs: whether the metadata is that of the owner who asks; KeyError, TypeError and ValueError mean no.

    Raises OSError if a file that is there cannot be read.
    """
    if not path.is_file():
        if os.path.lexists(path):
            _remove(path, "it is no file")
        return None
    try:
        with safe_open(path, framework="pt") as file:
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
