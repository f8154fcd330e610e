"""Which images a page opens with: for the layers that its answer names, the baseline beside the image without them."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from lesion.analysis.importance import LEAVE_ONE_OUT, ONLY_ONE, similarity
from lesion.analysis.reading import PREFIX, reading_columns
from lesion.analysis.settings import BASELINE, Setting
from lesion.report.data import inside
from lesion.report.findings import Findings
from lesion.report.text import clean, number

PAIRS = 3


@dataclass(frozen=True)
class Pair:
    """A baseline and a lesioned image by their places in the frame. words: what is seen; broken: aspects it lost."""

    baseline: int
    lesioned: int
    layer: str
    prompt: str
    words: str
    broken: list[str]


def pairs(found: Findings, setting: Setting, most: int = PAIRS) -> list[Pair]:
    """The layers that the answer names, each with the image of median change, of prompts that differ where they can.

    The most important layer; then one that breaks an aspect read from pixels, or the next by importance; then the most
    sufficient one alone; further ones by importance. Only images that are ok and have a file.
    """
    part = found.rows(setting)
    part = part.assign(_similarity=similarity(part, found.metric), _place=part.index)
    shown = part[(part["status"] == "ok") & (part["image"].fillna("").map(inside) != "") & part["_similarity"].notna()]
    plain = shown[shown["selection"] == BASELINE].drop_duplicates(["prompt_id", "seed"])
    plain = plain.set_index(["prompt_id", "seed"])
    table = found.summary(setting)
    out: list[Pair] = []
    used: set[str] = set()
    for selection, layer in _wanted(found, setting, table):
        of = shown[(shown["selection"] == selection) & (shown["layer"] == layer)]
        of = of[pd.MultiIndex.from_frame(of[["prompt_id", "seed"]]).isin(plain.index)]
        if of.empty:
            continue
        gap = (of["_similarity"] - of["_similarity"].median()).abs()
        fresh = gap[~of["prompt_id"].isin(used)]
        row = of.loc[(fresh if len(fresh) else gap).sort_values(kind="stable").index[:1]].iloc[0]
        used.add(row["prompt_id"])
        before = plain.loc[(row["prompt_id"], row["seed"])]
        broken = [name.removeprefix(PREFIX) for name in reading_columns(part) if before[name] == 1 and row[name] == 0]
        verb = "without" if selection == LEAVE_ONE_OUT else "with only"
        words = f"{verb} {clean(layer)}: change {number(1 - float(row['_similarity']), 2)}"
        words += f", {' and '.join(broken)} lost" if broken else ""
        out.append(Pair(int(before["_place"]), int(row["_place"]), clean(layer), clean(row["prompt"]), words, broken))
        if len(out) == most:
            break
    return out


def _wanted(found: Findings, setting: Setting, table: pd.DataFrame) -> list[tuple[str, str]]:
    """Selections and layers in the order in which they are worth a picture."""
    if table.empty:
        return []
    ranked = table[table["importance"].notna()].sort_values("importance", ascending=False, kind="stable")
    ranked = ranked[ranked["effect"] != "none"] if (ranked["effect"] != "none").any() else ranked
    drops = found.of("reading", setting)
    broken = drops[drops["low"] > 0].sort_values("drop", ascending=False) if len(drops) else drops
    breaking = broken["layer"].tolist() if len(broken) else []
    out = [(LEAVE_ONE_OUT, layer) for layer in dict.fromkeys([*ranked["layer"].head(1), *breaking, *ranked["layer"]])]
    alone = table.dropna(subset="sufficiency").sort_values("sufficiency", ascending=False, kind="stable")["layer"]
    first = [(ONLY_ONE, layer) for layer in alone]
    return [*out[:2], *first[:1], *out[2:], *first[1:]]
