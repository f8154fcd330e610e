"""report.html: one page that opens from disk, without network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lesion.analysis.importance import status_counts
from lesion.report.data import as_json, inside
from lesion.report.examples import Pair
from lesion.report.tables import Table
from lesion.report.text import clean, number
from lesion.store.files import atomically

SCRIPTS = ("data", "table", "filters", "compare", "profile", "heatmap", "gallery", "main")  # page/*.js, in this order
DATA_FILE = "report_data.js"
INLINE_ROWS = 2000  # more images than this go to DATA_FILE, so that the page itself opens at once
PROMPTS = 200  # rows of the table of prompts
ROWS = 200  # of a table shown on the page; longer ones are in the files


@dataclass
class Picture:
    """An image of the page: path relative to the page, alternative text, size in px."""

    path: str
    text: str
    width: int
    height: int


@dataclass
class Word:
    """The attention maps of one word of a prompt."""

    word: str
    pictures: list[Picture]


@dataclass
class Part:
    """What is said in full to one question, folded on the page."""

    question: str
    sentences: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Picture] = field(default_factory=list)


@dataclass
class Section:
    """What the page says about one setting, or of all together.

    answer: the few sentences the page opens with, layers between backquotes. pairs: image pairs beside them. setting:
    its number in the page's data; -1 for what is said of all together.
    """

    title: str
    anchor: str
    answer: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    comparisons: list[Picture] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # links to tables and figures
    notes: list[str] = field(default_factory=list)
    setting: int = -1


def with_layers(text: str) -> Markup:
    """Escaped text in which what stands between backquotes is code."""
    pieces = text.split("`")
    whole = Markup("").join(
        Markup("<code>{}</code>").format(piece) if place % 2 else escape(piece) for place, piece in enumerate(pieces)
    )
    return whole if len(pieces) % 2 else escape(text)


def _asset(name: str) -> str:
    return files("lesion.report").joinpath("page", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class _Images:
    """The URL of the image of each row, by its place: of a million rows the page's examples need a few."""

    def __init__(self, frame: pd.DataFrame):
        self._frame = frame

    def __getitem__(self, place: int) -> str:
        name = self._frame["image"].iloc[place]
        return "" if pd.isna(name) else quote(inside(name), errors="replace")


def page(
    frame: pd.DataFrame,
    sections: list[Section],
    data: Mapping[str, Any] | None,
    metric: str = "clip_similarity",
    notes: Sequence[str] = (),
    maps: Mapping[str, Sequence[Word]] | None = None,
) -> str:
    """The page's HTML; every text is escaped by the template. `data` is inlined; None: it stands in DATA_FILE.

    The page's policy allows its own script and style by their hashes, images and DATA_FILE beside it, nothing else.
    """
    environment = Environment(
        loader=PackageLoader("lesion.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, clean=clean, with_layers=with_layers)
    style = _asset("style.css")
    script = "\n".join(['(() => {"use strict";', *(_asset(f"{name}.js") for name in SCRIPTS), "})();"])
    beside = "" if data is not None else " 'self' file:"
    policy = (
        f"default-src 'none'; img-src 'self' file:; style-src {_digest(style)}; script-src {_digest(script)}{beside}; "
        "base-uri 'none'; form-action 'none'"
    )
    firsts = frame.drop_duplicates("prompt_id")[["prompt_id", "prompt"]] if len(frame) else frame
    return environment.get_template("report.html.j2").render(
        sections=sections,
        statuses=status_counts(frame).to_dict("records"),
        prompts=firsts.head(PROMPTS).to_dict("records"),
        n_prompts=len(firsts),
        metric=metric,
        most=ROWS,
        answered=[section for section in sections if section.answer],
        images=_Images(frame),
        notes=notes,
        maps=maps or {},
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        data_file=DATA_FILE if data is None else "",
        data=Markup(as_json(data or {})),
    )


def write(
    folder: Path,
    frame: pd.DataFrame,
    sections: list[Section],
    data: Mapping[str, Any],
    metric: str = "clip_similarity",
    notes: Sequence[str] = (),
    maps: Mapping[str, Sequence[Word]] | None = None,
) -> list[Path]:
    """Write report.html, and DATA_FILE where there are many images. Returns the paths, the page last."""
    path, beside = folder / "report.html", folder / DATA_FILE
    many = len(frame) > INLINE_ROWS
    if many:
        with atomically(beside) as temporary:
            temporary.write_text(f"globalThis.LESION_REPORT = {as_json(data)};\n", encoding="ascii", newline="\n")
    else:
        beside.unlink(missing_ok=True)  # of an earlier, larger report
    text = page(frame, sections, None if many else data, metric, notes, maps)
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    return [beside, path] if many else [path]
