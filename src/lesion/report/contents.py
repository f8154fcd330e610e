"""The tables of one setting: which there are, their columns and captions. `crossing` has those over settings."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from lesion.analysis.aspects import aspect_table
from lesion.analysis.bootstrap import ENOUGH, SMALL
from lesion.analysis.cells import reasons
from lesion.analysis.importance import LEAVE_ONE_OUT, ONLY_ONE, layer_by_prompt, status_counts
from lesion.analysis.reading import RIGHT, reading_table
from lesion.analysis.settings import Setting
from lesion.report.findings import NO_FLOOR, Findings
from lesion.report.tables import Cell, Column, Table, caption, missing
from lesion.report.text import clean, number

WIDEST = 200  # prompts side by side: LaTeX would split further ones over hundreds of pages
CORRECTED = "Holm-corrected over all tests of this report"
STARS = "* p < 0.05, ** p < 0.01, *** p < 0.001"
NO_EFFECT_TEXT = {"none": "no effect", "yes": "yes", "n/a": "n/a"}
METHOD_WORDS = {
    "bootstrap-t": "bootstrap-t over prompts",
    "bca": "BCa bootstrap over prompts",
    "t": "Student's t over prompts",
    "jackknife": "delete-one-prompt jackknife",
    "bounded": "Gaffke's limits of bounded values where few prompts hold the mean",
}
WIDENED_WORDS = {"seeds": "widened for seeds that all prompts share", "orders": "for the orders drawn"}
COUNTS = [
    Column("n_images", "images", "count"),
    Column("n_invalid", "invalid", "count", spare=True),
    Column("n_failed", "failed", "count", spare=True),
    Column("n_unscored", "unscored", "count", spare=True),
]


def interval_words(table: pd.DataFrame, columns: Iterable[str]) -> str:
    """How the limits were found, by the columns of methods, and of those that there are none of the reasons."""
    used = pd.concat([table[name] for name in columns if name in table] or [pd.Series(dtype=object)]).astype(str)
    parts = used[~used.str.startswith("n/a")].str.split("+")
    named = set(parts.explode().dropna())
    found = [words for method, words in METHOD_WORDS.items() if method in named]
    found += [words for what, words in WIDENED_WORDS.items() if what in named]
    why = reasons(used).unique()
    words = f" Intervals: {', '.join(found)}." if found else ""
    return words + (f" n/a: {', '.join(why)}." if len(why) else "")


def layers(found: Findings, setting: Setting) -> Table | None:
    """All that is said of each layer."""
    table = found.summary(setting)
    if table.empty:
        return None
    has_floor = table["other_seeds"].notna().any()
    table["effect_text"] = table["effect"].map(NO_EFFECT_TEXT)
    words = (
        "Importance: 1 - similarity, leave-one-out; sufficiency: similarity, only-one. Means over seeds, then prompts, "
        "with 95 % intervals; ranks with 95 % limits that hold for all layers together: rank by importance, typical "
        "rank one place behind the layers that change the image more on most prompts. "
    )
    words += ranks_words(table)
    if has_floor:
        words += (
            f"vs: importance divided by what another seed changes (similarity {_mean(table, 'other_seeds')})"
            f" or another prompt ({_mean(table, 'other_prompts')}), with 95 % limits, those of both parts apart where "
            f"few prompts decide. p: paired test of importance against that of another seed, which can say more, "
            f"{CORRECTED}; * above, † below it with p < 0.05, two 0.01, three 0.001. "
        )
    else:
        words += f"Importance vs another seed or prompt and p are n/a: {NO_FLOOR}. "
    fits = table["adherence_lost"].notna().any()
    if fits:
        words += (
            f"Lost: how much less images fit their prompts ({fit_words(found, setting)[0]}), paired; below 0 they fit "
            f"better; * above, † below 0 with p < 0.05, {CORRECTED}, two 0.01, three 0.001. "
        )
    words += "Bold: largest."
    counted = _images(table)
    if len(counted) > 1:
        words += " n: valid images of leave-one-out (out) and of only-one (only)."
    words += interval_words(table, [str(name) for name in table if str(name).endswith("method")])
    columns = [
        Column("layer", "layer", "code"),
        Column("rank", "rank", "count", "rank_low", "rank_high", up=True),
        Column("typical_rank", "typical rank", "count", "typical_low", "typical_high", up=True),
        _measure("importance", "importance"),
        _measure("normalised_other_seeds", "vs another seed", "p_floor", "beyond_floor", spare=True, kind="ratio"),
        _measure("normalised_other_prompts", "vs another prompt", spare=True, kind="ratio"),
        Column("p_floor", "p", "p", spare=True),
        *([_measure("adherence_lost", "lost", "p_adherence", "adherence_lost", spare=True)] if fits else []),
        _measure("sufficiency", "sufficiency", spare=True),
        *counted,
        *[one for one in COUNTS[1:] if one.name != "n_unscored" or table["n_unscored"].any()],
        Column("effect_text", "effect", "text", spare=True),
        *([Column("stopped", "stopped", "text", spare=True)] if "stopped" in table and table["stopped"].any() else []),
    ]
    what = "Importance and sufficiency of each layer, in depth order."
    title = caption(found.rows(setting), setting, what, found.metric)
    raw = table.drop(columns="effect_text")
    return Table.of(f"layers--{setting.slug}", "Layer table", title, columns, table, raw, count="depth", note=words)


def compact(found: Findings, setting: Setting) -> Table | None:
    """Layers with importance and sufficiency alone, for one column of a paper; statistics stand in a note."""
    table = found.summary(setting)
    measures = [name for name in ("importance", "sufficiency") if len(table) and table[name].notna().any()]
    if not measures:
        return None
    columns = [Column("layer", "layer", "code"), *(_measure(name, name) for name in measures)]
    methods = interval_words(table, [f"{name}_method" for name in measures])
    note = (
        f"Importance: 1 - {found.metric} with the layer lesioned; sufficiency: {found.metric} with all others so. "
        f"Means over seeds, then prompts, 95 % intervals in brackets, largest in bold.{methods}"
    )
    part = found.rows(setting)
    raw = table[["layer", *(f"{name}{end}" for name in measures for end in ("", "_low", "_high"))]]
    words = caption(part, setting, f"{' and '.join(measures).capitalize()} of each layer.", found.metric)
    return Table.of(
        f"layers-compact--{setting.slug}", "Layers, compact", words, columns, table, raw, count="depth", note=note
    )


def ranks_words(table: pd.DataFrame) -> str:
    """What the ranks of `Findings.summary` rest on where that is not all images; "" where it is."""
    if not len(table) or not table["n_left_out"].iloc[0] or table["importance"].isna().all():
        return ""
    prompts, images = (int(table[name].iloc[0]) for name in ("n_rank_prompts", "n_left_out"))
    if not prompts:
        return "No ranks: no image is valid for every layer. "
    named = f"{prompts} {'prompt' if prompts == 1 else 'prompts'}"
    left_out = f"{images} {'image' if images == 1 else 'images'} left out"
    return f"Ranks rest on the {named} ({left_out}) that every layer has. "


def _images(table: pd.DataFrame) -> list[Column]:
    """How many images are behind each measure; rounds of a budget may take another number for each."""
    measures = [name for name in ("n_importance", "n_sufficiency") if table[name].any()]
    if len(measures) < 2:
        return COUNTS[:1]
    return [
        Column("n_importance", "n, out", "count"),
        Column("n_sufficiency", "n, only", "count"),
    ]


def _measure(
    name: str, head: str, marks: str = "", sign: str = "", spare: bool = False, kind: str = "number"
) -> Column:
    return Column(name, head, kind, f"{name}_low", f"{name}_high", marks, sign, best=True, spare=spare)


def _mean(table: pd.DataFrame, name: str) -> str:
    return number(float(table[name].mean()))


def prompts(found: Findings, setting: Setting) -> list[Table]:
    """Layers by prompts, one table a selection; of more than WIDEST prompts for machines alone."""
    out = []
    for selection, what in ((LEAVE_ONE_OUT, "Importance (leave-one-out)"), (ONLY_ONE, "Sufficiency (only-one)")):
        part = found.rows(setting)
        table = layer_by_prompt(part, found.metric, selection)
        if table.empty:
            continue
        words = caption(part, setting, f"{what} of each layer for each prompt, mean over seeds.", found.metric)
        names = [str(name) for name in table.columns]
        raw = table.set_axis(names, axis=1).reset_index(names="layer" if "layer" not in names else "layer path")
        heads = list(raw.columns)
        columns = [Column(heads[0], "layer", "code"), *(Column(name, name) for name in heads[1:])]
        title = f"Layers by prompts, {selection.replace('_', '-')}"
        stem = f"prompts--{selection}--{setting.slug}"
        wide = len(names) > WIDEST
        out.append(Table(stem, words, columns, raw) if wide else Table.of(stem, title, words, columns, raw))
    return out


def aspects(found: Findings, setting: Setting) -> Table | None:
    """Layers by aspects, importance with intervals."""
    table = found.of("aspects", setting)
    table = table[table["measure"] == "importance"] if len(table) else table
    if table.empty:
        return None
    note = (
        "95 % intervals over the prompts of an aspect; bold: the most important layer for it; in brackets: prompts "
        "with the aspect. " + interaction_words(found, setting) + interval_words(table, ["method"])
    )
    columns, rows = _by_aspect({name: aspect_table(table, value=name) for name in ("mean", *_LIMITS)})
    words = caption(found.rows(setting), setting, "Importance of each layer for the aspects of prompts.", found.metric)
    return Table(f"aspects--{setting.slug}", words, columns, table, rows, title="Layers by aspects", note=note)


def reading(found: Findings, setting: Setting) -> Table | None:
    """Layers by aspects that are read from pixels: what leaving a layer out breaks."""
    table = found.of("reading", setting)
    if table.empty:
        return None
    right = table.groupby("aspect", sort=False)["baseline"].max()
    note = (
        "Share of images in which leaving the layer out breaks what the prompt asks for, less the share in which it "
        "mends it, read from pixels by rule; bold: the most broken. Right in baselines: "
        f"{', '.join(f'{name} {number(float(value))}' for name, value in right.items())}. "
    )
    what = "What the prompt asks for and leaving the layer out breaks."
    return _read(found, setting, "reading", table, "drop", what, note, "What a layer's absence breaks")


def alone(found: Findings, setting: Setting) -> Table | None:
    """Layers by aspects that are read from pixels: what a layer alone brings through."""
    table = found.of("alone", setting)
    if table.empty:
        return None
    control = table.groupby("aspect", sort=False)["control"].max()
    note = (
        "Share of images that still show what the prompt asks for when this layer is the only one that is intact, read "
        "from pixels by rule; bold: the layer that brings most through. "
    )
    if control.notna().any():
        shares = ", ".join(f"{name} {number(float(value))}" for name, value in control.items())
        note += f"With every layer lesioned: {shares}. "
    what = "What the prompt asks for and the layer alone brings through."
    return _read(found, setting, "alone", table, "share", what, note, "What a layer alone brings through")


def _read(
    found: Findings, setting: Setting, stem: str, table: pd.DataFrame, value: str, what: str, note: str, title: str
) -> Table:
    """A table of layers by aspects that are read from pixels; value: the column of its figures."""
    note += "95 % intervals over the prompts that ask; in brackets: how many." + interval_words(table, ["method"])
    shown = {"mean": value, **{name: name for name in _LIMITS}}
    columns, rows = _by_aspect({name: reading_table(table, column) for name, column in shown.items()})
    words = caption(found.rows(setting), setting, what, found.metric)
    return Table(f"{stem}--{setting.slug}", words, columns, table, rows, title=title, note=note)


_LIMITS = ("low", "high", "n_prompts")


def _by_aspect(values: dict[str, pd.DataFrame]) -> tuple[list[Column], list[list[Cell]]]:
    """Columns and rows of a table of layers by aspects: mean, low, high, n_prompts as such tables each."""
    sizes = values["n_prompts"].max(axis=0).fillna(0).astype(int)
    wide = pd.DataFrame({"layer": values["mean"].index})
    columns = [Column("layer", "layer", "code")]
    for name in map(str, values["mean"].columns):
        keys = [f"{key} {name}" for key in ("mean", "low", "high")]
        for key, column in zip(("mean", "low", "high"), keys, strict=True):
            wide[column] = values[key][name].to_numpy(dtype="float64", na_value=float("nan"))
        mean, low, high = keys
        columns.append(Column(mean, f"{name} ({sizes[name]})", "number", low, high, best=True))
    return columns, [list(row) for row in zip(*(column.cells(wide) for column in columns), strict=True)]


def fit_words(found: Findings, setting: Setting) -> list[str]:
    """The metrics of `Findings.adherence`, as text names them."""
    names = found.of("adherence", setting)["metric"].unique()
    return ["all that is asked and read is right" if name == RIGHT else clean(name) for name in names]


def adherence(found: Findings, setting: Setting) -> Table | None:
    """How much less images fit their prompts, beside how much they change."""
    table = found.of("adherence", setting)
    if table.empty:
        return None
    whole = found.summary(setting)
    columns = [
        Column("layer", "layer", "code"),
        Column("rank", "rank", "count", up=True),
        _measure("importance", "importance"),
    ]
    for (name, part), head in zip(table.groupby("metric", sort=False), fit_words(found, setting), strict=True):
        part = part.set_index("layer").reindex(whole["layer"])
        for end, source in (("", "lost"), ("_low", "low"), ("_high", "high"), ("_p", "p_holm")):
            whole[f"{name}{end}"] = part[source].to_numpy(dtype=float)
        columns.append(_measure(str(name), head, f"{name}_p", str(name)))
    note = (
        "Fit: baseline minus lesioned, paired over the same images; below 0: they fit better. 95 % intervals; * above, "
        f"† below 0 with p < 0.05, {CORRECTED}, two 0.01, three 0.001. " + fit_against_change(found, setting)
    )
    note += interval_words(table, ["method"])
    what = "How much less images fit their prompts without the layer, beside how much they change."
    words = caption(found.rows(setting), setting, what, found.metric)
    return Table.of(
        f"adherence--{setting.slug}", "Change and adherence", words, columns, whole, table, count="depth", note=note
    )


def fit_against_change(found: Findings, setting: Setting) -> str:
    """Whether layers that change images most lose most of the prompt, in a sentence; "" for fewer than three layers."""
    whole, said = found.summary(setting).set_index("layer"), []
    for (_, part), name in zip(
        found.of("adherence", setting).groupby("metric", sort=False), fit_words(found, setting), strict=True
    ):
        both = part.set_index("layer")[["lost"]].join(whole["importance"]).dropna().round(6)
        if len(both) > 2 and both["lost"].nunique() > 1 and both["importance"].nunique() > 1:
            rank = both["lost"].corr(both["importance"], method="spearman")
            said.append(f"{number(float(rank), 2)} ({name})")
    return f"Rank correlation over layers of what is lost with importance: {', '.join(said)}." if said else ""


def interaction_words(found: Findings, setting: Setting) -> str:
    """The test of layers by aspects in one sentence."""
    test = found.of("interaction", setting)
    if test.empty:
        return "Layers by aspects: n/a."
    one = test.iloc[0]
    if missing(one["p_holm"]):
        return f"Layers by aspects: {one['method']}."
    return (
        f"Layers by aspects: R2 = {number(float(one['r2']))}, p = {number(float(one['p_holm']))} "
        f"(permutation of the tags over {one['n_prompts']} prompts; {CORRECTED})."
    )


def order(found: Findings, setting: Setting) -> Table | None:
    """Is a layer more important than the next?"""
    table = found.of("neighbours", setting)
    if table.empty:
        return None
    note = (
        "Difference: mean difference of importance with 95 % interval, paired test over prompts (p); more, less: "
        "prompts on which the layer changes the image more and less than the next, exact sign test (p, sign); both "
        f"{CORRECTED}; {STARS}." + interval_words(table, ["method"])
    )
    columns = [
        Column("rank", "rank", "count"),
        Column("layer", "layer", "code"),
        Column("next_layer", "next layer", "code"),
        Column("difference", "difference", "number", "low", "high", "p_holm"),
        Column("p_holm", "p", "p"),
        Column("n_more", "more", "count"),
        Column("n_less", "less", "count"),
        Column("p_wins", "p, sign", "p"),
        Column("n_prompts", "prompts", "count"),
    ]
    words = caption(found.rows(setting), setting, "Neighbouring ranks compared.", found.metric)
    return Table.of(f"order--{setting.slug}", "Neighbouring ranks", words, columns, table, note=note)


def pairs(found: Findings, setting: Setting) -> Table | None:
    """Interactions of two layers."""
    table = found.of("interactions", setting)
    if table.empty:
        return None
    note = (
        "Both: effect of the two; sum: of the single effects; interaction: their difference with 95 % interval, above "
        "0 where each can stand in for the other." + interval_words(table, ["method"])
    )
    columns = [
        Column("layer_a", "layer", "code"),
        Column("layer_b", "and", "code"),
        Column("both", "both"),
        Column("expected", "sum"),
        Column("interaction", "interaction", "number", "low", "high"),
        *COUNTS[:1],
    ]
    words = caption(found.rows(setting), setting, "Two layers lesioned together.", found.metric)
    return Table.of(f"pairs--{setting.slug}", "Interactions of two layers", words, columns, table, lead=2, note=note)


def groups(found: Findings, setting: Setting) -> Table | None:
    """Sets of layers of one's own, or adjacent ones, lesioned together."""
    table = found.of("groups", setting)
    if table.empty:
        return None
    note = "Effect: 1 - similarity with 95 % interval; bold: largest." + interval_words(table, ["method"])
    columns = [
        Column("lesioned", "layers", "code"),
        Column("n_lesioned", "number", "count"),
        Column("selection", "selection", "text"),
        Column("mean", "effect", "number", "low", "high", best=True),
        *COUNTS,
    ]
    words = caption(found.rows(setting), setting, "Layers lesioned together.", found.metric)
    return Table.of(f"groups--{setting.slug}", "Layers lesioned together", words, columns, table, note=note)


def cumulative(found: Findings, setting: Setting) -> Table | None:
    """Effect by number of lesioned layers, areas in the note."""
    table = found.of("cumulative", setting)
    if table.empty:
        return None
    table = table.assign(order_text=table["order"].replace("", "as given"))
    note = (
        "Effect: 1 - similarity with 95 % interval. " + area_words(found, setting) + interval_words(table, ["method"])
    )
    columns = [
        Column("order_text", "order", "text", spare=True),
        Column("n_lesioned", "layers", "count"),
        Column("added", "added", "code"),
        Column("mean", "effect", "number", "low", "high"),
        *COUNTS[:1],
    ]
    words = caption(found.rows(setting), setting, "Layers lesioned one after the other.", found.metric)
    raw = table.drop(columns="order_text")
    return Table.of(
        f"cumulative--{setting.slug}", "Layers one after the other", words, columns, table, raw, 2, note=note
    )


def area_words(found: Findings, setting: Setting) -> str:
    """The areas under the cumulative curves in one sentence."""
    areas = []
    for one in found.of("areas", setting).to_dict("records"):
        limits = "no interval" if missing(one["low"]) else f"95 % {number(one['low'])} to {number(one['high'])}"
        areas.append(f"{one['order'] or 'as given'} {number(one['area'])} ({limits})")
    return f"Area under the curve: {'; '.join(areas)}." if areas else ""


def shapley(found: Findings, setting: Setting) -> Table | None:
    """Shapley values of layers."""
    table = found.of("shapley", setting)
    if table.empty:
        return None
    note = (
        f"Share of the effect of losing all, from {table['n_orders'].max()} sampled orders; se: of the sampling of "
        "orders; 95 % interval over prompts and orders." + interval_words(table, ["method"])
    )
    columns = [
        Column("layer", "layer", "code"),
        Column("shapley", "Shapley value", "number", "low", "high", best=True),
        Column("se", "se"),
        Column("n_orders", "orders", "count"),
        *COUNTS[:1],
    ]
    words = caption(found.rows(setting), setting, "Shapley values of layers.", found.metric)
    return Table.of(f"shapley--{setting.slug}", "Shapley values", words, columns, table, note=note)


def affected(found: Findings, setting: Setting) -> Table | None:
    """How many prompts a layer affects at all."""
    table = found.of("affected", setting)
    if table.empty:
        return None
    table["few"] = np.where(table["n_effective"] < ENOUGH, "few", "")
    note = (
        "Affected: prompts of which leaving the layer out changes an image by more than 0.0001; share with exact 95 % "
        "limits (Clopper-Pearson; one-sided where it is 0 or 1); mean importance among them. Rests on: effective "
        f"number of prompts, (sum m)^2 / sum m^2 of what their importance m is beyond {SMALL}; few: below {ENOUGH:g}, "
        "where the sample says little of prompts that are not in it."
    )
    columns = [
        Column("layer", "layer", "code"),
        Column("n_affected", "affected", "count"),
        Column("n_prompts", "prompts", "count"),
        Column("affected", "share", "number", "affected_low", "affected_high"),
        Column("mean_affected", "importance, if affected"),
        Column("n_effective", "rests on"),
        Column("few", "", "text"),
    ]
    words = caption(found.rows(setting), setting, "How many prompts leaving the layer out affects.", found.metric)
    raw = table.drop(columns="few")
    return Table.of(
        f"affected--{setting.slug}", "How many prompts a layer affects", words, columns, table, raw, note=note
    )


def variance(found: Findings, setting: Setting) -> Table | None:
    """Prompts, shared seeds and the rest as sources of variance."""
    table = found.of("variance", setting)
    if table.empty:
        return None
    note = (
        "Standard deviations of the parts of prompts, of seeds (the same noise for every prompt) and of the rest, from "
        f"the mean squares; F test of seeds, {CORRECTED}; {STARS}."
    )
    columns = [
        Column("layer", "layer", "code"),
        Column("measure", "measure", "text"),
        Column("sd_prompts", "prompts"),
        Column("sd_seeds", "seeds", marks="p_holm"),
        Column("sd_rest", "rest"),
        Column("f_seeds", "F of seeds"),
        Column("p_holm", "p", "p"),
        Column("n_prompts", "n, prompts", "count"),
        Column("n_seeds", "n, seeds", "count"),
    ]
    words = caption(found.rows(setting), setting, "Where effects vary.", found.metric)
    return Table.of(f"variance--{setting.slug}", "Prompts, seeds and the rest", words, columns, table, note=note)


def of_setting(found: Findings, setting: Setting) -> list[Table]:
    """Every table there is of one setting, the layer table first where there is one."""
    first = [layers(found, setting), compact(found, setting), adherence(found, setting)]
    first += [*prompts(found, setting), affected(found, setting)]
    rest = [
        what(found, setting) for what in (aspects, reading, alone, order, pairs, groups, cumulative, shapley, variance)
    ]
    return [table for table in [*first, *rest] if table is not None]


def status(frame: pd.DataFrame) -> Table:
    """How many images are ok, invalid, failed, a model, selection and replacement."""
    table = status_counts(frame)
    columns = [Column(name, name, "text") for name in ("model", "selection", "replacement")]
    columns += [Column(name, name, "count") for name in table.columns[3:]]
    words = "Images by status; invalid and failed images are left out of every mean."
    return Table.of("status", "Images by status", words, columns, table, lead=3)
