"""The numbers of a paper, and whether each is one of the tables'. Pure."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

IGNORE = "lesion-audit: ignore"  # in a comment of a line whose numbers are not of the study
SUFFIXES = (".tex", ".md")
_NUMBER = re.compile(
    r"(?<![\w./_\-−])([-−+]?)(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE]([-+]?\d+))?(?!\w)(?!\.\d)(\s*\\?%)?"
)
# Commands of LaTeX whose arguments are names, keys, addresses or lengths.
_NAMES = re.compile(
    r"\\(?:[a-zA-Z]*cite[a-zA-Z]*|[a-zA-Z]*ref|label|includegraphics|input|include|bibliography|bibliographystyle"
    r"|usepackage|documentclass|url|path|texttt|code|vspace|hspace|setlength|begin|end|cmidrule|multirow|rule)\*?"
    r"(?:\([^)]*\))?(?:\[[^\]]*\])*(?:\{[^{}]*\})*"
)


@dataclass(frozen=True)
class Number:
    """A number of a text. decimals: digits behind its point. percent: whether a % follows it."""

    line: int
    text: str
    value: float
    decimals: int
    percent: bool


def numbers(text: str, suffix: str) -> Iterator[Number]:
    """Every number of a .tex or .md text that a reader sees, but not parts of names, code, links and references.

    Lines with `IGNORE` are left out.
    """
    lines = text.splitlines()
    if suffix == ".tex":
        begin = next((place for place, line in enumerate(lines) if r"\begin{document}" in line), -1)
        lines = ["" if place <= begin else line for place, line in enumerate(lines)]
    fenced = False
    for place, line in enumerate(lines, 1):
        if suffix == ".md" and line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
            continue
        if fenced or IGNORE in line:
            continue
        yield from found_in(_plain_tex(line) if suffix == ".tex" else _plain_markdown(line), place)


def found_in(text: str, line: int = 0) -> Iterator[Number]:
    """Numbers of plain text."""
    text = re.sub(r"(?<=\d)(?:\s+(?:-{1,3}|–|—)\s+|-{1,3}|–|—)(?=\d)", " to ", text)
    for match in _NUMBER.finditer(text):
        sign, digits, power, percent = match.groups()
        plain = digits.replace(",", "")
        value = float(f"{'-' if sign in ('-', '−') else ''}{plain}e{power or 0}")
        decimals = max(0, len(plain.partition(".")[2]) - int(power or 0))
        yield Number(line, match[0].strip(), value, decimals, bool(percent))


def _plain_tex(line: str) -> str:
    line = re.sub(r"(?<!\\)%.*", "", line)
    line = re.sub(r"\\textminus(?:\{\})?\s*", "-", line)
    line = _NAMES.sub(" ", line).replace("{,}", ",").replace(r"\,", " ")
    line = re.sub(r"\\\\(?:\[[^\]]*\])?", " ", line).replace(r"\%", "%")
    line = re.sub(r"\\[a-zA-Z]+\*?", " ", line)
    return re.sub(r"[{}$~&]", " ", line)


def _plain_markdown(line: str) -> str:
    line = re.sub(r"<!--.*?-->", " ", line)
    line = re.sub(r"`+[^`]*`+", " ", line)
    line = re.sub(r"\]\([^)]*\)", "] ", line)
    line = re.sub(r"<?https?://\S+", " ", line)
    line = re.sub(r"^(\s*)\d+[.)]\s", r"\1", line)
    return re.sub(r"[*|]", " ", line)


class Tables:
    """The numbers of tables, as they are and as they are shown."""

    def __init__(self, paths: Iterable[Path]):
        found: dict[float, str] = {}
        for path in paths:
            if path.suffix in (".csv", ".md"):
                text = path.read_text(encoding="utf-8", errors="replace")
                for line in text.replace(",", " ").splitlines() if path.suffix == ".csv" else text.splitlines():
                    for one in found_in(_plain_markdown(line)):
                        found.setdefault(one.value, path.name)
        self._values = sorted(found)
        self._where = found

    def __len__(self) -> int:
        return len(self._values)

    def where(self, number: Number) -> str:
        """The table that has a number, as written or rounded to the digits it is written with; "" where none has.

        A whole number must be one of a table as it is. A number with % may be a share of a table, times 100.
        """
        for scale in (1, 100) if number.percent else (1,):
            exact = number.decimals == 0 and scale == 1
            room = 1e-9 if exact else 0.5 * 10.0**-number.decimals * (1 + 1e-9)
            low = bisect_left(self._values, (number.value - room) / scale)
            if low < len(self._values) and self._values[low] * scale <= number.value + room:
                return self._where[self._values[low]]
        return ""
