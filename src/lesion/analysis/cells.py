"""From a results frame to numbers that can be compared: effects of lesions by setting, prompt and seed.

effect = 1 - similarity(baseline, lesioned image), whatever the selection; 0 for identical images.
Rows that are not ok, or have no score, are left out of every mean and counted: `counts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lesion.analysis.bootstrap import Floats, Interval, effective_number, interval
from lesion.analysis.importance import LEAVE_ONE_OUT, NO_EFFECT, ONLY_ONE, left_out, similarity
from lesion.analysis.settings import BASELINE, in_order, layers_in_order, rows, settings
from lesion.study.columns import LESION

MEASURES = {LEAVE_ONE_OUT: "importance", ONLY_ONE: "sufficiency"}


def lesioned_rows(frame: pd.DataFrame, metric: str | None = None) -> tuple[pd.DataFrame, list[str]]:
    """Every row with a lesion, setting after setting, and the names of the columns that tell settings apart.

    Adds the columns of its setting where the frame lacks them, and `effect` (float, NaN unless ok and scored).
    ValueError for a metric that is no similarity (see `importance.similarity`).
    """
    known = _known.get()
    if known is None:
        return _lesioned_rows(frame, metric)
    if (id(frame), metric) not in known:
        known[id(frame), metric] = (*_lesioned_rows(frame, metric), frame)  # held, so that its id stays its own
    part, keys, _ = known[id(frame), metric]
    return part.copy(), [*keys]


@contextmanager
def worked_out_once() -> Iterator[None]:
    """Within it `lesioned_rows` of a frame are worked out once; no frame may be changed meanwhile."""
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


_known: ContextVar[dict[tuple[int, str | None], tuple[pd.DataFrame, list[str], pd.DataFrame]] | None] = ContextVar(
    "known", default=None
)


def _lesioned_rows(frame: pd.DataFrame, metric: str | None) -> tuple[pd.DataFrame, list[str]]:
    frame = frame.assign(effect=1.0 - similarity(frame, metric))
    parts, keys = [], ["model", *LESION]
    for setting in settings(frame):
        part = rows(frame, setting)
        columns = setting.columns()
        parts.append(part[part["selection"] != BASELINE].assign(**columns))
        keys += [name for name in columns if name not in keys]
    return (pd.concat(parts) if parts else frame.assign(**{k: frame.get(k) for k in keys})), keys


def groups(part: pd.DataFrame, keys: Sequence[str]) -> Iterable[tuple[dict[str, Any], pd.DataFrame]]:
    """Rows with equal keys, in order of appearance, and these keys."""
    if part.empty:
        return
    for values, group in part.groupby(list(keys), sort=False, dropna=False):
        yield dict(zip(keys, values, strict=True)), group


def counts(part: pd.DataFrame) -> dict[str, int]:
    """Rows left out: n_invalid, n_failed, n_unscored (ok, but without this metric)."""
    return left_out(part, "effect")


def nested(part: pd.DataFrame, column: str = "effect") -> Floats:
    """Prompts x seeds, each in the order of their names, NaN where there is no valid value. (P, S)

    Prompts without one are left out. Rows without `seed` are one seed after the other of their prompt. Rows with
    `cluster` have these in the place of prompts: means over the paraphrases of one seed.
    """
    return spread(part, part[column].to_numpy(dtype=np.float64, na_value=np.nan))


def spread(part: pd.DataFrame, values: Floats) -> Floats:
    """`nested` of values beside the rows of `part`."""
    held = ~np.isnan(values)
    prompt, ids = pd.factorize(part["cluster" if "cluster" in part else "prompt_id"].to_numpy()[held], sort=True)
    if "seed" in part:
        place, seeds = pd.factorize(part["seed"].to_numpy()[held], sort=True)
        width = len(seeds)
    else:
        place = _nth(prompt)
        width = int(place.max()) + 1 if len(place) else 0
    sums, number = np.zeros((len(ids), width)), np.zeros((len(ids), width))
    np.add.at(sums, (prompt, place), values[held])
    np.add.at(number, (prompt, place), 1.0)
    return np.where(number > 0, sums / np.maximum(number, 1.0), np.nan)


def _nth(codes: NDArray[np.intp]) -> NDArray[np.intp]:
    """How many equal codes stand before each."""
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    place = np.empty(len(codes), dtype=np.intp)
    place[order] = np.arange(len(codes)) - np.repeat(starts, np.diff(starts, append=len(codes)))
    return place


def shared_noise(part: pd.DataFrame) -> bool:
    """Whether a seed of these rows is the same noise for every prompt; so in results of version 0.1."""
    return "seed" in part and ("noise" not in part or bool((part["noise"] != "own").all()))


def over_prompts(part: pd.DataFrame, column: str = "effect", **options: Any) -> Interval:
    """The interval (options: those of `bootstrap.interval`) of a column in which 0 means that nothing changed.

    Effects lie within [0, 1], differences and other columns within [-1, 1], unless `bounds` say else.
    """
    bounds = options.pop("bounds", (0.0, 1.0) if column == "effect" else (-1.0, 1.0))
    return interval(nested(part, column), shared=shared_noise(part), bounds=bounds, **options)


def rests_on(part: pd.DataFrame, column: str = "effect") -> float:
    """The effective number of prompts behind a column (`bootstrap.effective_number`), 0 without a valid value."""
    cells = nested(part, column)
    return effective_number(np.nanmean(cells, axis=1)) if cells.size else 0.0


def no_effect(values: Any) -> bool:
    """Whether there are values and all are within 1e-4 of 0: rounding, not an effect."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    return bool(known.size) and bool((np.abs(known) <= NO_EFFECT).all())


def over_seeds(part: pd.DataFrame, column: str = "effect", confidence: float = 0.95) -> Interval:
    """Student's t over the seeds of one prompt: it speaks of that prompt only. `n/a (one seed)` for one."""
    values = part[column].dropna().to_numpy(dtype=np.float64)
    found = interval(values[:, None], "t", confidence)
    reason = "one seed" if found.reason == "one prompt" else found.reason
    if found.n_images > 1 and bool((np.abs(values) <= NO_EFFECT).all()):
        reason = "no effect"
    found = without_limits(found, reason) if reason else found
    return replace(found, sd_prompts=np.nan, sd_seeds=found.sd_prompts, n_prompts=min(found.n_images, 1))


def without_limits(found: Interval, reason: str) -> Interval:
    """The same without low and high."""
    return replace(found, low=np.nan, high=np.nan, used="", reason=reason)


def reasons(methods: pd.Series) -> pd.Series:
    """Of a table's column of methods, the reasons where there are no limits."""
    texts = methods.astype(str)
    return texts[texts.str.startswith("n/a (")].str.removeprefix("n/a (").str.removesuffix(")")


def flipped(found: Interval) -> Interval:
    """Of 1 - x: from effects back to similarities."""
    return replace(found, mean=1.0 - found.mean, low=1.0 - found.high, high=1.0 - found.low)


def matched(part: pd.DataFrame, columns: str = "layer", value: str = "effect") -> pd.DataFrame:
    """Images (prompt_id, seed) that have a valid value for each of `columns`; columns without any are left out.

    Index: prompt_id, seed, sorted. Columns: layers in depth order, else sorted.
    """
    known = part[part[value].notna()]
    wide = known.groupby(["prompt_id", "seed", columns], sort=False)[value].mean().unstack()  # a pivot_table is slow
    if columns == "layer":
        wide = wide.reindex(columns=[layer for layer in layers_in_order(part) if layer in wide])
    else:
        wide = wide.sort_index(axis=1)
    return wide.dropna().sort_index()


def cube(wide: pd.DataFrame) -> Floats:
    """`matched` as columns x prompts x seeds, NaN where an image is missing. (L, P, S)"""
    number, ids = pd.factorize(wide.index.get_level_values("prompt_id"), sort=True)
    place, seeds = pd.factorize(wide.index.get_level_values("seed"), sort=True)
    cells = np.full((wide.shape[1], len(ids), len(seeds)), np.nan)
    cells[:, number, place] = wide.to_numpy(dtype=np.float64).T
    return cells


def prompt_averages(cells: Floats) -> Floats:
    """Means over seeds of `cube`. (L, P)"""
    found: Floats = np.nanmean(cells, axis=2) if cells.size else np.empty(cells.shape[:2])
    return found


def images(part: pd.DataFrame) -> int:
    """Different pairs of prompt and seed."""
    return len(part[["prompt_id", "seed"]].drop_duplicates())


def names_of(lesioned: Any) -> tuple[str, ...]:
    """Module paths in a `lesioned` cell: joined by '+' ("" for none), or a sequence of them."""
    found = lesioned.split("+") if isinstance(lesioned, str) else lesioned
    return tuple(in_order(str(name) for name in found if name))
