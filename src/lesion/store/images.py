"""Cells on disk: one PNG a cell, named by its hash, written atomically; safe for many processes.

Format: cells/<first 2 digits>/<key, 32 hex digits>.png, RGB of 8 bits, with one iTXt chunk `lesion` of JSON: `cell`
(the key), `status` (ok, invalid), `reason`, `pixels` (`digest_of` them; absent in files of version 0.1), `made` (with
which card and versions, and `truncated_tokens`; absent in older files), the fields of `Cell.identity`, and of steered
images `box_mass`. So a file explains itself, and shows changed pixels, wherever it is copied.

A file torn by a power cut is noticed by its missing end and made again. Pixels are compared whenever they are read:
with the digest in the file, or, where it has none, with the one remembered in scores/ (`lesion.store.scores`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import stat
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from lesion.store.files import atomically, clear, gone, opened
from lesion.study.grid import Cell

log = logging.getLogger(__name__)
_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_IMAGE = re.compile(r"[0-9a-f]{32}\.png")
_LITTER_AGE = 24 * 3600.0  # seconds after which a temporary file has lost its process


class Damaged(Exception):
    """A stored image cannot be read or is not what its name says."""


@dataclass(frozen=True)
class Picture:
    """What is known of a stored image without decoding it.

    size: bytes of the file. modified: its mtime in nanoseconds. digest: of shape and pixels, 32 hex digits.
    reason: why the image is invalid, or "".
    box_mass: of steered images the share of attention in the prompt's boxes, as the file says it; NaN where not known.
    made: the card and the versions of torch and diffusers that made it, and how many tokens of the prompt no encoder
        of text saw, as JSON with sorted keys; "" where not known.
    """

    size: int
    modified: int
    digest: str
    reason: str
    box_mass: float = field(default=math.nan, compare=False)
    made: str = field(default="", compare=False)


@dataclass(frozen=True)
class Stored:
    """pixels: (height, width, 3) uint8. picture: the file's facts."""

    pixels: NDArray[np.uint8]
    picture: Picture

    @property
    def reason(self) -> str:
        """Why the image is invalid, or ""."""
        return self.picture.reason


def digest_of(pixels: NDArray[np.uint8]) -> str:
    """blake2b-128 of shape and pixels, 32 hex digits."""
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def _made(record: Mapping[str, object]) -> str:
    return json.dumps(made, sort_keys=True) if isinstance(made := record.get("made"), dict) else ""


def _facts_if_whole(path: str) -> os.stat_result | None:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
    except OSError:
        return None
    try:
        facts = os.fstat(file)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size < len(_END):
            return None
        os.lseek(file, -len(_END), os.SEEK_END)
        return facts if os.read(file, len(_END)) == _END else None
    except OSError:
        return None
    finally:
        os.close(file)


class Known:
    """The images a store held when it was listed: `key in known` costs no system call for one that is missing.

    An image that is listed counts only if its file is whole, which is looked up once. Some 130 bytes an image.
    """

    def __init__(self, store: Store):
        self._store = store
        self._checked: dict[bytes, bool] = {}  # by keys as 16 raw bytes; those found torn are dropped

    def __contains__(self, key: str) -> bool:
        try:
            raw = bytes.fromhex(key)
        except ValueError:
            return False
        checked = self._checked.get(raw)
        if checked is False:
            checked = self._store.has(key)
            if checked:
                self._checked[raw] = True
            else:
                self._checked.pop(raw, None)
                if os.path.lexists(self._store.path(key)):  # not one that was discarded meanwhile
                    log.warning("a stored image is torn and made again (%s.png)", key)
        return bool(checked)

    def lists(self, key: str) -> bool:
        """Whether it was listed, whole or not: for counting beforehand, without opening a file an image."""
        return bytes.fromhex(key) in self._checked

    def __len__(self) -> int:
        """Images listed, less those found torn."""
        return len(self._checked)

    def count(self, may_be: Callable[[Mapping[str, Any]], bool]) -> int:
        """How many of the listed images may be, by their records; those without a readable one may. Reads each file."""
        records = (self._store.record(raw.hex()) for raw in self._checked)
        return sum(record is None or may_be(record) for record in records)

    def _list(self, folder: Path) -> None:
        try:
            names = os.listdir(folder)
        except OSError as error:
            if gone(error):
                return
            raise
        for name in names:
            if _IMAGE.fullmatch(name):
                self._checked[bytes.fromhex(name[:32])] = False
            elif name.endswith(".tmp"):
                _sweep(folder / name)


def _sweep(path: Path) -> None:
    """Remove a temporary file that a killed process left long ago."""
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > _LITTER_AGE:
            path.unlink()


class Store:
    """folder: shared by every run; holds cells/ab/abcdef….png, means/, states/, scores/ and claims/."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._cells = str(folder / "cells")

    @property
    def means(self) -> Path:
        return self.folder / "means"

    @property
    def states(self) -> Path:
        return self.folder / "states"

    @property
    def scores(self) -> Path:
        return self.folder / "scores"

    @property
    def claims(self) -> Path:
        return self.folder / "claims"

    def path(self, key: str) -> Path:
        return Path(self._place(key))

    def _place(self, key: str) -> str:  # a text, since making a Path costs as much as looking the file up
        return f"{self._cells}/{key[:2]}/{key}.png"

    def has(self, key: str) -> bool:
        """Whether a whole image is there (a torn one counts as missing and is made again)."""
        return _facts_if_whole(self._place(key)) is not None

    def matches(self, key: str, picture: Picture) -> bool:
        """Whether a whole image is there and its file is still the one `picture` tells of."""
        facts = _facts_if_whole(self._place(key))
        return facts is not None and (facts.st_size, facts.st_mtime_ns) == (picture.size, picture.modified)

    def known(self) -> Known:
        """List the images that are there now."""
        known = Known(self)
        try:
            with os.scandir(self._cells) as folders:
                paths = [Path(entry.path) for entry in folders if len(entry.name) == 2 and entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return known
        for path in paths:
            known._list(path)
        return known

    def put(
        self,
        cell: Cell,
        pixels: NDArray[np.uint8],
        reason: str = "",
        box_mass: float = math.nan,
        made: Mapping[str, object] | None = None,
    ) -> Picture:
        """Write an image in one step, in place of any that is there; safe from many threads and processes.

        box_mass, made: as in `Picture`.

        Raises OSError.
        """
        path = self.path(cell.key)
        notes = PngImagePlugin.PngInfo()
        digest, status = digest_of(pixels), "invalid" if reason else "ok"
        record = {"cell": cell.key, "status": status, "reason": reason, "pixels": digest, **cell.identity()}
        if math.isfinite(box_mass):
            record["box_mass"] = box_mass
        if made:
            record["made"] = dict(made)
        notes.add_itxt("lesion", json.dumps(record, ensure_ascii=False))
        for removed in (False, True):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with atomically(path) as temporary:
                    Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=notes, compress_level=1)
                    facts = temporary.stat()
                break
            except FileNotFoundError:  # somebody removes the store at this moment
                if removed:
                    raise
        return Picture(facts.st_size, facts.st_mtime_ns, digest, reason, box_mass, _made(record))

    def get(self, key: str, size: tuple[int, int] | None = None, digest: str | None = None) -> Stored:
        """Read an image and check whose it is and that its pixels are those that were stored.

        size: height and width that the cell asks for, compared with the header before anything is decoded. digest: of
        its pixels as remembered; it decides for files without a digest of their own (version 0.1). A file that is
        true to its own digest counts, also if another was remembered: another process made the image again.

        Raises Damaged.
        """
        path = self.path(key)
        try:
            with opened(path) as file:
                facts, header = os.fstat(file.fileno()), file.read(24)
                if size is not None and header[16:] != struct.pack(">II", size[1], size[0]):
                    raise ValueError(f"not of {size[1]} x {size[0]} pixels")
                file.seek(0)
                with Image.open(file, formats=["PNG"]) as image:
                    image.load()
                    if "lesion" not in (texts := getattr(image, "text", {})):
                        raise ValueError("it has no record of what it shows")
                    record = json.loads(texts["lesion"])
                    pixels = np.asarray(image.convert("RGB"))
            if not isinstance(record, dict) or not isinstance(reason := record.get("reason", ""), str):
                raise ValueError("its record is of another form")
            mass = float(record.get("box_mass", math.nan))
            if record.get("cell") != key:
                raise ValueError("carries the hash of another cell")
            found = digest_of(pixels)
            if found != (record.get("pixels") or digest or found):
                raise ValueError("its pixels are not those that were made")
        except MemoryError:
            raise
        except Exception as error:  # whatever a decoder can raise on broken bytes
            raise Damaged(f"{path.name}: {error}") from None
        return Stored(pixels, Picture(facts.st_size, facts.st_mtime_ns, found, reason, mass, _made(record)))

    def record(self, key: str) -> dict[str, Any] | None:
        """The record in an image's file, whose pixels are not read; None where there is none to read."""
        try:
            with opened(self.path(key)) as file, Image.open(file, formats=["PNG"]) as image:
                record = json.loads(image.info["lesion"])
        except Exception:  # whatever a decoder can raise on broken bytes
            return None
        return record if isinstance(record, dict) and record.get("cell") == key else None

    def discard(self, key: str) -> None:
        """Remove an image, or whatever else has its name. Raises OSError."""
        clear(self.path(key))
