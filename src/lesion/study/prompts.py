"""Sets of prompts and seeds: from the config or from a .txt, .csv or .jsonl file."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from lesion.errors import RequestError

ENDINGS = (".txt", ".csv", ".jsonl")
FIELDS = ("text", "aspects", "id", "image")


@dataclass(frozen=True)
class Prompt:
    """What the model is asked.

    aspects: tags such as colour, shape, count. id: a readable, unique slug. image, digest: of img2img the path of the
    init image and its SHA-256.
    """

    text: str
    aspects: tuple[str, ...] = ()
    id: str = ""
    image: str = ""
    digest: str = ""


def slug(text: str) -> str:
    """A short file-name-safe name for any text, the same wherever it is computed: words, then 6 hex digits."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:32].strip("-")
    return f"{words or 'prompt'}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


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


def parse_prompts(given: Any, key: str = "prompts") -> tuple[str, tuple[Prompt, ...]]:
    """Name and prompts of a set: a mapping with `items` (texts, or mappings of text, aspects, id) or `path`.

    Raises RequestError for an empty set, an unreadable file, an unknown field or a prompt given twice.
    """
    if not isinstance(given, Mapping):
        raise RequestError(key, "needs a set of prompts (see conf/prompts)")
    path = given.get("path")
    if path:
        name, entries = Path(path).stem, list(_read(Path(path), f"{key}.path"))
        key = f"{key}.path"
    else:
        name, entries = str(given.get("name") or "prompts"), list(given.get("items") or [])
    prompts = tuple(_prompt(entry, key) for entry in entries)
    if not prompts:
        raise RequestError(key, f"the set {name!r} is empty; needs at least one prompt")
    for field in ("text", "id"):
        if twice := repeated(getattr(prompt, field) for prompt in prompts):
            raise RequestError(key, f"{field} {twice[0][:80]!r} is given twice; give each prompt once")
    return name, prompts


def _prompt(entry: Any, key: str) -> Prompt:
    if isinstance(entry, str):
        entry = {"text": entry}
    if not isinstance(entry, Mapping):
        raise RequestError(key, f"a prompt is a text or a mapping of {', '.join(FIELDS)}; got {entry!r}")
    if unknown := [name for name in entry if name not in FIELDS]:
        raise RequestError(key, f"unknown field {unknown[0]!r}; allowed: {', '.join(FIELDS)}")
    text = entry.get("text")
    if not isinstance(text, str) or not text.strip():
        raise RequestError(key, f"a prompt needs a non-empty text; got {text!r}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RequestError(key, f"prompt {text[:40]!r} has a lone surrogate, which is no text")
    aspects = entry.get("aspects") or ()
    if isinstance(aspects, str):
        aspects = [tag.strip() for tag in re.split(r"[,;|]", aspects) if tag.strip()]
    if not isinstance(aspects, list | tuple) or not all(isinstance(tag, str) for tag in aspects):
        raise RequestError(key, f"aspects are a list of tags, or one text with ; between them; got {aspects!r}")
    name = str(entry.get("id") or slug(text))
    if not re.fullmatch(r"[\w.-]{1,80}", name) or name.startswith("."):
        raise RequestError(key, f"prompt id {name[:80]!r} is not allowed; use up to 80 letters, digits, '.', '_', '-'")
    image = entry.get("image") or ""
    if not isinstance(image, str):
        raise RequestError(key, f"image is the path of an init image; got {image!r}")
    return Prompt(text, tuple(aspects), name, image)


def with_inits(prompts: Sequence[Prompt], init: str | None, key: str) -> tuple[Prompt, ...]:
    """The prompts with the path and digest of their init images.

    init: one image for all, or a folder that holds one named by the id of each prompt; a prompt's own `image` comes
    first. Raises RequestError where there is none, or one that cannot be read.
    """
    found = []
    for prompt in prompts:
        path = _init_of(prompt, init, key)
        try:
            content = path.read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise RequestError(key, f"{str(path)!r} is no image that can be read: {error}") from None
        found.append(replace(prompt, image=str(path.absolute()), digest=hashlib.sha256(content).hexdigest()))
    return tuple(found)


def _init_of(prompt: Prompt, init: str | None, key: str) -> Path:
    if prompt.image:
        return Path(prompt.image).expanduser()
    if not init:
        raise RequestError(
            key, f"prompt {prompt.id!r} has no init image: give generation.init (a file or folder) or a column `image`"
        )
    path = Path(init).expanduser()
    if not path.is_dir():
        return path
    fitting = sorted(file for file in path.iterdir() if file.stem == prompt.id)
    if len(fitting) != 1:
        number = "no image" if not fitting else f"{len(fitting)} images"
        raise RequestError(key, f"folder {init!r} has {number} named {prompt.id!r}.*; needs one for each prompt id")
    return fitting[0]


def _read(path: Path, key: str) -> Iterable[Any]:
    """Entries of a file: .txt a prompt a line; .csv with a `text` (or `prompt`) column; .jsonl an object a line."""
    if path.suffix not in ENDINGS:
        raise RequestError(key, f"{path.name!r} has an unknown ending; allowed: {', '.join(ENDINGS)}")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(key, f"cannot read {str(path)!r}: {error}") from None
    if path.suffix == ".txt":
        return [line.strip() for line in content.splitlines() if line.strip()]
    if path.suffix == ".csv":
        rows: Iterable[Any] = csv.DictReader(content.splitlines(keepends=True), strict=True)
    else:
        rows = _json_lines(content, path, key)
    try:
        return [_fields(row, path, key) for row in rows]
    except csv.Error as error:
        raise RequestError(key, f"{path.name!r} is no valid CSV: {error}") from None


def _json_lines(content: str, path: Path, key: str) -> Iterable[Any]:
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise RequestError(key, f"{path.name!r} line {number} is no valid JSON: {error}") from None


def _fields(row: Any, path: Path, key: str) -> Any:
    """A row's own fields under our names; other columns of a table are left alone."""
    if not isinstance(row, Mapping):
        return row
    text = row.get("text", row.get("prompt"))
    if text is None:
        raise RequestError(key, f"{path.name!r} has no `text` (or `prompt`) column")
    return {
        "text": text,
        "aspects": row.get("aspects") or row.get("aspect"),
        "id": row.get("id") or row.get("prompt_id"),
        "image": row.get("image"),
    }
