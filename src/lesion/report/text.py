"""Untrusted text made safe for one line of a picture, Markdown or LaTeX."""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pandas as pd

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        **{character: "\\" + character for character in "&%$#_{}"},
    }
)
_UNKNOWN = frozenset("ĦħĸĿŀŉŦŧſ")  # among Latin letters, those that T1 lacks
_KNOWN = frozenset("–—‘’“”…†‡•€")  # beyond Latin letters, what pdflatex can set without further packages
_REORDER = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # they would also turn what follows


def clean(text: object, limit: int = 400) -> str:
    """One printable line of at most `limit` characters; longer text ends in an ellipsis.

    Control characters are dropped, among them those that override the direction of the text around them.
    """
    line = str(text)[: 4 * limit]  # a bound on the work for very long prompts
    if not line.isprintable():  # what is has no other white space than spaces, and nothing to drop
        line = "".join(" " if c.isspace() else "" if _dropped(c) else c for c in line)
    line = re.sub(" +", " ", line).strip()
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def _dropped(character: str) -> bool:
    return character in _REORDER or unicodedata.category(character) in ("Cc", "Cs")


def latex(text: object, limit: int = 400) -> str:
    """Escaped for LaTeX text mode, on one line (an empty line would end the paragraph inside a table cell).

    Characters that pdfLaTeX with T1 fonts cannot set (`beyond_t1`) stay: LuaLaTeX and XeLaTeX can.
    """
    return clean(text, limit).translate(_LATEX)


def beyond_t1(text: str) -> list[str]:
    """The characters of a text at which pdfLaTeX with T1 fonts would stop, in the order of their code points."""
    return sorted({c for c in text if not (c in _KNOWN or (ord(c) < 0x180 and c not in _UNKNOWN))})


def markdown(text: object, limit: int = 400) -> str:
    """Escaped for a cell of a Markdown table."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", clean(text, limit))


def code(text: object) -> str:
    """A module path as Markdown code inside a table cell."""
    return "`" + clean(text).replace("`", "'").replace("|", "\\|") + "`"


def number(value: object, digits: int = 3) -> str:
    """A float with fixed digits; n/a for a missing one."""
    if value is None or value is pd.NA or value != value:
        return "n/a"
    return f"{round(value, digits) + 0.0:.{digits}f}" if isinstance(value, float) else str(value)  # + 0.0: no "-0.000"


_WEAK = frozenset(["a", "an", "the", "of", "on", "in", "at", "to", "with", "and", "is", "are", "its"])
_PARTS = {"attentions": "a", "transformer_blocks": "t", "single_transformer_blocks": "s", "resnets": "r", "blocks": "b"}
SHORT = 26  # characters of a short name


def short_names(prompts: Mapping[str, str], limit: int = SHORT) -> dict[str, str]:
    """A short name for each prompt (id -> text), all different: its id where that is short, else its telling words.

    Left out are articles and the like, and words that nearly every prompt has ("background").
    """
    words = {one: re.findall(r"[^\W_]+(?:[-'][^\W_]+)*", clean(text).lower()) for one, text in prompts.items()}
    shared = Counter(word for found in words.values() for word in set(found))
    common = {word for word, count in shared.items() if len(prompts) > 3 and count > 0.8 * len(prompts)}
    names: dict[str, str] = {}
    taken: set[str] = set()
    for one, found in words.items():
        telling = " ".join(word for word in found if word not in _WEAK | common) or clean(prompts[one])
        own = clean(one, limit + 1)
        name = own if len(own) <= min(limit, 16) or not telling else _to_length(telling, limit)
        unique, number = name, 2
        while unique in taken:
            unique, number = f"{name[: limit - 3].rstrip()} {number}", number + 1
        taken.add(unique)
        names[one] = unique
    return names


def _to_length(text: str, limit: int) -> str:
    """Cut at a word where there is one."""
    if len(text) <= limit:
        return text
    cut = text[: limit - 1]
    return (cut.rpartition(" ")[0] if " " in cut[limit // 2 :] else cut).rstrip() + "…"


def short_layer(path: str) -> str:
    """A module path for narrow places: up_blocks.2.attentions.1 is up2.a1."""
    pieces: list[str] = []
    for part in clean(path).split("."):
        if part.isdigit() and pieces:
            pieces[-1] += part
        else:
            pieces.append(_PARTS.get(part, part.removesuffix("_blocks").removesuffix("_block")))
    return ".".join(pieces)


def as_html(title: str, facts: Mapping[str, Any]) -> str:
    """A heading and a line of facts for a notebook."""
    line = " · ".join(f"{html.escape(name)} <b>{html.escape(str(value))}</b>" for name, value in facts.items())
    return f"<div>{html.escape(title)}<br>{line}</div>"
