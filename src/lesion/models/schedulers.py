"""Schedulers by name: their diffusers classes, options, and which models they fit."""

from __future__ import annotations

import inspect
import json
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
# What a name says beside its class.
OPTIONS: dict[str, dict[str, Any]] = {
    "pndm": {"skip_prk_steps": True},  # without Runge-Kutta steps, as in Stable Diffusion's own PNDM configs
    "euler_trailing": {"timestep_spacing": "trailing"},  # of few-step models such as SDXL-Lightning
    "dpmpp_karras": {"use_karras_sigmas": True},
    # DPM++ 2M SDE. diffusers' DPMSolverSDEScheduler is none: its noise does not come from the image's own generator.
    "dpmpp_sde": {"algorithm_type": "sde-dpmsolver++"},
}
# Options that make another sampler of the same class: never inherited from the model's own config.
EXCLUSIVE = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")  # diffusers refuses two of them
SWITCHES = (
    *EXCLUSIVE,
    *("use_lu_lambdas", "algorithm_type", "solver_order", "solver_type", "lower_order_final", "euler_at_final"),
    *("predict_x0", "disable_corrector", "stochastic_sampling"),
)
# The values that a class knows; diffusers itself puts the default in the place of another class's.
_VALUES = {
    ("DPMSolverMultistepScheduler", "algorithm_type"): ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
    ("DPMSolverMultistepScheduler", "solver_type"): ("midpoint", "heun"),
    ("UniPCMultistepScheduler", "solver_type"): ("bh1", "bh2"),
    ("DEISMultistepScheduler", "algorithm_type"): ("deis",),
    ("DEISMultistepScheduler", "solver_type"): ("logrho",),
}


def label(name: str, own: Mapping[str, Any]) -> str:
    """For tables and hashes: the class, and what sets it apart from another name of the same class, from the model's
    own scheduler of that class, and from what earlier versions made under the same name.

    own: the config of the model's own scheduler; what is inherited of it is in the model's fingerprint, not here.
    Such as `DPMSolverMultistepScheduler-karras`; then options that differ from the model's own,
    `-use_karras_sigmas=false`, which those versions had inherited.
    """
    cls = SCHEDULERS[name]
    shared = list(SCHEDULERS.values()).count(cls) > 1
    parts = [name.partition("_")[2]] if shared and "_" in name else []
    return "-".join([cls, *parts, *_changed(name, own, named=bool(parts))])


def is_own(name: str, own: Mapping[str, Any]) -> bool:
    """Whether a name asks for exactly the model's own scheduler, and labels it otherwise than null does.

    Such images have two keys, since earlier versions stored them under both.
    """
    cls = SCHEDULERS[name]
    return own.get("_class_name") == cls and not _changed(name, own, named=False) and label(name, own) != cls


def exact(name: str) -> dict[str, Any]:
    """Every option that tells samplers of one class apart, as the name has it, whatever the model's own config says."""
    usual = _defaults(SCHEDULERS[name])
    return {**{key: usual[key] for key in SWITCHES if key in usual}, **OPTIONS.get(name, {})}


def _changed(name: str, own: Mapping[str, Any], named: bool) -> list[str]:
    """The options that `make` sets otherwise than they would be inherited.

    named: whether the label has a word for the name's own options.
    """
    cls = SCHEDULERS[name]
    usual, said = _defaults(cls), {} if own.get("_class_name") == cls and not named else OPTIONS.get(name, {})
    found = []
    for key, value in exact(name).items():
        before = said.get(key, own.get(key))
        if before is None or before not in _VALUES.get((cls, key), (before,)):
            before = usual[key]
        if before != value:
            found.append(key if value is True else f"{key}={json.dumps(value).strip(chr(34))}")
    return sorted(found)


def _defaults(cls: str) -> dict[str, Any]:
    return facts.scheduler(cls) or switches_of(cls)


def switches_of(cls: str) -> dict[str, Any]:
    """Name -> default of those options of a class that labels are made of."""
    known = {*SWITCHES, *(key for options in OPTIONS.values() for key in options)}
    return {key: value for key, value in defaults_of(cls).items() if key in known}


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


def check_own(own: Mapping[str, Any]) -> None:
    """Raises RequestError for a scheduler config that diffusers would refuse, where no other one is asked for."""
    if len(on := [key for key in EXCLUSIVE if own.get(key)]) > 1:
        raise RequestError(
            "model.scheduler", f"the model's own scheduler has {' and '.join(on)}, which exclude each other; name one"
        )


def without_switches(cls: str, own: Mapping[str, Any]) -> Any:
    """The model's own scheduler less SWITCHES, which `make` sets: options that exclude each other cannot stop loading.

    cls: its class in diffusers. own: its config.
    """
    import diffusers

    return getattr(diffusers, cls).from_config({key: value for key, value in own.items() if key not in SWITCHES})


def make(name: str, own: Any) -> Any:
    """The scheduler of this name for a model whose own scheduler is `own`."""
    import diffusers

    options = exact(name)
    if name in FLOW and "shift" not in own.config and "flow_shift" in own.config:
        options["shift"] = own.config.flow_shift
    return getattr(diffusers, SCHEDULERS[name]).from_config(own.config, **options)
