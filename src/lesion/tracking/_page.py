"""The report's page with its pictures inside it, for where the page is shown without the folder beside it."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image

MOST = 24 << 20  # bytes of pictures in a page; what does not fit stays a link
PLAIN = 160  # pixels: pictures up to this width and height are taken as they are, and shown pixel by pixel
SMALL, LARGE = 384, 1200  # pixels that other images, and figures, are scaled down to
_SOURCE = re.compile(r'(<img\b[^>]*? src=")([^"]+)(")')
_DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.S)
_POLICY = re.compile(r"img-src (?:'|&#39;)self(?:'|&#39;) file:")
_BESIDE = re.compile(r'<script src="([^"]+)"></script>')


def with_pictures(page: Path) -> str:
    """The page's HTML with the data and the pictures that it shows, in its order, up to MOST bytes.

    Raises OSError or ValueError for a page that is not one of the report.
    """
    text = page.read_text(encoding="utf-8")
    folder = page.parent.resolve()
    if beside := _BESIDE.search(text):
        data = (folder / unquote(beside[1])).read_text(encoding="ascii").partition("=")[2].strip().rstrip(";")
        text = text.replace(beside[0], f'<script type="application/json" id="data">{data}</script>')
    found = _DATA.search(text)
    known: dict[str, Any] = json.loads(found[1]) if found else {}
    address = _addresses(folder)
    text = _SOURCE.sub(lambda one: f"{one[1]}{address(html.unescape(one[2])) or one[2]}{one[3]}", text)
    rows = known.get("rows", {}).get("image", [])
    if pictures := {name: inlined for name in dict.fromkeys(rows) if name and (inlined := address(name))}:
        packed = json.dumps({**known, "pictures": pictures}, separators=(",", ":"))
        packed = packed.replace("<", "\\u003c").replace(">", "\\u003e")
        text = _DATA.sub(lambda one: one[0].replace(one[1], packed), text)
    return _POLICY.sub(lambda one: f"{one[0]} data:", text, count=1)


def _addresses(folder: Path) -> Callable[[str], str]:
    """Gives the data: address of a picture by its path in the folder; "" for what is none or has no room left."""
    left = MOST
    made: dict[str, str] = {}

    def address(name: str) -> str:
        nonlocal left
        if name not in made:
            path = (folder / unquote(name)).resolve()
            kind, data = _picture(path) if path.is_relative_to(folder) and path.is_file() else ("", b"")
            fits = bool(data) and len(data) <= left
            left -= len(data) if fits else 0
            made[name] = f"data:{kind};base64,{base64.b64encode(data).decode()}" if fits else ""
        return made[name]

    return address


def _picture(path: Path) -> tuple[str, bytes]:
    try:
        with Image.open(path, formats=["PNG", "WEBP", "JPEG"]) as picture:
            kind = str(Image.MIME[picture.format or ""])
            if max(picture.size) <= PLAIN:
                return kind, path.read_bytes()
            side = SMALL if path.parent.parent.name in ("images", "thumbs") else LARGE
            picture.thumbnail((side, side))
            packed = io.BytesIO()
            picture.save(packed, "WEBP", quality=85)
            return "image/webp", packed.getvalue()
    except (OSError, ValueError, KeyError, Image.DecompressionBombError):
        return "", b""
