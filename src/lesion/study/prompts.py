"""Sets of prompts and seeds: from the config or from a .txt, .csv or .jsonl file."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from lesion.errors import RequestError

ENDINGS = (".txt", ".csv", ".jsonl")
FIELDS = ("text", "aspects", "id", "image")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # of init images; others may start programs (.eps: Ghostscript)
MENDED = b"\0read 2"  # told apart from what version 0.1 made of the same file
LONGEST_ID = 80, 255  # characters, and bytes in UTF-8: the id names a folder


@dataclass(frozen=True)
class Prompt:
    """What the model is asked.

    aspects: tags such as colour, shape, count. id: a readable, unique slug. image, digest: of img2img the path of the
    init image and its identity, see `read_init`.
    """

    text: str
    aspects: tuple[str, ...] = ()
    id: str = ""
    image: str = ""
    digest: str = ""


def slug(text: str) -> str:
    """A file-name-safe name for any text, the same wherever it is computed: words in any script, then 16 hex digits."""
    spelled = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
    words = re.sub("-+", "-", "".join(letter if _in_word(letter) else "-" for letter in spelled))
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
    _check_text(text, "prompt", key)
    aspects = entry.get("aspects") or ()
    if isinstance(aspects, str):
        aspects = [tag.strip() for tag in re.split(r"[,;|]", aspects) if tag.strip()]
    if not isinstance(aspects, list | tuple) or not all(isinstance(tag, str) for tag in aspects):
        raise RequestError(key, f"aspects are a list of tags, or one text with ; between them; got {aspects!r}")
    for tag in aspects:
        _check_text(tag, "aspect", key)
    image = entry.get("image") or ""
    if not isinstance(image, str):
        raise RequestError(key, f"image is the path of an init image; got {image!r}")
    _check_text(image, "image", key)
    return Prompt(text, tuple(aspects), _id(entry.get("id"), text, key), image)


def _id(given: Any, text: str, key: str) -> str:
    if given is None or given == "":
        return slug(text)
    name = unicodedata.normalize("NFC", str(given))
    if not all(_in_word(letter) or letter in "._-" for letter in name) or name.startswith("."):
        raise RequestError(key, f"prompt id {name[:80]!r} is not allowed; use letters, digits, '.', '_', '-'")
    characters, size = LONGEST_ID
    if len(name) > characters or len(name.encode()) > size:
        raise RequestError(key, f"prompt id {name[:80]!r} is too long; use up to {characters} letters, {size} bytes")
    return name


def _check_text(text: str, what: str, key: str) -> None:
    """Refuse what no file can hold as text: results could not be written once all images are made."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RequestError(key, f"{what} {text[:40]!r} has a lone surrogate, which is no text")
    if "\0" in text:
        raise RequestError(key, f"{what} {text[:40]!r} has a NUL character; is the file UTF-16? UTF-8 is read")


def with_inits(prompts: Sequence[Prompt], init: str | None, key: str) -> tuple[Prompt, ...]:
    """The prompts with the path and identity of their init images.

    init: one image for all, or a folder that holds one named by the id of each prompt; a prompt's own `image` comes
    first. Raises RequestError where there is none, or one that cannot be read.
    """
    digests: dict[Path, str] = {}
    found = []
    for prompt in prompts:
        path = _init_of(prompt, init, key)
        if path not in digests:
            try:
                _, digests[path] = read_init(path)
            except ValueError as error:
                raise RequestError(key, f"{str(path)!r} is no image that can be read: {error}") from None
        found.append(replace(prompt, image=str(path.absolute()), digest=digests[path]))
    return tuple(found)


def read_init(path: Path) -> tuple[Image.Image, str]:
    """An init image in RGB as diffusers' `load_image` reads it, and its identity, 64 hex digits.

    16-bit grey is scaled to 8 bits (`load_image` clips it to white). The identity is the SHA-256 of the file. Version
    0.1 read pictures that EXIF turns and 16-bit grey wrongly: theirs is the SHA-256 of the file and `MENDED`, so that
    images made from the wrong pixels do not count. Raises ValueError for what is no regular file of `FORMATS`,
    is damaged, or has more pixels than Pillow's limit against decompression bombs.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    try:
        content = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                # The orientation; of TIFF Pillow applies it by itself.
                mended = opened.getexif().get(0x0112, 1) in range(2, 9) and opened.format != "TIFF"
                image = ImageOps.exif_transpose(opened)
                if image.mode.startswith("I;16") or (image.mode == "I" and opened.format == "PNG"):
                    image, mended = _eight_bits(image), True
                elif image.mode in ("I", "F"):
                    raise ValueError("it has 32 bits a pixel; allowed: 8 or 16")
                picture = image.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"allowed: {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise many kinds; each means that the picture cannot be had
        raise ValueError(str(error) or type(error).__name__) from None
    return picture, hashlib.sha256(content + (MENDED if mended else b"")).hexdigest()


def _eight_bits(image: Image.Image) -> Image.Image:
    import numpy as np

    return Image.fromarray(((np.asarray(image, np.int64) * 255 + 32767) // 65535).astype(np.uint8))


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
    named: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        named.setdefault(unicodedata.normalize("NFC", file.stem), []).append(file)
    fitting = named.get(prompt.id) or named.get(slug_of_0_1(prompt.text), [])
    if len(fitting) != 1:
        number = "no image" if not fitting else f"{len(fitting)} images"
        raise RequestError(key, f"folder {init!r} has {number} named {prompt.id!r}.*; needs one for each prompt id")
    return fitting[0]


def _read(path: Path, key: str) -> list[Any]:
    """Entries of a UTF-8 file: .txt a prompt a line; .csv with a column `text` or `prompt`; .jsonl an object a line.

    Only newlines end a line (a carriage return before one belongs to it). An `image` is looked for beside the file.
    """
    if path.suffix not in ENDINGS:
        raise RequestError(key, f"{path.name!r} has an unknown ending; allowed: {', '.join(ENDINGS)}")
    if path.exists() and not path.is_file():
        raise RequestError(key, f"{str(path)!r} is no regular file")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise RequestError(key, f"cannot read {str(path)!r} as UTF-8: {error}") from None
    if "\0" in content:
        line = content[: content.index("\0")].count("\n") + 1
        raise RequestError(key, f"{path.name!r} line {line} has a NUL character; is the file UTF-16? UTF-8 is read")
    if path.suffix == ".txt":
        return [line.strip() for line in _lines(content) if line.strip()]
    rows = _table(content, path, key) if path.suffix == ".csv" else _json_lines(content, path, key)
    return [_fields(row, path, key) for row in rows]


def _lines(content: str) -> list[str]:
    return re.split(r"\r\n|\r|\n", content)


def _table(content: str, path: Path, key: str) -> Iterator[dict[str, Any]]:
    """Rows of a CSV by the names in its first line; a row may be shorter than that, not longer."""
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    names: list[str] | None = None
    while True:
        before = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise RequestError(key, f"{path.name!r} line {before} is no valid CSV: {error}") from None
        if row is None:
            return
        if not row:
            continue
        if names is None:
            names = row
            if twice := repeated(name for name in names if name):
                raise RequestError(key, f"{path.name!r} line {before} names the column {twice[0]!r} twice")
            continue
        if any(row[len(names) :]):
            raise RequestError(
                key,
                f"{path.name!r} line {before} has {len(row)} fields for {len(names)} columns; put a text with commas "
                "in double quotes",
            )
        yield dict(zip(names, row, strict=False))


def _json_lines(content: str, path: Path, key: str) -> Iterator[Any]:
    for number, line in enumerate(_lines(content), 1):
        if line.strip():
            try:
                yield json.loads(line, object_pairs_hook=_each_once)
            except (ValueError, RecursionError) as error:
                raise RequestError(key, f"{path.name!r} line {number} is no valid JSON: {error}") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := repeated(name for name, _ in pairs):
        raise ValueError(f"the key {twice[0]!r} is given twice")
    return dict(pairs)


def _fields(row: Any, path: Path, key: str) -> Any:
    """A row's own fields under our names; other columns of a table are left alone."""
    if not isinstance(row, Mapping):
        return row
    text = row.get("text", row.get("prompt"))
    if text is None:
        raise RequestError(key, f"{path.name!r} has no `text` (or `prompt`) column")
    image = row.get("image")
    if image and isinstance(image, str):
        image = str(path.parent / Path(image).expanduser())
    return {
        "text": text,
        "aspects": row.get("aspects") or row.get("aspect"),
        "id": row.get("prompt_id") if row.get("id") in (None, "") else row["id"],
        "image": image,
    }
