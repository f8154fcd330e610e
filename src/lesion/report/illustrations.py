"""Which figures a report has: written only where the data have something for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lesion.analysis.aspects import aspect_table
from lesion.analysis.cells import groups
from lesion.analysis.importance import LEAVE_ONE_OUT, ONLY_ONE, layer_by_prompt
from lesion.analysis.reading import reading_table
from lesion.analysis.settings import Setting, slug
from lesion.processes import Processes
from lesion.report import beside, curves, figures
from lesion.report.crossing import window_maps
from lesion.report.findings import Findings
from lesion.report.pictures import Drawn
from lesion.report.profile import profile
from lesion.report.tables import missing, telling
from lesion.report.text import clean, number, short_names

SETTINGS = 4  # with every figure, unless all are asked for; figures take most of the time of a report
ALIKE = "; the same numbers are in the tables"
_Figure = tuple[Callable[[], Figure], str, str]  # what draws it, stem of its files, text for those who cannot see it
SCATTERS = 12  # figures that compare two replacements or models


def of_setting(
    folder: Path,
    found: Findings,
    setting: Setting,
    processes: Processes,
    clusters: bool = False,
    first: bool = False,
) -> Drawn:
    """Figures of one setting as .png and .pdf, each with a text alternative; `first`: only that of the layers."""
    drawn = Drawn([], 0)
    title, metric, table = clean(setting.label), found.metric, found.summary(setting)

    def add(stem: str, text: str, build: Callable[..., Figure | None], *arguments: Any) -> None:
        call = figures.drawing(processes, folder / f"{stem}--{setting.slug}", build, *arguments)
        drawn.calls.append((call, f"{text}{ALIKE}"))

    if len(table):
        text = "Importance and sufficiency by layer with 95 % intervals, in depth order"
        add("layers", text, figures.layer_figure, table, title, metric, found.control(setting))
    if first:
        return drawn
    if len(table) and table["importance"].notna().any():
        meaning = f"importance: 1 - {metric}"
        text = "The UNet's layers coloured by importance"
        add("profile", text, profile, table, "importance", meaning, title)
    for selection, name, meaning in (
        (LEAVE_ONE_OUT, "importance", f"importance: 1 - {metric}"),
        (ONLY_ONE, "sufficiency", f"sufficiency: {metric}"),
    ):
        by_prompt = layer_by_prompt(found.rows(setting), metric, selection)
        if by_prompt.size:
            zero = selection == LEAVE_ONE_OUT
            texts = found.frame.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"]
            by_prompt = by_prompt.rename(columns=short_names({one: str(texts[one]) for one in by_prompt.columns}))
            text = f"Heat map of layers by prompts, {name}"
            add(f"heatmap--{selection}", text, figures.heat_map, by_prompt, meaning, title, zero)
            if clusters:
                text, table_ = f"Heat map of layers by prompts in clusters, {name}", figures.clustered(by_prompt)
                add(f"heatmap-clustered--{selection}", text, figures.heat_map, table_, meaning, title, zero)
    aspects = found.of("aspects", setting)
    if len(aspects) and (aspects["measure"] == "importance").any():
        meaning, by_aspect = f"importance: 1 - {metric}", aspect_table(aspects)
        map_of = partial(figures.heat_map, meaning=meaning, title=title, columns="aspect")
        add("aspects", "Heat map of layers by aspects", map_of, by_aspect)
        if clusters:
            text = "Heat map of layers by aspects in clusters"
            add("aspects-clustered", text, map_of, figures.clustered(by_aspect))
    for name, value, meaning, text in (
        ("reading", "drop", "share of images that its absence breaks", "what leaving a layer out breaks"),
        ("alone", "share", "share of images that show it", "what a layer alone brings through"),
    ):
        read = found.of(name, setting)
        if len(read) and read[value].notna().any():
            map_of = partial(figures.heat_map, meaning=meaning, title=title, columns="aspect, read from pixels")
            add(name, f"Heat map of {text}, by aspect read from pixels", map_of, reading_table(read, value))
    if len(table) and (table["importance"].notna() & table["sufficiency"].notna()).sum() > 1:
        labels = (f"importance: 1 - {metric} (leave-one-out)", f"sufficiency: {metric} (only-one)")
        words = f"{title}\n{_agreed(found.of('agreement', setting), 'measure')}".strip()
        text, names = "Importance against sufficiency by layer", ("importance", "sufficiency")
        add("modes", text, curves.scatter, table, table, names, labels, words, False)
    cumulative = found.of("cumulative", setting)
    if len(cumulative):
        text = "Effect against the number of lesioned layers"
        add("cumulative", text, curves.orders, cumulative, title, metric)
    return drawn


def _agreed(agreement: pd.DataFrame, between: str) -> str:
    """The rank correlations in words; "" where there are none."""
    one = agreement[agreement["between"] == between] if len(agreement) else agreement
    if len(one) != 1 or missing(one["spearman"].iloc[0]):
        return ""
    return f"Spearman {number(float(one['spearman'].iloc[0]), 2)}, Kendall {number(float(one['kendall'].iloc[0]), 2)}"


def over_settings(folder: Path, found: Findings, processes: Processes) -> Drawn:
    """Figures over settings: two replacements or models against each other, strengths, windows."""
    every = [*_besides(found), *_scatters(found), *_doses(found), *_windows(found)]
    return Drawn(
        [(figures.drawing(processes, folder / stem, build), f"{text}{ALIKE}") for build, stem, text in every],
        len(every),
    )


def _besides(found: Findings) -> list[_Figure]:
    """Layers by models, kinds and replacements; of more than a figure of points can hold, a heat map a measure."""
    out: list[_Figure] = []
    every = beside.side_by_side(found)
    for number_, one in enumerate(every[:SETTINGS], 1):
        end = f"--{number_}" if len(every) > 1 else ""
        text = f"Layers by {' and '.join(one.differ)}"
        if len(one.names) <= len(figures.COLOURS):
            build = partial(curves.side_by_side, one, found.metric)
            out.append((build, f"side-by-side{end}", f"{text}, with 95 % intervals"))
            continue
        for measure in one.measures:
            table = one.table.set_index("layer")[[f"{measure} {name}" for name in one.names]].set_axis(
                one.names, axis=1
            )
            meaning = f"{measure}: {'1 - ' if measure == 'importance' else ''}{found.metric}"
            by = " and ".join(one.differ)
            build = partial(figures.heat_map, table, meaning, one.alike, measure == "importance", by)
            out.append((build, f"side-by-side--{measure}{end}", f"{text}: heat map of {measure}"))
    return out


def _scatters(found: Findings) -> list[_Figure]:
    table = found.agreement
    if table.empty:
        return []
    out: list[_Figure] = []
    table = table[table["between"].isin(("replacement", "model")) & (table["measure"] == "importance")]
    for record in table.head(SCATTERS).to_dict("records"):
        of = found.layers[found.layers["measure"] == "importance"]
        keys = [str(key) for key in of.columns[: of.columns.get_loc("measure")]]
        shared = {key: record[key] for key in keys if key in record and key != record["between"]}
        sides = []
        for value in (record["a"], record["b"]):
            wanted: dict[str, Any] = {**shared, str(record["between"]): value}
            sides.append(_matching(of, wanted))
        labels = tuple(f"importance, {record['between']} {clean(value, 40)}" for value in (record["a"], record["b"]))
        title = " ".join(str(record[key]) for key in ("model", "replacement") if isinstance(record.get(key), str))
        words = f"{clean(title)}\n{_agreed(pd.DataFrame([record]), str(record['between']))}".strip()
        columns = {"mean": "importance", "low": "importance_low", "high": "importance_high"}
        one, other = (side.rename(columns=columns) for side in sides)
        names = ("importance", "importance")
        build = partial(curves.scatter, one, other, names, (labels[0], labels[1]), words, True)
        places = [str(value) for value in shared.values() if not missing(value)]
        stem = "--".join([f"{slug(str(record['a']))}-vs-{slug(str(record['b']))}", *map(slug, places[:1])])
        if any(stem == name for _, name, _ in out):
            stem += f"--{len(out) + 1}"
        out.append((build, stem, f"Importance of layers by {record['between']}: {labels[0]} and {labels[1]}"))
    return out


def _matching(table: pd.DataFrame, wanted: dict[str, Any]) -> pd.DataFrame:
    for name, value in wanted.items():
        column = table[str(name)]
        table = table[column.isna() if missing(value) else column == value]
    return table


def _doses(found: Findings) -> list[_Figure]:
    if found.doses.empty:
        return []
    out: list[_Figure] = []
    table = found.layers[found.layers["measure"] == "importance"]
    keys = [name for name in table.columns[: table.columns.get_loc("measure")] if name != "strength"]
    for number_, (names, part) in enumerate(groups(table, keys), 1):
        if part["strength"].nunique() > 1:
            _, alike = telling(pd.DataFrame([names]))
            label = f"effect: 1 - {found.metric}"
            build = partial(curves.lines, part, "strength", "strength of the lesion", label, clean(alike), True)
            out.append((build, f"doses--{number_}", "Effect of each layer against the strength of the lesion"))
    return out


def _windows(found: Findings) -> list[_Figure]:
    out: list[_Figure] = []
    for measure, maps in window_maps(found):
        for number_, (names, wide) in enumerate(maps, 1):
            _, alike = telling(pd.DataFrame([names]))
            place = list(wide.columns).index("layer")
            table = wide.iloc[:, place:].set_index("layer")
            meaning = f"{measure}: {'1 - ' if measure == 'importance' else ''}{found.metric}"
            stem = f"windows--{measure}--{number_}"
            title, zero = clean(alike), measure == "importance"
            build = partial(figures.heat_map, table, meaning, title, zero, "window of denoising")
            out.append((build, stem, f"Heat map of layers by windows of denoising, {measure}"))
            part = _matching(found.layers[found.layers["measure"] == measure], names)
            part = part[(part["window_start"] != 0) | (part["window_end"] != 1)]
            part = part.assign(middle=(part["window_start"] + part["window_end"]) / 2)
            if part["middle"].nunique() > 1:
                build = partial(
                    curves.lines, part, "middle", "middle of the window (share of steps)", meaning, title, False
                )
                out.append((build, f"window-curves--{measure}--{number_}", f"{measure.capitalize()} along denoising"))
    return out
