"""Tables of ready-made cells, written as CSV (raw numbers), Markdown and LaTeX, and shown on the page.

LaTeX needs \\usepackage[T1]{fontenc} and \\usepackage{array,booktabs}; long tables also longtable; with `siunitx` the
package of that name. A table with Chinese, emoji and the like needs LuaLaTeX: its first lines say with which preamble.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from lesion.analysis.importance import NO_EFFECT
from lesion.analysis.settings import Setting
from lesion.errors import visible
from lesion.report.text import beyond_t1, clean, code, latex, markdown, number
from lesion.store.files import atomically
from lesion.study.columns import GENERATION, LESION

WIDE = 110  # characters a line of a LaTeX table holds; wider tables are split
HEAD = 40  # characters of a heading in LaTeX
BROKEN = 45  # characters from which a cell is broken over lines
LONG = 45  # rows from which a LaTeX table runs over pages
LEVELS = ((0.001, 3), (0.01, 2), (0.05, 1))  # p-value, number of marks
FAR = 10.0  # ratios beyond say no more than that
ABOVE, BELOW = "*", "†"
# Only fonts that are there: luaotfload stops at another one.
UNICODE = r"""% {letters}: pdfLaTeX cannot set these; LuaLaTeX can, with this in place of fontenc:
% \usepackage{{fontspec}}
% \directlua{{others = {{}}}}
% \newcommand{{\other}}[1]{{\IfFontExistsTF{{#1}}{{\directlua{{table.insert(others, "#1:mode=harf;")}}}}{{}}}}
% \other{{Noto Sans CJK SC}}\other{{WenQuanYi Micro Hei}}\other{{FandolSong}}
% \other{{Noto Emoji}}\other{{Noto Color Emoji}}\other{{DejaVu Sans}}
% \directlua{{luaotfload.add_fallback("others", others)}}
% \setmainfont{{Latin Modern Roman}}[RawFeature={{fallback=others}}]
% \setmonofont{{Latin Modern Mono}}[RawFeature={{fallback=others}}]
"""


@dataclass(frozen=True)
class Cell:
    """text: as read. interval: beside it, "" for none. value: what the page sorts by, "" for a missing one."""

    text: str
    interval: str = ""
    marks: str = ""
    bold: bool = False
    code: bool = False
    value: str = ""


@dataclass(frozen=True)
class Column:
    """How a column of a frame is shown.

    kind: number | count | exact (a number as it was given) | p | ratio (a number; what is beyond FAR is "far above") |
    text | code. low, high: columns of the interval.
    marks: column of p-values that are shown as marks, daggers where the column `sign` is below 0. best: bold for the
    largest value above 0, where it is larger than the others as shown. spare: left out of LaTeX where it says the same
    in every row. up: the page sorts it upwards first. over: a heading that stands over this column and its neighbours
    with the same.
    absent: what stands for a missing number.
    """

    name: str
    head: str
    kind: str = "number"
    low: str = ""
    high: str = ""
    marks: str = ""
    sign: str = ""
    best: bool = False
    spare: bool = False
    up: bool = False
    over: str = ""
    absent: str = "n/a"

    @property
    def title(self) -> str:
        """The heading where there is one row of them."""
        return f"{self.over}: {self.head}" if self.over else self.head

    @property
    def left(self) -> bool:
        """Whether the column is text, aligned left and sorted as such."""
        return self.kind in ("text", "code")

    def cells(self, table: pd.DataFrame) -> list[Cell]:
        """One a row."""
        values = table[self.name].tolist() if self.name in table else [float("nan")] * len(table)
        top = max((value for value in values if self.best and not missing(value) and value > 0), default=None)
        beside = [name for name in (self.low, self.high, self.marks, self.sign) if name and name in table]
        records = table[beside].to_dict("records") if beside else [{}] * len(table)
        digits = self._digits([*values, *(record.get(name) for record in records for name in (self.low, self.high))])
        cells = [self._cell(value, record, digits) for value, record in zip(values, records, strict=True)]
        best = [place for place, cell in enumerate(cells) if top is not None and cell.text == self._shown(top, digits)]
        if len(best) == 1 < len(cells):
            cells[best[0]] = replace(cells[best[0]], bold=True)
        return cells

    def _digits(self, values: Iterable[Any]) -> int:
        """Decimals of the column: three, four where an effect beyond rounding (1e-4) would read as 0."""
        if self.kind not in ("number", "ratio"):
            return 3
        return 4 if any(not missing(value) and NO_EFFECT <= abs(value) < 5e-4 for value in values) else 3

    def _shown(self, value: Any, digits: int) -> str:
        return str(int(value)) if self.kind == "count" else number(float(value), digits)

    def _cell(self, value: Any, record: Mapping[Any, Any], digits: int) -> Cell:
        if self.left:
            value = "" if missing(value) else value
            return Cell(clean(value), code=self.kind == "code", value=clean(value))
        if missing(value):
            return Cell(self.absent)
        if self.kind == "ratio" and abs(value) > FAR:  # the floor it is divided by is next to nothing
            return Cell("far above" if value > 0 else "far below", value=str(value))
        if self.kind == "p":
            return Cell("< 0.001" if value < 0.001 else self._shown(value, digits), value=str(value))
        if self.kind == "exact":
            return Cell(f"{value:g}", value=str(value))
        limits: list[Any] = [record.get(name) for name in (self.low, self.high) if name]
        interval = ""
        if limits:
            shown = [self._limit(x, digits) for x in limits if not missing(x)]
            interval = f"[{', '.join(shown)}]" if len(shown) == 2 else "[n/a]"
        p = record.get(self.marks) if self.marks else None
        marks = 0 if p is None or missing(p) else next((n for level, n in LEVELS if p <= level), 0)
        stars = marks * (BELOW if self.sign and record.get(self.sign, 0) < 0 else ABOVE)
        return Cell(self._shown(value, digits), interval, stars, value=str(value))

    def _limit(self, value: Any, digits: int) -> str:
        if self.kind == "ratio" and abs(value) > FAR:
            return f"{'>' if value > 0 else '<'} {FAR * (1 if value > 0 else -1):g}"
        return self._shown(value, digits)


@dataclass(frozen=True)
class Table:
    """One table: `raw` becomes the CSV as it is; columns and cells are what people read.

    stem: of the file names. lead: columns repeated where LaTeX has to split a wide table. title: short, for the page.
    count: heading of the page's column of row numbers.
    """

    stem: str
    caption: str
    columns: list[Column]
    raw: pd.DataFrame
    cells: list[list[Cell]] = field(default_factory=list)  # rows
    lead: int = 1
    title: str = ""
    count: str = "row"
    note: str = ""  # below the table: what would make its caption long

    @classmethod
    def of(
        cls,
        stem: str,
        title: str,
        caption: str,
        columns: Sequence[Column],
        shown: pd.DataFrame,
        raw: pd.DataFrame | None = None,
        lead: int = 1,
        count: str = "row",
        note: str = "",
    ) -> Table:
        """With the columns' cells of the frame `shown`; raw: what the CSV holds where it is another."""
        made = [column.cells(shown) for column in columns]
        cells = [list(row) for row in zip(*made, strict=True)]
        return cls(stem, caption, list(columns), shown if raw is None else raw, cells, lead, title, count, note=note)

    def without_spare(self) -> Table:
        """Without spare columns that say the same everywhere."""
        keep = [
            place
            for place, column in enumerate(self.columns)
            if not column.spare or len({(row[place].text, row[place].interval) for row in self.cells}) > 1
        ]
        return replace(
            self,
            columns=[self.columns[place] for place in keep],
            cells=[[row[place] for place in keep] for row in self.cells],
        )


def missing(value: Any) -> bool:
    """None, NaN and NA."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def caption(part: pd.DataFrame, setting: Setting, what: str, metric: str) -> str:
    """Plain text: what is shown, metric, setting, how many prompts and seeds have a valid lesioned image."""
    return f"{what} Model {clean(setting.label)}; metric {metric}; {sizes(part)}."


def sizes(part: pd.DataFrame) -> str:
    """How many prompts and seeds have a valid lesioned image."""
    valid = part[["prompt_id", "seed"]][(part["status"] == "ok") & (part["selection"] != "none")]
    prompts, seeds = valid["prompt_id"].nunique(), valid["seed"].nunique()
    return f"n = {prompts} {'prompt' if prompts == 1 else 'prompts'}, {seeds} {'seed' if seeds == 1 else 'seeds'}"


def telling(table: pd.DataFrame, *besides: str) -> tuple[list[Column], str]:
    """Columns of the setting that differ between rows, and the others in words."""
    keys = [name for name in ("model", *LESION, *GENERATION) if name in table and name not in besides]
    differ = [name for name in keys if table[name].nunique(dropna=False) > 1]
    alike = {name: table[name].iloc[0] for name in keys if name not in differ and len(table)}
    usual = {name: getattr(Setting, name) for name in LESION if name != "replacement"}
    named = [f"{name} {clean(value, 60)}" for name, value in alike.items() if usual.get(name) != value]
    return [_setting_column(table, name) for name in differ], ", ".join(named)


def _setting_column(table: pd.DataFrame, name: str) -> Column:
    kind = "exact" if pd.api.types.is_numeric_dtype(table[name]) else "text"
    return Column(name, name.replace("_", " "), kind)


def over_words(frame: pd.DataFrame, what: str, alike: str, metric: str) -> str:
    """A caption: what is shown, what all rows have in common, metric, how many prompts and seeds."""
    facts = f"{alike}; metric {metric}; {sizes(frame)}." if alike else f"metric {metric}; {sizes(frame)}."
    return f"{what} {facts[0].upper()}{facts[1:]}"


def to_markdown(table: Table) -> str:
    """A pipe table below its caption."""
    lines = ["| " + " | ".join(markdown(column.title) for column in table.columns) + " |"]
    lines.append("|" + "|".join(" --- " if column.left else " ---: " for column in table.columns) + "|")
    lines += ["| " + " | ".join(_markdown_cell(cell) for cell in row) + " |" for row in table.cells]
    note = f"\n{markdown(table.note, 2000)}\n" if table.note else ""
    return markdown(table.caption, 2000) + "\n\n" + "\n".join(lines) + "\n" + note


def _markdown_cell(cell: Cell) -> str:
    if cell.code:
        return code(cell.text)
    text = markdown(cell.text)
    text = f"**{text}**" if cell.bold else text
    return text + markdown(cell.marks) + (f" {markdown(cell.interval)}" if cell.interval else "")


def to_latex(table: Table, siunitx: bool = False) -> str:
    """Table environments (longtable for many rows); everything is escaped. Too wide ones are split over several."""
    slim = table.without_spare()
    parts = _split(slim, siunitx)
    out = []
    for index, part in enumerate(parts, 1):
        words, label = slim.caption, f"tab:{slim.stem}"
        if len(parts) > 1:
            words, label = f"{words} Part {index} of {len(parts)}.", f"{label}--{index}"
        if index < len(parts):  # the note stands once, below the last part
            part = replace(part, note="")
        out.append(_environment(part, latex(words, 2000), label, siunitx))
    text = "\n".join(out)
    letters = "".join(beyond_t1(text.replace("\n", "")))
    return UNICODE.format(letters=clean(letters, HEAD)) + text if letters else text


def _split(table: Table, siunitx: bool) -> list[Table]:
    widths = [
        max([_width(column, siunitx), *(_cell_width(row[place], siunitx) for row in table.cells)]) + 2
        for place, column in enumerate(table.columns)
    ]
    room = WIDE - sum(widths[: table.lead])
    groups: list[list[int]] = [[]]
    left = room
    for place in range(table.lead, len(widths)):
        over = table.columns[place].over
        # Columns below one heading start in a part of their own where the rest of this one is too narrow for all.
        together = [one for one in range(place, len(widths)) if over and table.columns[one].over == over]
        begins = over and table.columns[place - 1].over != over
        wanted = min(sum(widths[one] for one in together), room) if begins else widths[place]
        if groups[-1] and max(wanted, widths[place]) > left:
            groups.append([])
            left = room
        groups[-1].append(place)
        left -= widths[place]
    found = []
    for group in groups:
        places = [*range(table.lead), *group]
        cells = [[row[place] for place in places] for row in table.cells]
        found.append(replace(table, columns=[table.columns[place] for place in places], cells=cells))
    return found


def _width(column: Column, siunitx: bool) -> float:
    """Of a heading, in characters of a table."""
    return max(min(len(column.head), HEAD) * 0.85, 6 if siunitx and not column.left else 3)


def _cell_width(cell: Cell, siunitx: bool) -> float:
    """Typewriter is wider than text, an interval smaller; with siunitx it is a column of its own."""
    text = min(len(cell.text), BROKEN) * (1.1 if cell.code else 1.0)
    return text + 0.85 * len(cell.interval) + len(cell.marks) + (4 if siunitx and cell.interval else 0)


def _environment(table: Table, words: str, label: str, siunitx: bool) -> str:
    heads, layout = [], ""
    spans: list[tuple[str, int]] = []
    with_intervals = [any(row[place].interval for row in table.cells) for place in range(len(table.columns))]
    for place, (column, between) in enumerate(zip(table.columns, with_intervals, strict=True)):
        spans.append((column.over, 2 if siunitx and not column.left and between else 1))
        if siunitx and not column.left:
            heads += [f"{{{latex(column.head, HEAD)}}}", *([r"{95\,\%}"] if between else [])]
            layout += f"S[table-format={_format([row[place].text for row in table.cells])}]" + ("l" if between else "")
        else:
            heads.append(latex(column.head, HEAD))
            broken = any(len(row[place].text) > BROKEN for row in table.cells)
            layout += r">{\raggedright\arraybackslash}p{0.42\textwidth}" if broken else "l" if column.left else "r"
    body = [
        _row(
            piece
            for place, cell in enumerate(row)
            for piece in _latex_cell(cell, siunitx and not table.columns[place].left, with_intervals[place])
        )
        for row in table.cells
    ]
    top = [r"\toprule", *_over(spans), _row(heads), r"\midrule"]
    named = rf"\caption{{{words}}}\label{{{label}}}"
    if len(body) > LONG:
        lines = [r"\begingroup\footnotesize\setlength{\tabcolsep}{3pt}", rf"\begin{{longtable}}{{{layout}}}"]
        lines += [named + r"\\", *top, r"\endfirsthead", *top, r"\endhead", r"\bottomrule", r"\endlastfoot", *body]
        lines += [r"\end{longtable}", *_noted(table), r"\endgroup"]
    else:
        lines = [
            r"\begin{table}[tbp]",
            r"\centering",
            named + r"\par\smallskip",
            r"\footnotesize\setlength{\tabcolsep}{3pt}",
        ]
        lines += [rf"\begin{{tabular}}{{{layout}}}", *top, *body, r"\bottomrule", r"\end{tabular}", *_noted(table)]
        lines += [r"\end{table}"]
    return "\n".join(lines) + "\n"


def _noted(table: Table) -> list[str]:
    if not table.note:
        return []
    return [r"\par\smallskip", rf"\parbox{{0.9\linewidth}}{{\scriptsize {latex(table.note, 2000)}}}"]


def _over(spans: Sequence[tuple[str, int]]) -> list[str]:
    """The row of headings over several columns, with a rule below each; none where there are none.

    spans: of each column, the heading over it and how many columns of LaTeX it takes.
    """
    if not any(over for over, _ in spans):
        return []
    pieces, rules, at = [], [], 1
    for over, group in itertools.groupby(spans, key=lambda span: span[0]):
        wide = sum(columns for _, columns in group)
        pieces += [rf"\multicolumn{{{wide}}}{{c}}{{{latex(over, 3 * HEAD)}}}"] if over else [""] * wide
        rules += [rf"\cmidrule(lr){{{at}-{at + wide - 1}}}"] if over else []
        at += wide
    return [_row(pieces), "".join(rules)]


def _row(pieces: Iterable[str]) -> str:
    """A line of a table; what precedes it, \\\\ or a rule, would take a bracket or star at its start as an option."""
    line = " & ".join(pieces) + r" \\"
    return "{}" + line if line.startswith(("[", "*")) else line


def _latex_cell(cell: Cell, aligned: bool, between: bool) -> list[str]:
    """One piece, or number and interval in columns of their own where numbers are `aligned` at the decimal sign."""
    text = _minus(latex(cell.text))
    stars = rf"\textsuperscript{{{cell.marks.replace(BELOW, chr(92) + 'textdagger{}')}}}" if cell.marks else ""
    interval = rf"{{\scriptsize {_minus(latex(cell.interval))}}}" if cell.interval else ""
    if aligned:
        plain = cell.text.lstrip("-").replace(".", "", 1).isdigit() and not cell.bold
        shown = cell.text if plain else rf"{{\bfseries {text}}}" if cell.bold else f"{{{text}}}"
        return [shown + (stars if not between else ""), *([stars + interval] if between else [])]
    text = rf"\texttt{{{text}}}" if cell.code else rf"\textbf{{{text}}}" if cell.bold else text
    return [text + stars + (f" {interval}" if interval else "")]


def _minus(text: str) -> str:
    """Numbers with a real minus sign."""
    return re.sub(r"(?<![\w.-])-(?=\d)", r"\\textminus{}", text)


def _format(texts: Sequence[str]) -> str:
    """Of an S column: digits before and after the decimal sign."""
    numbers = [text for text in texts if text.lstrip("-").replace(".", "", 1).isdigit()]
    before = max((len(text.lstrip("-").split(".")[0]) for text in numbers), default=1)
    after = max((len(text.partition(".")[2]) for text in numbers), default=0)
    sign = "-" if any(text.startswith("-") for text in numbers) else ""
    return f"{sign}{before}.{after}"


def _inert(value: Any) -> Any:
    """Text that a spreadsheet would run as a formula gets a ' before it; control characters are spelled out."""
    if not isinstance(value, str):
        return value
    return visible(f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value, keep="\n")


def write(folder: Path, table: Table, siunitx: bool = False) -> list[Path]:
    """stem.csv, and .md and .tex where there are cells for people. Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"csv": table.raw.map(_inert).to_csv(index=False, lineterminator="\n")}
    if table.cells or table.raw.empty:
        texts |= {"md": to_markdown(table), "tex": to_latex(table, siunitx)}
    for ending, text in texts.items():
        with atomically(folder / f"{table.stem}.{ending}") as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n", errors="replace")
    return [folder / f"{table.stem}.{ending}" for ending in texts]
