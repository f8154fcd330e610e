"""A request's way from Hydra's DictConfig, which `lesion.schema` types, to one checked `Request`.

No DictConfig goes past this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lesion import replacements, scoring
from lesion.analysis.metrics import why_unsuited
from lesion.config.reading import first_read
from lesion.errors import RequestError
from lesion.models import DTYPES, ModelSpec, check_offload
from lesion.models.defaults import filled
from lesion.models.devices import cuda_devices
from lesion.scoring import ScorerSpec
from lesion.study import layer_patterns
from lesion.study.budget import Budget
from lesion.study.lesions import BRANCHES, SELECTIONS, Replacement, check_selection, covers
from lesion.study.prompts import Prompt, parse_prompts, parse_seeds, with_inits
from lesion.surgery.kinds import GRANULARITIES, KINDS, WITH_HEADS

DTYPE_NAMES = ("auto", *DTYPES)
TASKS = ("txt2img", "img2img")


@dataclass(frozen=True)
class Request:
    """One checked study.

    height, width: pixels. device: cpu, cuda or cuda:N. by, kind, include, exclude: what the layers under study are, see
    `lesion.anatomy`. batch_size: None for as many as memory allows. budget: None for the whole grid.
    derived: which settings the model said, and where, in words; "" if the request said all.
    """

    model: ModelSpec
    prompts_name: str
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    by: str
    kind: str
    include: tuple[str, ...] | None
    exclude: tuple[str, ...] | None
    selections: dict[str, dict[str, Any]]
    replacements: dict[str, dict[str, Any]]
    windows: tuple[tuple[float, float], ...]
    branches: tuple[str, ...]
    strengths: tuple[float, ...]
    task: str
    steps: int
    guidance: float
    height: int
    width: int
    negative_prompt: str | None
    noising: float | None
    batch_size: int | None
    scorer: ScorerSpec
    tracker: dict[str, Any]
    budget: Budget | None
    store: Path
    device: str
    dry_run: bool
    derived: str = ""

    def described_replacements(self) -> tuple[Replacement, ...]:
        return tuple(replacements.describe(name, options) for name, options in self.replacements.items())


def parse(config: DictConfig, start: Path | None = None) -> Request:
    """Check a composed config. Raises RequestError naming the key and what is allowed; loads nothing.

    start: the folder that relative paths are relative to; None: the one in which the process is.
    """
    data = first_read(config, start)
    data["generation"], derived = filled(data["generation"], lambda: ModelSpec.of(data["model"], data["performance"]))
    model, generation, layers = data["model"], data["generation"], data["layers"]
    _one_of("model.dtype", model["dtype"], DTYPE_NAMES)
    _one_of("performance.dtype", data["performance"]["dtype"], DTYPE_NAMES)
    _one_of("generation.task", generation["task"], TASKS)
    _one_of("layers.by", layers["by"], GRANULARITIES)
    _one_of("layers.kind", layers["kind"], KINDS)
    if data["performance"]["compile"] and layers["kind"] != "cross_attention":
        raise RequestError("performance.compile", "works with layers.kind=cross_attention only; allowed here: false")
    if layers["by"] == "head":
        if layers["kind"] not in WITH_HEADS:
            raise RequestError(
                "layers.by", f"{layers['kind']} has no attention heads; with head: layers.kind={', '.join(WITH_HEADS)}"
            )
        if data["performance"]["compile"]:
            raise RequestError("performance.compile", "does not work with layers.by=head; allowed here: false")
    if data["performance"]["compile"] and model["offload"] != "none":
        raise RequestError("model.offload", "works without performance.compile only; allowed here: none")
    device = _device(data["device"])
    check_offload(model["offload"], device)
    _at_least("generation.steps", generation["steps"], 1)
    _at_least("generation.guidance", generation["guidance"], 0)
    for side in ("height", "width"):
        if generation[side] < 8 or generation[side] % 8:
            raise RequestError(f"generation.{side}", f"is in pixels, a multiple of 8 from 8 on; got {generation[side]}")
    selections = {name: dict(options or {}) for name, options in data["selection"].items()}
    if not selections:
        raise RequestError("selection", f"is empty; allowed: one or more of {', '.join(sorted(SELECTIONS))}")
    for name, options in selections.items():
        check_selection(name, options)
    given = {name: dict(options or {}) for name, options in data["replacement"].items()}
    if not given:
        raise RequestError("replacement", f"is empty; allowed: one or more of {', '.join(replacements.known())}")
    prompts_name, prompts = parse_prompts(data["prompts"])
    noising = None
    if generation["task"] == "img2img":
        prompts = with_inits(prompts, generation["init"], "generation.init")
        noising = _noising(generation["strength"], generation["steps"])
        for options in given.values():
            if "calibration" in options:
                options["init"] = generation["init"]
    elif generation["init"] is not None:
        raise RequestError("generation.init", "is for generation.task=img2img only; allowed here: null")
    for name, options in given.items():
        replacements.describe(name, options)
    branches = tuple(_one_of("branch", branch, BRANCHES) for branch in _distinct("branch", data["branch"]))
    for name in given:
        replacements.check(name, layers["kind"], branches, layers["by"])
        replacements.check_model(name, ModelSpec.of(model, data["performance"]))
    if generation["guidance"] <= 1 and any(branch != "both" for branch in branches):
        raise RequestError("branch", "needs guidance: with generation.guidance <= 1 there is one branch; allowed: both")
    return Request(
        model=ModelSpec.of(model, data["performance"]),
        prompts_name=prompts_name,
        prompts=prompts,
        seeds=parse_seeds(data["seeds"] if isinstance(data["seeds"], list) else [data["seeds"]]),
        by=layers["by"],
        kind=layers["kind"],
        include=_patterns("layers.include", layers["include"]),
        exclude=_patterns("layers.exclude", layers["exclude"]),
        selections=selections,
        replacements=given,
        windows=_windows(data["window"], int(generation["steps"] * (noising or 1))),
        branches=branches,
        strengths=tuple(_share("strength", value) for value in _distinct("strength", data["strength"])),
        task=generation["task"],
        steps=generation["steps"],
        guidance=float(generation["guidance"]),
        height=generation["height"],
        width=generation["width"],
        negative_prompt=generation["negative_prompt"],
        noising=noising,
        batch_size=_batch_size(generation["batch_size"]),
        scorer=_scorer(data["scorer"]),
        tracker=_tracker(data["tracker"]),
        budget=Budget.of(data["budget"]),
        store=Path(data["store"]["dir"]).expanduser(),
        device=device,
        dry_run=data["dry_run"],
        derived=derived,
    )


def _one_of(key: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise RequestError(key, f"got {value!r}; allowed: {', '.join(allowed)}")
    return str(value)


def _noising(value: float, steps: int) -> float:
    """Of img2img: int(steps * strength) steps are made, at least one."""
    if not 0 < value <= 1:
        raise RequestError("generation.strength", f"must be a number in (0, 1]; got {value}")
    if int(steps * value) < 1:
        raise RequestError("generation.strength", f"{value} of {steps} steps is none; make one of them larger")
    return float(value)


def _batch_size(value: Any) -> int | None:
    if value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RequestError("generation.batch_size", f"must be auto or a whole number >= 1; got {value!r}")
    return value


def _at_least(key: str, value: float, low: float) -> None:
    if not value >= low or value == float("inf"):
        raise RequestError(key, f"must be a number >= {low}; got {value}")


def _distinct(key: str, value: Any) -> list[Any]:
    """One value or a list of them, each once."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise RequestError(key, "is an empty list; give at least one value")
    if twice := [item for item in values if values.count(item) > 1]:
        raise RequestError(key, f"names {twice[0]!r} twice; give each value once")
    return values


def _share(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RequestError(key, f"must be a number in [0, 1]; got {value!r}")
    return float(value)


def _windows(value: Any, steps: int) -> tuple[tuple[float, float], ...]:
    if not isinstance(value, list) or not value:
        raise RequestError("window", f"must be [start, end], or a list of such; got {value!r}")
    windows = _distinct("window", value) if isinstance(value[0], list) else [value]
    found = []
    for window in windows:
        if not isinstance(window, list) or len(window) != 2:
            raise RequestError("window", f"must be [start, end] in fractions of the steps; got {window!r}")
        start, end = (_share("window", side) for side in window)
        if start >= end:
            raise RequestError("window", f"must have start < end; got {window!r}")
        if not any(covers((start, end), step, steps) for step in range(steps)):
            raise RequestError("window", f"{window!r} covers none of the {steps} steps; make it wider")
        found.append((start, end))
    return tuple(found)


def _patterns(key: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    patterns = _distinct(key, value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise RequestError(key, f"must be null or layer paths with * and ?, or re:REGEX; got {value!r}")
        layer_patterns.check(pattern, key)
    return tuple(patterns)


def _scorer(value: Mapping[str, Any]) -> ScorerSpec:
    metrics = _distinct("scorer.metrics", list(value["metrics"]))
    for metric in metrics:
        _one_of("scorer.metrics", metric, scoring.known_metrics())
    if "clip_similarity" not in metrics:
        raise RequestError("scorer.metrics", "must name clip_similarity: every table of results has it")
    importance = _one_of("scorer.importance", value["importance"], tuple(metrics))
    if why := why_unsuited(importance):
        suited = ", ".join(metric for metric in metrics if not why_unsuited(metric))
        raise RequestError("scorer.importance", f"cannot be {importance}: {why}; allowed: {suited}")
    _at_least("scorer.batch_size", value["batch_size"], 1)
    return ScorerSpec(
        name=value["name"],
        clip_model=value["clip_model"],
        clip_pretrained=value["clip_pretrained"],
        metrics=tuple(metrics),
        batch_size=value["batch_size"],
        importance=importance,
        dino_model=value["dino_model"],
    )


def _tracker(value: Mapping[str, Any]) -> dict[str, Any]:
    from lesion.tracking import make_tracker, tracker_names

    name = _one_of("tracker", value.get("name"), tuple(tracker_names()))
    try:
        make_tracker(name, dict(value))
    except ValueError as error:
        raise RequestError("tracker", str(error)) from None
    return dict(value)


def _device(value: str) -> str:
    """cpu, cuda or cuda:N as it stands on this machine; `auto` is cuda where there is one."""
    kind, _, number = value.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (":" in value and (kind != "cuda" or not number.isdigit())):
        raise RequestError("device", f"got {value!r}; allowed: auto, cpu, cuda, cuda:N")
    if kind == "auto":
        return "cuda" if cuda_devices() else "cpu"
    if kind == "cuda" and int(number or 0) >= (there := cuda_devices()):
        raise RequestError("device", f"{value!r} is not here: this machine has {there}; allowed: auto, cpu")
    return value
