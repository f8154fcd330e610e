"""Lesions as plain data, and the selections that make them. Imports nothing of torch."""

from __future__ import annotations

import fnmatch
import hashlib
import inspect
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lesion.errors import RequestError
from lesion.study.checks import distinct, one_of, share

BRANCHES = ("both", "cond", "uncond")
MOST = 2.0  # strength of those replacements that go beyond 1


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
class Place:
    """Where a lesion stands in a sequence that lesions one layer more at every step.

    order: which sequence, of its selection. permutation: its number, for random sequences. position: layers so far.
    """

    order: str = ""
    permutation: int = -1
    position: int = -1


NOWHERE = Place()


@dataclass(frozen=True)
class Lesion:
    """What is done to a model while one image is made.

    layers: module paths of the lesioned layers, in forward order. kind: which of their modules are touched. window:
    fraction of the denoising steps [start, end). branch: which half of classifier-free guidance is touched. strength: 0
    leaves the output, 1 replaces it fully, more goes as far again beyond.
    The defaults are those of a request that says nothing, here and wherever one is needed (`Lesion.branch`).
    selection, layer and place only label the lesion (how it was chosen, and for which layer); they do not change
    pixels.
    """

    selection: str
    layer: str
    layers: tuple[str, ...]
    replacement: Replacement
    window: tuple[float, float] = (0.0, 1.0)
    branch: str = "both"
    strength: float = 1.0
    kind: str = "cross_attention"
    place: Place = NOWHERE

    def identity(self) -> dict[str, Any]:
        """Everything of it that can change pixels, as JSON data; a value at its default is left out."""
        data: dict[str, Any] = {
            "layers": list(self.layers),
            "replacement": {"name": self.replacement.name, **self.replacement.identity},
        }
        for name in ("window", "branch", "strength", "kind"):
            if (value := getattr(self, name)) != getattr(Lesion, name):
                data[name] = list(value) if isinstance(value, tuple) else value
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
    """One answer of a selection: the layer it is about ("" if about none), the layers to lesion, and the place."""

    layer: str
    lesioned: tuple[str, ...]
    place: Place = NOWHERE


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
    """Every layer lesioned, one image: of cross-attention the text-blind control."""
    yield Choice("", tuple(layers))


@selection
def pairs(layers: Sequence[str]) -> Iterator[Choice]:
    """Every two layers lesioned together: with leave_one_out, what they do beyond the sum of both."""
    if len(layers) < 2:
        raise RequestError("selection.pairs", "needs at least two layers; layers.include leaves one")
    for two in itertools.combinations(layers, 2):
        yield Choice("", two)


@selection
def cumulative(layers: Sequence[str], order: str | Sequence[str] = "depth") -> Iterator[Choice]:
    """The first layer lesioned, the first two, … all. `layer` is the one added last.

    order: depth (forward order), reverse, or a list of every layer, say a ranking.
    """
    if order in ("depth", "reverse"):
        ordered = list(layers) if order == "depth" else list(layers)[::-1]
    elif isinstance(order, str) or sorted(order) != sorted(layers):
        raise RequestError(
            "selection.cumulative.order", "allowed: depth, reverse, or a list of every layer under study"
        )
    else:
        ordered = list(order)
    name = order if isinstance(order, str) else f"list {digest_of(ordered)[:8]}"
    for number in range(1, len(ordered) + 1):
        yield Choice(ordered[number - 1], _in_depth(ordered[:number], layers), Place(name, position=number))


@selection
def neighbours(layers: Sequence[str], size: int | str | Sequence[int] = 3) -> Iterator[Choice]:
    """Every `size` adjacent layers lesioned together, a window that slides through the depth.

    size: how many layers, a list of such, or `every` for the contiguous spans of every length.
    """
    key = "selection.neighbours.size"
    for one in distinct(key, list(range(1, len(layers) + 1)) if size == "every" else size):
        if isinstance(one, bool) or not isinstance(one, int) or not 1 <= one <= len(layers):
            words = f"must be a whole number from 1 to {len(layers)}, a list of such, or every"
            raise RequestError(key, f"{words}; got {one!r}")
        for start in range(len(layers) - one + 1):
            yield Choice("", tuple(layers[start : start + one]))


@selection
def custom(layers: Sequence[str], groups: Sequence[Sequence[str]] = ()) -> Iterator[Choice]:
    """Groups of one's own, each lesioned together. groups: lists of layer paths with * and ?."""
    key = "selection.custom.groups"
    if not groups or isinstance(groups, str):
        raise RequestError(key, "needs at least one list of layer paths")
    for group in groups:
        if isinstance(group, str) or not group:
            raise RequestError(key, f"must be lists of layer paths; got {group!r}")
        for glob in group:
            if not fnmatch.filter(layers, glob):
                raise RequestError(key, f"{glob!r} matches no layer; allowed: {', '.join(layers)}")
        yield Choice("", tuple(path for path in layers if any(fnmatch.fnmatchcase(path, glob) for glob in group)))


@selection
def coalitions(layers: Sequence[str], permutations: int = 8, seed: int = 0) -> Iterator[Choice]:
    """Sets of layers lesioned along random orders of all layers: what Shapley values are estimated from.

    A set that several orders reach is asked for by each, and made once. permutations: how many orders. seed: of the
    orders. Castro, Gómez and Tejada 2009, doi:10.1016/j.cor.2008.04.004.
    """
    for name, value, low, high in (("permutations", permutations, 1, 10_000), ("seed", seed, 0, 2**63 - 1)):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise RequestError(
                f"selection.coalitions.{name}", f"must be a whole number from {low} to {high}; got {value!r}"
            )
    dice = random.Random(seed)
    for permutation in range(permutations):
        order = dice.sample(list(layers), len(layers))
        for number in range(1, len(order) + 1):
            place = Place(f"seed {seed}", permutation, number)
            yield Choice("", _in_depth(order[:number], layers), place)


def _in_depth(chosen: Sequence[str], layers: Sequence[str]) -> tuple[str, ...]:
    return tuple(path for path in layers if path in set(chosen))


def check_selection(name: str, options: Mapping[str, Any]) -> None:
    """Raises RequestError if there is no such selection or it has no such option."""
    if name not in SELECTIONS:
        raise RequestError("selection", f"unknown selection {name!r}; allowed: {', '.join(sorted(SELECTIONS))}")
    allowed = list(inspect.signature(SELECTIONS[name]).parameters)[1:]
    if unknown := [option for option in options if option not in allowed]:
        raise RequestError(
            f"selection.{name}", f"unknown option {unknown[0]!r}; allowed: {', '.join(allowed) or 'none'}"
        )


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Along what the lesions of a study vary: every selection is made in every window, on every branch, at every
    strength. selections: name -> options.
    """

    selections: Mapping[str, Mapping[str, Any]]
    windows: tuple[tuple[float, float], ...] = (Lesion.window,)
    branches: tuple[str, ...] = (Lesion.branch,)
    strengths: tuple[float, ...] = (Lesion.strength,)

    @classmethod
    def of(cls, config: Mapping[str, Any], steps: int) -> Axes:
        """From a request's `selection`, `window`, `branch` and `strength`. steps: denoising steps of an image.

        Raises RequestError naming the key and what is allowed.
        """
        selections = {name: dict(options or {}) for name, options in config["selection"].items()}
        if not selections:
            raise RequestError("selection", f"is empty; allowed: one or more of {', '.join(sorted(SELECTIONS))}")
        for name, options in selections.items():
            check_selection(name, options)
        return cls(
            selections=selections,
            windows=parse_windows("window", config["window"], steps),
            branches=tuple(one_of("branch", branch, BRANCHES) for branch in distinct("branch", config["branch"])),
            strengths=tuple(share("strength", value, MOST) for value in distinct("strength", config["strength"])),
        )


def parse_windows(key: str, value: Any, steps: int) -> tuple[tuple[float, float], ...]:
    """Windows of steps, [start, end] or a list of such. Raises RequestError naming the key."""
    if not isinstance(value, list) or not value:
        raise RequestError(key, f"must be [start, end], or a list of such; got {value!r}")
    windows = distinct(key, value) if isinstance(value[0], list) else [value]
    found = []
    for window in windows:
        if not isinstance(window, list) or len(window) != 2:
            raise RequestError(key, f"must be [start, end] in fractions of the steps; got {window!r}")
        start, end = (share(key, side) for side in window)
        if start >= end:
            raise RequestError(key, f"must have start < end; got {window!r}")
        if not any(covers((start, end), step, steps) for step in range(steps)):
            raise RequestError(key, f"{window!r} covers none of the {steps} steps; make it wider")
        found.append((start, end))
    return tuple(found)


def choices(name: str, options: Mapping[str, Any], layers: Sequence[str]) -> list[Choice]:
    """What a selection picks of these layers (module paths in forward order)."""
    check_selection(name, options)
    return list(SELECTIONS[name](layers, **options))
