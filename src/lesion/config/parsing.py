"""A request's way from Hydra's DictConfig, which `lesion.schema` types, to one checked `Request`.

No DictConfig goes past this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lesion import replacements, tasks
from lesion.config.reading import first_read
from lesion.errors import RequestError
from lesion.models import ModelSpec, check_offload
from lesion.models.defaults import filled
from lesion.models.devices import HERE, Place, devices
from lesion.models.tokens import check_texts
from lesion.scoring import BOXES, ScorerSpec
from lesion.study.attribution import Attribution
from lesion.study.budget import Budget
from lesion.study.capture import Capture
from lesion.study.checks import one_of
from lesion.study.components import DENOISER, check_axes
from lesion.study.confirmation import Confirmation
from lesion.study.layers import Layers
from lesion.study.lesions import Axes, Lesion, Replacement
from lesion.study.prompts import Prompt, parse_prompts, parse_seeds
from lesion.study.settings import Settings
from lesion.study.shards import WHOLE, Shard
from lesion.study.steering import STEERING_OFF, Layout
from lesion.surgery.intervention import Intervention


@dataclass(frozen=True)
class Request:
    """One checked study.

    prompts: with what else an image is made of. axes: along what lesions vary, beside the replacements (name ->
    options). settings: without what `survey` finds out of the model. budget: None for the whole grid. device: cpu, cuda
    or cuda:N. derived: which settings the model said, and where, in words; "" if the request said all.
    capture: which attention maps are kept; None for none. confirm: the plan of a confirmatory study, if it is one.
    notes: what was guessed or left out of the prompts, in sentences.
    attribution: which lesions are estimated, and how many of them made; None where all are made.
    devices: of each process that makes images; the first is `device`, where this one scores them.
    """

    model: ModelSpec
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    layers: Layers
    axes: Axes
    replacements: dict[str, dict[str, Any]]
    settings: Settings
    scorer: ScorerSpec
    tracker: dict[str, Any]
    budget: Budget | None
    store: Path
    check_store: bool
    device: str
    dry_run: bool
    derived: str = ""
    capture: Capture | None = None
    shard: Shard = WHOLE
    confirm: Confirmation | None = None
    notes: tuple[str, ...] = ()
    attribution: Attribution | None = None
    devices: tuple[str, ...] = ()

    def described_replacements(self) -> tuple[Replacement, ...]:
        return tuple(replacements.describe(name, options) for name, options in self.replacements.items())


def parse(config: DictConfig, start: Path | None = None, place: Place = HERE) -> Request:
    """Check a composed config. Raises RequestError naming the key and what is allowed; loads nothing.

    start: the folder that relative paths are relative to; None: the one in which the process is. place: where the job
    runs; of a job elsewhere, `device` of the request is what was asked for.
    """
    data = first_read(config, start)
    model = ModelSpec.of(data["model"], data["performance"])
    layers = Layers.of(data["layers"])
    _check_compiled(model, layers)
    each = devices(data["device"], data["workers"], place)
    device = each[0]
    check_offload(model.offload, device)
    task = tasks.asked(data["generation"])
    generation, derived = filled(data["generation"], lambda: model)
    settings = Settings.of(generation, task.settings)
    axes = Axes.of(data, task.steps(settings))
    if settings.guidance <= 1 and any(branch != Lesion.branch for branch in axes.branches):
        raise RequestError(
            "branch", f"needs guidance: with generation.guidance <= 1 there is one branch; allowed: {Lesion.branch}"
        )
    if settings.guidance <= 1 and settings.negative_prompt is not None:
        raise RequestError(
            "generation.negative_prompt", "is not read with generation.guidance <= 1; allowed there: null"
        )
    check_axes(layers.components, axes)
    capture = Capture.of(data["capture"], task.steps(settings), settings.guidance > 1)
    if capture and model.compile:
        raise RequestError("capture", "works without performance.compile only; allowed here: none")
    settings = replace(settings, steering=Layout.of(data["steering"]))
    if settings.steering and model.compile:
        raise RequestError("steering", "works without performance.compile only; allowed here: none")
    given = {name: dict(options or {}) for name, options in data["replacement"].items()}
    if not given:
        raise RequestError("replacement", f"is empty; allowed: one or more of {', '.join(replacements.known())}")
    for name, options in given.items():
        if task.init and "calibration" in options:
            options["init"] = generation["init"]
        replacements.describe(name, options)
        replacements.check(name, layers.kind, axes.branches, layers.by, axes.strengths, layers.components)
        replacements.check_model(name, model)
    prompts = parse_prompts(data["prompts"])
    _check_steering(settings, prompts.prompts, given)
    _check_tokens(layers, axes, settings, [prompt.text for prompt in prompts.prompts])
    budget = Budget.of(data["budget"])
    scorer = _with_boxes(ScorerSpec.of(data["scorer"]), prompts.prompts)
    _check_donors(scorer, prompts.prompts, data)
    attribution = Attribution.of(data["attribution"])
    if attribution:
        attribution = replace(attribution, signed=_signed(attribution, scorer))
        _check_attribution(attribution, model, settings, scorer, budget, data, given, layers)
    return Request(
        model=model,
        prompts=task.prompts(prompts.prompts, generation["init"]),
        seeds=parse_seeds(data["seeds"] if isinstance(data["seeds"], list) else [data["seeds"]]),
        layers=layers,
        axes=axes,
        replacements=given,
        settings=settings,
        scorer=scorer,
        tracker=_tracker(data["tracker"]),
        budget=budget,
        shard=Shard.of(data["shard"], budget=budget is not None),
        confirm=Confirmation.of(data["confirm"], scorer.importance, budget is not None),
        store=Path(data["store"]["dir"]).expanduser(),
        check_store=data["store"]["check"],
        device=device,
        devices=each,
        dry_run=data["dry_run"],
        derived=derived,
        capture=capture,
        notes=prompts.notes,
        attribution=attribution,
    )


def _check_donors(scorer: ScorerSpec, prompts: Sequence[Prompt], data: Mapping[str, Any]) -> None:
    """Refuse metrics beside the images of a prompt that the study does not make, or not in time."""
    texts = {prompt.text for prompt in prompts}
    for metric in scorer.described:
        if metric.donor is None:
            continue
        if metric.donor not in texts:
            key, given = scorer.key(metric, "prompt"), metric.donor[:80]
            raise RequestError(key, f"got {given!r}; allowed: a prompt of the study, word for word")
        for key, wrong, allowed in (
            ("shard.count", data["shard"]["count"] > 1, "1"),
            ("budget.ci_halfwidth", data["budget"]["ci_halfwidth"] is not None, "null"),
        ):
            if wrong:
                raise RequestError(key, f"does not go with {metric.name}; allowed with it: {allowed}")


def _signed(attribution: Attribution, scorer: ScorerSpec) -> tuple[str, ...]:
    """The metrics whose changes are estimated to first order: those asked for, else all that can be."""
    able = tuple(metric.name for metric in scorer.described if metric.signed)
    if attribution.signed is None:
        return able
    for name in attribution.signed:
        if name not in able:
            raise RequestError(
                "attribution.signed",
                f"got {name!r}; allowed: those of scorer.metrics that have gradients ({', '.join(able) or 'none'})",
            )
    return attribution.signed


def _check_attribution(
    attribution: Attribution,
    model: ModelSpec,
    settings: Settings,
    scorer: ScorerSpec,
    budget: Budget | None,
    data: Mapping[str, Any],
    given: Mapping[str, Any],
    layers: Layers,
) -> None:
    """Refuse what gradients cannot flow through, and what decides itself which lesions are made."""
    for key, wrong, allowed in (
        ("performance.compile", model.compile, "false"),
        ("model.offload", model.offload != "none", "none"),
        ("steering", settings.steering, "none"),
        ("capture", data["capture"]["name"] != "none", "none"),
        ("layers.component", layers.components != (DENOISER,), DENOISER),
        ("budget.ci_halfwidth", budget, "null"),
        ("confirm.hypotheses", data["confirm"]["hypotheses"], "[]"),
        ("shard.count", data["shard"]["count"] > 1, "1"),
    ):
        if wrong:
            raise RequestError(key, f"does not go with attribution={attribution.name}; allowed with it: {allowed}")
    for name in given:
        one = replacements.find(name)
        if not _has_strength(one, layers):
            others = [other for other in replacements.known() if _has_strength(replacements.find(other), layers)]
            raise RequestError(
                "replacement", f"{name} has no strength that gradients can be taken of; with attribution: "
                f"{', '.join(others)}"
            )  # fmt: skip
    if scorer.importance != "clip_similarity":
        raise RequestError("scorer.importance", f"attribution estimates clip_similarity; got {scorer.importance}")


def _has_strength(replacement: type[Intervention], layers: Layers) -> bool:
    """Whether a site can be some of the way to what stands in its place."""
    if layers.tokens and replacement.of_tokens != ("values",):
        return False
    return replacement.changes == "output" and not replacement.donor_images


def _check_steering(settings: Settings, prompts: Sequence[Prompt], replacements: Mapping[str, Any]) -> None:
    """Refuse steering without boxes, and taking layers out of a loss that there is not."""
    if settings.steering is None:
        if STEERING_OFF in replacements:
            raise RequestError("replacement", f"{STEERING_OFF} needs steering; with it: steering=layout")
    elif bare := [prompt.text for prompt in prompts if not prompt.boxes]:
        raise RequestError(
            "prompts", f"steering=layout needs boxes: [{{words, box}}, …] with each prompt; {bare[0][:80]!r} has none"
        )


def _check_tokens(layers: Layers, axes: Axes, settings: Settings, texts: Sequence[str]) -> None:
    """Refuse sets of tokens that a prompt lacks; the negative prompt must have them only where it alone is lesioned."""
    if not layers.tokens:
        return
    if settings.steering:
        raise RequestError("steering", f"does not go with layers.by={layers.by}; allowed with it: none")
    if set(axes.branches) - {"uncond"}:
        check_texts(texts, layers.tokens)
    if "uncond" in axes.branches:
        check_texts([settings.negative_prompt or ""], layers.tokens, "branch")


def _with_boxes(scorer: ScorerSpec, prompts: Sequence[Prompt]) -> ScorerSpec:
    """The scorer, with the metrics of boxes where prompts have some, steered or not: so both can be compared."""
    if not any(prompt.boxes for prompt in prompts):
        return scorer
    return replace(scorer, metrics=tuple(dict.fromkeys((*scorer.metrics, *BOXES))))


def _check_compiled(model: ModelSpec, layers: Layers) -> None:
    """Refuse lesions and ways of loading that compiled blocks do not know."""
    if not model.compile:
        return
    if layers.kind == "text_stream":
        raise RequestError("performance.compile", "does not work with layers.kind=text_stream; allowed here: false")
    if layers.by == "head" or layers.tokens:
        raise RequestError("performance.compile", f"does not work with layers.by={layers.by}; allowed here: false")
    if model.shared_rows:
        raise RequestError("performance.shared_rows", "works without performance.compile only; allowed here: false")
    if model.offload != "none":
        raise RequestError("model.offload", "works without performance.compile only; allowed here: none")


def _tracker(value: Mapping[str, Any]) -> dict[str, Any]:
    from lesion.tracking import make_tracker, tracker_names

    name = one_of("tracker", value.get("name"), tuple(tracker_names()))
    try:
        make_tracker(name, dict(value))
    except ValueError as error:
        raise RequestError("tracker", str(error)) from None
    return dict(value)
