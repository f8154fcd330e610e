"""What an attribution shows: its certificate in sentences, a table, and a figure of estimates against real lesions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lesion.errors import counted
from lesion.report import figures
from lesion.report.text import code, number, short_layer
from lesion.store.files import atomically

STEM = "attribution"
CERTIFICATE = "certificate.json"


def certificate_lines(data: Mapping[str, Any]) -> list[str]:
    """What a certificate says, in sentences. data: as certificate.json has it."""

    def of(name: str, data: Mapping[str, Any] = data) -> str:
        one = data[name]
        if one["value"] is None:
            return "n/a"
        limits = "" if one["low"] is None else f" [{one['low']:.2f}, {one['high']:.2f}]"
        return f"{one['value']:.2f}{limits}"

    def plainly(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.2f}"

    top, rest, made = data["top"], data["lesions"] - data["top"], data["top"] + data["sampled"]
    share, apart = data["share_of_grid"], data["held_out"]
    said = [
        f"attribution of {data['lesions']} lesions by gradients, certified by {made} that were made: the {top} ranked "
        f"highest and {data['sampled']} of the others at random; layers are ranked among these {made}",
        f"  estimate and importance in the complete grid, as these show it: Spearman {of('spearman')}, "
        f"Kendall {of('kendall')}",
        f"  of the {top} ranked highest, {of('precision')} are among the {top} most important",
        f"  at most {data['missed']} of the {rest} others have an importance of {data['threshold']:.2g} or more "
        f"({100 * data['confidence']:g} % confidence), and {data['important_found']} of the {top}",
        *(
            f"  change of {name}: Spearman {of('spearman', one)}, its sign right for {of('same_sign', one)} of them; "
            f"at most {one['missed']} of the {rest} others change it by {one['threshold']:.2g} or more"
            for name, one in data["signed"].items()
        ),
        f"  estimates took {data['estimates']['seconds']:.0f} s, {100 * share['estimates']:.1f} % of what the complete "
        f"grid's {data['grid']['images']} images take; with the images made {100 * share['in_all']:.1f} %",
    ]
    if apart:
        said[-1:] = [
            f"  by {counted(apart['prompts'], 'prompt')} on which no candidate was lesioned: Spearman "
            f"{plainly(apart['spearman'])}, {plainly(apart['precision'])} of the {top} ranked highest",
            f"  {data['candidates']['images']} images of candidates rank them; with these the estimates took "
            f"{100 * share['order']:.1f} %",
            said[-1],
        ]
    return said


def notes(data: Mapping[str, Any]) -> list[str]:
    """The same as full sentences."""
    lines = [line.strip() for line in certificate_lines(data)]
    return [f"{line[0].upper()}{line[1:]}." for line in lines]


def kept_notes(folder: Path) -> list[str]:
    """Those of a run folder that has a certificate; none where it has none that can be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return notes(json.loads((folder / CERTIFICATE).read_text(encoding="utf-8")))
    return []


def _value(value: Any) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else number(value, 4)


def drawn(folder: Path, table: pd.DataFrame, data: Mapping[str, Any]) -> list[Path]:
    """Write the table and the figure into a run folder; the paths.

    table: of all lesions, as attribution.parquet has it. data: its certificate.
    """
    tables, pictures = folder / "tables", folder / "figures"
    tables.mkdir(exist_ok=True)
    pictures.mkdir(exist_ok=True)
    csv, text = tables / f"{STEM}.csv", tables / f"{STEM}.md"
    with atomically(csv) as temporary:
        table.sort_values("rank").to_csv(temporary, index=False)
    with atomically(text) as temporary:
        temporary.write_text(_markdown(table, data), encoding="utf-8")
    return [csv, text, *figures.save(figure(table, data), pictures / STEM)]


def _markdown(table: pd.DataFrame, data: Mapping[str, Any]) -> str:
    """The certificate, and the lesions that were made with both values."""
    made = table[table["lesioned"]].sort_values("rank")
    signed = [f"{name}_{side}" for name in data["signed"] for side in ("estimate", "real")]
    rows = [
        f"| {one.rank} | {code(one.layer)} | {one.window_start:g} to {one.window_end:g} | {one.branch} | {one.chosen} "
        f"| {one.screened} | {_value(one.estimate)} | {_value(one.adjusted)} | {_value(one.real)} |"
        + "".join(f" {_value(getattr(one, name))} |" for name in signed)
        for one in made.itertuples()
    ]
    head = [
        "| rank | layer | window | branch | made as | screened on | estimate | adjusted | importance |"
        + "".join(f" {name.replace('_', ' ')} |" for name in signed),
        "| ---: | --- | --- | --- | --- | ---: | ---: | ---: | ---: |" + " ---: |" * len(signed),
    ]
    return "\n".join([*notes(data), "", *head, *rows, ""])


def figure(table: pd.DataFrame, data: Mapping[str, Any]) -> Figure:
    """The lesions that were made: estimates against importance, the top ones and the sample apart."""
    made = table[table["lesioned"]]
    with figures.styled():
        found = figures.blank(figures.SINGLE, figures.SINGLE)
        axes = found.add_subplot()
        least = float(made.loc[made["estimate"] > 0, "estimate"].min()) if (made["estimate"] > 0).any() else 1.0
        for name, colour, marker in (("top", figures.VERMILION, "o"), ("sample", figures.BLUE, "s")):
            some = made[made["chosen"] == name]
            label = "ranked highest" if name == "top" else "sample of the others"
            axes.plot(np.maximum(some["estimate"], least), some["real"], marker, color=colour, label=label, ls="none")
        for one in made.nlargest(3, "real").to_dict("records"):
            axes.annotate(short_layer(str(one["layer"])), (max(one["estimate"], least), one["real"]), (-4, 3),
                          textcoords="offset points", fontsize=5.5, ha="right")  # fmt: skip
        axes.axhline(data["threshold"], color=figures.GREY, linestyle="--", linewidth=0.9)
        axes.set(xscale="log", xlabel="estimate, 1/2 |J|\u00b2", ylabel="importance of the lesion made")
        axes.xaxis.set_major_formatter("{x:g}")  # the style draws no maths
        axes.legend(loc="upper left")
    return found
