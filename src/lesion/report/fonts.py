"""Fonts for letters that DejaVu Sans, the font of grids and figures, lacks: Chinese, Japanese, Korean, emoji and more.

Each such letter is drawn in the first installed font that has it. Which letters no font has is said once, in one line.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import matplotlib
from fontTools.subset import Options
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

log = logging.getLogger(__name__)
FAMILY = "DejaVu Sans"  # bundled with matplotlib
PACKAGES = ("paperang_p2_fonts_cjk", "manimgx_fonts")  # fonts of the extra `lesion[fonts]`
_SHOWN = 40  # letters that the warning names
# taken where nothing else has the letter
_STYLES = ("bold", "italic", "oblique", "black", "thin", "light", "mono", "condensed")
_USELESS = ("color emoji", "lastresort")  # colour glyphs, which cannot be drawn in ink; boxes for every letter
_said: set[str] = set()


def regular(bold: bool = False) -> Path:
    """The file of DejaVu Sans."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"


@contextmanager
def embedded_without_layout() -> Iterator[None]:
    """Within it a PDF embeds fonts without their tables for shaping text and formulas.

    Readers of PDF use none of them, and to cut them to a figure's letters takes half of the time of writing it.
    """
    default = Options._drop_tables_default
    Options._drop_tables_default = [*default, "GSUB", "GPOS", "GDEF", "MATH"]
    try:
        yield
    finally:
        Options._drop_tables_default = default


def lacking(text: str) -> set[str]:
    """The letters that DejaVu Sans lacks."""
    if text.isascii():
        return set()
    known = _letters(regular()).keys() & _letters(regular(bold=True)).keys()
    return {letter for letter in text if ord(letter) not in known and letter.isprintable()}


def covering(letters: Iterable[str]) -> dict[str, Path]:
    """Which of these letters are in an installed font, and in which file; warns of the others, once a process each."""
    found = {letter: path for letter in letters if (path := _having(letter)) is not None}
    if absent := sorted({*letters} - found.keys() - _said):
        _said.update(absent)
        more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
        log.warning(
            "no installed font has %s%s: boxes in grids and figures (pip install 'lesion[fonts]' for Chinese, "
            "Japanese, Korean, emoji and other scripts)",
            "".join(absent[:_SHOWN]),
            more,
        )
    return found


def families(text: str) -> list[str]:
    """Names of fonts that matplotlib is to try after DejaVu Sans, so that all letters are drawn that can be."""
    paths = dict.fromkeys(path for _, path in sorted(covering(lacking(text)).items()))
    return [_registered(path) for path in paths]


@lru_cache
def _registered(path: Path) -> str:
    """The family of a font, known to matplotlib from now on."""
    name = FT2Font(path).family_name
    if not any(Path(one.fname) == path for one in font_manager.fontManager.ttflist):
        font_manager.fontManager.addfont(path)
    return name


@lru_cache(maxsize=65536)
def _having(letter: str) -> Path | None:
    """The first installed font that has a letter."""
    return next((path for path in _installed() if ord(letter) in _letters(path)), None)


@lru_cache
def _installed() -> list[Path]:
    """Every font file, those of the extra first, then regular styles."""
    own: list[Path] = []
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        for folder in (found.submodule_search_locations or ()) if found else ():
            own += sorted(path for path in Path(folder).rglob("*.tt[cf]") if path.is_file())
    return [*own, *sorted(map(Path, font_manager.findSystemFonts()), key=_rank)]


def _rank(path: Path) -> tuple[bool, bool, str]:
    name = path.name.lower()  # PDFs embed TrueType outlines as such, others not in every reader
    return any(style in name for style in _STYLES), path.suffix.lower() == ".otf", name


@lru_cache(maxsize=4096)
def _letters(path: Path) -> dict[int, int]:
    """Code points that a font draws; none of a file that cannot be used."""
    try:
        face = FT2Font(path)
        if any(word in face.family_name.lower() for word in _USELESS):
            return {}
        return {int(point): int(glyph) for point, glyph in face.get_charmap().items()}
    except (OSError, RuntimeError, ValueError):
        return {}
