"""Lesions as plain data, and the selections that make them. Imports nothing of torch."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lesion.errors import RequestError

BRANCHES = ("both", "cond", "uncond")


def digest_of(data: Any) -> str:
    """SHA-256, 64 hex digits, of JSON data written with sorted keys, in UTF-8 that lets lone surrogates pass."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Replacement:
    """By what a site's output is replaced.

    `name` is a module of `lesion.replacements`; `identity` is whatever else of it can change pixels (for `mean`: the
    calibration set), as plain JSON data.
    """

    name: str
    identity: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Lesion:
    """What is done to a model while one image is made.

    layers: module paths of the lesioned layers, in forward order. window: fraction of the denoising steps [start, end).
    branch: which half of classifier-free guidance is touched. strength: 0 leaves the output, 1 replaces it fully.
    selection and layer only label the lesion (how it was chosen, and for which layer); they do not change pixels.
    """

    selection: str
    layer: str
    layers: tuple[str, ...]
    replacement: Replacement
    window: tuple[float, float] = (0.0, 1.0)
    branch: str = "both"
    strength: float = 1.0

    def identity(self) -> dict[str, Any]:
        """Everything of it that can change pixels, as JSON data; a value at its default is left out."""
        data: dict[str, Any] = {
            "layers": list(self.layers),
            "replacement": {"name": self.replacement.name, **self.replacement.identity},
        }
        if self.window != (0.0, 1.0):
            data["window"] = list(self.window)
        if self.branch != "both":
            data["branch"] = self.branch
        if self.strength != 1.0:
            data["strength"] = self.strength
        return data

    @cached_property
    def digest(self) -> str:
        """`digest_of` its identity; at strength 0, where it does nothing, that of no lesion (None)."""
        return digest_of(self.identity() if self.strength else None)


def covers(window: tuple[float, float], step: int, steps: int) -> bool:
    """Whether a window [start, end), in fractions of the steps, holds step number `step` (from 0) of `steps`."""
    start, end = window
    return start * steps - 1e-9 <= step < end * steps - 1e-9  # 0.3 * 10 is not quite 3


@dataclass(frozen=True)
class Choice:
    """One answer of a selection: the layer it is about ("" if about none) and the layers to lesion."""

    layer: str
    lesioned: tuple[str, ...]


Selection = Callable[..., Iterator[Choice]]
SELECTIONS: dict[str, Selection] = {}


def selection(make: Selection) -> Selection:
    """Registers a selection under its function's name. Its keyword arguments are its options in the config."""
    SELECTIONS[make.__name__.removesuffix("_")] = make
    return make


@selection
def none(layers: Sequence[str]) -> Iterator[Choice]:
    """The baseline alone; it is part of every study anyway."""
    return iter(())


@selection
def leave_one_out(layers: Sequence[str]) -> Iterator[Choice]:
    """One layer lesioned, all others intact: one image a layer."""
    for layer in layers:
        yield Choice(layer, (layer,))


@selection
def only_one(layers: Sequence[str]) -> Iterator[Choice]:
    """One layer intact, all others lesioned: one image a layer."""
    if len(layers) < 2:
        raise RequestError("selection", "only_one needs at least two layers; layers.include leaves one")
    for layer in layers:
        yield Choice(layer, tuple(other for other in layers if other != layer))


@selection
def all_(layers: Sequence[str]) -> Iterator[Choice]:
    """Every layer lesioned: the text-blind control, one image."""
    yield Choice("", tuple(layers))


def check_selection(name: str, options: Mapping[str, Any]) -> None:
    """Raises RequestError if there is no such selection or it has no such option."""
    if name not in SELECTIONS:
        raise RequestError("selection", f"unknown selection {name!r}; allowed: {', '.join(sorted(SELECTIONS))}")
    allowed = list(inspect.signature(SELECTIONS[name]).parameters)[1:]
    if unknown := [option for option in options if option not in allowed]:
        raise RequestError(
            f"selection.{name}", f"unknown option {unknown[0]!r}; allowed: {', '.join(allowed) or 'none'}"
        )


def choices(name: str, options: Mapping[str, Any], layers: Sequence[str]) -> list[Choice]:
    """What a selection picks of these layers (module paths in forward order)."""
    check_selection(name, options)
    return list(SELECTIONS[name](layers, **options))
