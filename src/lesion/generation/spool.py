"""Attention maps of every step on their way to the store: on disk, so that memory does not grow with the steps."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Hashable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_BYTES = np.dtype(np.float32).itemsize


class Spool:
    """float32 arrays of as many steps each, written step by step to a file without a name, which goes with the process.

    folder: on the disk that is to hold them; None for the system's own for temporary files. Raises OSError.
    """

    def __init__(self, folder: Path | None, steps: int):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (its arrays outlive every block)
        self._steps, self._end = steps, 0
        self._places: dict[Hashable, tuple[int, tuple[int, ...]]] = {}

    def put(self, key: Hashable, step: int, values: NDArray[np.float32]) -> None:
        """Write one step of an array. Raises OSError."""
        if key not in self._places:
            self._places[key] = self._end, values.shape
            self._end += self._steps * values.size * _BYTES
            os.ftruncate(self._file.fileno(), self._end)
        begin, form = self._places[key]
        assert values.shape == form
        rest = np.ascontiguousarray(values, dtype=np.float32).data.cast("B")
        place = begin + step * len(rest)
        while rest:
            done = os.pwrite(self._file.fileno(), rest, place)
            rest, place = rest[done:], place + done

    def get(self, key: Hashable) -> NDArray[np.float32]:
        """An array, (steps, …), mapped from the file: it is read as it is used."""
        begin, form = self._places[key]
        return np.memmap(self._file, np.float32, "r", begin, (self._steps, *form))
