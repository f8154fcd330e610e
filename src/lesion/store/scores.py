"""What is known of stored images: their facts and scores, in part files that many processes append side by side.

Format: folder/pictures/ holds facts, folder/made/ with which card and versions images were made,
folder/COLUMN-IDENTITY/ one metric's values of images against their baselines, folder/pairs-COLUMN-IDENTITY/ its values
of two baselines. In each, parts: Parquet files named <time, 20 digits of nanoseconds>-<blake2b-64 of the file's
bytes>.parquet, written once, in one step, and never changed. So later records win, and any damage is noticed. The
schema's metadata `owner` says what a part holds (`_owner`): one in another folder is noticed. Parts of version 0.1
have no owner; they are taken where they lie, unless the same part lies in a second folder too: then nobody can say
whose it is, and both are removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lesion.store.files import atomically, clear, gone
from lesion.store.images import Picture

__all__ = ["Picture", "Scores"]
log = logging.getLogger(__name__)
MANY = 64  # parts of a folder that are merged when they are read
_PART = re.compile(r"(\d{20})-([0-9a-f]{16})\.parquet")
_OWNER = b"owner"
_HASH = pa.binary(16)
_PICTURES = pa.schema(
    [("key", _HASH), ("size", pa.int64()), ("modified", pa.int64()), ("digest", _HASH), ("reason", pa.string())]
)
_MADE = pa.schema([("key", _HASH), ("made", pa.string())])
_VALUES = pa.schema(
    [("key", _HASH), ("baseline", _HASH), ("digest", _HASH), ("baseline_digest", _HASH), ("value", pa.float64())]
)
_Row = tuple[Any, ...]  # as in the schemas, the key first


class _Parts:
    """One folder of parts with the same columns. owner: what its parts hold."""

    def __init__(self, folder: Path, schema: pa.Schema, owner: str):
        self.folder, self.schema, self.owner = folder, schema, owner
        self._seen: set[str] = set()  # parts that were read, or written here

    def read(self) -> tuple[pa.Table, NDArray[np.int64], bool]:
        """Every row of the parts that were not read yet, the latest last; the time of its part in nanoseconds; whether
        these are the rows of all parts.

        Damaged parts are removed. Where there are many, all are read and merged.
        """
        tables: dict[str, pa.Table] = {}
        if len(self._names()) > MANY:
            self._seen.clear()
        whole = not self._seen
        while fresh := [name for name in self._names() if name not in self._seen]:  # again: a merge may have moved rows
            self._seen.update(fresh)
            tables |= {name: table for name in fresh if (table := self._read(name)) is not None}
        names = sorted(tables)
        table = pa.concat_tables([tables[name] for name in names]) if names else self.schema.empty_table()
        if whole and len(names) > MANY:
            self._merge(names, table)
        times = np.array([int(name[:20]) for name in names], np.int64)
        return table, np.repeat(times, [len(tables[name]) for name in names]), whole

    def _names(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.folder) if _PART.fullmatch(name))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _read(self, name: str) -> pa.Table | None:
        """None if it is gone or damaged."""
        path = self.folder / name
        try:
            if not path.is_file():  # a pipe would be waited for
                if os.path.lexists(path):
                    _remove(path, "it is no file")
                return None
            content = path.read_bytes()
        except OSError as error:
            if gone(error):
                return None
            raise
        try:
            if _digest(content) != name[21:37]:
                raise ValueError("its content has changed")
            file = pq.ParquetFile(pa.BufferReader(content))
            owner = (file.schema_arrow.metadata or {}).get(_OWNER)
            if owner is None:
                self._check_alone(name)
            elif owner.decode() != self.owner:
                raise ValueError(f"it holds {owner.decode()}")
            return file.read(use_threads=False).cast(self.schema)
        except (pa.ArrowException, ValueError, OSError) as error:
            _remove(path, str(error))
            return None

    def _check_alone(self, name: str) -> None:
        """Raise ValueError where another folder holds the same part, and remove it there."""
        others = [path for path in self.folder.parent.glob(f"*/{name}") if path.parent != self.folder]
        for path in others:
            _remove(path, f"the same part lies in {self.folder.name}")
        if others:
            raise ValueError(f"the same part lies in {others[0].parent.name}")

    def write(self, table: pa.Table, stamp: str | None = None, durable: bool = False) -> str:
        """Add a part and return its name; it is not read again.

        stamp: the time in its name. durable: flushed to the device.
        """
        sink = pa.BufferOutputStream()
        pq.write_table(
            table.replace_schema_metadata({_OWNER: self.owner}), sink, compression="zstd", write_statistics=False
        )
        content = sink.getvalue().to_pybytes()
        name = f"{stamp or f'{time.time_ns():020d}'}-{_digest(content)}.parquet"
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomically(self.folder / name) as temporary, temporary.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        self._seen.add(name)
        return name

    def _merge(self, names: list[str], table: pa.Table) -> None:
        """Put one part, as late as the latest of them, in the place of `names`."""
        last = {key: i for i, key in enumerate(_hashes(table, "key").tolist())}
        try:
            merged = self.write(table.take(pa.array(sorted(last.values()))), stamp=names[-1][:20], durable=True)
            for name in names:
                if name != merged:
                    (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            log.warning("the parts in %s could not be merged: %s", self.folder, error)


def _remove(path: Path, why: str) -> None:
    log.warning("%s is damaged and removed; what it told is worked out anew (%s)", path, why)
    with suppress(OSError):
        clear(path)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _hashes(table: pa.Table, column: str) -> NDArray[np.void]:
    """A column of 16-byte hashes, as void scalars; their `tolist` is of bytes."""
    array = table[column].combine_chunks()
    if not len(array):
        return np.empty(0, "V16")
    return np.frombuffer(array.buffers()[1], "V16")[array.offset : array.offset + len(array)]


def _array(table: pa.Table, field: pa.Field) -> NDArray[Any]:
    if field.type == _HASH:
        return _hashes(table, field.name)
    if field.type == pa.string():  # few different ones, each in memory once
        texts = table[field.name].to_pylist()
        return np.array([None if text is None else sys.intern(text) for text in texts], object)
    return np.asarray(table[field.name].to_numpy())


class _Columns:
    """Rows in growing arrays, one a column: some 60 bytes a row, where a dict of tuples takes many times that."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[Any]] = []
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    @property
    def last(self) -> NDArray[Any]:
        """The last column, with room behind it."""
        return self._arrays[-1]

    def row(self, place: int) -> _Row:
        """A row, less the last column."""
        return tuple(column.item(place) for column in self._arrays[:-1])

    def extend(self, columns: Sequence[NDArray[Any]]) -> None:
        """Adds rows; room is made for a quarter more each time, so that adding many costs little."""
        end = self._rows + len(columns[0])
        if not self._arrays:
            self._arrays = [column[:0].copy() for column in columns]
        for i, column in enumerate(columns):
            array = self._arrays[i]
            if end > len(array):
                grown = np.empty(max(end, len(array) * 5 // 4), column.dtype)
                grown[: self._rows] = array[: self._rows]
                self._arrays[i] = array = grown
            array[self._rows : end] = column
        self._rows = end


class _Records:
    """The rows of one folder of parts by key: those on disk in columns, those that are not yet in a dict."""

    def __init__(self, folder: Path, schema: pa.Schema, owner: str):
        self._parts = _Parts(folder, schema, owner)
        self._columns = _Columns()  # of what is on disk, less the key; at the end the time of the part
        self._places = np.empty(0, np.int32)  # key number -> row in the columns, or -1
        self._pending: dict[bytes, _Row] = {}  # on no disk yet

    def load(self, numbers: dict[bytes, int]) -> None:
        """Read the parts that were not read yet. numbers: of all keys seen so far in any folder; gets the new ones."""
        table, times, whole = self._parts.read()
        if whole:
            self._columns, self._places = _Columns(), np.empty(0, np.int32)
        if len(table):
            self._take(table, times, numbers)

    def _take(self, table: pa.Table, times: NDArray[np.int64], numbers: dict[bytes, int]) -> None:
        """Rows of a table into the columns; the latest of equal keys is the one that is found."""
        keys = _hashes(table, "key").tolist()
        numbered = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
        if len(numbers) > len(self._places):
            places = np.full(max(len(numbers), len(self._places) * 5 // 4), -1, np.int32)
            places[: len(self._places)] = self._places
            self._places = places
        earlier, new = self._places[numbered], np.arange(len(self._columns), len(self._columns) + len(keys))
        self._columns.extend([*(_array(table, field) for field in self._parts.schema if field.name != "key"), times])
        later = (earlier < 0) | (self._columns.last[earlier] <= times)
        self._places[numbered[later]] = new[later]

    def get(self, key: bytes, number: int | None) -> _Row | None:
        if (row := self._pending.get(key)) is not None:
            return row
        if number is None or number >= len(self._places) or (place := self._places[number]) < 0:
            return None
        return self._columns.row(place)

    def add(self, key: bytes, row: _Row) -> None:
        self._pending[key] = row

    def flush(self, numbers: dict[bytes, int]) -> None:
        """Write what is pending as a part, and keep it in the columns. Raises OSError, and keeps it pending then."""
        if not self._pending:
            return
        rows = [(key, *row) for key, row in self._pending.items()]
        schema = self._parts.schema
        columns = [pa.array(values, field.type) for values, field in zip(zip(*rows, strict=True), schema, strict=True)]
        table = pa.table(columns, schema=schema)
        name = self._parts.write(table)
        self._pending.clear()
        self._take(table, np.full(len(table), int(name[:20])), numbers)


class Scores:
    """The facts and scores of stored images. Not for several threads at once; any number of processes.

    folder: holds the parts. metrics: column -> everything that can change its values, as a text; only values made
    under the same text are known. An image has one baseline, so a column keeps one value an image: the latest.
    """

    def __init__(self, folder: Path, metrics: Mapping[str, str]):
        self._numbers: dict[bytes, int] = {}
        self._pictures = _Records(folder / "pictures", _PICTURES, "pictures")
        self._made = _Records(folder / "made", _MADE, "made")
        self._values, self._pairs = (
            {
                column: _Records(
                    folder / f"{prefix}{_folder_name(column, identity)}", _VALUES, _owner(holds, column, identity)
                )
                for column, identity in metrics.items()
            }
            for prefix, holds in (("", "values"), ("pairs-", "pairs"))
        )

    def load(self) -> None:
        """Read what any process has flushed since the last time. Raises OSError.

        Damaged parts are reported and removed.
        """
        for records in self._records():
            records.load(self._numbers)

    def _records(self) -> Iterator[_Records]:
        yield self._pictures
        yield self._made
        yield from self._values.values()
        yield from self._pairs.values()

    def picture(self, key: str) -> Picture | None:
        """The latest facts of an image. They are old if the file has another size or time by now."""
        row = self._row(self._pictures, bytes.fromhex(key))
        if row is None:
            return None
        size, modified, digest, reason = row
        made = self._row(self._made, bytes.fromhex(key))
        return Picture(size, modified, digest.hex(), reason, made=made[0] if made else "")

    def values(self, key: str, baseline_key: str) -> dict[str, float]:
        """The columns known for an image against its baseline, as both are by their latest facts."""
        raw, baseline = bytes.fromhex(key), bytes.fromhex(baseline_key)
        digests = self._digest(raw), self._digest(baseline)
        if None in digests:
            return {}
        found = {}
        for column, records in self._values.items():
            row = self._row(records, raw)
            if row is not None and row[:3] == (baseline, *digests):
                found[column] = row[3]
        return found

    def add_picture(self, key: str, picture: Picture) -> None:
        """Note an image's facts; values of other pixels are void from now on."""
        digest = bytes.fromhex(picture.digest)
        self._pictures.add(bytes.fromhex(key), (picture.size, picture.modified, digest, picture.reason))
        if picture.made:
            self._made.add(bytes.fromhex(key), (picture.made,))

    def add_values(self, key: str, baseline_key: str, values: Mapping[str, float]) -> None:
        """Note what metrics say of an image as its latest facts describe it; a NaN is not noted.

        Raises KeyError for an unknown column, or if the facts of the image or of its baseline are unknown.
        """
        raw, baseline = bytes.fromhex(key), bytes.fromhex(baseline_key)
        digests = self._digest(raw), self._digest(baseline)
        if None in digests:
            raise KeyError(f"no facts of {key} or of its baseline {baseline_key}")
        for column, value in values.items():
            records = self._values[column]
            if not math.isnan(value):
                records.add(raw, (baseline, *digests, float(value)))

    def pair(self, column: str, key: str, other: str) -> float | None:
        """What a metric says of two images, whichever comes first, as both are by their latest facts."""
        first, second = sorted((bytes.fromhex(key), bytes.fromhex(other)))
        row = self._row(self._pairs[column], _pair_key(first, second))
        if row is None or None in (row_digests := (self._digest(first), self._digest(second))):
            return None
        return float(row[3]) if row[:3] == (second, *row_digests) else None

    def add_pair(self, column: str, key: str, other: str, value: float) -> None:
        """Note what a metric says of two images. KeyError and NaN as in `add_values`."""
        first, second = sorted((bytes.fromhex(key), bytes.fromhex(other)))
        digests = self._digest(first), self._digest(second)
        if None in digests:
            raise KeyError(f"no facts of {key} or of {other}")
        if not math.isnan(value):
            self._pairs[column].add(_pair_key(first, second), (second, *digests, float(value)))

    def flush(self) -> None:
        """Write what was added as new parts, facts first. Raises OSError; what is not written stays for the next."""
        for records in self._records():
            records.flush(self._numbers)

    def _row(self, records: _Records, key: bytes) -> _Row | None:
        return records.get(key, self._numbers.get(key))

    def _digest(self, key: bytes) -> bytes | None:
        row = self._row(self._pictures, key)
        return None if row is None else row[2]


def _pair_key(first: bytes, second: bytes) -> bytes:
    return hashlib.blake2b(first + second, digest_size=16).digest()


def _owner(holds: str, column: str, identity: str) -> str:
    """What a part says it holds: values or pairs, of which column, made how."""
    return f"{holds} of {json.dumps([column, identity])}"


def _folder_name(column: str, identity: str) -> str:
    digest = hashlib.blake2b(identity.encode(), digest_size=4).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', column)}-{digest}"
