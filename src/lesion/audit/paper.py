"""The numbers of a paper, and whether each is one of the tables'. Pure."""

from __future__ import annotations

import html
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

IGNORE = "lesion-audit: ignore"  # in a comment of a line whose numbers are not of the study
SUFFIXES = (".tex", ".md")
_DIGITS = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_PERCENT = r"[\])]?\s*(?:\\?%|per ?cent\b|percentage points?\b|pp\b)"
# A unit may follow (4.9x, 37min); 2D and 3D are no numbers.
_NUMBER = re.compile(
    rf"(?<![\w./_\-−])([-−+]?)({_DIGITS})(?:[eE]([-+]?\d+))?(?![dD]\b)(?=[^\W\d_]*(?!\w))(?!\.\d)({_PERCENT})?"
)
_BETWEEN = re.compile(r"\s*(?:to|and|or|,|;|/|of|\.\.+|[-–—]+)?\s*[\[(]?\s*")  # of two that share a %
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_POWER = re.compile(r"(?:(?<=[\d}\s$])\s*(?:\\times|\\cdot|×|·)\s*)?(?<![\d.])10\s*\^\s*\{?\s*([-−+]?\d+)\s*\}?")
_LENGTH = r"[-+]?\d*\.?\d+\s*(?:\\(?:text|line|column|paper)(?:width|height)|(?:pt|em|ex|cm|mm|bp)\b)"
# Commands of LaTeX whose arguments are names, keys, addresses or lengths, by how many arguments of that kind they have.
_NAMES = [
    re.compile(rf"\\(?:{names})\*?(?:\([^)]*\))?(?:\[[^\]]*\])*" + r"(?:\s*\{[^{}]*\})" * arguments)
    for arguments, names in (
        (2, "multirow|setlength|addtolength|href|rule"),
        (
            1,
            r"[a-zA-Z]*cite[a-zA-Z]*|[a-zA-Z]*ref|label|includegraphics|input|include|bibliography|bibliographystyle"
            r"|usepackage|documentclass|url|path|texttt|code|vspace|hspace|begin\{(?:tabular|longtable|array|minipage)\}"
            r"|begin|end|cmidrule|cline|bibitem|multicolumn|color|cellcolor|rowcolor",
        ),
    )
]
_DEFINITION = re.compile(r"\\(?:(?:re|provide)?newcommand|def|title|author|date|pgfmathsetmacro|DeclareMathOperator)\b")
_UNREAD = re.compile(
    r"\\begin\{(verbatim|lstlisting|minted|comment|thebibliography)\*?\}.*?\\end\{\1\*?\}|\\verb\*?([^\w\s]).*?\2|<!--.*?-->",
    re.DOTALL,
)


@dataclass(frozen=True)
class Number:
    """A number of a text. decimals: digits behind its point. percent: whether it is followed by a %, or shares one."""

    line: int
    text: str
    value: float
    decimals: int
    percent: bool


def numbers(text: str, suffix: str) -> Iterator[Number]:
    """Every number of a .tex or .md text that a reader sees, but not parts of names, code, links and references.

    Of the part of a .tex before its document begins, what commands are defined as and the title. Lines with `IGNORE`
    are left out.
    """
    lines = ["" if IGNORE in line else line for line in text.splitlines()]
    if suffix == ".tex":
        begin = next((place for place, line in enumerate(lines) if r"\begin{document}" in line), -1)
        lines = [line if place > begin or _DEFINITION.search(line) else "" for place, line in enumerate(lines)]
        lines = [re.sub(r"(?<!\\)((?:\\\\)*)%.*", r"\1", line) for line in lines]
    else:
        lines = list(_without_fences(lines))
    kept = _UNREAD.sub(lambda match: "\n" * match[0].count("\n"), "\n".join(lines))
    for place, line in enumerate(kept.split("\n"), 1):
        yield from found_in(_plain_tex(line) if suffix == ".tex" else _plain_markdown(line), place)


def _without_fences(lines: Iterable[str]) -> Iterator[str]:
    """Markdown with its blocks of code empty."""
    fence = ""
    for line in lines:
        start = re.match(r"\s*(`{3,}|~{3,})", line)
        if start and not fence:
            fence = start[1]
        elif start and start[1].startswith(fence):
            fence = ""
        elif not fence:
            yield line
            continue
        yield ""


def found_in(text: str, line: int = 0) -> Iterator[Number]:
    """Numbers of plain text."""
    text = re.sub(r"(?<=\d)(?:\s+(?:-{1,3}|–|—)\s+|-{1,3}|–|—)(?=\d)", " to ", text)
    text = re.sub(r"(?<=\d)\s*([/x×])\s*(?=[-−+]?\.?\d)", r" \1 ", text)
    text = re.sub(r"(?<![\d.,])\d{1,3}(?:[\u2009\u202f]\d{3})+(?!\d)", lambda match: _joined(match[0]), text)
    found: list[Number] = []
    end = len(text)
    for match in reversed(list(_NUMBER.finditer(text))):
        sign, digits, power, percent = match.groups()
        plain = digits.replace(",", "")
        value = float(f"{'-' if sign in ('-', '−') else ''}{plain}e{power or 0}")
        decimals = max(0, len(plain.partition(".")[2]) - int(power or 0))
        # In "[11.0, 21.5] %" and "11 to 21 %" both are shares.
        shared = bool(found) and found[-1].percent and bool(_BETWEEN.fullmatch(text[match.end() : end]))
        found.append(Number(line, match[0].strip(), value, decimals, bool(percent) or shared))
        end = match.start()
    yield from reversed(found)


def _joined(digits: str) -> str:
    return re.sub(r"[^\d]", "", digits)


def _plain_math(line: str) -> str:
    """With signs, powers of ten and groups of digits as plain text has them."""
    line = re.sub(r"(?<=10)[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda match: "^" + match[0].translate(_SUPERSCRIPT), line)
    line = _POWER.sub(
        lambda match: ("" if match[0].lstrip()[0] != "1" else "1") + "e" + match[1].replace("−", "-"), line
    )
    line = re.sub(r"\$\s*([-−+])\s*\$|\{([-−+,])\}", lambda match: match[1] or match[2], line)
    line = re.sub(r"(?<![\d.,])\d{1,3}(?:\\(?:,|thinspace\s?)\d{3})+(?!\d)", lambda match: _joined(match[0]), line)
    return line.replace(r"\,", " ").replace(r"\percent", "%").replace(r"\%", "%")


def _plain_tex(line: str) -> str:
    line = re.sub(r"\\textminus(?:\{\})?\s*", "-", line)
    line = re.sub(rf"\{{\s*{_LENGTH}\s*\}}|\[\s*{_LENGTH}\s*\]", "{}", line)
    line = re.sub(r"\*\{\d+\}(?=\{)", " ", line)  # columns of a table
    for names in _NAMES:
        line = names.sub(" ", line)
    line = re.sub(r"#\d|(?<=\})\[\d\](?=\{)", " ", _plain_math(line))  # arguments of a definition
    line = re.sub(r"\\\\(?:\[[^\]]*\])?", " ", line)
    line = re.sub(r"\\[a-zA-Z]+\*?", " ", line)
    return re.sub(r"[{}$~&]", " ", line)


def _plain_markdown(line: str) -> str:
    line = re.sub(r"`+[^`]*`+", " ", line)
    line = re.sub(r"^\s*\[[^\]]+\]:.*|\[\^[^\]]+\]:?", " ", line)  # where a link or a footnote leads
    line = re.sub(r"\]\([^)]*\)", "] ", line)
    line = re.sub(r"<?https?://\S+", " ", line)
    line = re.sub(r"^(\s*)\d+[.)]\s", r"\1", line)
    line = html.unescape(re.sub(r"</?[a-zA-Z][^<>]*>", " ", line))
    line = re.sub(r"\\[a-zA-Z]+\*?", " ", _plain_math(line))
    return re.sub(r"[*|${}]|(?<!\w)_+|_+(?!\w)", " ", line)


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
