"""Which images may be averaged together: one setting is one model, lesion kind and way of generating."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import pandas as pd

from lesion.study.columns import GENERATION, LESION
from lesion.study.components import COMPONENTS, component_of
from lesion.study.lesions import Lesion

BASELINE = "none"


def slug(text: str) -> str:
    """A file name part of a-z, 0-9, '.', '_' and '-'; a short hash tells apart texts that would become the same."""
    safe = re.sub(r"[^a-z0-9._]+", "-", text.lower())[:48].strip("-.")
    if safe == text:
        return safe
    return f"{safe or 'x'}-{hashlib.sha1(text.encode('utf-8', 'replace')).hexdigest()[:6]}"


@dataclass(frozen=True)
class Setting:
    """Everything the images of one average share; `generation` holds only what differs inside the frame."""

    model: str
    replacement: str = ""  # "" when the model has nothing but baselines
    window_start: float = Lesion.window[0]
    window_end: float = Lesion.window[1]
    branch: str = Lesion.branch
    strength: float = Lesion.strength
    kind: str = Lesion.kind
    generation: tuple[tuple[str, Any], ...] = ()

    def columns(self) -> dict[str, Any]:
        """The setting as table columns."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "generation"}
        return {**named, **dict(self.generation)}

    def _parts(self) -> list[tuple[str, str]]:
        parts = []
        if self.kind != Lesion.kind:
            parts.append(("of", self.kind))
        if (self.window_start, self.window_end) != Lesion.window:
            parts.append(("window", f"{self.window_start:g}-{self.window_end:g}"))
        if self.branch != Lesion.branch:
            parts.append(("branch", str(self.branch)))
        if self.strength != Lesion.strength:
            parts.append(("strength", f"{self.strength:g}"))
        return parts + [(name, str(value)) for name, value in self.generation]

    @property
    def label(self) -> str:
        """For people; kind, window, branch and strength only where they are not the default."""
        lesion = f"{self.replacement} replacement" if self.replacement else "baselines only"
        return ", ".join([str(self.model), lesion, *(f"{name} {value[:40]}" for name, value in self._parts())])

    @property
    def slug(self) -> str:
        """For file names; two different settings never share one."""
        parts = [f"{name}{slug(value)}" for name, value in self._parts()]
        # "--" cannot occur inside a part, so the parts cannot run into each other.
        replacement = slug(str(self.replacement)) if self.replacement else "baseline"
        return "--".join([slug(str(self.model)), replacement, *parts])


def _varying(frame: pd.DataFrame) -> list[str]:
    """Generation columns with more than one value inside one model: images that must not be averaged together."""
    several = [name for name in GENERATION if name in frame and frame[name].nunique(dropna=False) > 1]
    if not several:
        return []
    counts = frame.groupby("model", dropna=False)[several].nunique(dropna=False).max()
    return [name for name in several if counts[name] > 1]


def settings(frame: pd.DataFrame) -> list[Setting]:
    """Every setting in the frame in order of appearance; a model with baselines only counts as one."""
    if frame.empty:
        return []
    varying = _varying(frame)
    generation = ["model", *varying]
    lesion = [name for name in LESION if name in frame]
    lesioned = frame[[*generation, *lesion]][frame["selection"] != BASELINE]
    found = [
        Setting(
            generation=tuple((name, record[name]) for name in varying),
            **{name: record[name] for name in ("model", *lesion)},
        )
        for record in lesioned.drop_duplicates().to_dict("records")
    ]
    seen = {(one.model, one.generation) for one in found}
    for record in frame[generation].drop_duplicates().to_dict("records"):
        one = Setting(model=record["model"], generation=tuple((name, record[name]) for name in varying))
        if (one.model, one.generation) not in seen:
            found.append(one)
    return found


def _equal(column: pd.Series, value: Any) -> pd.Series:
    return column.isna() if pd.isna(value) else column == value


def rows(frame: pd.DataFrame, setting: Setting) -> pd.DataFrame:
    """The setting's lesioned images and the baselines they are compared with."""
    keep = _equal(frame["model"], setting.model)
    for name, value in setting.generation:
        keep &= _equal(frame[name], value)
    lesioned = frame["selection"] != BASELINE
    for name in LESION:
        if name in frame:
            lesioned &= _equal(frame[name], getattr(setting, name))
    keep &= lesioned | (frame["selection"] == BASELINE)
    return frame.copy(deep=False) if keep.all() else frame[keep]  # a study of one setting: all, and no row is copied


def only_setting(frame: pd.DataFrame, **wanted: Any) -> Setting:
    """The one setting with these values (keys of `Setting.columns`; None is any); ValueError unless just one fits."""
    asked = {name: value for name, value in wanted.items() if value is not None}
    fitting = [one for one in settings(frame) if all(one.columns().get(name) == value for name, value in asked.items())]
    if len(fitting) != 1:
        fits = "; ".join(one.label for one in fitting) or "none"
        raise ValueError(f"these rows need exactly one setting to be named, {asked or 'no choice'} fits: {fits}")
    return fitting[0]


def layers_in_order(frame: pd.DataFrame) -> list[str]:
    """The layers named in the frame, by component, forward depth in it (`layer_index`), then name."""
    named = frame[["layer", "layer_index"]][frame["layer"].fillna("") != ""]
    if named.empty:
        return []
    depth = named.groupby("layer", sort=False)["layer_index"].min()
    order = {str(layer): (COMPONENTS.index(component_of(str(layer))), place) for layer, place in depth.items()}
    return sorted(order, key=lambda layer: (order[layer], layer))


def in_order(values: Iterable[Any]) -> list[Any]:
    """Distinct values in order of appearance."""
    if isinstance(values, pd.Series):  # not by Python's iteration over its texts, which is slow
        return values.drop_duplicates().tolist()
    return list(dict.fromkeys(values))
