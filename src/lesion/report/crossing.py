"""Tables over settings: agreement of ways of measuring, of prompts; noise floor; strengths and windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from lesion.analysis.cells import groups
from lesion.analysis.interactions import by_window
from lesion.analysis.side_by_side import over_replacements
from lesion.report import beside
from lesion.report.contents import interval_words
from lesion.report.findings import Findings
from lesion.report.tables import Column, Table, over_words, telling

MEANINGS = {
    "measure": "importance under leave-one-out and sufficiency under only-one",
    "replacement": "two replacements",
    "model": "models with the same layers",
}


def agreement(found: Findings) -> Table | None:
    """Rank correlations between modes, replacements and models."""
    table = found.agreement
    if table.empty:
        return None
    differ, alike = telling(table)
    present = [MEANINGS[name] for name in MEANINGS if (table["between"] == name).any()]
    what = (
        f"Agreement on the order of layers between {'; '.join(present)}: Spearman's and Kendall's rank correlations "
        "with what 95 % of resamples of prompts and seeds lie between, which is no confidence interval."
    )
    shown = table.assign(measure=table["measure"].astype(object).fillna("both"))
    shown = shown.assign(**{one.name: shown[one.name].fillna("both") for one in differ if one.kind == "text"})
    differ.append(Column("measure", "measure", "text", spare=True))
    columns = [
        Column("a", "one", "text"),
        Column("b", "other", "text"),
        *differ,
        Column("spearman", "Spearman", "number", "spearman_low", "spearman_high"),
        Column("kendall", "Kendall", "number", "kendall_low", "kendall_high"),
        Column("n_layers", "layers", "count"),
        Column("n_prompts", "prompts", "count"),
    ]
    words = over_words(found.frame, what, alike, found.metric)
    return Table.of("agreement", "Agreement of ways of measuring", words, columns, shown, table, lead=2)


def concordance(found: Findings) -> Table | None:
    """Kendall's W across prompts."""
    table = found.concordance
    if table.empty:
        return None
    differ, alike = telling(table)
    what = (
        "Do prompts agree on the order of layers? Kendall's W (0 no agreement, 1 the same order) and Friedman's test."
    )
    columns = [
        *differ,
        Column("measure", "measure", "text"),
        Column("W", "W"),
        Column("p", "p", "p"),
        Column("n_layers", "layers", "count"),
        Column("n_prompts", "prompts", "count"),
    ]
    return Table.of(
        "concordance",
        "Agreement of prompts",
        over_words(found.frame, what, alike, found.metric),
        columns,
        table,
        lead=len(differ) + 1,
    )


def stability(found: Findings) -> Table | None:
    """How far the top survives resampling."""
    table = found.stability
    if table.empty:
        return None
    differ, alike = telling(table)
    what = (
        "The k most important layers when prompts and seeds are resampled: mean share of them that stays in the top k, "
        "and share of resamples with exactly these."
    )
    columns = [
        *differ,
        Column("k", "k", "count"),
        Column("layers", "layers", "code"),
        Column("overlap", "stays"),
        Column("same", "same set"),
        Column("n_prompts", "prompts", "count"),
    ]
    shown = table.assign(layers=table["layers"].str.replace("+", " + "))
    words = over_words(found.frame, what, alike, found.metric)
    return Table.of("stability", "Stability of the top", words, columns, shown, table, len(differ) + 1)


def floor(found: Findings) -> Table | None:
    """The noise floor."""
    table = found.floors
    if table.empty:
        return None
    differ, alike = telling(table)
    what = "Noise floor: similarity of baselines of the same prompt with other seeds, and of other prompts."
    columns = [
        *differ,
        Column("floor", "baselines of", "text"),
        Column("mean", "similarity", "number", "low", "high"),
        Column("n_prompts", "prompts", "count"),
        Column("n_pairs", "pairs", "count"),
    ]
    shown = table.assign(floor=table["floor"].str.replace("_", " "))
    words = over_words(found.frame, what + interval_words(table, ["method"]), alike, found.metric)
    return Table.of("floor", "Noise floor", words, columns, shown, table, len(differ) + 1)


def replacements(found: Findings) -> Table | None:
    """What a layer is worth whatever takes its place."""
    table = over_replacements(found.layers)
    if table.empty:
        return None
    differ, alike = telling(table)
    what = (
        "Layers as a range over replacements: smallest and largest mean, by what, and limits that hold each "
        "replacement's mean with 95 %."
    )
    columns = [
        *differ,
        Column("measure", "measure", "text"),
        Column("layer", "layer", "code"),
        Column("lowest", "smallest"),
        Column("lowest_by", "by", "text"),
        Column("highest", "largest"),
        Column("highest_by", "by", "text", spare=True),
        Column("low", "from"),
        Column("high", "to"),
    ]
    words = over_words(found.frame, what, alike, found.metric)
    return Table.of("range", "Layers over replacements", words, columns, table, lead=len(differ) + 2)


def doses(found: Findings) -> Table | None:
    """Effect against strength."""
    table = found.doses
    if table.empty:
        return None
    differ, alike = telling(table)
    what = (
        "Dose and response: effect over strength of the lesion. Area: under the curve, as a mean effect, with 95 % "
        "interval; bend: area by effect at full strength (0.5 for a straight line, more if weak lesions do most); "
        "rising: share of images whose effect never falls." + interval_words(table, ["method"])
    )
    columns = [
        *differ,
        Column("layer", "layer", "code"),
        Column("full", "at full strength"),
        Column("area", "area", "number", "low", "high"),
        Column("bend", "bend"),
        Column("rising", "rising"),
        Column("n_images", "images", "count"),
    ]
    return Table.of(
        "doses",
        "Dose and response",
        over_words(found.frame, what, alike, found.metric),
        columns,
        table,
        lead=len(differ) + 1,
    )


def windows(found: Findings) -> list[Table]:
    """Layer x window maps, one a setting apart from the window; only where there are several windows."""
    out = []
    for measure, maps in window_maps(found):
        for number, (names, table) in enumerate(maps, 1):
            _, alike = telling(pd.DataFrame([names]))
            what = (
                f"{measure.capitalize()} of each layer by the window of denoising in which it is lesioned (fractions)."
            )
            spans = [str(name) for name in table if "-" in str(name) and str(name)[0].isdigit()]
            columns = [Column("layer", "layer", "code"), *(Column(name, name, best=True) for name in spans)]
            stem = f"windows--{measure}" + (f"--{number}" if len(maps) > 1 else "")
            out.append(
                Table.of(
                    stem,
                    f"Windows of denoising, {measure}",
                    over_words(found.frame, what, alike, found.metric),
                    columns,
                    table,
                )
            )
    return out


def window_maps(found: Findings) -> list[tuple[str, list[tuple[dict[str, Any], pd.DataFrame]]]]:
    """By measure: settings apart from their window, and layers x windows with the setting's columns."""
    out = []
    if found.layers.empty or len(found.layers[["window_start", "window_end"]].drop_duplicates()) < 2:
        return []
    for measure in ("importance", "sufficiency"):
        table = by_window(found.layers, measure)
        place = table.columns.get_loc("layer")
        assert isinstance(place, int)
        spans = list(table.columns[place + 1 :])
        if len(spans) < 2:
            continue
        maps = [
            (names, whole.drop(columns=[name for name in spans if whole[name].isna().all()]))
            for names, whole in groups(table, list(table.columns[:place]))
            if whole[spans].notna().any().sum() > 1
        ]
        if maps:
            out.append((measure, maps))
    return out


def over_settings(found: Findings) -> Sequence[Table]:
    """Every table there is over settings."""
    tables = [what(found) for what in (floor, replacements, agreement, concordance, stability, doses)]
    return [*beside.tables(found), *(table for table in tables if table is not None), *windows(found)]
