"""What the columns of a prompt file mean: which holds the texts, ids, aspects and init images, and which rows count."""

from __future__ import annotations

import io
import itertools
import re
import signal
import threading
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from lesion.errors import RequestError
from lesion.study.boxes import boxes_of_row, has_boxes
from lesion.study.prompt_files import Row

TEXTS = ("text", "prompt", "prompts", "texts", "caption", "captions", "sentence")
IDS = ("id", "prompt_id")
ASPECTS = ("aspects", "aspect")
TAGS = ("category", "categories", "challenge", "tag", "tags", "element_type")  # aspects where there is none of these
IMAGES = ("image",)
OWN = {"text", *IDS, *ASPECTS, *IMAGES}  # the names of our own format: nothing is guessed
LIMIT = 5.0  # seconds of computing for a condition over all rows
# What a condition may call on a column: nothing that writes or reads files.
CALLS = (
    "str",
    "contains",
    "startswith",
    "endswith",
    "lower",
    "upper",
    "strip",
    "len",
    "isin",
    "isna",
    "notna",
    "between",
)


@dataclass(frozen=True)
class Columns:
    """Names of the columns that mean something; several are alternatives, but of aspects all count.

    boxed: whether there are some of `boxes_of_row`.
    guessed: which were taken without being asked for, in words; "" if all of them have the names of our own format.
    """

    text: tuple[str, ...]
    id: tuple[str, ...]
    aspects: tuple[str, ...]
    image: tuple[str, ...]
    guessed: str
    boxed: bool = False


def find(
    rows: Sequence[Row],
    key: str,
    text: str | None = None,
    id: str | None = None,
    aspects: Sequence[str] | None = None,
) -> Columns:
    """The columns of a file.

    key: of the set, whose `column`, `id_column` and `aspects_column` name columns.
    text, id, aspects: the names asked for, in any case of letters; None to guess them; "" or an empty list for none.

    Raises RequestError for a name that there is not, or where no column looks like one of texts.
    """
    there = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    if not there:
        if asked := [name for name, one in {"column": text, "id_column": id, "aspects_column": aspects}.items() if one]:
            raise RequestError(f"{key}.{asked[0]}", "names a column, and the file has none; allowed here: null")
        return Columns((), (), (), (), "")
    by_name: dict[str, list[str]] = {}
    for name in there:
        by_name.setdefault(name.strip().casefold(), []).append(name)

    def guess(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for one in names for name in by_name.get(one, ()))

    def named(name: str, what: str) -> str:
        found = [name] if name in there else by_name.get(name.strip().casefold(), [])
        if len(found) != 1:
            raise RequestError(f"{key}.{what}", f"there is no column {name!r}; allowed: {_listed(there)}")
        return found[0]

    texts = (named(text, "column"),) if text else guess(TEXTS)
    if not texts:
        raise RequestError(
            f"{key}.path",
            f"has no `text` (or `prompt`, `caption`, …) column, but {_listed(there)}; name one by {key}.column",
        )
    ids = (named(id, "id_column"),) if id else guess(IDS) if id is None else ()
    if aspects is None:
        tags = guess(ASPECTS) or guess(TAGS)
    else:
        tags = tuple(named(name, "aspects_column") for name in aspects)
    tags, images = tuple(name for name in tags if name not in texts + ids), guess(IMAGES)
    taken = {"texts": (texts, text), "ids": (ids, id), "aspects": (tags, aspects), "init images": (images, None)}
    guessed = [
        f"{what} from {_listed(names)}"
        for what, (names, asked) in taken.items()
        if asked is None and not OWN.issuperset(names)
    ]
    return Columns(texts, ids, tags, images, "; ".join(guessed), has_boxes(map(str, there)))


def entries(rows: Iterable[Row], columns: Columns, key: str, folder: Path) -> Iterator[Any]:
    """Each row as a text, or a mapping of text, aspects, id, image and boxes; other columns are left alone.

    folder: where images lie. Raises RequestError where columns that could mean the same differ.
    """
    taken = {"text": (columns.text, "column"), "id": (columns.id, "id_column"), "image": (columns.image, "image")}
    taken = {field: names for field, names in taken.items() if names[0]}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            yield row
            continue
        entry = {
            field: row.get(names[0]) if len(names) == 1 else _one(row, names, number, key, option)
            for field, (names, option) in taken.items()
        }
        if columns.aspects:
            entry["aspects"] = _aspects(row, columns.aspects)
        if (image := entry.get("image")) and isinstance(image, str):
            entry["image"] = str(folder / Path(image).expanduser())
        boxes = row.get("boxes")
        if not boxes and columns.boxed:
            boxes = boxes_of_row(row, str(entry.get("text")), f"{key}.path")
        if boxes:
            entry["boxes"] = boxes
        yield entry


def _one(row: Mapping[str, Any], names: tuple[str, ...], number: int, key: str, option: str) -> Any:
    """The value of the columns of these names that is not empty."""
    found = {name: value for name in names if (value := row.get(name)) not in (None, "")}
    first = next(iter(found.values()), None)
    if any(value != first for value in found.values()):
        advice = f"name one by {key}.{option}" if option != "image" else "remove one"
        raise RequestError(f"{key}.path", f"columns {_listed(found)} differ in row {number}; {advice}")
    return first


def _aspects(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    if len(names) == 1 and not isinstance(row.get(names[0]), int | float):
        return row.get(names[0])
    tags: list[Any] = []
    for name in names:
        value = row.get(name)
        if isinstance(value, list):
            tags += value
        elif value is not None:
            tags += split_tags(str(value)) if isinstance(value, str | int | float) else [value]
    return [tag for number, tag in enumerate(tags) if tag not in tags[:number]]


@lru_cache(maxsize=1024)  # rows share them
def split_tags(text: str) -> tuple[str, ...]:
    """Tags of one text with commas, semicolons or bars between them."""
    return tuple(tag.strip() for tag in re.split(r"[,;|]", text) if tag.strip())


def fulfil(rows: Sequence[Row], where: str, key: str) -> list[Row]:
    """The rows for which a condition in pandas' words holds, such as `Category == 'Abstract'`.

    A column of numbers in text, as CSV has them, counts as numbers. Raises RequestError for what is no condition on
    these columns.
    """
    import pandas as pd

    _check_calls(where, key)
    if not rows:
        return []
    frame = pd.DataFrame([row if isinstance(row, dict) else {"text": row} for row in rows])
    for name in frame:
        numbers = pd.to_numeric(frame[name].replace("", None), errors="coerce")
        if numbers.notna().sum() == frame[name].replace("", None).notna().sum():
            frame[name] = numbers
    try:
        with _at_most(LIMIT), warnings.catch_warnings(action="ignore"):  # of groups in a pattern
            fits = frame.eval(where, engine="python", local_dict={}, global_dict={})
    except TimeoutError:
        why = f"takes more than {LIMIT:g} s; write its expressions without nested repetitions"
        raise RequestError(key, f"{where[:200]!r} {why}") from None
    except Exception as error:  # pandas raises whatever the condition makes its parts raise
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise RequestError(key, f"{where[:200]!r} cannot be read: {why}; columns: {_listed(frame)}") from None
    if not isinstance(fits, pd.Series) or not pd.api.types.is_bool_dtype(fits.dropna().infer_objects()):
        raise RequestError(
            key, f"{where[:200]!r} is no condition, such as \"Category == 'Abstract'\"; columns: {_listed(frame)}"
        )
    return [row for row, fit in zip(rows, fits.fillna(False), strict=True) if fit]


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after that much computing; Python's `re` looks for signals. No limit in other threads."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_: Any) -> NoReturn:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _check_calls(where: str, key: str) -> None:
    """Refuse what a condition must not reach: pandas lets it call anything of a column, such as what writes files."""
    plain = re.sub(r"`[^`]*`", "x", where)  # names of columns that are no identifiers
    try:
        tokens = [token.string for token in tokenize.generate_tokens(io.StringIO(plain).readline)]
    except (tokenize.TokenError, SyntaxError):
        tokens = []  # pandas says what is wrong with it
        if "." in plain:
            raise RequestError(key, f"{where[:200]!r} is no condition, such as \"Category == 'Abstract'\"") from None
    for before, token in itertools.pairwise(tokens):
        if (before == "." and token not in CALLS) or token.startswith("__") or token in ("@", "**"):
            raise RequestError(key, f"{where[:200]!r} uses {token[:40]!r}; allowed of a column: {', '.join(CALLS)}")


def _listed(names: Iterable[Any]) -> str:
    shown = [f"`{str(name)[:40]}`" for name in names]
    return ", ".join(shown[:20]) + (" …" if len(shown) > 20 else "")
