"""Figures of pairs of measures and of curves: scatters, cumulative lesions, strengths, windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from lesion.report.beside import Beside
from lesion.report.figures import (
    COLOURS,
    DASHES,
    DOUBLE,
    GREY,
    MARKERS,
    SINGLE,
    blank,
    entitle,
    limits,
    styled,
)
from lesion.report.text import clean

KEY = 40  # layers that a scatter names
MARK = 1.8  # half the side of a scatter's marker, points
APART, MOST_APART = 3.0, 12.0  # points between the markers of two sides at one depth, and between the outermost
LINES = 5  # layers that stand out among curves
PLACES = (("down", "o", COLOURS[0]), ("mid", "s", COLOURS[1]), ("up", "^", COLOURS[2]), ("", "D", GREY))


def scatter(
    one: pd.DataFrame, other: pd.DataFrame, names: tuple[str, str], labels: tuple[str, str], title: str, same: bool
) -> Figure:
    """Layers by two measures, with intervals and their numbers in depth order, which a key beside resolves.

    one, other: tables with layer and, for the name in `names`, columns NAME, NAME_low, NAME_high. same: both axes are
    one scale, with its diagonal.
    """
    both = one.merge(other, on="layer", suffixes=("|x", "|y"))
    x, y = (_renamed(both, name, end) for name, end in zip(names, ("|x", "|y"), strict=True))
    with styled():
        figure = blank(DOUBLE, max(2.9, 0.45 + 0.115 * min(len(both), KEY)))
        axes, key = figure.subplots(1, 2, width_ratios=(2, 1))
        kinds = [_place(name) for name in both["layer"]]
        for number, (place, marker, colour) in enumerate(PLACES):
            of = np.array([kind == number for kind in kinds])
            if of.any():
                style: dict[str, Any] = {
                    "fmt": marker,
                    "color": colour,
                    "elinewidth": 0.6,
                    "capsize": 0,
                    "label": place or "layer",
                }
                x_reach, y_reach = limits(x, "v")[:, of], limits(y, "v")[:, of]
                axes.errorbar(x["v"][of], y["v"][of], yerr=y_reach, xerr=x_reach, **style)
        if same and np.isfinite([x["v"], y["v"]]).any():
            ends = np.array([np.nanmin([x["v"], y["v"]]), np.nanmax([x["v"], y["v"]])])
            axes.plot(ends, ends, color=GREY, linestyle=":", linewidth=0.9, zorder=0)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.set_xscale("function", functions=(_root, _square))  # most layers lie near 0, where their numbers pile up
        if same:
            axes.set_yscale("function", functions=(_root, _square))
        axes.grid()
        if len(set(kinds)) > 1:
            figure.legend(loc="outside lower left", ncols=4)
        key.axis("off")
        lines = [f"{number:2} {clean(name, 48)}" for number, name in enumerate(both["layer"][:KEY], 1)]
        if len(both) <= KEY:
            key.text(0, 1, "\n".join(lines), va="top", fontsize=5.5, transform=key.transAxes, linespacing=1.25)
        entitle(figure, title)
        if len(both) <= KEY:
            _numbered(figure, axes, x["v"].to_numpy(), y["v"].to_numpy())
    return figure


def _numbered(figure: Figure, axes: Axes, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> None:
    """Write each point's number, from 1, as near to it as no other number or marker is; far ones get a line to it."""
    figure.draw_without_rendering()  # lays the figure out, which says where points lie on paper
    figure.set_layout_engine("none")  # and there they stay: numbers take no room of their own
    points = axes.transData.transform(np.column_stack([x, y])) * 72 / figure.dpi
    frame = np.asarray(axes.bbox.extents) * 72 / figure.dpi
    known = np.flatnonzero(np.isfinite(points).all(axis=1))
    taken = [np.concatenate([points[one] - MARK, points[one] + MARK]) for one in known]  # left, bottom, right, top
    angles = np.pi * (1 / 4 + np.arange(16) / 8)
    rings = [(radius, angle) for radius in np.arange(5.5, 60, 3.5) for angle in angles]
    for one in known:
        half = np.array([1.9 * len(str(one + 1)), 2.9])  # of a number in the small font, points
        for radius, angle in rings:
            offset = (radius + half - half.min()) * (np.cos(angle), np.sin(angle))
            middle = points[one] + offset
            box = np.concatenate([middle - half, middle + half])
            inside = box[0] > frame[0] and box[1] > frame[1] and box[2] < frame[2] and box[3] < frame[3]
            if inside and not any(_meet(box, other) for other in taken):
                break
        else:
            offset = np.array([4.5, 4.5])
            box = np.concatenate([points[one] + offset - half, points[one] + offset + half])
        taken.append(box)
        line = {"arrowstyle": "-", "linewidth": 0.3, "color": GREY, "shrinkA": 0, "shrinkB": 1}
        axes.annotate(
            str(one + 1), (x[one], y[one]), tuple(offset), textcoords="offset points", fontsize=5.5,
            ha="center", va="center", arrowprops=line if radius > 9 else None,
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.2},
        )  # fmt: skip


def _meet(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    return bool(one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3])


def _root(value: Any) -> Any:
    return np.sign(value) * np.sqrt(np.abs(value))


def _square(value: Any) -> Any:
    return np.sign(value) * np.square(value)


def _renamed(both: pd.DataFrame, name: str, end: str) -> pd.DataFrame:
    def column(suffix: str) -> pd.Series:
        full = f"{name}{suffix}"
        return both[full if full in both else full + end].astype("float64")

    return pd.DataFrame({"v": column(""), "v_low": column("_low"), "v_high": column("_high")})


def _place(layer: str) -> int:
    return next((number for number, (place, *_) in enumerate(PLACES) if place and str(layer).startswith(place)), 3)


def orders(table: pd.DataFrame, title: str, metric: str) -> Figure:
    """Effect against the number of lesioned layers, a line an order with its 95 % band."""
    with styled():
        figure = blank(SINGLE, 2.4)
        axes = figure.add_subplot()
        for number, (order, line) in enumerate(table.groupby("order", sort=False)):
            line = line.sort_values("n_lesioned")
            x, mean = [0, *line["n_lesioned"]], [0.0, *line["mean"]]
            style = _style_of(number)
            axes.plot(x, mean, **style, label=clean(order, 40) or "as given")
            axes.fill_between(x, [0.0, *line["low"]], [0.0, *line["high"]], color=style["color"], alpha=0.15, lw=0)
        axes.set(xlabel="layers lesioned", ylabel=f"effect: 1 - {metric}")
        entitle(figure, title)
        axes.grid()
        if table["order"].nunique() > 1:
            axes.legend(title="order", title_fontsize=6)
    return figure


def lines(table: pd.DataFrame, x: str, xlabel: str, ylabel: str, title: str, origin: bool) -> Figure:
    """Effect of each layer along `x` with 95 % bars; the layers with the largest effect stand out.

    table: layer, x, mean, low, high. origin: curves start at 0, 0.
    """
    top = table.groupby("layer", sort=False)["mean"].max().nlargest(LINES).index.tolist()
    depth = list(dict.fromkeys(table["layer"]))
    with styled():
        figure = blank(DOUBLE, 2.7)
        axes = figure.add_subplot()
        for layer in sorted(depth, key=lambda name: name in top):
            line = table[table["layer"] == layer].sort_values(x)
            start = [0.0] if origin else []
            points, mean = [*start, *line[x]], [*start, *line["mean"]]
            if layer not in top:
                axes.plot(points, mean, color="0.75", linewidth=0.7)
                continue
            style = _style_of(sorted(top, key=depth.index).index(layer))
            axes.plot(points, mean, **style, label=clean(layer, 48))
            reach = limits(line.rename(columns={"mean": "v", "low": "v_low", "high": "v_high"}), "v")
            axes.errorbar(line[x], line["mean"], yerr=reach, fmt="none", ecolor=style["color"], elinewidth=0.7)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid()
        rest = len(depth) - len(top)
        figure.legend(loc="outside right upper", title=f"grey: {rest} other layers" if rest else None, title_fontsize=6)
        entitle(figure, title)
    return figure


def side_by_side(one: Beside, metric: str) -> Figure:
    """Layers of several models, kinds or replacements: a panel a measure, a marker and colour a side, 95 % intervals.

    Sides with the same layers share a row a layer; others are curves over the relative depth of their layers. Colours
    run out after five sides: `figures.heat_map` shows more.
    """
    labels = {"importance": f"importance: 1 - {metric}", "sufficiency": f"sufficiency: {metric}"}
    rows, across = one.table, not one.depths
    panels, n_sides = len(one.measures), len(one.names)
    tall = 0.9 + max(0.16, 0.1 * n_sides) * max(len(rows), 4) if across else 2.6
    with styled():
        figure = blank(SINGLE if panels == 1 and across else DOUBLE, tall)
        all_axes = figure.subplots(1, panels, sharey=across, squeeze=False)[0]
        for axes, measure in zip(all_axes, one.measures, strict=True):
            for number, (name, side) in enumerate(zip(one.names, one.sides, strict=True)):
                key = f"{measure} {name}"
                table = pd.DataFrame({"v": rows[key], "v_low": rows[f"{key} low"], "v_high": rows[f"{key} high"]})
                held = np.flatnonzero(table["v"].notna())
                if not across:  # the rows are in the order of the mean depth of all models
                    held = held[np.argsort(rows[f"depth {side[0]}"].to_numpy(float)[held], kind="stable")]
                reach, style = limits(table, "v")[:, held], _style_of(number)
                if across:
                    place = np.arange(len(rows)) + 0.6 * ((number + 0.5) / n_sides - 0.5)
                    style["linestyle"] = "none"
                    axes.errorbar(
                        table["v"].iloc[held], place[held], xerr=reach, **style, label=clean(name, 48), elinewidth=0.8
                    )
                else:
                    # Depths of several sides are equal, 0 and 1 always: markers stand beside one another on the paper,
                    # or the last would cover the others, while the axis keeps its numbers.
                    points = min(APART, MOST_APART / n_sides) * (number - (n_sides - 1) / 2)
                    moved = axes.transData + ScaledTranslation(points / 72, 0, figure.dpi_scale_trans)
                    depth, middle = rows[f"depth {side[0]}"].iloc[held], table["v"].iloc[held]
                    for end in (middle - reach[0], middle + reach[1]):  # what is moved does not count for the axes
                        axes.update_datalim(np.column_stack([depth, end]))
                    axes.errorbar(
                        depth, middle, yerr=reach, **style, label=clean(name, 48), elinewidth=0.7, transform=moved,
                    )  # fmt: skip
            axes.set(**{"xlabel" if across else "ylabel": labels[measure]})
            axes.grid(axis="both")
        if across:
            all_axes[0].set_yticks(range(len(rows)), [clean(name, 64) for name in rows["layer"]])
            all_axes[0].set_ylim(len(rows) - 0.4, -0.6)
        else:
            for axes in all_axes:
                axes.set_xlabel("depth: first to last layer")
        handles = all_axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=min(n_sides, 4))
        entitle(figure, one.alike)
    return figure


def _style_of(number: int) -> dict[str, Any]:
    pick: list[Sequence[object]] = [COLOURS, DASHES, MARKERS]
    colour, dash, marker = (choices[number % len(choices)] for choices in pick)
    return {"color": colour, "linestyle": dash, "marker": marker}
