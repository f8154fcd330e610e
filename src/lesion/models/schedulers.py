"""Schedulers by name: their diffusers classes, options, and which models they fit."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lesion.errors import RequestError
from lesion.models import facts

SCHEDULERS = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_trailing": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
    "dpmpp_karras": "DPMSolverMultistepScheduler",
    "dpmpp_sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "lcm": "LCMScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
    "flow_heun": "FlowMatchHeunDiscreteScheduler",
}
FLOW = ("flow_euler", "flow_heun")
_EITHER = ("dpmpp", "dpmpp_sde", "unipc", "deis")  # of flow too, from a config that says so, as Sana's does
OPTIONS: dict[str, dict[str, Any]] = {
    "pndm": {"skip_prk_steps": True},  # without Runge-Kutta steps, as in Stable Diffusion's own PNDM configs
    "euler_trailing": {"timestep_spacing": "trailing"},  # of few-step models such as SDXL-Lightning
    "dpmpp_karras": {"use_karras_sigmas": True},
    # DPM++ 2M SDE. diffusers' DPMSolverSDEScheduler is none: its noise does not come from the image's own generator.
    "dpmpp_sde": {"algorithm_type": "sde-dpmsolver++"},
}


def label(name: str, own: Mapping[str, Any]) -> str:
    """For tables and hashes: the class, and what sets it apart from another name of the same class, or from the model's
    own scheduler of that class.

    own: the config of the model's own scheduler.
    """
    cls = SCHEDULERS[name]
    if list(SCHEDULERS.values()).count(cls) > 1:
        variant = name.partition("_")[2]
    else:
        variant = "-".join(_changed(name, own)) if own.get("_class_name") == cls else ""
    return cls + (f"-{variant}" if variant else "")


def _changed(name: str, own: Mapping[str, Any]) -> list[str]:
    """The options that `make` sets otherwise than a scheduler of the same class has them."""
    options = OPTIONS.get(name, {})
    if not options:
        return []
    usual = facts.scheduler(SCHEDULERS[name]) or defaults_of(SCHEDULERS[name])  # for what the config leaves out
    return [key for key, value in options.items() if own.get(key, usual[key]) != value]


def defaults_of(cls: str) -> dict[str, Any]:
    """Name -> default of the options of one of diffusers' classes; None where there is none."""
    import diffusers

    given = inspect.signature(getattr(diffusers, cls)).parameters.values()
    return {one.name: None if one.default is inspect.Parameter.empty else one.default for one in given}


def check(name: str, own: Mapping[str, Any], pipeline: str) -> None:
    """Raises RequestError for an unknown scheduler, and for one that does not fit the model.

    own: the config of the model's own scheduler. pipeline: class name.
    """
    key = "model.scheduler"
    if name not in SCHEDULERS:
        raise RequestError(key, f"unknown scheduler {name!r}; allowed: {', '.join(sorted(SCHEDULERS))}")
    flow = is_flow(own)
    matching = [other for other in SCHEDULERS if (other in FLOW) == flow]
    if own.get("prediction_type") == "flow_prediction":
        matching += _EITHER
    if pipeline.startswith("Flux") and "flow_heun" in matching:
        matching.remove("flow_heun")  # it takes no sigmas, which this pipeline always sets
    if name not in matching:
        kind = "a flow" if flow else "noise (or its velocity)"
        raise RequestError(
            key, f"{name} does not fit {pipeline}, which predicts {kind}; allowed: {', '.join(matching)}"
        )


def is_flow(own: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config is of a model that was trained by flow matching."""
    named = str(own.get("_class_name", "")).startswith("FlowMatch")
    return named or own.get("prediction_type") == "flow_prediction" or bool(own.get("use_flow_sigmas"))


def make(name: str, own: Any) -> Any:
    """The scheduler of this name for a model whose own scheduler is `own`."""
    import diffusers

    options = dict(OPTIONS.get(name, {}))
    if name in FLOW and "shift" not in own.config and "flow_shift" in own.config:
        options["shift"] = own.config.flow_shift
    return getattr(diffusers, SCHEDULERS[name]).from_config(own.config, **options)
