"""Layers side by side: the table of layers by models, kinds and replacements, and that of their paired differences."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lesion.analysis.cells import groups
from lesion.analysis.settings import in_order
from lesion.analysis.side_by_side import SIDES, beside, relative_depth
from lesion.report.contents import interval_words
from lesion.report.findings import Findings
from lesion.report.tables import Column, Table, missing, over_words, telling
from lesion.report.text import clean

MEASURES = {"importance": "importance (leave-one-out)", "sufficiency": "sufficiency (only-one)"}
ENDS = ("", " low", " high")
ABSENT = "–"


@dataclass(frozen=True)
class Beside:
    """Settings side by side: a row a layer, columns for each measure and side.

    shared: the columns of settings that all have in common. sides: model, kind and replacement of each. names: what
    tells them apart, in words. table: layer; of models with different layers "depth MODEL" each, in [0, 1]; for each
    measure and side "MEASURE NAME" and the same with " low" and " high". methods: of the intervals.
    """

    shared: dict[str, Any]
    sides: list[tuple[str, ...]]
    names: list[str]
    measures: list[str]
    table: pd.DataFrame
    methods: pd.Series

    @property
    def depths(self) -> list[str]:
        """The models whose depths are columns; none where all have the same layers."""
        return [model for model in in_order(side[0] for side in self.sides) if f"depth {model}" in self.table]

    @property
    def differ(self) -> list[str]:
        """What the sides differ in: model, kind, replacement."""
        return [name for name, values in zip(SIDES, zip(*self.sides, strict=True), strict=True) if len(set(values)) > 1]

    @property
    def alike(self) -> str:
        """What they have in common, in words."""
        common = {name: self.sides[0][place] for place, name in enumerate(SIDES) if name not in self.differ}
        return telling(pd.DataFrame([{**self.shared, **common}]))[1]


def side_by_side(found: Findings) -> list[Beside]:
    """Every group of settings that differ in nothing but model, kind or replacement."""
    made = []
    every = relative_depth(found.frame)
    for shared, part in beside(found.layers):
        sides = in_order(part[list(SIDES)].itertuples(index=False, name=None))
        measures = [name for name in MEASURES if (part["measure"] == name).any()]
        of = {side: _rows(part, side) for side in sides}
        depth = pd.concat([_rows(every, side[:2]) for side in in_order(side[:2] for side in sides)])
        depth = depth[depth["layer"].isin(part["layer"])]
        mean = depth.groupby("layer", sort=False)["depth"].mean().sort_values(kind="stable")
        table = pd.DataFrame({"layer": mean.index})
        if len({frozenset(rows["layer"]) for rows in of.values()}) > 1:
            for model in in_order(side[0] for side in sides):
                at = depth[depth["model"] == model].groupby("layer")["depth"].mean()
                table[f"depth {model}"] = table["layer"].map(at)
        names = _names(sides)
        for measure in measures:
            for side, name in zip(sides, names, strict=True):
                rows = of[side][of[side]["measure"] == measure].set_index("layer")
                for end, column in zip(ENDS, ("mean", "low", "high"), strict=True):
                    table[f"{measure} {name}{end}"] = table["layer"].map(rows[column].astype("float64"))
        made.append(Beside(shared, sides, names, measures, table, part["method"]))
    return made


def _rows(table: pd.DataFrame, side: Sequence[str]) -> pd.DataFrame:
    for name, value in zip(SIDES, side, strict=False):
        table = table[table[name] == value]
    return table


def _names(sides: Sequence[tuple[str, ...]]) -> list[str]:
    differ = [place for place in range(len(SIDES)) if len({side[place] for side in sides}) > 1]
    return [", ".join(clean(side[place], 60) for place in differ) for side in sides]


def tables(found: Findings) -> list[Table]:
    """Layers side by side, each table followed by that of the differences; none where there is one setting."""
    out = []
    every = side_by_side(found)
    for number, one in enumerate(every, 1):
        end = f"--{number}" if len(every) > 1 else ""
        out.append(_layers(found, one, f"side-by-side{end}"))
        differences = found.differences
        for name, value in one.shared.items():
            differences = differences[differences[name].isna() if missing(value) else differences[name] == value]
        if len(differences):
            out.append(_differences(found, one, differences, f"differences{end}"))
    return out


def _layers(found: Findings, one: Beside, stem: str) -> Table:
    note = "Means over seeds, then prompts, 95 % intervals in brackets, the largest of a column in bold."
    if one.depths:
        note += f" Depth: 0 for the first of a model's layers here, 1 for its last; {ABSENT}: it has no such layer."
    note += interval_words(pd.DataFrame({"method": one.methods}), ["method"])
    columns = [Column("layer", "layer", "code")]
    columns += [Column(f"depth {model}", clean(model, 60), over="depth", absent=ABSENT) for model in one.depths]
    for measure in one.measures:
        over = MEASURES[measure] if len(one.measures) > 1 else ""
        columns += [_with_limits(f"{measure} {name}", name, over, best=True) for name in one.names]
    by = " and ".join(one.differ)
    words = _caption(found, one, f"{' and '.join(one.measures).capitalize()} of each layer by {by}.")
    return Table.of(
        stem, f"Layers by {by}", words, columns, one.table, lead=1 + len(one.depths), count="depth", note=note
    )


def _caption(found: Findings, one: Beside, what: str) -> str:
    return over_words(found.frame, what, one.alike, found.metric)


def _with_limits(key: str, head: str, over: str, best: bool = False) -> Column:
    low, high = (f"{key}{end}" for end in ENDS[1:])
    return Column(key, head, "number", low, high, best=best, over=over, absent=ABSENT)


def _differences(found: Findings, one: Beside, table: pd.DataFrame, stem: str) -> Table:
    """Layers by pairs of settings."""
    varying = [name for name in SIDES if table.loc[table[name] != "", name].nunique() > 1]

    def named(record: dict[Hashable, Any]) -> str:
        pair = f"{clean(record['other'], 60)} – {clean(record['one'], 60)}"
        return ", ".join([pair, *(clean(record[name], 60) for name in varying if record[name])])

    wide = one.table[["layer"]][one.table["layer"].isin(table["layer"])].reset_index(drop=True)
    columns = [Column("layer", "layer", "code")]
    table = table.sort_values("measure", key=lambda names: names.map(one.measures.index), kind="stable")
    for _, part in groups(table, ["measure", "between", "one", "other", *SIDES]):
        record, of = part.iloc[0].to_dict(), part.set_index("layer")
        head, over = named(record), MEASURES[record["measure"]] if len(one.measures) > 1 else ""
        key = f"{record['measure']} {head}"
        for end, column in zip(ENDS, ("difference", "low", "high"), strict=True):
            wide[f"{key}{end}"] = wide["layer"].map(of[column].astype("float64"))
        columns.append(_with_limits(key, head, over))
    what = f"Paired differences of {' and '.join(one.measures)} of each layer, over the same prompts and seeds."
    note = "Means over seeds, then prompts; 95 % intervals in brackets, each for itself: some leave out 0 by chance."
    note += interval_words(table, ["method"])
    return Table.of(stem, "Paired differences", _caption(found, one, what), columns, wide, count="depth", note=note)
