"""Drawing pieces of the comparison pictures: fonts, wrapped text, tiles, placeholders."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lesion.report import fonts
from lesion.report.boxes import Mark, draw_marks
from lesion.report.text import clean

INK, FAINT, PAPER, HOLE = (20, 20, 20), (105, 105, 105), (255, 255, 255), (232, 232, 232)
GAP = 8  # px between tiles and at the border
SMALL, LARGE, SHRUNK = 128, 512, 256  # px: enlarge below SMALL; shrink from LARGE on to SHRUNK
MAX_WIDTH = 2400  # px


@lru_cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as bundled with matplotlib: Pillow's own font has Latin letters only."""
    return ImageFont.truetype(str(fonts.regular(bold)), size)


def runs(text: str, face: ImageFont.FreeTypeFont) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """Pieces of a line, each with the font that has its letters: `face`, or another of the same size."""
    others = fonts.covering(fonts.lacking(text))
    if not others:
        return [(text, face)]
    parts = groupby(text, key=others.get)
    return [("".join(part), _other(path, face.size) if path else face) for path, part in parts]


@lru_cache
def _other(path: Path, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size)


def length(text: str, face: ImageFont.FreeTypeFont) -> float:
    """Width of a line in px."""
    return sum(one.getlength(piece) for piece, one in runs(text, face))


def wrap(text: str, face: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """At most `most` lines of at most `width` px, broken at spaces and after dots, inside a word only if it must be."""
    return list(_wrapped(text, face, width, most))


@lru_cache(maxsize=4096)  # the same layer names and prompts stand in picture after picture
def _wrapped(text: str, face: ImageFont.FreeTypeFont, width: int, most: int) -> tuple[str, ...]:
    fonts.covering(fonts.lacking(text))  # says at once what cannot be drawn
    pieces = re.findall(r"[^ .]*[ .]|[^ .]+", clean(text))
    lines, line = [], ""
    for piece in pieces:
        if line and length((line + piece).rstrip(), face) > width:
            lines.append(line.rstrip())
            line = ""
        line += piece
        while length(line.rstrip(), face) > width and len(line) > 1:
            fits = len(line) - 1
            while fits > 1 and length(line[:fits], face) > width:
                fits -= 1
            lines.append(line[:fits])
            line = line[fits:]
        if len(lines) > most:
            break
    if line.strip():
        lines.append(line.rstrip())
    if len(lines) > most:
        last = lines[most - 1]
        while last and length(last + "…", face) > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last + "…"]
    return tuple(lines)


def line_height(face: ImageFont.FreeTypeFont) -> int:
    """Height of one line of text in px."""
    ascent, descent = face.getmetrics()
    return ascent + descent


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    lines: list[str],
    face: ImageFont.FreeTypeFont,
    fill: tuple[int, int, int] = INK,
    centre: int | None = None,
) -> int:
    """Write lines downwards from `at`, centred in `centre` px if given; the y below the last line."""
    x, y = at
    for line in lines:
        right: float = x if centre is None else x + max(0, int(centre - length(line, face)) // 2)
        base = y + face.getmetrics()[0]  # fonts share the line they stand on
        for piece, one in runs(line, face):
            draw.text((right, base), piece, font=one, fill=fill, anchor="ls")
            right += one.getlength(piece)
        y += line_height(face)
    return y


@dataclass(frozen=True)
class Tile:
    """One image to show; `trouble` says why there is none. marks: boxes to draw over it."""

    caption: str
    score: str
    picture: Image.Image | None = None
    trouble: str = ""
    marks: tuple[Mark, ...] = ()


def load(path: Path) -> Image.Image | None:
    """The image as RGB; None if it is absent or unreadable."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def tile_size(pictures: list[Image.Image]) -> tuple[int, int]:
    """Shown width and height in px, after the first picture: small ones grow by a whole factor, large ones shrink."""
    if not pictures:
        return SMALL, SMALL
    width, height = pictures[0].size
    longest = max(width, height)
    if longest < SMALL:
        factor = -(-SMALL // longest)
        return width * factor, height * factor
    if longest >= LARGE:
        return max(1, width * SHRUNK // longest), max(1, height * SHRUNK // longest)
    return width, height


def _fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    grows = picture.width <= size[0]
    return picture.resize(size, Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS)


def paint(canvas: Image.Image, tile: Tile, at: tuple[int, int], size: tuple[int, int]) -> None:
    """Put the tile's picture, or a placeholder that names its trouble, on the canvas."""
    draw = ImageDraw.Draw(canvas)
    x, y = at
    width, height = size
    if tile.picture is not None:
        canvas.paste(_fit(tile.picture, size), at)
        draw_marks(draw, tile.marks, at, size)
        return
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=HOLE, outline=FAINT)
    face = font(11)
    room = max(1, (height - 8) // line_height(face))
    lines = wrap(tile.trouble, face, width - 12, room)
    top = y + max(2, (height - len(lines) * line_height(face)) // 2)
    write(draw, (x + 6, top), lines, face, centre=width - 12)
