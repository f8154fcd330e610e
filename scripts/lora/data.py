"""A folder of captioned images: what is in it, checked before anything is trained, and its pixels.

Two conventions, as in diffusers' and datasets' own image folders: `metadata.csv` or `metadata.jsonl` with a column
`file_name` and one of `text`, `caption` or `prompt`; or a file NAME.txt beside NAME.png with the caption in it.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
COLUMNS = ("text", "caption", "prompt")


class BadFolder(ValueError):
    """The folder cannot be trained on; one line says which file and why."""


@dataclass(frozen=True)
class Example:
    """An image file and its caption."""

    path: Path
    caption: str


def read_folder(folder: Path) -> list[Example]:
    """Every captioned image, in the order of the metadata, or of the names. Raises BadFolder."""
    if not folder.is_dir():
        raise BadFolder(f"no folder {str(folder)!r}")
    tables = [folder / name for name in ("metadata.csv", "metadata.jsonl") if (folder / name).is_file()]
    if len(tables) == 2:
        raise BadFolder(f"{str(folder)!r} has both metadata.csv and metadata.jsonl; keep one")
    found = list(_from_table(tables[0])) if tables else list(_from_text_files(folder))
    if not found:
        raise BadFolder(
            f"{str(folder)!r} has no captioned image; give metadata.csv or metadata.jsonl with the columns file_name "
            "and text, or a NAME.txt beside each image"
        )
    for example in found:
        _check(example)
    return found


def _from_table(table: Path) -> Iterator[Example]:
    for number, row in _rows(table):
        where = f"{table.name}, row {number}"
        name = row.get("file_name")
        column = next((column for column in COLUMNS if column in row), None)
        if not isinstance(name, str) or not name.strip():
            raise BadFolder(f"{where}: no file_name")
        if column is None:
            raise BadFolder(f"{where}: no caption; allowed columns: {', '.join(COLUMNS)}")
        if not isinstance(row[column], str) or not str(row[column]).strip():
            raise BadFolder(f"{where}: the caption of {name!r} is empty")
        yield Example(table.parent / name, str(row[column]).strip())


def _rows(table: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Row numbers from 1 and rows as dictionaries."""
    try:
        text = table.read_text(encoding="utf-8-sig")
        if table.suffix == ".csv":
            yield from enumerate(csv.DictReader(text.splitlines()), 1)
            return
        for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise BadFolder(f"{table.name}, row {number}: is no JSON object")
            yield number, row
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise BadFolder(f"{table.name} cannot be read: {error}") from None


def _from_text_files(folder: Path) -> Iterator[Example]:
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    captions = {path: path.with_suffix(".txt") for path in images}
    if not any(text.is_file() for text in captions.values()):
        return
    for image, text in captions.items():
        if not text.is_file():
            raise BadFolder(f"{image.name} has no caption: there is no {text.name}")
        try:
            caption = " ".join(text.read_text(encoding="utf-8").split())
        except UnicodeDecodeError as error:
            raise BadFolder(f"{text.name} cannot be read: {error}") from None
        if not caption:
            raise BadFolder(f"{text.name} is empty")
        yield Example(image, caption)


def _check(example: Example) -> None:
    if not example.path.is_file():
        raise BadFolder(f"no image {example.path.name!r} in {str(example.path.parent)!r}, but a caption for it")
    try:
        with Image.open(example.path) as image:
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise BadFolder(f"{example.path.name} is no readable image: {error}") from None


def digest(examples: Sequence[Example]) -> str:
    """16 hex digits over the names, captions and bytes of a data set."""
    total = hashlib.sha256()
    for example in examples:
        content = hashlib.sha256(example.path.read_bytes()).hexdigest()
        total.update(json.dumps([example.path.name, example.caption, content]).encode())
    return total.hexdigest()[:16]


@dataclass(frozen=True)
class Pixels:
    """An image cut to a square, and what SDXL is told about it.

    values: (3, side, side) in [-1, 1]. original: (height, width) of the file. corner: (top, left) of the cut, in pixels
    after resizing.
    """

    values: torch.Tensor
    original: tuple[int, int]
    corner: tuple[int, int]


def read_pixels(path: Path, side: int) -> Pixels:
    """The shorter edge is resized to `side` (bilinear, as in diffusers' scripts), then the middle is cut out."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    width, height = image.size
    scale = side / min(width, height)
    size = max(side, round(width * scale)), max(side, round(height * scale))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    image = image.crop((left, top, left + side, top + side))
    values = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
    return Pixels(values, (height, width), (top, left))


ORDER, NOISE = 0, 1


def randomness(seed: int, stream: int, index: int) -> torch.Generator:
    """A generator of its own for each use of the seed (0 to 2^30) and each index (0 to 2^32)."""
    return torch.Generator("cpu").manual_seed(((2 * seed + stream) << 32) + index)


def rows_of(number: int, batch: int, index: int, seed: int) -> list[int]:
    """The examples of batch `index` (from 0): every epoch a fresh order, the same whenever it is asked for."""
    orders: dict[int, list[int]] = {}

    def at(place: int) -> int:
        epoch, offset = divmod(place, number)
        if epoch not in orders:
            orders[epoch] = torch.randperm(number, generator=randomness(seed, ORDER, epoch)).tolist()
        return orders[epoch][offset]

    return [at(place) for place in range(index * batch, (index + 1) * batch)]
