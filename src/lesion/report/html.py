"""report.html: one page that opens from disk, without network."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from lesion.analysis.importance import status_counts
from lesion.report.tables import EFFECTS
from lesion.report.text import clean, number


@dataclass
class Picture:
    """An image of the page: path relative to the page, alternative text, size in px."""

    path: str
    text: str
    width: int
    height: int


@dataclass
class Section:
    """What the page says about one setting."""

    title: str
    anchor: str
    sentences: list[str]
    table: pd.DataFrame
    figures: list[Picture] = field(default_factory=list)
    comparisons: list[Picture] = field(default_factory=list)


def page(frame: pd.DataFrame, sections: list[Section], metric: str = "clip_similarity") -> str:
    """The page's HTML; every text is escaped by the template."""
    environment = Environment(
        loader=PackageLoader("lesion.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, clean=clean)
    prompts = frame.drop_duplicates("prompt_id")[["prompt_id", "prompt"]].to_dict("records") if len(frame) else []
    return environment.get_template("report.html.j2").render(
        sections=sections,
        statuses=status_counts(frame).to_dict("records"),
        prompts=prompts,
        metric=metric,
        effects=EFFECTS,
    )


def write(path: Path, html: str) -> Path:
    """Write the page as UTF-8."""
    path.write_text(html, encoding="utf-8", errors="replace", newline="\n")
    return path
