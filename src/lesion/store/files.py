"""File primitives: writing in one step, reading without waiting, freeing a name. Imports the standard library only."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` that takes its place when the block ends well, and vanishes otherwise.

    A folder that has the place is moved aside (`clear`). Nothing is flushed to the device, so a power cut may leave a
    torn file: readers check what they read.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # short, since `path` may have the longest name there is
    try:
        yield temporary
        try:
            os.replace(temporary, path)
        except IsADirectoryError:
            clear(path)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def opened(path: Path | str) -> Iterator[BinaryIO]:
    """Open a regular file for reading bytes; never waits. Raises OSError, also for a pipe, device or folder."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would be waited for
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with os.fdopen(number, "rb") as file:
        yield file


def gone(error: OSError) -> bool:
    """Tell whether a file is not there, or (on NFS) another host removed it while it was read."""
    return error.errno in (errno.ENOENT, errno.ESTALE)


def clear(path: Path) -> None:
    """Free a name, whatever has it: files, pipes and links are removed, a folder that is not empty is moved aside.

    Raises OSError.
    """
    try:
        path.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError):  # which of them a folder raises depends on the system
        if not path.is_dir() or path.is_symlink():
            raise
        try:
            path.rmdir()
        except OSError:
            path.rename(path.with_name(f".{uuid.uuid4().hex}.aside"))
