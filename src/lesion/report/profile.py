"""The U of a UNet with its layers coloured by importance."""

from __future__ import annotations

import re
from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from lesion.report.figures import DOUBLE, GREY, blank, brief, entitle, styled
from lesion.report.text import clean

BOXES = 24  # layers into whose boxes numbers fit
_PATH = re.compile(r"(?:(down_blocks|up_blocks)\.(\d+)|mid_block)(?:\.|$)")


def levels(layers: Sequence[str]) -> list[int] | None:
    """How deep each layer lies in the U, 0 at the image's resolution; None unless all are parts of a UNet.

    Blocks are numbered from the image down and from the bottom up; the largest number tells how many levels there
    are. The middle block works at the lowest one.
    """
    found = [_PATH.match(str(layer)) for layer in layers]
    parts = [match.groups() for match in found if match]
    if not parts or len(parts) != len(layers) or not any(part for part, _ in parts):
        return None
    count = 1 + max(int(block) for part, block in parts if part)
    return [
        count - 1 if not part else int(block) if part == "down_blocks" else count - 1 - int(block)
        for part, block in parts
    ]


def profile(table: pd.DataFrame, name: str, meaning: str, title: str) -> Figure | None:
    """Boxes in forward order from left to right, as low as their level; None where layers are not those of a UNet.

    table: layer and the column `name`. Hatched: no value.
    """
    depth = levels(table["layer"].tolist())
    if depth is None:
        return None
    values = table[name].to_numpy(float)
    finite = values[np.isfinite(values)]
    low = min(0.0, float(finite.min())) if finite.size else 0.0
    high = max(float(finite.max()), low + 1e-3) if finite.size else 1.0
    colours, scale = matplotlib.colormaps["cividis"], PowerNorm(0.5, low, high)
    with styled():
        figure = blank(DOUBLE, 1.2 + 0.42 * (max(depth) - min(depth) + 1))
        axes = figure.add_subplot()
        axes.plot(range(len(depth)), [-level for level in depth], color="0.8", linewidth=1.0, zorder=0)
        for place, (level, value, layer) in enumerate(zip(depth, values, table["layer"], strict=True)):
            known = bool(np.isfinite(value))
            fill = {"facecolor": colours(scale(value))} if known else {"facecolor": "white", "hatch": "/////"}
            box = FancyBboxPatch((place - 0.42, -level - 0.36), 0.84, 0.72, "round,pad=0,rounding_size=0.12")
            box.set(edgecolor="0.4", linewidth=0.5, **fill)
            axes.add_patch(box)
            if len(depth) <= BOXES:
                ink = "black" if not known or scale(value) > 0.5 else "white"
                text = f"{brief(float(value))}\n{_inner(str(layer))}"
                axes.text(place, -level, text, ha="center", va="center", fontsize=5.5, color=ink, linespacing=1.3)
        _name_blocks(axes, table["layer"].tolist(), depth)
        axes.set(xlim=(-0.7, len(depth) - 0.3), ylim=(-max(depth) - 0.8, -min(depth) + 0.85))
        axes.axis("off")
        bar = figure.colorbar(ScalarMappable(scale, colours), ax=axes, label=meaning, pad=0.01, shrink=0.9)
        bar.outline.set_visible(False)  # type: ignore[operator]
        entitle(figure, title)
    return figure


def _inner(layer: str) -> str:
    """The last part of the path, shortened to fit a box: attentions.0 is a0."""
    parts = layer.split(".")
    return f"{parts[-2][0]}{parts[-1]}" if len(parts) > 1 and parts[-1].isdigit() else parts[-1][:6]


def _name_blocks(axes: matplotlib.axes.Axes, layers: Sequence[str], depth: Sequence[int]) -> None:
    """The block's path above its first layer (below the lowest ones there is nothing in the way)."""
    seen: dict[str, list[int]] = {}
    for place, layer in enumerate(layers):
        block = ".".join(str(layer).split(".")[: 1 if str(layer).startswith("mid") else 2])
        seen.setdefault(block, []).append(place)
    for block, places in seen.items():
        middle = (places[0] + places[-1]) / 2
        axes.text(
            middle, -depth[places[0]] + 0.42, clean(block, 24), ha="center", va="bottom", fontsize=5.5, color=GREY
        )
