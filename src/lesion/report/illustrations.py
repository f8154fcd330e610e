"""Which figures a report has: written only where the data have something for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lesion.analysis.aspects import aspect_table
from lesion.analysis.cells import groups
from lesion.analysis.importance import LEAVE_ONE_OUT, ONLY_ONE, layer_by_prompt
from lesion.analysis.reading import reading_table
from lesion.analysis.settings import Setting, slug
from lesion.report import beside, curves, figures
from lesion.report.crossing import window_maps
from lesion.report.findings import Findings
from lesion.report.profile import profile
from lesion.report.tables import missing, telling
from lesion.report.text import clean, number, short_names

Drawn = list[tuple[Path, str]]  # and the text for those who cannot see it
SETTINGS = 4  # with every figure, unless all are asked for; figures take most of the time of a report
SCATTERS = 12  # figures that compare two replacements or models


def of_setting(folder: Path, found: Findings, setting: Setting, clusters: bool = False, first: bool = False) -> Drawn:
    """Figures of one setting as .png and .pdf, each with a text alternative; `first`: only that of the layers."""
    drawn: Drawn = []
    title, metric, table = clean(setting.label), found.metric, found.summary(setting)

    def add(figure: Figure | None, stem: str, text: str) -> None:
        if figure is not None:
            full = f"{text}; the same numbers are in the tables"
            drawn.extend((path, full) for path in figures.save(figure, folder / f"{stem}--{setting.slug}"))

    if len(table):
        figure = figures.layer_figure(table, title, metric, found.control(setting))
        add(figure, "layers", "Importance and sufficiency by layer with 95 % intervals, in depth order")
    if first:
        return drawn
    if len(table) and table["importance"].notna().any():
        meaning = f"importance: 1 - {metric}"
        add(profile(table, "importance", meaning, title), "profile", "The UNet's layers coloured by importance")
    for selection, name, meaning in (
        (LEAVE_ONE_OUT, "importance", f"importance: 1 - {metric}"),
        (ONLY_ONE, "sufficiency", f"sufficiency: {metric}"),
    ):
        by_prompt = layer_by_prompt(found.rows(setting), metric, selection)
        if by_prompt.size:
            zero = selection == LEAVE_ONE_OUT
            texts = found.frame.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"]
            by_prompt = by_prompt.rename(columns=short_names({one: str(texts[one]) for one in by_prompt.columns}))
            figure = figures.heat_map(by_prompt, meaning, title, zero)
            add(figure, f"heatmap--{selection}", f"Heat map of layers by prompts, {name}")
            if clusters:
                figure = figures.heat_map(figures.clustered(by_prompt), meaning, title, zero)
                add(figure, f"heatmap-clustered--{selection}", f"Heat map of layers by prompts in clusters, {name}")
    aspects = found.of("aspects", setting)
    if len(aspects) and (aspects["measure"] == "importance").any():
        meaning, by_aspect = f"importance: 1 - {metric}", aspect_table(aspects)
        add(figures.heat_map(by_aspect, meaning, title, columns="aspect"), "aspects", "Heat map of layers by aspects")
        if clusters:
            figure = figures.heat_map(figures.clustered(by_aspect), meaning, title, columns="aspect")
            add(figure, "aspects-clustered", "Heat map of layers by aspects in clusters")
    for name, value, meaning, text in (
        ("reading", "drop", "share of images that its absence breaks", "what leaving a layer out breaks"),
        ("alone", "share", "share of images that show it", "what a layer alone brings through"),
    ):
        read = found.of(name, setting)
        if len(read) and read[value].notna().any():
            figure = figures.heat_map(reading_table(read, value), meaning, title, columns="aspect, read from pixels")
            add(figure, name, f"Heat map of {text}, by aspect read from pixels")
    if len(table) and (table["importance"].notna() & table["sufficiency"].notna()).sum() > 1:
        labels = (f"importance: 1 - {metric} (leave-one-out)", f"sufficiency: {metric} (only-one)")
        words = f"{title}\n{_agreed(found.of('agreement', setting), 'measure')}".strip()
        figure = curves.scatter(table, table, ("importance", "sufficiency"), labels, words, False)
        add(figure, "modes", "Importance against sufficiency by layer")
    cumulative = found.of("cumulative", setting)
    if len(cumulative):
        add(curves.orders(cumulative, title, metric), "cumulative", "Effect against the number of lesioned layers")
    return drawn


def _agreed(agreement: pd.DataFrame, between: str) -> str:
    """The rank correlations in words; "" where there are none."""
    one = agreement[agreement["between"] == between] if len(agreement) else agreement
    if len(one) != 1 or missing(one["spearman"].iloc[0]):
        return ""
    return f"Spearman {number(float(one['spearman'].iloc[0]), 2)}, Kendall {number(float(one['kendall'].iloc[0]), 2)}"


def over_settings(folder: Path, found: Findings) -> Drawn:
    """Figures over settings: two replacements or models against each other, strengths, windows."""
    drawn: Drawn = []

    def add(figure: Figure, stem: str, text: str) -> None:
        full = f"{text}; the same numbers are in the tables"
        drawn.extend((path, full) for path in figures.save(figure, folder / stem))

    for figure, stem, text in [*_besides(found), *_scatters(found), *_doses(found), *_windows(found)]:
        add(figure, stem, text)
    return drawn


def _besides(found: Findings) -> list[tuple[Figure, str, str]]:
    """Layers by models, kinds and replacements; of more than a figure of points can hold, a heat map a measure."""
    out = []
    every = beside.side_by_side(found)
    for number_, one in enumerate(every[:SETTINGS], 1):
        end = f"--{number_}" if len(every) > 1 else ""
        text = f"Layers by {' and '.join(one.differ)}"
        if len(one.names) <= len(figures.COLOURS):
            out.append((curves.side_by_side(one, found.metric), f"side-by-side{end}", f"{text}, with 95 % intervals"))
            continue
        for measure in one.measures:
            table = one.table.set_index("layer")[[f"{measure} {name}" for name in one.names]].set_axis(
                one.names, axis=1
            )
            meaning = f"{measure}: {'1 - ' if measure == 'importance' else ''}{found.metric}"
            figure = figures.heat_map(table, meaning, one.alike, measure == "importance", " and ".join(one.differ))
            out.append((figure, f"side-by-side--{measure}{end}", f"{text}: heat map of {measure}"))
    return out


def _scatters(found: Findings) -> list[tuple[Figure, str, str]]:
    table = found.agreement
    if table.empty:
        return []
    out: list[tuple[Figure, str, str]] = []
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
        figure = curves.scatter(one, other, ("importance", "importance"), (labels[0], labels[1]), words, True)
        places = [str(value) for value in shared.values() if not missing(value)]
        stem = "--".join([f"{slug(str(record['a']))}-vs-{slug(str(record['b']))}", *map(slug, places[:1])])
        if any(stem == name for _, name, _ in out):
            stem += f"--{len(out) + 1}"
        out.append((figure, stem, f"Importance of layers by {record['between']}: {labels[0]} and {labels[1]}"))
    return out


def _matching(table: pd.DataFrame, wanted: dict[str, Any]) -> pd.DataFrame:
    for name, value in wanted.items():
        column = table[str(name)]
        table = table[column.isna() if missing(value) else column == value]
    return table


def _doses(found: Findings) -> list[tuple[Figure, str, str]]:
    if found.doses.empty:
        return []
    out = []
    table = found.layers[found.layers["measure"] == "importance"]
    keys = [name for name in table.columns[: table.columns.get_loc("measure")] if name != "strength"]
    for number_, (names, part) in enumerate(groups(table, keys), 1):
        if part["strength"].nunique() > 1:
            _, alike = telling(pd.DataFrame([names]))
            label = f"effect: 1 - {found.metric}"
            figure = curves.lines(part, "strength", "strength of the lesion", label, clean(alike), True)
            out.append((figure, f"doses--{number_}", "Effect of each layer against the strength of the lesion"))
    return out


def _windows(found: Findings) -> list[tuple[Figure, str, str]]:
    out = []
    for measure, maps in window_maps(found):
        for number_, (names, wide) in enumerate(maps, 1):
            _, alike = telling(pd.DataFrame([names]))
            place = list(wide.columns).index("layer")
            table = wide.iloc[:, place:].set_index("layer")
            meaning = f"{measure}: {'1 - ' if measure == 'importance' else ''}{found.metric}"
            stem = f"windows--{measure}--{number_}"
            figure = figures.heat_map(table, meaning, clean(alike), measure == "importance", "window of denoising")
            out.append((figure, stem, f"Heat map of layers by windows of denoising, {measure}"))
            part = _matching(found.layers[found.layers["measure"] == measure], names)
            part = part[(part["window_start"] != 0) | (part["window_end"] != 1)]
            part = part.assign(middle=(part["window_start"] + part["window_end"]) / 2)
            if part["middle"].nunique() > 1:
                figure = curves.lines(
                    part, "middle", "middle of the window (share of steps)", meaning, clean(alike), False
                )
                out.append((figure, f"window-curves--{measure}--{number_}", f"{measure.capitalize()} along denoising"))
    return out
