"""All that the analysis says of a results frame, worked out once: what tables, figures and sentences read."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lesion.analysis.affected import affected_prompts
from lesion.analysis.agreement import BETWEEN, correlations
from lesion.analysis.aspects import aspect_estimates, aspect_interaction
from lesion.analysis.bootstrap import METHODS
from lesion.analysis.cells import images, shared_noise, worked_out_once
from lesion.analysis.estimates import layer_estimates
from lesion.analysis.floor import FLOORS, PAIR, noise_floor, normalised_importance, of_setting
from lesion.analysis.importance import LEAVE_ONE_OUT, ONLY_ONE, controls, importance_metric, layer_table
from lesion.analysis.interactions import (
    GROUPS,
    cumulative_areas,
    cumulative_curves,
    dose_response,
    group_effects,
    pair_interactions,
)
from lesion.analysis.order import RANKS, kendalls_w, ranks, top_stability
from lesion.analysis.paired import against_floor, comparisons, holm, neighbours, wins
from lesion.analysis.reading import (
    adherence_columns,
    adherence_lost,
    reading_columns,
    reading_drops,
    reading_shares,
    with_right,
)
from lesion.analysis.settings import Setting, rows, settings
from lesion.analysis.shapley import shapley_values
from lesion.analysis.side_by_side import paired_differences
from lesion.analysis.variance import variance_components
from lesion.processes import Call, Processes
from lesion.scoring import known_metrics, metric_class
from lesion.study.columns import GENERATION, LESION

CERTAIN = 0.05  # p-values up to this count as a difference
SENT = 20_000  # rows up to which it takes less to send them to another process than to work there
NO_FLOOR = "there are no pairs of baselines to take the noise floor from"
_RANK = (*RANKS, "top_1", "top_3")


def _none() -> pd.DataFrame:
    return pd.DataFrame()


@dataclass
class Findings:
    """One table of the analysis a field, over every setting of the frame; empty where the data have nothing for it.

    pairs: similarities between baselines (see `lesion.analysis.floor`) by `metric`, empty if there are none. troubles:
    what could not be worked out though there are rows for it, and why.
    """

    frame: pd.DataFrame
    pairs: pd.DataFrame
    metric: str
    layers: pd.DataFrame = field(default_factory=_none)
    ranks: pd.DataFrame = field(default_factory=_none)
    stability: pd.DataFrame = field(default_factory=_none)
    concordance: pd.DataFrame = field(default_factory=_none)
    neighbours: pd.DataFrame = field(default_factory=_none)
    tested: pd.DataFrame = field(default_factory=_none)
    normalised: pd.DataFrame = field(default_factory=_none)
    floors: pd.DataFrame = field(default_factory=_none)
    affected: pd.DataFrame = field(default_factory=_none)
    variance: pd.DataFrame = field(default_factory=_none)
    comparisons: pd.DataFrame = field(default_factory=_none)
    wins: pd.DataFrame = field(default_factory=_none)
    aspects: pd.DataFrame = field(default_factory=_none)
    interaction: pd.DataFrame = field(default_factory=_none)
    reading: pd.DataFrame = field(default_factory=_none)
    alone: pd.DataFrame = field(default_factory=_none)
    adherence: pd.DataFrame = field(default_factory=_none)
    agreement: pd.DataFrame = field(default_factory=_none)
    differences: pd.DataFrame = field(default_factory=_none)
    interactions: pd.DataFrame = field(default_factory=_none)
    groups: pd.DataFrame = field(default_factory=_none)
    cumulative: pd.DataFrame = field(default_factory=_none)
    areas: pd.DataFrame = field(default_factory=_none)
    doses: pd.DataFrame = field(default_factory=_none)
    shapley: pd.DataFrame = field(default_factory=_none)
    troubles: list[str] = field(default_factory=list)
    _summaries: dict[Setting, pd.DataFrame] = field(default_factory=dict)

    def of(self, name: str, setting: Setting) -> pd.DataFrame:
        """The rows of one setting in the table `name`; columns that the table lacks do not matter."""
        return of_setting(getattr(self, name), setting.columns()).reset_index(drop=True)

    def rows(self, setting: Setting) -> pd.DataFrame:
        """The setting's lesioned images and their baselines."""
        return rows(self.frame, setting)

    def summary(self, setting: Setting) -> pd.DataFrame:
        """One row a layer in depth order: all that is said of it.

        Columns: those of `layer_table`; importance_low, _high, _method and the same of sufficiency; those of
        `order.ranks` from rank_low to top_3 (over the images valid for every layer); n_rank_prompts, n_left_out:
        prompts of these, and pairs of prompt and seed that are not among them (the same in every row); other_seeds,
        normalised_other_seeds, _low, _high, _method and the same of other_prompts; beyond_floor (importance less 1 -
        floor), p_floor (corrected over the report); those of `affected_prompts`; adherence_lost, _low, _high,
        p_adherence (corrected, by the first metric of `adherence`); n_importance, n_sufficiency (images); where the
        frame has it, stopped: why rounds of a budget ended for the layer. NaN where there is nothing to say.
        """
        if setting not in self._summaries:
            self._summaries[setting] = self._summary(setting)
        return self._summaries[setting].copy()

    def _summary(self, setting: Setting) -> pd.DataFrame:
        table = layer_table(self.rows(setting), self.metric)
        if table.empty:
            return table
        table = table.drop(columns="rank").set_index("layer", drop=False)
        estimates = self.of("layers", setting)
        for measure in ("importance", "sufficiency"):
            of = estimates[estimates["measure"] == measure].set_index("layer")
            for name in ("low", "high"):
                table[f"{measure}_{name}"] = of[name].astype("float64")
            table[f"{measure}_method"] = of["method"]
            table[f"n_{measure}"] = of["n_images"].reindex(table.index).fillna(0).astype(int)
        ranked, rows = self.of("ranks", setting), self.rows(setting)
        _take(table, ranked, {name: name for name in _RANK})
        lesioned = images(rows[rows["selection"] == LEAVE_ONE_OUT])
        for name, shared, without in (("n_rank_prompts", "n_prompts", 0), ("n_left_out", "n_left_out", lesioned)):
            table[name] = int(ranked[shared].iloc[0]) if len(ranked) else without
        named = [name for floor in FLOORS for name in (floor, *(f"normalised_{floor}{end}" for end in _ENDS))]
        _take(table, self.of("normalised", setting), {name: name for name in named})
        tests = {"difference": "beyond_floor", "p_holm": "p_floor"}
        _take(table, self.of("tested", setting), tests)
        _take(table, self.of("affected", setting), {name: name for name in _TOUCHED})
        lost = self.of("adherence", setting)
        lost = lost[lost["metric"] == lost["metric"].iloc[0]] if len(lost) else lost
        _take(table, lost, _LOST)
        if "stopped" in rows:
            table["stopped"] = _stopped(rows).reindex(table.index).fillna("")
        return table.astype(dict.fromkeys(RANKS, "Int64")).reset_index(drop=True)

    def control(self, setting: Setting) -> float:
        """Mean similarity with every layer lesioned; NaN without such images."""
        blind = controls(self.rows(setting), self.metric)
        return float(blind["similarity"].iloc[0]) if len(blind) else float("nan")


_TOUCHED = (
    *("n_affected", "affected", "affected_low", "affected_high", "mean_affected", "n_effective"),
    *("images_affected", "n_prompts"),
)
_LOST = {
    "lost": "adherence_lost",
    "low": "adherence_lost_low",
    "high": "adherence_lost_high",
    "p_holm": "p_adherence",
}
_ENDS = ("", "_low", "_high", "_method")


def _stopped(rows: pd.DataFrame) -> pd.Series:
    """By layer why its rounds ended, each selection's reason where they differ; "" for what was made in full."""
    known = rows[rows["stopped"].fillna("") != ""].drop_duplicates(["layer", "selection", "stopped"])
    said: dict[str, str] = {}
    for layer, part in known.groupby("layer", sort=False):
        reasons = {name: part.loc[part["selection"] == name, "stopped"].tolist() for name in (LEAVE_ONE_OUT, ONLY_ONE)}
        alike = part["stopped"].nunique() == 1
        named = [f"{' / '.join(why)} ({name.replace('_', '-')})" for name, why in reasons.items() if why]
        said[str(layer)] = str(part["stopped"].iloc[0]) if alike else ", ".join(named)
    return pd.Series(said, dtype=object)


def _take(table: pd.DataFrame, source: pd.DataFrame, names: dict[str, str]) -> None:
    """Copy columns of `source` (one row a layer) into `table` (index layer); NaN where there are none."""
    of = source.set_index("layer") if len(source) else pd.DataFrame(columns=list(names))
    for name, new in names.items():
        found = of[name].reindex(table.index)
        table[new] = found if name.endswith("method") else found.astype("float64")


@worked_out_once()
def findings(
    frame: pd.DataFrame,
    floor: pd.DataFrame | None = None,
    interval: str = METHODS[0],
    processes: Processes | None = None,
) -> Findings:
    """Work out everything; what the analysis refuses for some rows is left out and named in `troubles`.

    floor: similarities between baselines (`lesion.analysis.floor`).
    interval: of means, one of `bootstrap.METHODS`; `bootstrap-t` by default because of its coverage (see there).
    processes: that work out tables too, where they are started and the rows are few enough to be sent to them.

    Raises ValueError for an unknown interval.
    """
    if interval not in METHODS:
        raise ValueError(f"unknown interval {interval!r}; allowed: {', '.join(METHODS)}")
    metric = importance_metric(frame)
    found = Findings(frame, _scored_by(metric, pd.DataFrame(columns=list(PAIR)) if floor is None else floor), metric)
    if frame.empty:
        return found
    how = {"method": interval}
    several = processes if processes and len(frame) <= SENT else Processes(0)
    calls: dict[str, Call[tuple[pd.DataFrame, str]]] = {}

    def begin(name: str, what: Callable[..., pd.DataFrame], *arguments: Any, **options: Any) -> None:
        calls[name] = several.call(partial(_tried, what, arguments, options))

    whole, frame = frame, slim(frame, metric)
    if read := reading_columns(whole):
        shown = frame.assign(**whole[read])
        begin("reading", reading_drops, shown, **how)
        begin("alone", reading_shares, shown, **how)
    if fits := adherence_columns(whole):
        begin("adherence", adherence_lost, frame.assign(**with_right(whole)[fits]), metrics=fits, **how)
    pairs = _plain_texts(found.pairs)
    has = frame["selection"].value_counts()
    work = partial(begin, metric=metric)
    work("layers", bounded_estimates, frame, **how)
    work("affected", affected_prompts, frame)
    work("variance", variance_components, frame)
    work("comparisons", comparisons, frame)
    work("wins", wins, frame)
    work("stability", top_stability, frame)
    work("concordance", kendalls_w, frame)
    work("neighbours", neighbours, frame, **how)
    if len(pairs):
        work("tested", against_floor, frame, pairs, **how)
        work("normalised", normalised_importance, frame, pairs, **how)
        work("floors", _floors, frame, pairs, **how)
    if "aspects" in frame and (frame["aspects"].fillna("") != "").any():
        work("aspects", aspect_estimates, frame, **how)
        work("interaction", aspect_interaction, frame)
    work("agreement", _agreement, frame)
    work("differences", paired_differences, frame, **how)
    if has.get("pairs", 0):
        work("interactions", pair_interactions, frame, **how)
    if frame["selection"].isin(GROUPS).any():
        work("groups", group_effects, frame, **how)
    if has.get("cumulative", 0):
        work("cumulative", cumulative_curves, frame, **how)
        work("areas", cumulative_areas, frame, **how)
    if frame.loc[frame["selection"] == LEAVE_ONE_OUT, "strength"].nunique() > 1:
        work("doses", dose_response, frame, **how)
    if has.get("coalitions", 0):
        work("shapley", shapley_values, frame, **how)
    _gather(found, calls)
    found.aspects = _bounded(found.aspects, metric)
    _correct(found)
    calls.clear()
    work("ranks", ranks, frame, compared=found.comparisons, won=found.wins)
    _gather(found, calls)
    return found


def _tried(
    what: Callable[..., pd.DataFrame], arguments: Sequence[Any], options: Mapping[str, Any]
) -> tuple[pd.DataFrame, str]:
    """The table, or an empty one and why it is refused."""
    try:
        return what(*arguments, **options), ""
    except ValueError as error:
        return _none(), str(error)


def _gather(found: Findings, calls: Mapping[str, Call[tuple[pd.DataFrame, str]]]) -> None:
    for name, call in calls.items():
        table, trouble = call.result()
        setattr(found, name, table)
        if trouble:
            found.troubles.append(f"{name}: {trouble}")


def prepare() -> None:
    """Import what the first findings of a process would."""
    importlib.import_module("scipy.optimize")
    importlib.import_module("scipy.stats")


CLAIMS = (
    *("comparisons", "wins", "tested", "adherence", "reading", "alone", "interactions", "interaction", "concordance"),
    "variance",
)


def _correct(found: Findings) -> None:
    """One correction over every test that a report makes, of all its settings and tables: column p_holm.

    Rank limits follow from comparisons and wins, and neighbouring ranks are some of them.
    """
    tables = [table for name in CLAIMS if "p" in (table := getattr(found, name))]
    values = [table["p"].to_numpy(dtype=np.float64, na_value=np.nan) for table in tables]
    least = [table["p_least"] if "p_least" in table else np.zeros(len(table)) for table in tables]
    together = holm(np.concatenate(values), np.concatenate(least)) if values else np.empty(0)
    for table, part in zip(tables, np.split(together, np.cumsum([len(one) for one in values])[:-1]), strict=True):
        table["p_holm"] = part
    if len(found.neighbours):
        plain = found.neighbours.drop(columns="p_holm").rename(columns={"next_layer": "other"})
        keys = [name for name in found.comparisons if name in plain and name not in ("difference", "p", "n_prompts")]
        table = plain.merge(found.comparisons[[*keys, "p_holm"]], on=keys, how="left")
        turned = {"layer": "other", "other": "layer", "n_more": "n_less", "n_less": "n_more"}
        won = pd.concat([found.wins, found.wins.rename(columns=turned)], ignore_index=True)
        won = won[[*keys, "n_more", "n_less", "p_holm"]].rename(columns={"p_holm": "p_wins"})
        found.neighbours = table.merge(won, on=keys, how="left").rename(columns={"other": "next_layer"})


def bounded_estimates(frame: pd.DataFrame, metric: str, **options: Any) -> pd.DataFrame:
    """`layer_estimates` with limits within what the metric can be."""
    return _bounded(layer_estimates(frame, metric, **options), metric)


def _bounded(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Limits of importance and sufficiency cut at what the metric can be: bootstrap-t knows no bounds."""
    if table.empty or metric not in known_metrics():
        return table
    least, most = metric_class(metric).range
    if metric_class(metric).direction == "distance":
        least, most = 1 - most, 1 - least
    important = table["measure"] == "importance"
    bounds = {"low": np.where(important, 1 - most, least), "high": np.where(important, 1 - least, most)}
    low, high = (table[end].clip(bounds["low"], bounds["high"]) for end in ("low", "high"))
    return table.assign(low=low, high=high)


_READ = ("prompt_id", "seed", "selection", "layer", "layer_index", "lesioned", "aspects", "order", "permutation")


def slim(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Only what the analysis reads, texts as plain objects: it takes rows apart, and would copy the rest each time."""
    keep = ["model", *LESION, *GENERATION, *_READ, "status", metric]
    return _plain_texts(frame[[name for name in dict.fromkeys(keep) if name in frame]])


def _plain_texts(frame: pd.DataFrame) -> pd.DataFrame:
    texts = [name for name in frame if not pd.api.types.is_numeric_dtype(frame[name])]
    return frame.astype(dict.fromkeys(texts, object))


def _scored_by(metric: str, pairs: pd.DataFrame) -> pd.DataFrame:
    """Runs that chose another metric have floors of that one; a floor that names none has the study's."""
    return pairs[pairs["metric"].isna() | (pairs["metric"] == metric)] if "metric" in pairs else pairs


def _agreement(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    tables = [correlations(frame, between, metric) for between in BETWEEN]
    tables = [table for table in tables if len(table)]
    found = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    return found if "measure" in found or found.empty else found.assign(measure=None)


def _floors(frame: pd.DataFrame, pairs: pd.DataFrame, metric: str, method: str) -> pd.DataFrame:
    """`noise_floor` for each model and way of generating: those columns of its settings that the pairs name."""
    tables, seen = [], []
    for setting in settings(frame):
        names = {"model": setting.model, **dict(setting.generation)}
        if names in seen:
            continue
        seen.append(names)
        shared = shared_noise(rows(frame, setting))
        table = noise_floor(of_setting(pairs, names), method=method, shared=shared)
        tables.append(table[table["n_pairs"] > 0].assign(**names))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def certain(p: object) -> bool:
    """Whether a (corrected) p-value counts as a difference; no for a missing one."""
    return isinstance(p, float) and bool(np.isfinite(p)) and p <= CERTAIN
