"""The tables of a study: results, one row per image, and floor, one row per pair of baselines."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lesion.analysis.importance import as_similarity
from lesion.run.publish import Publisher
from lesion.run.score_queue import ScoreQueue
from lesion.study import pairs
from lesion.study.columns import COMPONENT, GENERATION, MADE_WITH, PLACE, TRUNCATED, WHOLE, component, row
from lesion.study.components import DENOISER, components_of
from lesion.study.grid import Cell, Study

ROWS = 1024  # that wait as Python objects, which take more memory than the table's columns


def results(
    study: Study,
    scores: ScoreQueue,
    paths: Sequence[str],
    failures: Mapping[str, str],
    publisher: Publisher,
) -> pd.DataFrame:
    """One row per image, in the order of `Study.cells`.

    paths: every layer of the model in forward order. failures: reasons for images that could not be made.
    """
    columns: defaultdict[str, list[Any]] = defaultdict(list)
    parts: list[pd.DataFrame] = []
    scorer = {
        "scorer": scores.spec.name,
        "scorer_identity": "; ".join(scores.identities.values()),
        "importance_metric": scores.spec.importance,
    }
    sharded, several = study.shard.count > 1, components_of(study.layers) != (DENOISER,)
    for cell, place in zip(study.cells(), study.places() if sharded else itertools.repeat(0)):
        status, reason = status_of(cell, scores, failures)
        values = scores.values(cell) if status == "ok" else {}
        facts = scores.picture(cell.key) if status != "failed" else None
        made = json.loads(facts.made) if facts and facts.made else {}
        record = row(cell, paths) | {
            **{name: made.get(name, "") for name in MADE_WITH},
            TRUNCATED: made.get(TRUNCATED),
            "status": status,
            "reason": reason,
            "image": "" if status == "failed" else publisher.place(cell),
            **{column: values.get(column, float("nan")) for column in scores.identities},
            **scorer,
            "protocol": study.protocol_of(cell.lesion) if cell.lesion else "",
            **({COMPONENT: component(cell)} if several else {}),
            **({WHOLE: study.whole, PLACE: place} if sharded else {}),
        }
        for name, value in record.items():
            columns[name].append(value)
        if len(columns["cell"]) == ROWS:
            parts.append(pd.DataFrame(columns))
            columns.clear()
    if columns or not parts:
        parts.append(pd.DataFrame(columns))
    frame = pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]
    known = frame[TRUNCATED].astype("Int64")  # images of earlier versions do not say it, nor do those that failed
    frame[TRUNCATED] = known.groupby(frame["prompt_id"]).transform("max")
    return frame


def status_of(cell: Cell, scores: ScoreQueue, failures: Mapping[str, str]) -> tuple[str, str]:
    """Status (ok, invalid, failed) and reason ("" for ok) of an image."""
    if why := failures.get(cell.key):
        return "failed", why
    facts = scores.picture(cell.key)
    if facts is None:
        return "failed", "not made yet"
    if facts.reason:
        return "invalid", facts.reason
    baseline = cell.baseline.key
    against = scores.picture(baseline)
    why = failures.get(baseline) or ("not made yet" if against is None else against.reason)
    return ("invalid", f"its baseline cannot be compared with: {why}") if why else ("ok", "")


def floor(study: Study, scores: ScoreQueue) -> pd.DataFrame:
    """How similar baselines are to each other: what `lesion.analysis.floor` reads, one row a pair of
    `lesion.study.pairs`. Scores what has no score yet; a pair with an image that is not valid has no row.

    A shard has the pairs of its baselines with each other, and with those of other shards that are made by now: of two
    shards, the later one has their common pairs.
    """
    metric = scores.spec.importance
    baselines = itertools.takewhile(lambda cell: cell.lesion is None, study.cells())  # they come first
    ours = {cell.key for cell in baselines}
    sharded = study.shard.count > 1
    if sharded:
        scores.refresh()
    candidates = ((n, a, b) for n, (a, b) in enumerate(pairs.pairs(study)) if a.key != b.key and ours & {a.key, b.key})
    numbers, compared = [], []
    for number, a, b in candidates:
        if all((facts := scores.facts(cell.key)) and not facts.reason for cell in (a, b)):
            numbers.append(number)
            compared.append((a, b))
    records = []
    for number, (a, b), value in zip(numbers, compared, scores.pairs(metric, compared), strict=True):
        if not np.isfinite(value):
            continue
        records.append(
            {
                "model": study.model.name,
                "prompt_id_a": a.prompt.id,
                "seed_a": a.seed,
                "prompt_id_b": b.prompt.id,
                "seed_b": b.seed,
                "similarity": as_similarity(value, metric),
                **{name: value for name, value in row(a, ()).items() if name in GENERATION},
                "metric": metric,
                "scorer_identity": scores.identities[metric],
                **({WHOLE: study.whole, PLACE: number} if sharded else {}),
            }
        )
    columns = ["model", *pairs.COLUMNS, *GENERATION, "metric", "scorer_identity", *((WHOLE, PLACE) if sharded else ())]
    return pd.DataFrame(records, columns=columns)


def mixed(frame: pd.DataFrame) -> str:
    """With which cards and versions the images of a study were made, if with several; else ""."""
    made = frame[frame["torch"] != ""].drop_duplicates([*MADE_WITH])
    if len(made) < 2:
        return ""
    return "; ".join(
        f"{card}, torch {torch}, diffusers {diffusers}" + (f", lesion {lesion}" if lesion else "")
        for card, torch, diffusers, lesion in made[[*MADE_WITH]].itertuples(index=False)
    )
