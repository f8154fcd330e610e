"""Numbers for an image, its baseline and its prompt: one file a metric, found by its name.

To add a metric, add `scoring/NAME.py` with a subclass of `Metric`, and name it in `scorer.metrics`; nothing else
changes.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lesion.errors import RequestError
from lesion.scoring._metric import Direction, Metric, OptionError, ScorerError, Shot
from lesion.study.checks import one_of
from lesion.study.settings import LARGEST_BATCH

__all__ = [
    "BOXES",
    "Direction",
    "Metric",
    "OptionError",
    "Scorer",
    "ScorerError",
    "ScorerSpec",
    "Shot",
    "check",
    "columns_for",
    "identities",
    "known_metrics",
    "make_scorer",
    "metric_class",
]

log = logging.getLogger(__name__)
KEY = "scorer.metrics"
BOXES = ("box_mass", "box_iou", "box_success", "unsteered_distance")  # of prompts with boxes


@dataclass(frozen=True)
class ScorerSpec:
    """What to score with; the fields of `conf/scorer/*.yaml`, of which `metrics` may carry options there."""

    name: str
    clip_model: str  # "embedded", an open_clip name, "hf-hub:org/repo" or "local-dir:/path"
    clip_pretrained: str | None  # of an open_clip name: a pretrained tag or a checkpoint file
    metrics: tuple[str, ...]
    batch_size: int = 64  # images a forward pass
    importance: str = "clip_similarity"  # the one of the metrics that importance and sufficiency are computed from
    dino_model: str = "facebook/dinov2-base"  # a name on the hub, or a folder
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of metrics, by name

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ScorerSpec:
        """From the config's `scorer`, plain data. Raises RequestError; loads nothing.

        Its `metrics` are names, names with options, or both in one list.
        """
        chosen = _chosen(config["metrics"])
        for name in chosen:
            one_of(KEY, name, known_metrics())
        if "clip_similarity" not in chosen:
            raise RequestError(KEY, "must name clip_similarity: every table of results has it")
        importance = one_of("scorer.importance", config["importance"], tuple(chosen))
        unsuited = {name: metric_class(name).why_unsuited() for name in chosen}
        if why := unsuited[importance]:
            suited = ", ".join(name for name, why in unsuited.items() if not why)
            raise RequestError("scorer.importance", f"cannot be {importance}: {why}; allowed: {suited}")
        if not 1 <= config["batch_size"] <= LARGEST_BATCH:
            raise RequestError("scorer.batch_size", f"must be in [1, {LARGEST_BATCH}]; got {config['batch_size']}")
        spec = cls(
            name=config["name"],
            clip_model=config["clip_model"],
            clip_pretrained=config["clip_pretrained"],
            metrics=tuple(chosen),
            batch_size=config["batch_size"],
            importance=importance,
            dino_model=config["dino_model"],
            options=chosen,
        )
        _ = spec.described  # refuses options that are not there
        return spec

    def each(self) -> Iterator[Metric]:
        """Its metrics with their options, not loaded. Raises RequestError; ScorerError where a package is missing."""
        for name in self.metrics:
            kind, given = self._class(name), self.options.get(name, {})
            shared = {} if set(given) & set(kind.shared) else kind.shared
            yield kind.of({option: getattr(self, key) for option, key in shared.items()} | dict(given), f"{KEY}.{name}")

    @cached_property
    def described(self) -> tuple[Metric, ...]:
        """Those of `each`, to be asked and never loaded."""
        return tuple(self.each())

    def key(self, metric: Metric, option: str) -> str:
        """The config's key from which a metric has an option."""
        given = self.options.get(metric.name, {})
        if option in metric.shared and not set(given) & set(metric.shared):
            return f"scorer.{metric.shared[option]}"
        return f"{KEY}.{metric.name}.{option}"

    def _class(self, name: str) -> type[Metric]:
        try:
            return metric_class(name)
        except ImportError as error:
            raise ScorerError(f"scorer {self.name}: metric {name} needs a package that is missing: {error}") from error


def _chosen(value: Any) -> dict[str, dict[str, Any]]:
    """Metric -> options, from a name, a list of names and of names with options, or names with options."""
    items = list(value.items()) if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    if not items:
        raise RequestError(KEY, f"is empty; allowed: one or more of {', '.join(known_metrics())}")
    chosen: dict[str, dict[str, Any]] = {}
    for item in items:
        pairs = list(item.items()) if isinstance(item, Mapping) else [item if isinstance(item, tuple) else (item, None)]
        if len(pairs) != 1:
            raise RequestError(KEY, f"got {item!r}; allowed: a name, or one `name: options`")
        name, options = pairs[0]
        if not isinstance(name, str):
            raise RequestError(KEY, f"got {name!r}; allowed: {', '.join(known_metrics())}")
        if name in chosen:
            raise RequestError(KEY, f"names {name!r} twice; give each metric once")
        if options is not None and not isinstance(options, Mapping):
            raise RequestError(f"{KEY}.{name}", f"got {options!r}; allowed: {{option: value}}, or {{}}")
        chosen[name] = {str(option): value for option, value in (options or {}).items()}
    return chosen


class Scorer:
    """The metrics asked for, ready to use."""

    def __init__(self, metrics: Sequence[Metric]):
        self.metrics = tuple(metrics)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(metric.name for metric in self.metrics)

    def score(self, shots: Sequence[Shot], only: Collection[str] | None = None) -> dict[str, NDArray[np.float64]]:
        """One array (n,) a column, of all columns or `only` these; no shots give empty arrays.

        An image that equals its baseline gets the metric's exact value for that, without rounding.
        """
        scores: dict[str, NDArray[np.float64]] = {}
        for metric in self.metrics:
            if only is not None and metric.name not in only:
                continue
            try:
                values = _values(metric, shots)
            except Exception as error:  # one metric that fails must not cost the others, nor the images
                if "torch" in sys.modules:
                    from lesion.models import memory

                    memory.raise_if_lost(error)
                log.error("metric %s failed, its values are left empty: %s", metric.name, error)
                values = np.full(len(shots), np.nan)
            else:
                if values.shape != (len(shots),):
                    raise ValueError(f"metric {metric.name} gave {values.shape} for {len(shots)} shots")
                if metric.identical is not None:
                    values[[shot.unchanged for shot in shots]] = metric.identical
            scores[metric.name] = values
        return scores


def _values(metric: Metric, shots: Sequence[Shot]) -> NDArray[np.float64]:
    """The values of a metric; of the halves one after the other where all of them do not fit in memory."""
    if not shots:
        return np.zeros(0)
    try:
        return np.asarray(metric(shots), dtype=np.float64)
    except Exception as error:
        from lesion.models import memory  # with torch, of which a metric that raises has need

        if len(shots) == 1 or not memory.ran_out(error):
            raise
    memory.release("cuda" if memory.usable() else "cpu")
    middle = len(shots) // 2
    return np.concatenate([_values(metric, shots[:middle]), _values(metric, shots[middle:])])


def known_metrics() -> tuple[str, ...]:
    """Names of the metrics there are, sorted; imports none of them."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")))


def metric_class(name: str) -> type[Metric]:
    """The class of a metric, which states its facts. Raises KeyError for an unknown one; imports no torch."""
    if name not in known_metrics():
        raise KeyError(name)
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (
        kind
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, Metric) and kind.__module__ == module.__name__
    )
    return found


def check(spec: ScorerSpec) -> None:
    """Whether its models can exist, without loading them: RequestError names the key."""
    for metric in spec.described:
        try:
            metric.check()
        except OptionError as error:
            raise RequestError(spec.key(metric, error.option), str(error)) from None


def identities(spec: ScorerSpec) -> dict[str, str]:
    """For each metric everything that can change a value: its formula's version, its model with a digest of weights.

    Loads nothing. Raises ScorerError where a package or a model is missing.
    """
    found = {}
    for metric in spec.described:
        try:
            found[metric.name] = metric.identity()
        except (ValueError, OSError) as error:
            raise ScorerError(f"scorer {spec.name}: {metric.name}: {error}") from error
    return found


def columns_for(spec: ScorerSpec, prompt: str, boxed: bool = False, steered: bool = False) -> frozenset[str]:
    """The metrics that have a value for images of this prompt. Loads nothing; ScorerError as for `identities`.

    boxed: whether the prompt has boxes. steered: whether the images are steered to them.
    """
    return frozenset(
        metric.name
        for metric in spec.described
        if metric.asks(prompt) and metric.boxed <= boxed and metric.steered <= steered
    )


def make_scorer(spec: ScorerSpec, device: str) -> Scorer:
    """Load what the metrics of `spec` need onto `device`; ScorerError if that fails."""
    if not spec.metrics or len(set(spec.metrics)) < len(spec.metrics):
        raise ScorerError(f"scorer {spec.name}: metrics must be distinct and at least one, got {list(spec.metrics)}")
    if spec.batch_size < 1:
        raise ScorerError(f"scorer {spec.name}: batch_size must be at least 1, got {spec.batch_size}")
    if unknown := [name for name in spec.metrics if name not in known_metrics()]:
        allowed = ", ".join(known_metrics())
        raise ScorerError(f"scorer {spec.name}: unknown metric {', '.join(unknown)}; allowed: {allowed}")
    metrics = list(spec.each())
    for metric in metrics:
        try:
            metric.load(device, spec.batch_size)
        except ScorerError as error:
            raise ScorerError(f"scorer {spec.name}: {error}") from error
        except ImportError as error:
            raise ScorerError(
                f"scorer {spec.name}: metric {metric.name} needs a package that is missing: {error}"
            ) from error
    return Scorer(metrics)
