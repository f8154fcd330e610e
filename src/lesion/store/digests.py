"""SHA-256 of files of weights, remembered on this machine: those of FLUX are 34 GB, and each process asks for them.

Format: digests/<sha256 of the path, 32 hex digits>.json in the cache folder, a JSON object of `_Known`. It serves while
the file has the size, times and number on its disk with which it was read; a write changes its time of change, which
nobody can set back. What does not fit is read and noted anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from lesion.store.files import atomically

LARGE = 16 << 20  # bytes; smaller files are read as fast as a note of them
SETTLED = 2.0  # seconds since its last change after which a further one shows in a file's times, on any file system


@dataclass(frozen=True)
class _Facts:
    """Of a file, by whose change its content may have changed. modified, changed: in nanoseconds."""

    size: int
    modified: int
    changed: int
    number: int

    @classmethod
    def of(cls, path: Path) -> _Facts:
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


@dataclass(frozen=True)
class _Known(_Facts):
    """path: absolute, links followed. sha256: in hex. check: of all else, so that damage is noticed."""

    path: str
    sha256: str
    check: str


def cache_folder() -> Path:
    """Return where this machine keeps what it need not work out again: LESION_CACHE_DIR, or `lesion` in the user's
    cache folder.

    Raises RuntimeError where there is no home folder.
    """
    if given := os.environ.get("LESION_CACHE_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lesion"


def sha256_of(path: Path) -> bytes:
    """Return the SHA-256 of a file's bytes, 32 bytes. Raises OSError."""
    return _sha256(path, _Facts.of(path))


def digest_of(files: Iterable[Path]) -> str:
    """Return a digest of the bytes of these files, 16 hex digits. Raises OSError."""
    return hashlib.sha256(b"".join(map(sha256_of, files))).hexdigest()[:16]


@lru_cache(maxsize=4096)
def _sha256(path: Path, facts: _Facts) -> bytes:
    if facts.size < LARGE:
        return _read(path)
    place = None
    with suppress(OSError, RuntimeError):
        where = str(path.resolve())
        place = cache_folder() / "digests" / f"{hashlib.sha256(os.fsencode(where)).hexdigest()[:32]}.json"
        if (known := _noted(place, where, facts)) is not None:
            return known
    found = _read(path)
    if place is not None:
        with suppress(OSError):
            settled = time.time_ns() - max(facts.modified, facts.changed) > SETTLED * 1e9
            if settled and _Facts.of(path) == facts:
                note = {**asdict(facts), "path": where, "sha256": found.hex()}
                place.parent.mkdir(parents=True, exist_ok=True)
                with atomically(place) as temporary:
                    temporary.write_text(json.dumps({**note, "check": _check(note)}), encoding="utf-8")
    return found


def _noted(place: Path, where: str, facts: _Facts) -> bytes | None:
    """None for what is not noted, of a file as it was before, or damaged."""
    try:
        known = _Known(**json.loads(place.read_text(encoding="utf-8")))
        rest = {name: value for name, value in asdict(known).items() if name != "check"}
        fits = known.path == where and all(getattr(known, name) == value for name, value in asdict(facts).items())
        return bytes.fromhex(known.sha256) if fits and known.check == _check(rest) else None
    except (OSError, ValueError, TypeError):
        return None


def _check(note: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
