"""A scheduler by name is what docs/models.md says of it, whatever the model's own scheduler config says.

Without a model: schedulers denoise small latents with a made-up denoiser.
"""

from __future__ import annotations

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from conftest import settings, tiny_spec
from lesion import models
from lesion.errors import RequestError
from lesion.generation.generate import generate
from lesion.models import SCHEDULERS, resolve, schedulers
from lesion.models.schedulers import FLOW
from lesion.study.grid import Cell
from lesion.study.prompts import Prompt

TRAINED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DPM, EULER = "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"
# The model's own scheduler: as in plain folders, then such as would change what a name means.
PLAIN = {
    "ddim": {"_class_name": "DDIMScheduler", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False},
    "pndm": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1},
    "euler": {"_class_name": EULER, "timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": False},
    "dpm": {"_class_name": DPM, "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"},
    "deis": {"_class_name": "DEISMultistepScheduler", "algorithm_type": "deis", "solver_type": "logrho"},
    "v": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "clip_sample": False},
}
ODD = {
    "sde_karras": {"_class_name": DPM, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    "third": {"_class_name": DPM, "solver_order": 3, "solver_type": "heun", "euler_at_final": True},
    "unipc": {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1", "predict_x0": False, "solver_order": 3},
    "karras": {"_class_name": EULER, "use_karras_sigmas": True, "timestep_spacing": "leading"},
    "exponential": {"_class_name": EULER, "use_exponential_sigmas": True},
    "beta": {"_class_name": "HeunDiscreteScheduler", "use_beta_sigmas": True},
    "two": {"_class_name": DPM, "use_beta_sigmas": True, "use_karras_sigmas": True},
    "turbo": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "trailing": {"_class_name": EULER, "timestep_spacing": "trailing"},
    "prk": {"_class_name": "PNDMScheduler", "skip_prk_steps": False},
    "kept": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "use_karras_sigmas": True, "solver_order": 1},
}
OWN = {name: {**TRAINED, **config} for name, config in {**PLAIN, **ODD}.items()}
NAMES = [name for name in SCHEDULERS if name not in FLOW]
# What docs/models.md says of each name, in diffusers' words.
PLAINLY = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
MULTI = {**PLAINLY, "solver_order": 2, "lower_order_final": True}
TWO_M = {**MULTI, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False}
MEANS = {
    "pndm": {"skip_prk_steps": True},
    "euler": PLAINLY,
    "euler_trailing": {**PLAINLY, "timestep_spacing": "trailing"},
    "heun": PLAINLY,
    "lms": PLAINLY,
    "dpmpp": TWO_M,
    "dpmpp_karras": {**TWO_M, "use_karras_sigmas": True},
    "dpmpp_sde": {**TWO_M, "algorithm_type": "sde-dpmsolver++"},
    "unipc": {**MULTI, "solver_type": "bh2", "predict_x0": True},
    "deis": {**MULTI, "algorithm_type": "deis", "solver_type": "logrho"},
}


def own_scheduler(config):
    """As it is when a model is loaded to have another scheduler by name."""
    return schedulers.without_switches(config["_class_name"], config)


def denoised(scheduler):
    """Latents after a few steps, from noise, with a denoiser that any scheduler takes for one."""
    noise = torch.Generator("cpu").manual_seed(0)
    scheduler.set_timesteps(6)
    latents = torch.randn((1, 1, 4, 4), generator=noise) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        read = scheduler.scale_model_input(latents, timestep)
        takes = {} if type(scheduler).__name__ in NO_NOISE else {"generator": noise}
        latents = scheduler.step(torch.sin(read * 3) + read * 0.8, timestep, latents, **takes).prev_sample
    return latents


NO_NOISE = {"PNDMScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "UniPCMultistepScheduler",
            "DEISMultistepScheduler"}  # fmt: skip


def as_asked(name, config):
    """The documented meaning on the model's own training: betas, prediction, spacing and such, no other option."""
    cls = getattr(diffusers, SCHEDULERS[name])
    kept = ("beta_schedule", "beta_start", "beta_end", "prediction_type", "timestep_spacing", "steps_offset",
            "clip_sample", "set_alpha_to_one")  # fmt: skip
    takes = schedulers.defaults_of(SCHEDULERS[name])
    return cls(**{**{key: config[key] for key in kept if key in config and key in takes}, **MEANS.get(name, {})})


@pytest.mark.parametrize("own", OWN)
def test_a_name_means_the_same_in_every_folder(own):
    others = [own_scheduler(OWN[own])]
    if own != "two":  # which diffusers refuses as it stands
        others.append(getattr(diffusers, OWN[own]["_class_name"]).from_config(OWN[own]))
    for name in NAMES:
        asked = denoised(as_asked(name, OWN[own]))
        assert all(torch.equal(denoised(schedulers.make(name, other)), asked) for other in others), name


@pytest.mark.parametrize("own", OWN)
def test_other_images_have_other_labels(own):
    """Within one folder, whose config is in the fingerprint: one label, one result."""
    found = {}
    if own != "two":
        found[OWN[own]["_class_name"]] = denoised(getattr(diffusers, OWN[own]["_class_name"]).from_config(OWN[own]))
    for name in NAMES:
        label = schedulers.label(name, OWN[own])
        result = denoised(schedulers.make(name, own_scheduler(OWN[own])))
        assert torch.equal(found.setdefault(label, result), result), (name, label)
        twice = own != "two" and SCHEDULERS[name] == OWN[own]["_class_name"] != label
        assert schedulers.is_own(name, OWN[own]) == (twice and torch.equal(result, found[SCHEDULERS[name]])), name


def label_of_0_1(name, own):
    """The label that version 0.1 gave, which stands in the keys of its cells."""
    cls = SCHEDULERS[name]
    if list(SCHEDULERS.values()).count(cls) > 1:
        variant = name.partition("_")[2]
    else:
        skips = name == "pndm" and own["_class_name"] == cls and not own.get("skip_prk_steps", False)
        variant = "skip_prk_steps" if skips else ""
    return cls + (f"-{variant}" if variant else "")


@pytest.mark.parametrize("own", [name for name in OWN if name != "two"])
def test_keys_stay_where_the_name_was_kept_and_change_where_it_was_not(own):
    plain = getattr(diffusers, OWN[own]["_class_name"]).from_config(OWN[own])
    kept, changed = [], []
    for name in NAMES:
        cls = getattr(diffusers, SCHEDULERS[name])
        try:
            before = denoised(cls.from_config(plain.config, **schedulers.OPTIONS.get(name, {})))
        except (ValueError, NotImplementedError):
            continue  # options that exclude each other: no image has this label
        same = torch.equal(before, denoised(schedulers.make(name, own_scheduler(OWN[own]))))
        label = schedulers.label(name, OWN[own])
        assert (label == label_of_0_1(name, OWN[own])) == same, (name, label)
        (kept if label == label_of_0_1(name, OWN[own]) else changed).append(name)
    assert own in ODD or not changed
    assert kept


def test_labels_that_tell_what_was_inherited():
    labels = {
        name: schedulers.label(name, OWN["sde_karras"]) for name in ("dpmpp", "dpmpp_karras", "dpmpp_sde", "euler")
    }
    assert labels == {
        "dpmpp": f"{DPM}-algorithm_type=dpmsolver++-use_karras_sigmas=false",
        "dpmpp_karras": f"{DPM}-karras-algorithm_type=dpmsolver++",
        "dpmpp_sde": f"{DPM}-sde-use_karras_sigmas=false",
        "euler": f"{EULER}-use_karras_sigmas=false",
    }
    assert schedulers.label("euler", OWN["trailing"]) == EULER  # as the model's own, whose key it shares


def test_flow_schedulers_are_plain_too():
    own = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_karras_sigmas": True,
           "stochastic_sampling": True}  # fmt: skip
    made = schedulers.make("flow_euler", own_scheduler(own))
    plain = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for one in (made, plain):
        one.set_timesteps(5)
    assert torch.equal(made.sigmas, plain.sigmas) and not made.config.stochastic_sampling
    assert schedulers.label("flow_euler", own) != "FlowMatchEulerDiscreteScheduler"
    sana = {"_class_name": DPM, "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0,
            "use_karras_sigmas": True}  # fmt: skip
    made = schedulers.make("dpmpp", own_scheduler(sana))
    plain = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    assert torch.equal(denoised(made), denoised(plain))


def test_a_run_says_where_a_name_is_what_the_model_has(tiny_folder, tmp_path, cli):
    folder = shutil.copytree(tiny_folder, tmp_path / "karras")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", DPM]}))
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": DPM, "use_karras_sigmas": True})
    )
    for name, told in (("dpmpp_karras", True), ("dpmpp", False), ("null", False)):
        code, out, err = cli(f"model.id={folder}", f"model.scheduler={name}", "dry_run=true")
        assert code == 0, err
        assert ("model.scheduler=null makes the same pixels" in out) == told


def test_a_folder_with_switches_of_its_own_from_request_to_pixels(tiny_folder, tmp_path):
    """`dpmpp` in a folder of SDE with two exclusive switches: loaded, and plain DPM++ 2M to the bit."""
    folder = shutil.copytree(tiny_folder, tmp_path / "odd")
    config = {**OWN["two"], "algorithm_type": "sde-dpmsolver++"}
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", DPM]}))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=r"model.scheduler: .*use_karras_sigmas and use_beta_sigmas.*; name one"):
        resolve(tiny_spec(folder))
    source = resolve(tiny_spec(folder, scheduler="dpmpp"))
    model = models.load(source, "cpu")
    cell = Cell(model.identity, Prompt("a red circle"), 0, settings(scheduler=source.scheduler), None)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(**TRAINED)
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "np"}
    plain = pipe(["a red circle"], generator=[torch.Generator("cpu").manual_seed(0)], **given).images
    assert np.array_equal(generate(model, [cell], {}), plain)
