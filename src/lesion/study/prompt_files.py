"""Reads files of prompts into texts and rows of a table; what their columns mean is for `prompt_columns`.

Reading and parsing are two steps, so that a set which several jobs of a process use need be parsed only once.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import stat
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from lesion.errors import RequestError
from lesion.study.checks import one_of

FORMATS = ("txt", "csv", "tsv", "jsonl", "json", "parquet")
ENDINGS = tuple(f".{name}" for name in FORMATS)
LARGEST = 256 << 20  # bytes of a file, unpacked
MOST = 2_000_000  # prompts of a set
STDIN = "-"
GZIP = b"\x1f\x8b"  # how such a file begins; standard input has no ending that says so
Row = str | dict[str, Any]


@dataclass(frozen=True)
class Content:
    """What a file holds. name: for messages. format: one of `FORMATS`, or `folder`. parts: name, bytes of each file."""

    name: str
    format: str
    parts: tuple[tuple[str, bytes], ...]


def has_ending(name: str) -> bool:
    """Whether a name ends as a file of prompts does."""
    return _format(name) is not None


def label(path: str) -> str:
    """The name of a set: that of its file without endings."""
    name = Path(path).name
    return "stdin" if path == STDIN else re.sub(r"\.gz$", "", name, flags=re.I).rsplit(".", 1)[0] or name


def content(path: str, key: str, format: str | None = None) -> Content:
    """Read a file, a folder of .txt files, or standard input (`-`).

    format: one of `FORMATS`; None: as the file's name ends, of standard input txt. Raises RequestError naming `key` for
    what is not there, no regular file, of unknown ending, not readable, or larger than `LARGEST`.
    """
    if format is not None:
        one_of(f"{key.removesuffix('.path')}.format", format, FORMATS)
    if path == STDIN:
        return Content("standard input", format or "txt", (("", _standard_input(key)),))
    place = Path(path).expanduser()
    try:
        mode = place.stat().st_mode
        if stat.S_ISDIR(mode):
            return _folder(place, key)
        if not stat.S_ISREG(mode):
            raise RequestError(key, f"{path!r} is no regular file; standard input is {STDIN}")
        if (format or _format(place.name)) is None:
            raise RequestError(
                key, f"{place.name!r} has an unknown ending; allowed: {', '.join(ENDINGS)}, each also with .gz"
            )
        data = _bytes(place, key)
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(key, f"cannot read {path!r}: there is no such file or folder") from None
    except (OSError, ValueError) as error:  # a ValueError for a name with a NUL character
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise RequestError(key, f"cannot read {path!r}: {why}") from None
    return Content(place.name, format or str(_format(place.name)), (("", data),))


def _format(name: str) -> str | None:
    ending = Path(name.lower().removesuffix(".gz")).suffix
    return ending[1:] if ending in ENDINGS else None


def _bytes(path: Path, key: str) -> bytes:
    """A file's bytes, unpacked if it is .gz. Raises OSError; RequestError for too many."""
    with path.open("rb") as file:
        return _read(file, path.name, key, packed=path.name.lower().endswith(".gz"))


def _read(file: BinaryIO, name: str, key: str, packed: bool) -> bytes:
    try:
        return _limited((gzip.GzipFile(fileobj=file) if packed else file).read(LARGEST + 1), name, key)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RequestError(key, f"{name!r} is no whole gzip file: {error}") from None


def _limited(data: bytes, name: str, key: str) -> bytes:
    if len(data) > LARGEST:
        raise RequestError(key, f"{name!r} holds more than {LARGEST >> 20} MiB; give a smaller file")
    return data


@lru_cache(maxsize=1)
def _piped() -> bytes:
    """Standard input can be read only once, and each job of a process asks for it."""
    return sys.stdin.buffer.read(LARGEST + 1)


def _standard_input(key: str) -> bytes:
    try:
        if sys.stdin is None or sys.stdin.isatty():
            raise RequestError(key, f"{STDIN} is standard input, and nothing is piped into it")
        data = _limited(_piped(), "standard input", key)
        return _read(io.BytesIO(data), "standard input", key, packed=data.startswith(GZIP))
    except (OSError, ValueError, AttributeError) as error:  # closed, or no file
        raise RequestError(key, f"standard input cannot be read: {error}") from None


def _folder(folder: Path, key: str) -> Content:
    parts: list[tuple[str, bytes]] = []
    size = 0
    for path in sorted(folder.iterdir()):
        if _format(path.name) == "txt" and not path.name.startswith(".") and path.is_file():
            data = _bytes(path, key)
            size += len(data)
            if size > LARGEST or len(parts) == MOST:
                raise RequestError(key, f"folder {folder.name!r} holds more than {LARGEST >> 20} MiB or {MOST} files")
            parts.append((path.name, data))
    if not parts:
        raise RequestError(key, f"folder {str(folder)!r} has no .txt file; allowed: a file, or a folder of .txt files")
    return Content(folder.name, "folder", tuple(parts))


def parsed(content: Content, key: str) -> list[Row]:
    """A file's prompts in its order: texts, or rows by the names of their columns.

    .txt: a prompt a line. .csv, .tsv: names in the first line. .jsonl: an object or text a line. .json: a list of such.
    .parquet: columns of texts, numbers and lists. A folder: a prompt a file, with the file's name as its id.
    Only newlines end a line (a carriage return before one belongs to it).

    Raises RequestError naming `key` for what is not of its form, not UTF-8, or has more than `MOST` prompts.
    """
    rows: list[Row] = []
    for row in _rows(content, key):
        if len(rows) == MOST:
            raise RequestError(key, f"{content.name!r} has more than {MOST} prompts; give a smaller file")
        rows.append(row)
    return rows


def _rows(content: Content, key: str) -> Iterator[Row]:
    if content.format == "folder":
        yield from _of_folder(content, key)
        return
    ((_, data),) = content.parts
    if content.format == "parquet":
        yield from _parquet(data, content.name, key)
        return
    text = _text(data, content.name, key)
    if content.format == "txt":
        yield from (line.strip() for line in _lines(text) if line.strip())
    elif content.format in ("csv", "tsv"):
        yield from _table(text, content.name, key, tabs=content.format == "tsv")
    elif content.format == "jsonl":
        for number, line in enumerate(_lines(text), 1):
            if line.strip():
                yield _json(line, f"{content.name!r} line {number}", key)
    else:
        rows = _json(text, repr(content.name), key)
        if not isinstance(rows, list):
            raise RequestError(
                key, f"{content.name!r} must hold a list of texts or of objects; its outermost is a {_kind(rows)}"
            )
        yield from rows


def _kind(value: Any) -> str:
    """What JSON calls a value that is no list."""
    words = {dict: "object", str: "string", bool: "boolean", type(None): "null"}
    return f"JSON {words.get(type(value), 'number')}"


def _text(data: bytes, name: str, key: str) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise RequestError(key, f"cannot read {name!r}: it is UTF-16; UTF-8 is read")
    try:
        text = data.decode("utf-8-sig")
    except ValueError as error:
        raise RequestError(key, f"cannot read {name!r} as UTF-8: {error}") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise RequestError(key, f"{name!r} line {line} has a NUL character; is the file UTF-16? UTF-8 is read")
    return text


def _lines(text: str) -> list[str]:
    return re.split(r"\r\n|\r|\n", text)


def _table(text: str, name: str, key: str, tabs: bool) -> Iterator[dict[str, Any]]:
    """Rows by the names in the first line; a row may be shorter than that, not longer. Empty rows are left out."""
    names: list[str] | None = None
    for line, row in _tabbed(text, name, key) if tabs else _quoted(text, name, key):
        if names is None:
            names = row
            if twice := [column for number, column in enumerate(names) if column and column in names[:number]]:
                raise RequestError(key, f"{name!r} line {line} names the column {twice[0]!r} twice")
            continue
        if len(row) > len(names) and any(row[len(names) :]):
            advice = "" if tabs else "; put a text with commas in double quotes"
            raise RequestError(key, f"{name!r} line {line} has {len(row)} fields for {len(names)} columns{advice}")
        if any(row):
            yield dict(zip(names, row, strict=False))


def _quoted(text: str, name: str, key: str, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Each row of a CSV with the number of its first line."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise RequestError(key, f"{name!r} line {line} is no valid CSV: {error}") from None
        if row is None:
            return
        if row:
            yield line, row


def _tabbed(text: str, name: str, key: str) -> Iterator[tuple[int, list[str]]]:
    """Each row of a TSV. Quotes belong to the text, as in PartiPrompts, but where all names of columns have them.

    A field whose own quotes are doubled was written by a program that quotes (pandas), and is taken out of its quotes.
    """
    if text.startswith('"'):
        yield from _quoted(text, name, key, "\t")
        return
    for line, row in enumerate(_lines(text), 1):
        if row:
            yield line, [_unquoted(field, f"{name!r} line {line}", key) for field in row.split("\t")]


def _unquoted(field: str, where: str, key: str) -> str:
    if not field.startswith('"'):
        return field
    if field.count('"') % 2:
        raise RequestError(key, f"{where} opens a quote that its field does not close")
    doubled = len(field) > 3 and '""' in field[1:-1] and re.fullmatch(r'"(?:[^"]|"")*"', field)
    return field[1:-1].replace('""', '"') if doubled else field


def _json(text: str, where: str, key: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        several = " (an object a line is .jsonl)" if "Extra data" in str(error) else ""
        raise RequestError(key, f"{where} is no valid JSON: {error}{several}") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} is given twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_each_once)


def _parquet(data: bytes, name: str, key: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(data))
        columns = [field.name for field in file.schema_arrow if _readable(field.type, pa.types)]
        if file.metadata.num_rows > MOST:
            raise RequestError(key, f"{name!r} has more than {MOST} prompts; give a smaller file")
        groups = (file.metadata.row_group(number) for number in range(file.num_row_groups))
        if sum(group.total_byte_size for group in groups) > 4 * LARGEST:
            raise RequestError(key, f"{name!r} holds more than {4 * LARGEST >> 20} MiB unpacked; give a smaller file")
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RequestError(key, f"{name!r} is no valid Parquet file: {str(error)[:200]}") from None


def _readable(kind: Any, types: Any) -> bool:
    """Whether a column may be read: pictures and their like are left alone."""
    if types.is_list(kind) or types.is_large_list(kind):
        return _readable(kind.value_type, types)
    checks: tuple[Callable[[Any], bool], ...] = (
        *(types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean),
        types.is_null,
    )
    if types.is_dictionary(kind):
        return _readable(kind.value_type, types)
    return any(check(kind) for check in checks)


def _of_folder(content: Content, key: str) -> Iterator[Row]:
    for name, data in content.parts:
        lines = [line.strip() for line in _lines(_text(data, name, key)) if line.strip()]
        if len(lines) != 1:
            raise RequestError(
                key,
                f"{name!r} has {len(lines)} lines with text; a file of a folder holds one prompt (a file with a prompt "
                "a line is given by its own path)",
            )
        stem = unicodedata.normalize("NFC", label(name))
        yield {"id": re.sub(r"[^\w.\-]", "-", stem).lstrip("."), "text": lines[0]}
