"""Pieces of every figure, and the two kinds each study has: heat maps, and importance and sufficiency by layer.

Drawn without pyplot's state. `paper.mplstyle` beside this file has the style; colours are Okabe-Ito's and cividis, told
apart by colour-blind readers; markers and line styles differ too, so that nothing is lost in grey.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from lesion.processes import Call, Processes
from lesion.report import fonts
from lesion.report.text import clean, number, short_layer
from lesion.store.files import atomically

SINGLE, DOUBLE, TALL = 3.3, 6.9, 9.0  # inches: width of one column, of both, and the height of a page
BLUE, VERMILION, GREEN, PURPLE, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#767676"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE)
MARKERS, DASHES = ("o", "s", "^", "D", "v"), ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
COMPRESSION = 3  # of 9: half the time of Pillow's default for files a few per cent larger
VALUES = 15  # values are written into heat maps of at most this many columns
NAMED = 60  # rows and columns beyond which not every name is written


@lru_cache
def _style() -> dict[str, Any]:
    with as_file(files("lesion.report").joinpath("paper.mplstyle")) as path:
        settings: Any = matplotlib.rc_params_from_file(path, use_default_template=False)
        return dict(settings)


@dataclass(frozen=True)
class Look:
    """What a user chooses: style files or names of matplotlib's styles, laid over ours; whether titles are drawn.

    Papers have captions, so figures have no title unless it is asked for.
    """

    styles: tuple[str, ...] = ()
    titles: bool = False


_look: ContextVar[Look] = ContextVar("look", default=Look())  # noqa: B039 - it is frozen


@contextmanager
def looking(look: Look) -> Iterator[None]:
    """Figures drawn inside look so. Raises ValueError, which names it, for a style that there is not."""
    for style in look.styles:
        try:
            _over(style)
        except (OSError, ValueError) as error:
            why = f"{error.strerror}; it is no style of matplotlib's either" if isinstance(error, OSError) else error
            raise ValueError(f"style {style!r}: {why}") from None
    token = _look.set(look)
    try:
        yield
    finally:
        _look.reset(token)


@lru_cache
def _over(style: str) -> dict[str, Any]:
    from matplotlib import style as styles

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library: Any = styles.library
        if style not in library:
            Path(style).read_text(encoding="utf-8")  # of another file matplotlib would say so in a line of its own
        read: Any = library[style] if style in library else matplotlib.rc_params_from_file(style, False, False)
        return dict(read)


def styled() -> AbstractContextManager[None]:
    """Drawing inside has the style."""
    style: Any = dict(_style())  # Any: the stubs ask for a literal type of all keys
    for name in _look.get().styles:
        style |= {key: value for key, value in _over(name).items() if not key.startswith("backend")}
    return matplotlib.rc_context(style)


class _Lettered(Figure):
    """A figure that draws letters which its font lacks in other fonts, looked for when it is first drawn."""

    _lettered = False

    def draw(self, renderer: RendererBase) -> None:
        if not self._lettered:
            self._letter()
            self._lettered = True
        super().draw(renderer)

    def _letter(self) -> None:
        for axes in self.axes:
            for axis in (axes.xaxis, axes.yaxis):
                axis.get_ticklabels()  # they get their texts when asked for
        for text in self.findobj(Text):
            if others := fonts.families(text.get_text()):
                text.set_fontfamily([fonts.FAMILY, *others])


def blank(width: float, height: float) -> Figure:
    """An empty figure in inches, no higher than a page."""
    return _Lettered(figsize=(width, min(TALL, height)), layout="constrained")


def entitle(figure: Figure, title: str) -> None:
    """A title above everything if titles are asked for, broken to the figure's width.

    Not by matplotlib's own wrapping, which reads dollar signs as maths.
    """
    if not _look.get().titles:
        return
    room = int(figure.get_figwidth() * 16)  # characters
    lines = [line for part in title.split("\n") for line in textwrap.wrap(part, room)]
    figure.suptitle("\n".join(lines[:4]), x=0.01, ha="left", fontsize=7.5)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write stem.png and stem.pdf."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.parent / f"{stem.name}.png", stem.parent / f"{stem.name}.pdf"]
    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # `fonts` says in one line which letters no font has
        # Not by `savefig`, which draws everything once more beforehand, to find a layout.
        figure.set_dpi(matplotlib.rcParams["savefig.dpi"])
        with atomically(paths[0]) as temporary:
            FigureCanvasAgg(figure).print_png(temporary, pil_kwargs={"compress_level": COMPRESSION})
        figure.set_layout_engine("none")  # keep the layout just found: finding it again takes most of the time
        with atomically(paths[1]) as temporary, fonts.embedded_without_layout():
            FigureCanvasPdf(figure).print_pdf(temporary, metadata={"CreationDate": None})
    return paths


@dataclass(frozen=True)
class _State:
    """What figures look like in this process: the user's choice, and matplotlib's settings."""

    look: Look
    settings: dict[str, Any]


def drawing(processes: Processes, stem: Path, build: Callable[..., Figure | None], *arguments: Any) -> Call[list[Path]]:
    """Have the figure that `build` makes of these arguments drawn and saved; its paths, none where it makes none."""
    now: dict[str, Any] = dict(dict.items(matplotlib.rcParams))  # type: ignore[arg-type]  # asked for, a backend is chosen
    settings = {key: value for key, value in now.items() if not key.startswith("backend")}
    return processes.call(partial(_drawn, _State(_look.get(), settings), stem, build, arguments))


def _drawn(state: _State, stem: Path, build: Callable[..., Figure | None], arguments: Sequence[Any]) -> list[Path]:
    with matplotlib.rc_context(), looking(state.look):
        dict.update(matplotlib.rcParams, state.settings)  # type: ignore[misc]  # they are checked already
        figure = build(*arguments)
        return [] if figure is None else save(figure, stem)


def prepare() -> None:
    """Do once what takes the first figure of a process its time: imports, fonts."""
    figure = heat_map(pd.DataFrame({"a": [0.0, 1.0]}, index=["b", "c"]), "d", "e")
    with styled(), fonts.embedded_without_layout():
        FigureCanvasAgg(figure).print_png(io.BytesIO())
        FigureCanvasPdf(figure).print_pdf(io.BytesIO())


def clustered(table: pd.DataFrame) -> pd.DataFrame:
    """Rows and columns with similar values side by side (average linkage, optimal leaf order); missing cells count as
    their row's mean. The same table where there are fewer than 3 rows and columns.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage

    values = table.to_numpy(dtype="float64")
    held = np.isfinite(values)
    sums, n = np.where(held, values, 0.0).sum(axis=1, keepdims=True), held.sum(axis=1, keepdims=True)
    filled = np.where(held, values, sums / np.maximum(n, 1))
    order = [
        leaves_list(linkage(side, "average", optimal_ordering=True)) if len(side) > 2 else np.arange(len(side))
        for side in (filled, filled.T)
    ]
    return table.iloc[order[0], order[1]]


def heat_map(table: pd.DataFrame, meaning: str, title: str, from_zero: bool = True, columns: str = "prompt") -> Figure:
    """Layers (rows) x prompts, aspects or windows; missing cells are hatched. `meaning` labels the colour bar.

    Colours start at 0 with `from_zero`, else at the smallest value, and follow the square root: most changes are small.
    columns: what they are, for the axis.
    """
    values = table.to_numpy(dtype="float64")  # (layers, columns)
    n_layers, n_columns = values.shape
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    low = min(0.0, low) if from_zero else low
    high = max(high, low + 1e-3)  # a map of nothing but zeros stays dark instead of showing rounding errors
    written = n_columns <= VALUES and n_layers <= NAMED
    with styled():
        figure = blank(SINGLE if n_columns <= 3 else DOUBLE, 1.1 + 0.155 * max(n_layers, 4))
        axes = figure.add_subplot()
        axes.set_facecolor("white")
        axes.patch.set(hatch="//////", edgecolor="0.6")
        scale = PowerNorm(0.5, low, high)  # no clipping: a bar would name larger values at its end
        image = axes.imshow(np.ma.masked_invalid(values), norm=scale, aspect="auto", interpolation="nearest")
        every, skip = max(1, -(-n_columns // NAMED)), max(1, -(-n_layers // NAMED))
        axes.set_xticks(range(0, n_columns, every), [clean(name, 28) for name in table.columns[::every]])
        axes.tick_params(axis="x", rotation=40 if n_columns <= 30 else 90, length=0)
        for tick in axes.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor", va="center" if n_columns > 30 else "baseline")
        axes.set_yticks(range(0, n_layers, skip), [clean(name, 64) for name in table.index[::skip]])
        axes.tick_params(axis="y", length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(columns)
        entitle(figure, title)
        figure.colorbar(image, ax=axes, label=meaning, pad=0.02).outline.set_visible(False)  # type: ignore[operator]
        if written:
            light = np.ma.filled(scale(np.ma.masked_invalid(values)), 1.0) > 0.5
            for (row, column), value in np.ndenumerate(values):
                colour = "black" if light[row, column] else "white"
                cell = axes.text(column, row, brief(float(value)), ha="center", va="center", fontsize=5.5, color=colour)
                cell.set_in_layout(False)  # it lies inside the map, whose place does not depend on it
    return figure


def brief(value: float) -> str:
    """Few digits: 0 for what is next to nothing, three places below 0.1, else two."""
    if not np.isfinite(value):
        return "n/a"
    return "0" if abs(value) < 5e-4 else number(value, 3 if abs(value) < 0.0995 else 2)


def limits(table: pd.DataFrame, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How far the interval reaches below and above the mean, 0 where there is none. (2, rows)"""
    mean = table[name].to_numpy(float)
    low, high = (table[f"{name}_{end}"].to_numpy(float) for end in ("low", "high"))
    reach: np.ndarray[Any, np.dtype[np.float64]] = np.nan_to_num(np.maximum(np.stack([mean - low, high - mean]), 0.0))
    return reach


def layer_figure(table: pd.DataFrame, title: str, metric: str, control: float = float("nan")) -> Figure:
    """Importance and sufficiency by layer (`Findings.summary` of one setting) in depth order with 95 % intervals.

    Layers without measurable effect are hollow and named. Dashed: all layers lesioned (`control`, a similarity);
    dotted: what another seed changes.
    """
    panels = [
        ("importance", f"importance: 1 - {metric}\n(leave-one-out)", BLUE, "o", 1.0 - control),
        ("sufficiency", f"sufficiency: {metric}\n(only-one)", VERMILION, "s", control),
    ]
    panels = [panel for panel in panels if table[panel[0]].notna().any()] or panels[:1]
    depth = np.arange(len(table))
    floor = float(table["other_seeds"].mean()) if "other_seeds" in table else float("nan")
    with styled():
        figure = blank(SINGLE if len(panels) == 1 else DOUBLE, 1.2 + 0.16 * max(len(table), 4))
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (name, label, colour, marker, dashed) in zip(all_axes, panels, strict=True):
            mean, reach = table[name].to_numpy(float), limits(table, name)
            none = (table["effect"] == "none").to_numpy() & (name == "importance")
            drawn = np.isfinite(mean) & (reach.sum(axis=0) > 0)
            axes.errorbar(
                mean[drawn], depth[drawn], xerr=reach[:, drawn], fmt="none", ecolor=colour, elinewidth=1, capsize=1.8
            )
            axes.plot(mean[~none], depth[~none], marker, color=colour, linestyle="none")
            axes.plot(mean[none], depth[none], marker, linestyle="none", mfc="white", mec=GREY)
            for row in depth[none]:
                above: dict[str, Any] = {"textcoords": "offset points", "color": GREY, "fontsize": 5.5}
                axes.annotate("no effect", (mean[row], row), (4, 0.8), va="bottom", **above)  # clear of its interval
            shown = np.concatenate([mean - reach[0], mean + reach[1]])
            span = (np.nanmin([0.0, *shown]), np.nanmax(shown)) if np.isfinite(shown).any() else (0.0, 1.0)
            _line(axes, dashed, "--", "all lesioned", 0, span)
            _line(axes, 1.0 - floor if name == "importance" else floor, ":", "another seed", 1, span)
            axes.grid(axis="both")
            note = "bars: 95 % intervals" if drawn.any() else "no intervals: see the table"
            axes.set_xlabel(f"{label}\n{note}")
            axes.tick_params(axis="y", length=0)
        first = all_axes[0]
        first.set_yticks(depth, [clean(name, 64) for name in table["layer"]])
        first.set_ylim(len(table) - 0.4, -0.6)
        entitle(figure, title)
    return figure


def _line(axes: Axes, at: float, dash: str, text: str, row: int, span: tuple[float, float]) -> None:
    """A reference line with its name above the axes, in rows so that two names do not meet.

    span: of the data. A line that would more than double it is only named, with its value, at that side of the axes.
    """
    if not np.isfinite(at):
        return
    place: dict[str, Any] = {"textcoords": "offset points", "fontsize": 5.5, "color": GREY}
    width = max(span[1] - span[0], 1e-3)
    if span[0] - width <= at <= span[1] + width:
        axes.axvline(at, color=GREY, linestyle=dash, linewidth=0.9)
        axes.annotate(text, (at, 1.0), (0, 1 + 7 * row), xycoords=("data", "axes fraction"), ha="center", **place)
    else:
        right = at > span[1]
        named = f"{text}: {number(at, 2)} \u2192" if right else f"\u2190 {text}: {number(at, 2)}"
        side = "right" if right else "left"
        axes.annotate(named, (float(right), 1.0), (0, 1 + 7 * row), xycoords="axes fraction", ha=side, **place)


def sheet(
    pictures: Sequence[Sequence[Image.Image]], heads: Sequence[str], texts: Sequence[str], width: float
) -> Figure:
    """Pictures in rows of one prompt each and columns of one layer each; names and prompts are text, not pixels.

    width: of the figure in inches.
    """
    from mpl_toolkits.axes_grid1 import ImageGrid  # type: ignore[import-untyped]

    tall, wide = len(pictures), len(heads)
    side = width / (wide + 0.55)
    with styled():
        figure = Figure(figsize=(width, min(TALL, side * tall + 0.25)))
        grid: Any = ImageGrid(
            figure, (0.5 * side / width, 0.0, 1 - 0.5 * side / width, 1 - 0.22 / figure.get_figheight()),
            nrows_ncols=(tall, wide), axes_pad=0.03,
        )  # fmt: skip
        for place, axes in enumerate(grid):
            row, column = divmod(place, wide)
            axes.imshow(np.asarray(pictures[row][column]), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(clean(heads[column]) if column == 0 else short_layer(heads[column]), loc="center", pad=2)
            if column == 0:
                room = max(8, int(side * 16))
                lines = textwrap.wrap(clean(texts[row]), room)[:4]
                axes.set_ylabel("\n".join(lines), rotation=90, fontsize=5.5)
    return figure
