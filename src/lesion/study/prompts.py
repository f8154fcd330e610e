"""Sets of prompts and seeds: from the config, or from a file (`prompt_files`, `prompt_columns`)."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lesion.errors import RequestError
from lesion.study import prompt_columns, prompt_files
from lesion.study.boxes import Box, parse_boxes
from lesion.study.checks import shown

FIELDS = ("text", "aspects", "id", "image", "boxes")
_FIELDS = set(FIELDS)
OPTIONS = ("name", "items", "path", "format", "column", "id_column", "aspects_column")
PICKS = ("where", "sample", "sample_seed", "limit")  # which of a set's prompts count
LONGEST_ID = 80, 255  # characters, and bytes in UTF-8: the id names a folder
LONGEST_TEXT = 10_000  # characters; encoders see some hundred tokens, and tokenizers of very long lines abort
_PLAIN_ID = re.compile("[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}")
_ASCII_WORDS = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Prompt:
    """What the model is asked.

    aspects: tags such as colour, shape, count. id: a readable, unique slug. image, digest: of img2img the path of the
    init image and its identity, see `inits.read_init`. boxes: where some of its words are to be, for `steering=layout`.
    """

    text: str
    aspects: tuple[str, ...] = ()
    id: str = ""
    image: str = ""
    digest: str = ""
    boxes: tuple[Box, ...] = ()


def slug(text: str) -> str:
    """A file-name-safe name for any text, the same wherever it is computed: words in any script, then 16 hex digits."""
    if text.isascii():
        words = "-".join(text.translate(_ASCII_WORDS).split())
    else:
        spelled = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
        words = re.sub("-+", "-", spelled.translate(_WORDS))
    return f"{words.strip('-')[:32].strip('-') or 'prompt'}-{hashlib.sha256(_utf8(text)).hexdigest()[:16]}"


def slug_of_0_1(text: str) -> str:
    """The name that version 0.1 gave a text, which its results and folders of init images still have."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:32].strip("-")
    return f"{words or 'prompt'}-{hashlib.sha256(_utf8(text)).hexdigest()[:6]}"


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _in_word(letter: str) -> bool:
    """Letters and digits of every script, with the marks that some scripts write as characters of their own."""
    return unicodedata.category(letter)[0] in "LMN"


class _Words(dict[int, int | str]):
    """For `str.translate`: letters of words stay, anything else becomes a hyphen. Each letter is looked at once."""

    def __missing__(self, code: int) -> int | str:
        self[code] = found = code if _in_word(chr(code)) else "-"
        return found


_WORDS = _Words()


def parse_seeds(seeds: list[Any], key: str = "seeds") -> tuple[int, ...]:
    """Different whole numbers that a generator takes, at least one; RequestError otherwise."""
    if not seeds:
        raise RequestError(key, "is an empty list; give at least one value")
    for seed in seeds:
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise RequestError(key, f"must be whole numbers from 0 to 2^63 - 1; got {seed!r}")
    if twice := repeated(seeds):
        raise RequestError(key, f"names {twice[0]!r} twice; give each value once")
    return tuple(seeds)


def repeated(values: Iterable[Any]) -> Any:
    """The first value that comes a second time, in a list of one; an empty list if each comes once."""
    seen: set[Any] = set()
    return next(([value] for value in values if value in seen or seen.add(value)), [])  # type: ignore[func-returns-value]


class PromptSet(NamedTuple):
    """A set of prompts. notes: sentences on what was guessed or left out, for whoever runs the study."""

    name: str
    prompts: tuple[Prompt, ...]
    notes: tuple[str, ...] = ()


def parse_prompts(given: Any, key: str = "prompts") -> PromptSet:
    """A set of prompts: a mapping with `items` (texts, or mappings of `FIELDS`) or `path`, and `PICKS`.

    Prompts are told apart by their ids: a file's text that comes again with no id or the same one counts once.

    Raises RequestError for an empty set, an unreadable file, an unknown field or option, an id of two texts, and a text
    that `items` give twice.
    """
    if not isinstance(given, Mapping):
        raise RequestError(key, "needs a set of prompts (see conf/prompts)")
    if unknown := [name for name in given if name not in OPTIONS + PICKS]:
        raise RequestError(f"{key}.{unknown[0]}", f"there is no such key; allowed: {', '.join(OPTIONS + PICKS)}")
    picks = _Picks(
        _text_or_none(given, "where", key),
        _whole(given, "sample", key, 1),
        _whole(given, "sample_seed", key, 0) or 0,
        _whole(given, "limit", key, 1),
    )
    if path := _text_or_none(given, "path", key):
        content = prompt_files.content(path, f"{key}.path", _text_or_none(given, "format", key))
        names = _text_or_none(given, "column", key), _text_or_none(given, "id_column", key)
        aspects = _names(given.get("aspects_column"), f"{key}.aspects_column")
        return _of_file(content, key, path, names, aspects, picks)
    if asked := [name for name in ("format", "column", "id_column", "aspects_column") if given.get(name)]:
        raise RequestError(f"{key}.{asked[0]}", f"is for files ({key}.path); allowed here: null")
    items = given.get("items") or []
    if not isinstance(items, list | tuple):
        raise RequestError(f"{key}.items", f"is a list of prompts; got {shown(items)}")
    if picks.where:
        items = prompt_columns.fulfil(items, picks.where, f"{key}.where")
    name = str(given.get("name") or "prompts")
    return PromptSet(name, tuple(_picked(iter(items), picks, name, key, key, once=True)[0]))


@dataclass(frozen=True)
class _Picks:
    where: str | None
    sample: int | None
    sample_seed: int
    limit: int | None


@lru_cache(maxsize=2)
def _of_file(
    content: prompt_files.Content,
    key: str,
    path: str,
    names: tuple[str | None, str | None],
    aspects: tuple[str, ...] | None,
    picks: _Picks,
) -> PromptSet:
    """A set from a file, remembered by what it holds: it is asked for when a request is checked and when it is run."""
    rows = prompt_files.parsed(content, f"{key}.path")
    columns = prompt_columns.find(rows, key, *names, aspects)
    notes = [columns.guessed] if columns.guessed else []
    if picks.where:
        rows = prompt_columns.fulfil(rows, picks.where, f"{key}.where")
    name = prompt_files.label(path)
    entries = prompt_columns.entries(rows, columns, key, Path(path).expanduser().parent)
    prompts, repeats = _picked(entries, picks, name, key, f"{key}.path")
    if repeats:
        notes.append(f"{repeats} of its rows repeat an earlier prompt and are left out")
    return PromptSet(name, tuple(prompts), tuple(f"prompts of {name}: {note}" for note in notes))


def _picked(
    entries: Iterator[Any], picks: _Picks, name: str, key: str, where_from: str, once: bool = False
) -> tuple[list[Prompt], int]:
    """The prompts that count, and how many entries repeat one."""
    prompts, repeats = _different(entries, where_from, None if picks.sample else picks.limit, once)
    if not prompts:
        why = f"of the set {name!r} no prompt is left by {key}.where" if picks.where else f"the set {name!r} is empty"
        raise RequestError(where_from, f"{why}; needs at least one prompt")
    if picks.sample and picks.sample > len(prompts):
        there = len(prompts)
        raise RequestError(f"{key}.sample", f"must be a whole number from 1 to {there}, the prompts there are")
    if picks.sample:
        prompts = _sampled(prompts, picks.sample, picks.sample_seed)[: picks.limit]
    return prompts, repeats


def _names(value: Any, key: str) -> tuple[str, ...] | None:
    if isinstance(value, str):
        value = [value] if value else []
    if value is not None and not (isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)):
        raise RequestError(key, f"must be null, a name, or a list of names; got {shown(value)}")
    return None if value is None else tuple(value)


def _text_or_none(given: Mapping[str, Any], name: str, key: str) -> str | None:
    value = given.get(name)
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{key}.{name}", f"must be a text or null; got {shown(value)}")
    return value


def _whole(given: Mapping[str, Any], name: str, key: str, low: int) -> int | None:
    value = given.get(name)
    if value is not None and (type(value) is not int or not low <= value < 2**63):
        raise RequestError(
            f"{key}.{name}", f"must be null or a whole number from {low} to 2^63 - 1; got {shown(value)}"
        )
    return value


def _different(entries: Iterable[Any], key: str, limit: int | None, once: bool) -> tuple[list[Prompt], int]:
    """The first `limit` different prompts, and how many entries before that repeat one. once: a repeat is refused."""
    found: dict[str, Prompt] = {}
    repeats = 0
    for number, entry in enumerate(entries, 1):
        if len(found) == limit:
            break
        try:
            prompt = _prompt(entry, key)
        except RequestError as error:
            raise RequestError(key, f"prompt {number}: {str(error).removeprefix(f'{key}: ')}") from None
        same = found.setdefault(prompt.id, prompt)
        if same is prompt:
            continue
        if once or (same.text, same.image, same.boxes) != (prompt.text, prompt.image, prompt.boxes):
            field = "text" if same.text == prompt.text else "id"
            raise RequestError(key, f"{field} {getattr(prompt, field)[:80]!r} is given twice; give each prompt once")
        repeats += 1
    return list(found.values()), repeats


def _sampled(prompts: Sequence[Prompt], number: int, seed: int) -> list[Prompt]:
    """So many prompts drawn at random, in their order. A larger sample of one seed holds each smaller one."""
    dice = [hashlib.sha256(f"{seed}\n{prompt.id}".encode()).digest() for prompt in prompts]
    drawn = set(sorted(range(len(prompts)), key=dice.__getitem__)[:number])
    return [prompt for place, prompt in enumerate(prompts) if place in drawn]


def _prompt(entry: Any, key: str) -> Prompt:
    if isinstance(entry, str):
        entry = {"text": entry}
    if not isinstance(entry, dict | Mapping):
        raise RequestError(key, f"a prompt is a text or a mapping of {', '.join(FIELDS)}; got {shown(entry)}")
    if not entry.keys() <= _FIELDS:
        unknown = [name for name in entry if name not in FIELDS]
        raise RequestError(key, f"unknown field {unknown[0]!r}; allowed: {', '.join(FIELDS)}")
    text = entry.get("text")
    if not isinstance(text, str) or not text.strip():
        raise RequestError(key, f"a prompt needs a non-empty text; got {shown(text)}")
    _check_text(text, "prompt", key)
    aspects = entry.get("aspects") or ()
    if isinstance(aspects, str):
        aspects = prompt_columns.split_tags(aspects)
    if not isinstance(aspects, list | tuple) or not all(isinstance(tag, str) for tag in aspects):
        raise RequestError(key, f"aspects are a list of tags, or one text with ; between them; got {shown(aspects)}")
    for tag in aspects:
        _check_text(tag, "aspect", key)
    image = entry.get("image") or ""
    if image and not isinstance(image, str):
        raise RequestError(key, f"image is the path of an init image; got {shown(image)}")
    if image:
        _check_text(image, "image", key)
    boxes = parse_boxes(entry.get("boxes"), text, key)
    return Prompt(text, tuple(aspects), _id(entry.get("id"), text, key), image, boxes=boxes)


def _id(given: Any, text: str, key: str) -> str:
    if given is None or given == "":
        return slug(text)
    if not isinstance(given, str | int | float):
        raise RequestError(key, f"a prompt id is a text or a number; got {shown(given)}")
    name = str(given)
    if _PLAIN_ID.fullmatch(name):
        return name
    name = unicodedata.normalize("NFC", name)
    if not all(_in_word(letter) or letter in "._-" for letter in name) or name.startswith("."):
        raise RequestError(key, f"prompt id {name[:80]!r} is not allowed; use letters, digits, '.', '_', '-'")
    characters, size = LONGEST_ID
    if len(name) > characters or len(name.encode()) > size:
        raise RequestError(key, f"prompt id {name[:80]!r} is too long; use up to {characters} letters, {size} bytes")
    return name


def _check_text(text: str, what: str, key: str) -> None:
    """Refuse what no file can hold as text: results could not be written once all images are made."""
    if len(text) > LONGEST_TEXT:
        raise RequestError(key, f"{what} {text[:40]!r}… has {len(text)} characters; allowed: up to {LONGEST_TEXT}")
    if (text.isascii() and "\0" not in text) or not _NO_TEXT.search(text):
        return
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RequestError(key, f"{what} {text[:40]!r} has a lone surrogate, which is no text")
    raise RequestError(key, f"{what} {text[:40]!r} has a NUL character; is the file UTF-16? UTF-8 is read")
