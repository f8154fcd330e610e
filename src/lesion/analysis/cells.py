"""From a results frame to numbers that can be compared: effects of lesions by setting, prompt and seed.

effect = 1 - similarity(baseline, lesioned image), whatever the selection; 0 for identical images.
Rows that are not ok, or have no score, are left out of every mean and counted: `counts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lesion.analysis.bootstrap import Floats, Interval, interval
from lesion.analysis.importance import LEAVE_ONE_OUT, NO_EFFECT, ONLY_ONE, left_out, similarity
from lesion.analysis.settings import BASELINE, in_order, layers_in_order, rows, settings
from lesion.study.columns import LESION

MEASURES = {LEAVE_ONE_OUT: "importance", ONLY_ONE: "sufficiency"}


def lesioned_rows(frame: pd.DataFrame, metric: str | None = None) -> tuple[pd.DataFrame, list[str]]:
    """Every row with a lesion, setting after setting, and the names of the columns that tell settings apart.

    Adds the columns of its setting where the frame lacks them, and `effect` (float, NaN unless ok and scored).
    ValueError for a metric that is no similarity (see `importance.similarity`).
    """
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
    """Prompts x seeds, a prompt's valid values first, then NaN. (P, S)"""
    values = part[column].to_numpy(dtype=np.float64, na_value=np.nan)
    held = ~np.isnan(values)
    prompt, ids = pd.factorize(part["prompt_id"].to_numpy(dtype=object)[held])
    place = _nth(prompt)
    cells = np.full((len(ids), int(place.max()) + 1 if len(place) else 0), np.nan)
    cells[prompt, place] = values[held]
    return cells


def _nth(codes: NDArray[np.intp]) -> NDArray[np.intp]:
    """How many equal codes stand before each."""
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    place = np.empty(len(codes), dtype=np.intp)
    place[order] = np.arange(len(codes)) - np.repeat(starts, np.diff(starts, append=len(codes)))
    return place


def over_prompts(part: pd.DataFrame, column: str = "effect", **options: Any) -> Interval:
    """The interval (options: those of `bootstrap.interval`) of a column in which 0 means that nothing changed.

    Values that are all within 1e-4 of 0 are rounding: they get no interval, `n/a (no effect)`.
    """
    cells = nested(part, column)
    found = interval(cells, **options)
    if found.n_prompts > 1 and bool((np.abs(cells[np.isfinite(cells)]) <= NO_EFFECT).all()):
        return without_limits(found, "no effect")
    return found


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

    Index: prompt_id, seed. Columns: layers in depth order, else sorted.
    """
    wide = part.pivot_table(index=["prompt_id", "seed"], columns=columns, values=value, aggfunc="mean", sort=False)
    if columns == "layer":
        wide = wide.reindex(columns=[layer for layer in layers_in_order(part) if layer in wide])
    else:
        wide = wide.sort_index(axis=1)
    return wide.dropna()


def cube(wide: pd.DataFrame) -> Floats:
    """`matched` as columns x prompts x seeds, a prompt's seeds first, then NaN. (L, P, S)"""
    prompts = wide.index.get_level_values("prompt_id")
    number, ids = pd.factorize(prompts)
    place = _nth(number)
    cells = np.full((wide.shape[1], len(ids), int(place.max()) + 1 if len(place) else 0), np.nan)
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
