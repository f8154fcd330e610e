"""Cells on disk: one PNG a cell, named by its hash, written atomically; safe for many processes.

A PNG carries its cell's identity and status in its metadata, so a file explains itself wherever it is copied.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from lesion.study import Cell

_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


class Damaged(Exception):
    """A stored image cannot be read or is not what its name says."""


@dataclass(frozen=True)
class Stored:
    """pixels: (height, width, 3) uint8. reason: why the image is invalid, or ""."""

    pixels: NDArray[np.uint8]
    reason: str


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well, and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Store:
    """folder: shared by every run; holds cells/ab/abcdef….png and means/."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def means(self) -> Path:
        return self.folder / "means"

    def path(self, key: str) -> Path:
        return self.folder / "cells" / key[:2] / f"{key}.png"

    def has(self, key: str) -> bool:
        """Whether a whole image is there (a torn one counts as missing and is made again)."""
        try:
            with self.path(key).open("rb") as file:
                file.seek(-len(_END), os.SEEK_END)
                return file.read() == _END
        except OSError:
            return False

    def put(self, cell: Cell, pixels: NDArray[np.uint8], reason: str = "") -> None:
        path = self.path(cell.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        notes = PngImagePlugin.PngInfo()
        record = {"cell": cell.key, "status": "invalid" if reason else "ok", "reason": reason, **cell.identity()}
        notes.add_itxt("lesion", json.dumps(record, ensure_ascii=False))
        with atomically(path) as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=notes, compress_level=1)

    def get(self, key: str) -> Stored:
        """Raises Damaged if the image cannot be read or carries another cell's hash."""
        try:
            with Image.open(self.path(key)) as image:
                image.load()
                record = json.loads(image.text["lesion"])  # type: ignore[attr-defined]
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, KeyError) as error:
            raise Damaged(f"{self.path(key).name}: {error}") from None
        if record.get("cell") != key:
            raise Damaged(f"{self.path(key).name}: carries the hash of another cell")
        return Stored(pixels, record.get("reason", ""))

    def discard(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)
