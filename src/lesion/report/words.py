"""The results in words: the lines a run ends with, and the summary of the report."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pandas as pd

from lesion.analysis.bootstrap import BOUNDED
from lesion.analysis.cells import reasons, shared_noise
from lesion.analysis.importance import NO_EFFECT
from lesion.analysis.settings import BASELINE, Setting, settings
from lesion.errors import counted
from lesion.report.contents import (
    CORRECTED,
    area_words,
    fit_against_change,
    fit_words,
    interaction_words,
    ranks_words,
)
from lesion.report.findings import NO_FLOOR, Findings, certain
from lesion.report.tables import missing
from lesion.report.text import clean, number

MOST = 6  # layers a sentence names
RANK_HEADS = ["rank", "typical rank"]
MEASURES = {"importance": "importance (leave-one-out)", "sufficiency": "sufficiency (only-one)"}


def _images(record: dict[Hashable, Any]) -> str:
    left_out = [f"{record[f'n_{name}']} {name}" for name in ("invalid", "failed", "unscored") if record[f"n_{name}"]]
    return str(record["n_images"]) + (f" (+ {', '.join(left_out)})" if left_out else "")


def ranking_lines(found: Findings) -> list[str]:
    """A plain text table a setting with 95 % intervals, no colours: the most important layer first.

    Without leave-one-out the most sufficient layer comes first. A measure that no layer has is left out.
    """
    lines: list[str] = []
    unsettled: list[str] = []
    for setting in settings(found.frame):
        table = found.summary(setting)
        if table.empty:
            continue
        measures = [name for name in MEASURES if table[name].notna().any()]
        ranked = "importance" in measures
        if ranked:
            table = table.sort_values(
                ["rank", "importance"], ascending=[True, False], kind="stable", na_position="last"
            )
        elif measures:
            table = table.sort_values(measures[0], ascending=False, kind="stable", na_position="last")
        if ranked and _no_place(table):
            table = table.drop(columns=["rank_low", "rank_high"])
            unsettled.append(clean(setting.label))
        head = [*(RANK_HEADS if ranked else []), "layer", *(MEASURES[name] for name in measures), "images", ""]
        cells = [head]
        for record in table.to_dict("records"):
            line = [_limited(record, "rank", 0), _limited(record, "typical", 0, "typical_rank")] if ranked else []
            line += [clean(record["layer"]), *(_limited(record, name, 4) for name in measures), _images(record)]
            cells.append([*line, "no effect" if record["effect"] == "none" else ""])
        widths = [max(len(cell[column]) for cell in cells) for column in range(len(head))]
        lines += ["", clean(setting.label)] if lines else [clean(setting.label)]
        lines += [
            "  ".join(text.ljust(width) for text, width in zip(cell, widths, strict=True)).rstrip() for cell in cells
        ]
    if any(RANK_HEADS[1] in line for line in lines):
        lines.append("Rank: by mean importance. Typical rank: by which layer changes the image more on most prompts.")
    if unsettled:
        of = "" if len(unsettled) == len(settings(found.frame)) else f" of {'; '.join(unsettled)}"
        lines.append(f"Ranks by mean importance{of} have no interval: with these prompts each could be any place.")
    return [*lines, "In brackets: 95 % intervals over prompts."] if any("[" in line for line in lines) else lines


def _no_place(table: pd.DataFrame) -> bool:
    """Whether the intervals of all ranks reach from the first place to the last."""
    known = table.dropna(subset=["rank_low", "rank_high"])
    return len(known) > 1 and bool(((known["rank_low"] == 1) & (known["rank_high"] == known["rank"].count())).all())


def _limited(record: dict[Hashable, Any], name: str, digits: int, value: str = "") -> str:
    """A value, of the column `value` or else `name`, with its interval where it has one."""
    values: list[Any] = [record.get(column) for column in (value or name, f"{name}_low", f"{name}_high")]
    if missing(values[0]):
        return "n/a"
    shown = [str(int(one)) if not digits else number(float(one), digits) for one in values if not missing(one)]
    return shown[0] + (f" [{', '.join(shown[1:])}]" if len(shown) == 3 else "")


def _listed(names: list[str], most: int | None = None) -> str:
    if most is not None and len(names) > most + 1:
        names = [*names[:most], f"{len(names) - most} others"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _with_interval(record: Any, name: str) -> str:
    mean, low, high = (getattr(record, f"{name}{end}") for end in ("", "_low", "_high"))
    return number(float(mean)) + ("" if missing(low) else f", 95 % {number(float(low))} to {number(float(high))}")


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {number(float(value))}"


QUESTIONS = {
    "layers": "Which layers matter most, and how sure is the order?",
    "noise": "Is that more than noise?",
    "alone": "What does a layer alone keep of the image?",
    "prompts": "Do prompts agree on the order?",
    "aspects": "Which layers carry which part of the prompt?",
    "together": "What happens when several layers are lesioned together?",
    "missing": "What is missing?",
}  # what the page answers in full, folded, in this order


def answers(found: Findings, setting: Setting) -> dict[str, list[str]]:
    """What there is to say to each of QUESTIONS about one setting, in sentences (plain text, not escaped)."""
    part, table = found.rows(setting), found.summary(setting)
    counts = part["status"].value_counts()
    bad = [f"{counts[name]} {name}" for name in ("invalid", "failed") if counts.get(name, 0)]
    said: dict[str, list[str]] = {name: [] for name in QUESTIONS}
    said["layers"].append(
        f"{counted(len(part), 'image')} of {counted(part['prompt_id'].nunique(), 'prompt')} and "
        f"{counted(part['seed'].nunique(), 'seed')}, {counted(len(table), 'layer')} lesioned; "
        + (f"{_listed(bad)}, left out of every mean." if bad else "none invalid or failed.")
    )
    if len(table):
        said["layers"] += [*_importance(found, setting, table), *_seeds(found, setting)]
        said["noise"] += _noise(found, table)
        said["alone"] += _sufficiency(found, setting, table)
    control = found.control(setting)
    if not missing(control):
        blind = part[(part["selection"] == "all") & (part["status"] == "ok")]
        said["alone"].append(
            f"With every layer lesioned the similarity is {control:.3f} ({counted(len(blind), 'image')})."
        )
    said["prompts"] += _prompts(found, setting)
    said["aspects"] += [*_fits(found, setting), *_aspects(found, setting), *_read(found, setting)]
    said["together"] += _together(found, setting)
    said["missing"] += _unsaid(table)
    return said


def summary(found: Findings, setting: Setting) -> list[str]:
    """Every sentence of `answers`."""
    return [sentence for sentences in answers(found, setting).values() for sentence in sentences]


def answer(found: Findings, setting: Setting) -> list[str]:
    """What one setting shows in at most five short sentences: what is sure first, then what is not settled.

    Plain text. Layers stand between backquotes, as in Markdown.
    """
    table = found.summary(setting)
    sure, open_ = [], []
    for part in (
        _first_layer(found, setting, table),
        _broken(found, setting, table),
        _beyond_noise(table),
        _best_alone(table),
    ):
        sure += part[0]
        open_ += part[1]
    if table.empty:
        sure += _together(found, setting)[:2]
    bad = found.rows(setting)["status"].isin(("invalid", "failed")).sum()
    if bad:
        open_.insert(
            0, f"{counted(int(bad), 'image')} failed or {'is' if bad == 1 else 'are'} invalid and not counted."
        )
    if not sure and not open_:
        return ["These are baselines only: no layer is lesioned."]
    return [*sure, *open_][:MOST_SENTENCES]


MOST_SENTENCES = 5
_Said = tuple[list[str], list[str]]  # what is sure, what is not


def _named(layer: object) -> str:
    return f"`{clean(layer)}`"


def _first_layer(found: Findings, setting: Setting, table: pd.DataFrame) -> _Said:
    """The most important layer, and whether its place is settled: by its mean, and on most prompts."""
    if table.empty or not table["importance"].notna().any():
        return [], []
    ranked = table[table["importance"].notna()]
    ranked = ranked.sort_values(["rank", "importance"], ascending=[True, False], kind="stable")
    top = ranked.iloc[0]
    if top["effect"] == "none":
        return [f"No layer's absence changes an image: every similarity ({found.metric}) stays 1."], []
    first = (
        f"Leaving out {_named(top['layer'])} changes images most: importance {_interval_of(top, 'importance')}, "
        "where 0 is no change."
    )
    none = int((ranked["effect"] == "none").sum())
    quiet = [f"{none} of {counted(len(ranked), 'layer')} change{'s' if none == 1 else ''} no image."] if none else []
    if top["rank_high"] is not pd.NA and top["rank_high"] == 1:
        return [f"{first} That it comes first is settled.", *quiet], []
    beaten, beating = _sure_wins(found, setting, str(top["layer"]))
    rivals = [name for name in ranked["layer"] if name not in (top["layer"], *beaten)]
    if beating:
        names = _listed([_named(name) for name in beating], 3)
        verb = "changes" if len(beating) == 1 else "change"
        return [first, *quiet], [f"On most prompts, though, {names} {verb} them more: its mean rests on a few."]
    if beaten and not rivals:
        sure = f"{first} On most prompts it changes them more than any other layer does."
        return [sure, *quiet], ["Whether its mean is the largest is not settled: prompts not asked may decide."]
    if beaten:
        first += f" On most prompts it changes them more than {len(beaten)} of the {len(ranked) - 1} other layers do."
    names = _listed([_named(name) for name in rivals], 3) if len(ranked) > 1 and top["rank_high"] is not pd.NA else ""
    why = f"{names} may too" if names else "there are too few prompts"
    return [first, *quiet], [f"Which layer comes first is not settled: {why}."]


def _sure_wins(found: Findings, setting: Setting, layer: str) -> tuple[list[str], list[str]]:
    """The layers that this one surely changes images more than on most prompts, and those that do so to it."""
    pairs = found.of("wins", setting)
    pairs = pairs[pairs["p_holm"].map(certain)] if len(pairs) else pd.DataFrame(columns=["layer", "other"])
    beaten, beating = pairs[pairs["layer"] == layer]["other"], pairs[pairs["other"] == layer]["layer"]
    return list(beaten), list(beating)


def _interval_of(record: Any, name: str) -> str:
    low, high = record[f"{name}_low"], record[f"{name}_high"]
    limits = "" if missing(low) or missing(high) else f" ({number(float(low), 2)} to {number(float(high), 2)})"
    return f"{number(float(record[name]), 2)}{limits}"


def _broken(found: Findings, setting: Setting, table: pd.DataFrame) -> _Said:
    """What lesions break as read from pixels; and where a layer does so that similarity places low."""
    drops = found.of("reading", setting)
    if drops.empty:
        return [], []
    sure = drops[drops["p_holm"].map(certain) & (drops["drop"] > 0)]
    if sure.empty:
        return [], ["No single layer's absence can be shown to break what the prompt asks for, read from pixels."]
    worst = sure.loc[sure.groupby("aspect", sort=False)["drop"].idxmax()].sort_values("drop", ascending=False)
    by_layer = {layer: part.head(3) for layer, part in worst.groupby("layer", sort=False)}
    named = []
    for layer, part in list(by_layer.items())[:2]:
        parts = [f"{one['aspect']} ({100 * one['drop']:.0f} %)" for one in part.to_dict("records")]
        named.append(f"without {_named(layer)} images lose {_listed(parts)}")
    out = [f"Read from pixels, {_listed(named)}."]
    top = worst.iloc[0]
    place = table.set_index("layer").loc[top["layer"]] if (table["layer"] == top["layer"]).any() else None
    if place is not None and not missing(place["rank"]) and place["rank"] > 3:
        out.append(
            f"Similarity hides this: by {found.metric} {_named(top['layer'])} is only number {int(place['rank'])} of "
            f"{int(table['rank'].notna().sum())}."
        )
    return out, []


def _beyond_noise(table: pd.DataFrame) -> _Said:
    """The effects beside those of another seed."""
    tested = table[table["p_floor"].notna()] if len(table) else table
    if tested.empty:
        return [], []
    more = int((tested["p_floor"].map(certain) & (tested["beyond_floor"] > 0)).sum())
    seeds = number(1 - float(tested["other_seeds"].mean()), 2)
    if more:
        verb = "changes" if more == 1 else "change"
        return [f"{more} of {counted(len(tested), 'layer')} {verb} images more than another seed does ({seeds})."], []
    return [], [f"No layer's absence can be shown to change images more than another seed does ({seeds})."]


def _best_alone(table: pd.DataFrame) -> _Said:
    """Which layer alone keeps most."""
    alone = table[table["sufficiency"].notna()] if len(table) else table
    if alone.empty:
        return [], []
    top = alone.sort_values("sufficiency", ascending=False, kind="stable").iloc[0]
    return [
        f"With only {_named(top['layer'])} intact, images stay closest to the baseline: similarity "
        f"{_interval_of(top, 'sufficiency')}, where 1 is the same image. That no other layer keeps more is not tested."
    ], []


def _importance(found: Findings, setting: Setting, table: pd.DataFrame) -> list[str]:
    """Which layers matter, and whether the first place is sure."""
    out = []
    ranked = table[table["importance"].notna()]
    # Layers may have different valid images; ranks are of those that all share, and decide who comes first.
    ranked = ranked.sort_values(["rank", "importance"], ascending=[True, False], kind="stable")
    effective = ranked[ranked["effect"] == "yes"]
    if len(effective):
        top = [f"{clean(one.layer)} ({_with_interval(one, 'importance')})" for one in effective.head(3).itertuples()]
        out.append(f"Most important by leave-one-out (1 - {found.metric} to the baseline): {_listed(top)}.")
        maybe = ranked[ranked["rank_low"].eq(1).fillna(False)]
        firsts = [clean(name) for name in maybe["layer"]]
        if len(ranked) and ranked["rank_high"].head(1).eq(1).fillna(False).any():
            out.append(f"{clean(ranked['layer'].iloc[0])} is first also by its rank interval (1 to 1).")
        elif len(firsts) > 1:
            out.append(
                f"Who comes first by the mean is not settled: the rank intervals of {_listed(firsts, MOST)} include 1."
            )
        elif firsts:
            out.append(f"{firsts[0]} is first also by its rank interval (1 to {maybe['rank_high'].iloc[0]}).")
        out += _typical(found, setting, ranked)
        if said := ranks_words(table).strip():
            out.append(said)
        rare = effective[effective["importance_method"].astype(str).str.startswith(BOUNDED)]
        if len(rare):
            names = _listed([f"{clean(one.layer)} ({_touched(one)})" for one in rare.itertuples()], MOST)
            out.append(
                f"The means of {counted(len(rare), 'layer')} rest on few prompts, so that limits allow for prompts "
                f"that were not asked: {names}."
            )
    silent = table[table["effect"] == "none"]
    if len(silent):
        verb = "has" if len(silent) == 1 else "have"
        allowed = silent["affected_high"].max()
        more = "" if missing(allowed) else f"; up to {100 * allowed:.1f} % of prompts may still be affected (95 %)"
        names = _listed([clean(name) for name in silent["layer"]])
        out.append(f"{names} {verb} no measurable effect (every similarity within {NO_EFFECT:g} of 1){more}.")
    return out


def _typical(found: Findings, setting: Setting, ranked: pd.DataFrame) -> list[str]:
    """Which layers change images more than which on most prompts, in terms of ranks."""
    count = int(ranked["typical_low"].notna().sum())
    said = ranked[(ranked["typical_low"] > 1).fillna(False) | (ranked["typical_high"] < count).fillna(False)]
    if not count or said.empty:
        return []
    named = [
        f"{_listed([clean(name) for name in part['layer']], MOST)} {low} to {high}"
        for (low, high), part in said.sort_values("typical_rank").groupby(["typical_low", "typical_high"])
    ]
    of = ", with the seeds of this study" if shared_noise(found.rows(setting)) else ""
    return [
        f"On most prompts{of}, ranks by which layer changes the image more lie within these limits, for all layers "
        f"together (exact sign tests of every two layers, {CORRECTED}, 5 %): {'; '.join(named)}."
    ]


def _touched(one: Any) -> str:
    return f"{int(one.n_affected)} of {counted(int(one.n_prompts), 'prompt')} affected"


def _seeds(found: Findings, setting: Setting) -> list[str]:
    """What shared noise means for the intervals; nothing where every prompt has its own."""
    part = found.rows(setting)
    part = part[[name for name in ("seed", "noise") if name in part]][part["selection"] != BASELINE]
    if not len(part) or not shared_noise(part):
        return []
    if part["seed"].nunique() == 1:
        return ["All prompts share the noise of one seed: intervals and tests say nothing on other seeds."]
    table = found.of("variance", setting)
    table = table[table["p"].notna()] if len(table) else table
    if table.empty:
        return []
    sure, seeds = int(table["p_holm"].map(certain).sum()), part["seed"].nunique()
    said = (
        f"All prompts share the noise of {counted(seeds, 'seed')}, for which intervals are widened; "
        f"the seeds differ for {sure} of {len(table)} means of layers (F tests, {CORRECTED}, 5 %)."
    )
    summary = found.summary(setting)
    if seeds == 2 and len(summary) and summary["other_seeds"].notna().any():
        said += " What another seed changes, which only three seeds tell of others, is that of these two seeds."
    return [said]


def _noise(found: Findings, table: pd.DataFrame) -> list[str]:
    """The effects beside those of another seed and another prompt."""
    tried = table[table["importance"].notna()]
    if tried.empty:
        return []
    seeds, prompts = (float(table[name].mean()) for name in ("other_seeds", "other_prompts"))
    if missing(seeds) and missing(prompts):
        why = NO_FLOOR if found.pairs.empty else "the baselines of this setting were not compared"
        return [f"How this compares with noise cannot be said: {why}."]
    parts = [("seed", seeds), ("prompt", prompts)]
    known = [f"another {what} changes an image by {1 - value:.3f}" for what, value in parts if not missing(value)]
    unknown = [f"of another {what}" for what, value in parts if missing(value)]
    out = [f"Noise floor: {_listed(known)}" + (f"; {unknown[0]} n/a." if unknown else ".")]
    tested = tried[tried["p_floor"].notna()]
    if len(tested):
        sure = tested["p_floor"].map(certain)
        groups = [
            ("change the image more", tested[sure & (tested["beyond_floor"] > 0)]),
            ("change it less", tested[sure & (tested["beyond_floor"] < 0)]),
            ("cannot be told apart from it", tested[~sure]),
        ]
        said = []
        for verb, group in groups:
            if len(group):
                layers = group.sort_values("importance", ascending=False)["layer"]
                said.append(
                    f"{counted(len(group), 'layer')} {verb} ({_listed([clean(name) for name in layers], MOST)})"
                )
        said = [text.replace("1 layer change ", "1 layer changes ", 1) for text in said]
        out.append(f"Against another seed (paired tests over prompts, {CORRECTED}, 5 %): {'; '.join(said)}.")
    elif not missing(seeds):
        out.append("Whether layers differ from another seed could not be tested: it takes two prompts that differ.")
    return out


def _sufficiency(found: Findings, setting: Setting, table: pd.DataFrame) -> list[str]:
    alone = table[table["sufficiency"].notna()].sort_values("sufficiency", ascending=False, kind="stable")
    if alone.empty:
        return []
    best = next(iter(alone.itertuples()))
    out = [
        f"Alone, {clean(best.layer)} keeps the image closest to the baseline "
        f"(sufficiency {_with_interval(best, 'sufficiency')}); which layer does so is not tested."
    ]
    agreed = found.of("agreement", setting)
    agreed = agreed[agreed["between"] == "measure"] if len(agreed) else agreed
    return out + [
        f"Importance and sufficiency order the layers with {_correlation(one)}." for one in agreed.to_dict("records")
    ]


def _correlation(one: dict[Hashable, Any]) -> str:
    if missing(one["spearman"]):
        return "no rank correlation (n/a: fewer than three layers, or ties)"
    limits = (
        "no interval"
        if missing(one["spearman_low"])
        else f"95 % of resamples {number(float(one['spearman_low']), 2)} to {number(float(one['spearman_high']), 2)}"
    )
    return (
        f"Spearman {number(float(one['spearman']), 2)} ({limits}) and Kendall {number(float(one['kendall']), 2)} "
        f"over {one['n_layers']} layers"
    )


def _prompts(found: Findings, setting: Setting) -> list[str]:
    """Do prompts agree, and does the top survive resampling?"""
    out = []
    agreed = found.of("concordance", setting)
    for one in agreed.to_dict("records"):
        if not missing(one["W"]):
            out.append(
                f"Prompts agree on the order by {one['measure']} with Kendall's W = {number(float(one['W']), 2)} "
                f"({_p(one['p_holm'])}, {one['n_prompts']} prompts)."
            )
    for one in found.of("stability", setting).to_dict("records"):
        if one["k"] > 1 and not missing(one["overlap"]):
            out.append(
                f"Of the {one['k']} most important layers {100 * one['overlap']:.0f} % stay among them when prompts "
                f"and seeds are resampled; all of them do in {100 * one['same']:.0f} % of resamples."
            )
    return out


def _aspects(found: Findings, setting: Setting) -> list[str]:
    test, table = found.of("interaction", setting), found.of("aspects", setting)
    if test.empty:
        return []
    p = test["p_holm"].iloc[0]
    if missing(p):
        out = [f"Whether layers matter differently for different aspects cannot be said: {test['method'].iloc[0]}."]
    else:
        verb = "matter" if certain(float(p)) else "cannot be shown to matter"
        out = [f"Layers {verb} differently for different aspects. {interaction_words(found, setting)}"]
    table = table[(table["measure"] == "importance") & table["mean"].notna()]
    if len(table):
        named = _first_by_aspect(table, "mean", lambda one: number(float(one["mean"])))
        out.append(f"The largest mean importance by aspect, which layer has it not being tested: {_listed(named, 12)}.")
    return out


def _fits(found: Findings, setting: Setting) -> list[str]:
    """Which layers' absence costs adherence, which mends it, and which only changes images."""
    table = found.of("adherence", setting)
    if table.empty:
        return []
    changed = set(found.summary(setting).query("effect == 'yes'")["layer"])
    out = []
    for (_, part), name in zip(table.groupby("metric", sort=False), fit_words(found, setting), strict=True):
        sure, lost = part["p_holm"].map(certain), part["lost"]
        said = [
            f"{len(some)} {verb} ({_listed([clean(one) for one in some], MOST)})"
            for verb, some in (
                ("cost adherence", part[sure & (lost > 0)].sort_values("lost", ascending=False)["layer"]),
                ("mend it", part[sure & (lost < 0)].sort_values("lost")["layer"]),
            )
            if len(some)
        ]
        rest = int((~sure & part["layer"].isin(changed)).sum())
        said += [f"{rest} change images and cannot be shown to do either"] if rest else []
        if said:
            out.append(f"Of layers left out, by {name}: {'; '.join(said)} ({CORRECTED}, 5 %).")
    return [*out, *filter(None, [fit_against_change(found, setting)])]


def _first_by_aspect(table: pd.DataFrame, value: str, words: Callable[[dict[Any, Any]], str]) -> list[str]:
    """Of each aspect the layer with the largest value, as "ASPECT LAYER (WORDS)"; words: of its row."""
    best = table.loc[table.groupby("aspect", sort=False)[value].idxmax()].to_dict("records")
    return [f"{clean(one['aspect'])} {clean(one['layer'])} ({words(one)})" for one in best]


def _read(found: Findings, setting: Setting) -> list[str]:
    """What lesions break and what layers bring through, as read from pixels."""
    out = []
    drops = found.of("reading", setting)
    if len(drops):
        broken = drops[drops["p_holm"].map(certain) & (drops["drop"] > 0)]
        if len(broken):
            named = _first_by_aspect(broken, "drop", lambda one: number(float(one["drop"])))
            out.append(
                "Read from pixels, of the layers whose absence can be shown to break something, the first: "
                f"{_listed(named, 12)}."
            )
        spared = [clean(name) for name in drops["aspect"].unique() if name not in set(broken["aspect"])]
        if spared:
            out.append(f"No single layer's absence can be shown to break {_listed(spared, 12)}.")
    shares = found.of("alone", setting)
    if len(shares) and shares["control"].notna().any():
        through = shares[shares["p_holm"].map(certain) & (shares["share"] > shares["control"])]
        if len(through):
            named = _first_by_aspect(through, "share", _beside)
            out.append(
                "Of the layers that can be shown to bring more through alone than none does, the first: "
                f"{_listed(named, 12)}."
            )
        rest = [clean(name) for name in shares["aspect"].unique() if name not in set(through["aspect"])]
        if rest:
            out.append(f"No layer alone can be shown to bring {_listed(rest, 12)} through.")
    elif len(shares) and (shares["share"] > 0).any():
        some = shares[shares["share"] > 0]
        named = _first_by_aspect(some, "share", _beside)
        out.append(f"Largest shares that a layer alone brings through, without a control: {_listed(named, 12)}.")
    return out


def _beside(one: dict[Hashable, Any]) -> str:
    control = "" if missing(one["control"]) else f", {number(float(one['control']))} with every layer lesioned"
    return f"{number(float(one['share']))}{control}"


def _together(found: Findings, setting: Setting) -> list[str]:
    """Lesions of several layers."""
    out = []
    pairs = found.of("interactions", setting)
    pairs = pairs[pairs["interaction"].notna()] if len(pairs) else pairs
    if len(pairs):
        apart = pairs[pairs["p_holm"].map(certain)]
        largest = pairs.iloc[int(pairs["interaction"].abs().to_numpy().argmax())]
        out.append(
            f"Of {counted(len(pairs), 'pair')} of layers {len(apart)} have an interaction that differs from 0 (paired "
            f"tests, {CORRECTED}, 5 %); the largest is {number(float(largest['interaction']))} for "
            f"{clean(largest['layer_a'])} and {clean(largest['layer_b'])}."
        )
    areas = area_words(found, setting)
    if areas:
        out.append(f"Layers lesioned one after the other. {areas}")
    shapley = found.of("shapley", setting)
    if len(shapley) and shapley["shapley"].notna().any():
        top = shapley.sort_values("shapley", ascending=False).iloc[0]
        error = "n/a" if missing(top["se"]) else number(float(top["se"]))
        out.append(
            f"Largest Shapley value, which layer has it not being tested: {clean(top['layer'])} "
            f"{number(float(top['shapley']))} (standard error {error}, {top['n_orders']} orders)."
        )
    return out


def _unsaid(table: pd.DataFrame) -> list[str]:
    """Intervals there are none of, and why."""
    out = []
    for measure in ("importance", "sufficiency"):
        methods = table.loc[table[measure].notna(), f"{measure}_method"] if len(table) else pd.Series(dtype=str)
        found = reasons(methods).value_counts(sort=False)
        if len(found):
            why = [f"{counted(int(n), 'layer')}: {reason}" for reason, n in found.items()]
            out.append(f"No interval of {measure} for {'; '.join(why)}.")
    return out


def comparison(found: Findings) -> list[str]:
    """Sentences on settings compared with each other, and on what the analysis refused."""
    out = []
    table = found.agreement
    table = table[table["between"] != "measure"] if len(table) else table
    for one in table.head(12).to_dict("records"):
        what = f"{one['between']}s {clean(one['a'])} and {clean(one['b'])}"
        model = f" of {clean(one['model'])}" if one["between"] != "model" and "model" in one else ""
        out.append(f"By {one['measure']}, {what}{model} order the layers with {_correlation(one)}.")
    if len(table) > 12:
        out.append(f"{len(table) - 12} more comparisons are in the table.")
    for one in found.floors.to_dict("records"):
        what = str(one["floor"]).replace("_", " ")
        if not missing(one["mean"]):
            limits = "no interval" if missing(one["low"]) else f"95 % {number(one['low'])} to {number(one['high'])}"
            out.append(
                f"Baselines of {what} are similar by {number(one['mean'])} ({limits}; {counted(one['n_pairs'], 'pair')}"
                f"{', ' + clean(one['model']) if found.floors['model'].nunique() > 1 else ''})."
            )
    return out + [f"Could not be worked out: {clean(text)}." for text in found.troubles]
