"""The results as the page's script reads them: columns of small numbers that point into lists of names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

import matplotlib
import pandas as pd

from lesion.analysis.settings import BASELINE, in_order, layers_in_order, rows, settings
from lesion.report.profile import levels
from lesion.report.text import clean, short_layer, short_names
from lesion.scoring import known_metrics, metric_class
from lesion.study.columns import GENERATION

PROMPT_LIMIT = 2000  # characters of a prompt that the page shows
SHADES = 64  # of the heat map's colour scale


def inside(image: object) -> str:
    """The path of an image if it lies below the page's folder, else "" (a results file may come from anybody)."""
    name = str(image or "")
    parts = name.split("/")
    if not name or not parts[0] or ".." in parts or "\\" in name or "\0" in name:
        return ""
    return PurePosixPath(name).as_posix() if "" in parts or "." in parts else name


def _values(column: pd.Series) -> list[Any]:
    """Of a column, as Python objects: many times faster than iterating over its texts."""
    return column.to_numpy(dtype=object).tolist()  # type: ignore[no-any-return]


def _numbered(values: Iterable[Any]) -> tuple[list[Any], Callable[[Any], int]]:
    """The distinct values in order of appearance, and each one's place (-1 for others)."""
    distinct = in_order(values)
    places = {value: index for index, value in enumerate(distinct)}
    return distinct, lambda value: places.get(value, -1)


def _number(value: Any) -> float | None:
    return round(float(value), 5) if value is not None and math.isfinite(value) else None


def _memberships(frame: pd.DataFrame) -> tuple[list[dict[str, Any]], list[int], list[int]]:
    """Settings with their group (model and generation, which share baselines), and both numbers of every row.

    A baseline belongs to a group, not to a setting: its setting is -1.
    """
    found = settings(frame)
    groups = in_order((one.model, one.generation) for one in found)
    of_setting, of_group = [-1] * len(frame), [-1] * len(frame)
    for number, one in enumerate(found):
        group = groups.index((one.model, one.generation))
        part = rows(frame, one)
        for place, selection in zip(part.index, _values(part["selection"]), strict=True):
            of_group[place] = group
            if selection != BASELINE:
                of_setting[place] = number
    named = [{"label": clean(one.label), "group": groups.index((one.model, one.generation))} for one in found]
    return named, of_setting, of_group


def _baselines(frame: pd.DataFrame) -> list[int]:
    """The row of each row's baseline, -1 where it is missing; a baseline is its own."""
    own = ["model", "prompt_id", "seed", *(name for name in GENERATION if name in frame)]
    keys = list(map(tuple, frame[own].astype(object).where(frame[own].notna(), None).to_numpy()))
    selections = _values(frame["selection"])
    first: dict[tuple[Any, ...], int] = {}
    for place, (key, selection) in enumerate(zip(keys, selections, strict=True)):
        if selection == BASELINE:
            first.setdefault(key, place)
    return [
        place if selection == BASELINE else first.get(key, -1)
        for place, (key, selection) in enumerate(zip(keys, selections, strict=True))
    ]


def _change(metric: str) -> str:
    """How the page reads a metric as change from the baseline; "" where it cannot.

    similarity: 1 - value; distance: the value; prompt: the baseline's value less the image's, so above 0 where an image
    shows less of its prompt.
    """
    if metric not in known_metrics():
        return "similarity"  # what importance is computed from in results of other versions
    facts = metric_class(metric)
    if facts.direction == "similarity":
        return "similarity" if facts.identical == 1 else ""
    return facts.direction if facts.direction in ("distance", "prompt") else ""


def page_data(
    frame: pd.DataFrame,
    thumbs: Mapping[str, str],
    metric: str = "clip_similarity",
    marks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Everything the script shows, as plain lists; paths are quoted for URLs and lie below the page's folder.

    marks: of each row the boxes to draw over its image, as JSON data; empty where no prompt has any.
    """
    frame = frame.reset_index(drop=True)
    prompt_ids, prompt = _numbered(frame["prompt_id"])
    firsts = frame.drop_duplicates("prompt_id")
    aspects = firsts["aspects"].fillna("") if "aspects" in frame else [""] * len(firsts)
    layer_names = layers_in_order(frame)
    _, layer = _numbered(layer_names)
    modes, mode = _numbered(frame["selection"])
    statuses, status = _numbered(frame["status"])
    reasons, reason = _numbered(["", *in_order(frame["reason"].fillna("").astype(str))])
    together = frame["lesioned"].fillna("").astype(str) if "lesioned" in frame else pd.Series("", frame.index)
    groups, group = _numbered(["", *in_order(together)])
    named, of_setting, of_group = _memberships(frame)
    images = [inside(name) for name in _values(frame["image"].fillna(""))]
    extra = [name for name in known_metrics() if name != metric and name in frame]
    colours = matplotlib.colormaps["cividis"]
    short = short_names(dict(zip(prompt_ids, firsts["prompt"], strict=True)))
    return {
        "metric": metric,
        "metrics": [{"name": name, "change": _change(name)} for name in (metric, *extra)],
        "settings": named,
        "prompts": [
            {"id": clean(one), "text": clean(text, PROMPT_LIMIT), "aspects": _tags(tags), "short": short[one]}
            for one, text, tags in zip(prompt_ids, firsts["prompt"], aspects, strict=True)
        ],
        "layers": [clean(name) for name in layer_names],
        "short": [short_layer(name) for name in layer_names],
        "levels": levels(layer_names),
        "groups": [clean(names, PROMPT_LIMIT).replace("+", " + ") for names in groups],
        "modes": [clean(name) for name in modes],
        "statuses": [clean(name) for name in statuses],
        "reasons": [clean(text) for text in reasons],
        "palette": [matplotlib.colors.to_hex(colours(shade / (SHADES - 1))) for shade in range(SHADES)],
        "rows": {
            "setting": of_setting,
            "group": of_group,
            "prompt": [prompt(value) for value in _values(frame["prompt_id"])],
            "seed": [int(value) for value in _values(frame["seed"])],
            "mode": [mode(value) for value in _values(frame["selection"])],
            "layer": [layer(value) for value in _values(frame["layer"].fillna(""))],
            "lesioned": [group(value) for value in _values(together)],
            "status": [status(value) for value in _values(frame["status"])],
            "reason": [reason(value) for value in _values(frame["reason"].fillna("").astype(str))],
            "baseline": _baselines(frame),
            "image": [_url(name) for name in images],
            "thumb": [_url(thumbs[name]) if name in thumbs else 0 for name in images],
        },
        "marks": list(marks),
        "scores": {name: [_number(value) for value in frame[name].astype("float64")] for name in (metric, *extra)},
    }


def _url(path: str) -> str:
    return quote(path, errors="replace")


def _tags(text: object) -> list[str]:
    return [clean(tag, 60) for tag in str(text).split(",") if tag.strip()]


def as_json(data: Mapping[str, Any]) -> str:
    """JSON that is safe inside a script element: no "<", nothing outside ASCII."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e")
