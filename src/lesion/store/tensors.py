"""Safetensors files that notice when a bit of them has changed: calibration means and half-made images.

What they hold decides pixels, so each carries a digest of its tensors and metadata. A file whose digest is missing (an
earlier version's) or wrong counts as not there: it is removed with a warning, and its owner makes it again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lesion.store.images import atomically

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


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata; None where there is no file, or a damaged one, which is reported and removed.

    Raises OSError if a file that is there cannot be read.
    """
    if not path.exists():
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
    return tensors, metadata


def _remove(path: Path, why: str) -> None:
    log.warning("%s is damaged and removed; it is made again (%s)", path, why)
    path.unlink(missing_ok=True)
