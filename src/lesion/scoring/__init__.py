"""The scoring room: numbers for an image, its baseline and its prompt. One small module a metric, found by its name.

A metric module has two functions:

    identity(spec) -> str           all that can change its values (formula version, model), without loading anything
    build(spec, device) -> Metric

and, if it has nothing to say of some prompts (its values there are NaN), a third:

    asks(prompt) -> bool            whether it has a value for images of this prompt

To add a metric, add `scoring/<name>.py` and list `<name>` in the config's `scorer.metrics`; nothing else changes. Its
module is imported when a study is laid out, so it imports torch, and what brings it, only where it computes.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lesion.analysis.metrics import why_unsuited
from lesion.errors import RequestError
from lesion.study.checks import at_least, distinct, one_of

log = logging.getLogger(__name__)


class ScorerError(Exception):
    """A scorer cannot be made as asked: one line that says why and what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class Shot:
    """One image to score, with the baseline of the same prompt, seed and settings."""

    key: str  # the cell's hash
    image: NDArray[np.uint8]  # (height, width, 3), 0-255
    baseline_key: str
    baseline: NDArray[np.uint8]  # the same shape
    prompt: str

    def __post_init__(self) -> None:
        for name, pixels in (("image", self.image), ("baseline", self.baseline)):
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
                raise ValueError(f"{name} of {self.key} is {pixels.dtype} {pixels.shape}, not uint8 (height, width, 3)")
        if self.image.shape != self.baseline.shape:
            raise ValueError(f"{self.key} is {self.image.shape}, its baseline {self.baseline.shape}")

    @cached_property
    def unchanged(self) -> bool:
        """Whether the image is its baseline, pixel for pixel: then similarities are exact, not rounded."""
        return self.key == self.baseline_key or np.array_equal(self.image, self.baseline)


class Metric(Protocol):
    """Called with any number of shots, at least one. Values depend on the shots alone, not on their order or company,
    except for rounding: batches of other sizes may add up in another order (about 1e-6 in float32).
    """

    column: str  # its column in the results: the metric's name

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        """One value a shot, (n,)."""
        ...


@dataclass(frozen=True)
class ScorerSpec:
    """What to score with; the fields of `conf/scorer/*.yaml`."""

    name: str
    clip_model: str  # "embedded", an open_clip name, "hf-hub:org/repo" or "local-dir:/path"
    clip_pretrained: str | None  # of an open_clip name: a pretrained tag or a checkpoint file
    metrics: tuple[str, ...]
    batch_size: int = 64  # images a forward pass
    importance: str = "clip_similarity"  # the one of the metrics that importance and sufficiency are computed from
    dino_model: str = "facebook/dinov2-base"  # of dino_similarity: a name on the hub, or a folder

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ScorerSpec:
        """From the `scorer` group of a request. Raises RequestError naming the key and what is allowed."""
        metrics = distinct("scorer.metrics", list(config["metrics"]))
        for metric in metrics:
            one_of("scorer.metrics", metric, known_metrics())
        if "clip_similarity" not in metrics:
            raise RequestError("scorer.metrics", "must name clip_similarity: every table of results has it")
        importance = one_of("scorer.importance", config["importance"], metrics)
        if why := why_unsuited(importance):
            suited = ", ".join(metric for metric in metrics if not why_unsuited(metric))
            raise RequestError("scorer.importance", f"cannot be {importance}: {why}; allowed: {suited}")
        at_least("scorer.batch_size", config["batch_size"], 1)
        return cls(**{**config, "metrics": tuple(metrics)})


class Scorer:
    """The metrics asked for, ready to use."""

    def __init__(self, metrics: Sequence[Metric]):
        self.metrics = tuple(metrics)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(metric.column for metric in self.metrics)

    def score(self, shots: Sequence[Shot], only: Collection[str] | None = None) -> dict[str, NDArray[np.float64]]:
        """One array (n,) a column, of all columns or `only` these; no shots give empty arrays."""
        scores: dict[str, NDArray[np.float64]] = {}
        for metric in self.metrics:
            if only is not None and metric.column not in only:
                continue
            try:
                values = np.asarray(metric(shots) if shots else [], dtype=np.float64)
            except Exception as error:  # one metric that fails must not cost the others, nor the images
                log.error("metric %s failed, its values are left empty: %s", metric.column, error)
                values = np.full(len(shots), np.nan)
            if values.shape != (len(shots),):
                raise ValueError(f"metric {metric.column} gave {values.shape} for {len(shots)} shots")
            scores[metric.column] = values
        return scores


def known_metrics() -> tuple[str, ...]:
    """Names of the metrics there are, sorted; imports none of them."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")))


def check(spec: ScorerSpec) -> None:
    """Whether its models can exist, without loading them: RequestError names the key."""
    if "dino_similarity" in spec.metrics:
        from lesion.scoring import _dino

        try:
            _dino.resolve(spec.dino_model)
        except (ValueError, OSError) as error:
            raise RequestError("scorer.dino_model", f"{spec.dino_model!r}: {error}") from None
    if any(name.startswith("clip_") for name in spec.metrics):
        from lesion.scoring import _clip_weights

        try:
            _clip_weights.resolve(spec.clip_model, spec.clip_pretrained)
        except (ValueError, FileNotFoundError) as error:
            key = "scorer.clip_pretrained" if "clip_pretrained" in str(error) else "scorer.clip_model"
            raise RequestError(key, f"{spec.clip_model!r}: {error}; {_clip_weights.advice(spec.clip_model)}") from None


def identities(spec: ScorerSpec) -> dict[str, str]:
    """For each metric everything that can change a value: its formula's version, its model with a digest of weights.

    Loads nothing. Raises ScorerError where a package is missing.
    """
    return {name: str(_module(name, spec).identity(spec)) for name in spec.metrics}


def columns_for(spec: ScorerSpec, prompt: str) -> frozenset[str]:
    """The metrics that have a value for images of this prompt. Loads nothing; ScorerError as for `identities`."""
    modules = {name: _module(name, spec) for name in spec.metrics}
    return frozenset(name for name, module in modules.items() if not hasattr(module, "asks") or module.asks(prompt))


def make_scorer(spec: ScorerSpec, device: str) -> Scorer:
    """Load what the metrics of `spec` need onto `device`; ScorerError if that fails."""
    if not spec.metrics or len(set(spec.metrics)) < len(spec.metrics):
        raise ScorerError(f"scorer {spec.name}: metrics must be distinct and at least one, got {list(spec.metrics)}")
    if spec.batch_size < 1:
        raise ScorerError(f"scorer {spec.name}: batch_size must be at least 1, got {spec.batch_size}")
    if unknown := [name for name in spec.metrics if name not in known_metrics()]:
        allowed = ", ".join(known_metrics())
        raise ScorerError(f"scorer {spec.name}: unknown metric {', '.join(unknown)}; allowed: {allowed}")
    return Scorer([_build(name, spec, device) for name in spec.metrics])


def _build(name: str, spec: ScorerSpec, device: str) -> Metric:
    metric: Metric = _module(name, spec).build(spec, device)
    return metric


def _module(name: str, spec: ScorerSpec) -> ModuleType:
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        raise ScorerError(f"scorer {spec.name}: metric {name} needs a package that is missing: {error}") from error
