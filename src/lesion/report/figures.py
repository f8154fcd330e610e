"""Figures in one style, drawn without pyplot state: importance layer x prompt, importance and sufficiency a layer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lesion.report.text import clean, number

STYLE: Any = {  # Any: the stubs ask for a literal type of all keys
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "0.88",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 160,
    "pdf.fonttype": 42,
    "text.parse_math": False,  # prompt ids and model names may hold dollar signs
}
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#767676"  # Okabe-Ito: told apart by colour-blind readers and in grey
CELLS = 20  # values are written into heat maps of at most this many rows and columns


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write stem.png and stem.pdf."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.parent / f"{stem.name}.png", stem.parent / f"{stem.name}.pdf"]
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a letter the font lacks is drawn as a box
        figure.savefig(paths[0])
        figure.set_layout_engine("none")  # keep the layout just found: finding it again takes most of the time
        figure.savefig(paths[1], metadata={"CreationDate": None})
    return paths


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def heat_map(table: pd.DataFrame, meaning: str, title: str, from_zero: bool = True) -> Figure:
    """Layers (rows, depth order) x prompts; missing cells are hatched. `meaning` labels the colour bar.

    Colours start at 0 with `from_zero`, else at the smallest value.
    """
    values = table.to_numpy(dtype="float64")  # (layers, prompts)
    n_layers, n_prompts = values.shape
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    low = min(0.0, low) if from_zero else low
    high = max(high, low + 1e-3)  # a map of nothing but zeros stays dark instead of showing rounding errors
    written = n_layers <= CELLS and n_prompts <= CELLS
    with matplotlib.rc_context(STYLE):
        figure = _figure(
            min(24.0, 3.6 + (0.62 if written else 0.3) * max(n_prompts, 4)), min(24.0, 1.9 + 0.29 * max(n_layers, 4))
        )
        axes = figure.add_subplot()
        axes.set_facecolor("white")
        axes.patch.set(hatch="////", edgecolor="0.8")
        image = axes.imshow(np.ma.masked_invalid(values), cmap="cividis", vmin=low, vmax=high, aspect="auto")
        every = max(1, -(-n_prompts // 60))
        axes.set_xticks(range(0, n_prompts, every), [clean(name, 28) for name in table.columns[::every]])
        axes.tick_params(axis="x", rotation=40, length=0)
        for tick in axes.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor")
        skip = max(1, -(-n_layers // 72))
        axes.set_yticks(range(0, n_layers, skip), [clean(name, 64) for name in table.index[::skip]])
        axes.tick_params(axis="y", length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("prompt")
        axes.set_title(title, wrap=True)
        figure.colorbar(image, ax=axes, label=meaning, pad=0.02)
        if written:
            for (row, column), value in np.ndenumerate(values):
                missing = not np.isfinite(value)
                shade = 0.0 if missing else (value - low) / (high - low)
                colour = "black" if missing or shade > 0.5 else "white"
                text = number(float(value))
                axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
    return figure


def layer_figure(
    table: pd.DataFrame, title: str, control: float = float("nan"), metric: str = "clip_similarity"
) -> Figure:
    """Importance and sufficiency a layer (`layer_table` of one setting) in depth order, sd across prompts as bars.

    Layers without measurable effect are hollow and named; `control` (similarity with every layer lesioned) is dashed.
    """
    panels = [
        ("importance", f"importance: mean over prompts of 1 - {metric}\n(leave-one-out)", BLUE, "o", 1.0 - control),
        ("sufficiency", f"sufficiency: mean over prompts of {metric}\n(only-one)", VERMILION, "s", control),
    ]
    panels = [panel for panel in panels if table[panel[0]].notna().any()] or panels[:1]
    depth = np.arange(len(table))
    with matplotlib.rc_context(STYLE):
        figure = _figure(3.2 + 3.4 * len(panels), min(24.0, 2.1 + 0.27 * max(len(table), 4)))
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (name, label, colour, marker, dashed) in zip(all_axes, panels, strict=True):
            mean, spread = table[name].to_numpy(float), table[f"{name}_sd"].to_numpy(float)
            drawn = np.isfinite(spread) & np.isfinite(mean)
            axes.errorbar(
                mean[drawn], depth[drawn], xerr=spread[drawn], fmt="none", ecolor=colour, elinewidth=1.2, capsize=2.5
            )
            none = (table["effect"] == "none").to_numpy() & (name == "importance")
            axes.plot(mean[~none], depth[~none], marker, color=colour, markersize=5.5, linestyle="none")
            axes.plot(mean[none], depth[none], marker, markersize=5.5, linestyle="none", mfc="white", mec=GREY)
            beside: dict[str, Any] = {"textcoords": "offset points", "color": GREY}
            for row in depth[none]:
                axes.annotate("no effect", (mean[row], row), (7, 0), va="center", **beside)
            if np.isfinite(dashed):
                axes.axvline(dashed, color=GREY, linestyle="--", linewidth=1.0)
                axes.annotate(
                    "all layers lesioned",
                    (dashed, 1.0),
                    (0, 3),
                    xycoords=("data", "axes fraction"),
                    ha="right" if name == "importance" else "left",  # away from the other panel's label
                    fontsize=7.5,
                    **beside,
                )
            axes.grid(axis="both", linewidth=0.6)
            note = "bars: ± 1 sd across prompts" if drawn.any() else "one prompt: no spread"
            axes.set_xlabel(f"{label}\n{note}")
            axes.tick_params(axis="y", length=0)
        first = all_axes[0]
        first.set_yticks(depth, [clean(name, 64) for name in table["layer"]])
        first.set_ylim(len(table) - 0.4, -0.6)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, wrap=True)
    return figure
