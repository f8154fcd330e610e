"""Optimal constants and donors of minimal pairs: planted layers, plain hooks, and what they are made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from conftest import settings
from lesion import replacements
from lesion.errors import RequestError
from lesion.generation.generate import generate
from lesion.replacements import Bench
from lesion.replacements.resample_pairs import nearest
from lesion.study.grid import Cell
from lesion.study.lesions import Lesion
from lesion.study.prompts import Prompt
from lesion.surgery.operation import replacement_key

PROMPTS = ["a red circle", "two stars", "x"]
CALIBRATION = {"calibration": {"prompts": {"name": "own", "items": PROMPTS}, "seeds": [4]}}
OPTIONS = {"zero": {}, "mean": CALIBRATION, "optimal": {**CALIBRATION, "updates": 2}}
SHORT = settings(steps=2)


def lesioned(model, layer, name, options, bench, prompts=("a dog",), seed=3):
    lesion = Lesion("leave_one_out", layer.path, (layer.path,), replacements.describe(name, options))
    fillers = {replacement_key(lesion): replacements.build(name, options, bench)}
    cells = [Cell(model.identity, Prompt(text), seed, SHORT, lesion) for text in prompts]
    return generate(model, cells, fillers)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("means")


@pytest.fixture
def bench(tiny_model, kept):
    return Bench(tiny_model, SHORT, kept, batch_size=4)


def test_a_layer_that_puts_out_a_constant_is_worth_something_under_zero_alone(tiny_model, tmp_path):
    layer = tiny_model.anatomy.layers[1]
    out = tiny_model.denoiser.get_submodule(layer.sites[0].path).to_out[0]
    kept = out.weight.data.clone(), out.bias.data.clone()
    bench = Bench(tiny_model, SHORT, tmp_path, batch_size=4)
    try:
        out.weight.data.zero_()
        out.bias.data.copy_(torch.linspace(-2, 2, len(kept[1])))
        plain = generate(tiny_model, [Cell(tiny_model.identity, Prompt("a dog"), 3, SHORT, None)], {})
        off = {n: np.abs(lesioned(tiny_model, layer, n, o, bench) - plain).max() for n, o in OPTIONS.items()}
    finally:
        out.weight.data, out.bias.data = kept
    assert off["zero"] > 2e-3 and off["mean"] < 1e-5 and off["optimal"] < 1e-5


def test_no_constant_changes_the_denoiser_less_by_plain_hooks(tiny_folder, tiny_model, bench):
    """Squared error of the UNet's output at the first step, over the calibration set, hooked by hand."""
    mean, best = (replacements.build(name, OPTIONS[name], bench).means for name in ("mean", "optimal"))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe.unet.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True
    )
    for text in PROMPTS:
        noise = torch.Generator("cpu").manual_seed(4)
        pipe(text, generator=noise, num_inference_steps=2, guidance_scale=3.0, height=16, width=16)
    first, gained = seen[::2], []
    for layer in tiny_model.anatomy.layers[:4]:
        site = layer.sites[0].path
        errors = []
        for table in (mean, best):
            hook = pipe.unet.get_submodule(site).register_forward_hook(
                lambda module, args, output, rows=table[site][0]: rows[:, None].expand_as(output)
            )
            with torch.no_grad():
                off = [pipe.unet(*args, **kwargs)[0] - output[0] for args, kwargs, output in first]
            hook.remove()
            errors.append(float(torch.stack(off).square().mean()))
        assert errors[1] <= errors[0] * (1 + 1e-5)
        gained.append(1 - errors[1] / errors[0])
    assert sum(gain > 0.03 for gain in gained) >= 2, gained


@pytest.mark.slow
def test_batches_do_not_matter_and_the_constants_are_kept(tiny_model, bench, tmp_path, monkeypatch):
    first = replacements.build("optimal", OPTIONS["optimal"], bench).means
    again = replacements.build("optimal", OPTIONS["optimal"], Bench(tiny_model, SHORT, tmp_path, 2)).means
    mean = replacements.build("mean", CALIBRATION, bench).means
    for site in first:
        moved = (first[site] - mean[site]).abs().max()
        assert (first[site] - again[site]).abs().max() <= 0.05 * moved + 1e-5
    monkeypatch.setattr("lesion.replacements._optimal.optimised", lambda *args: pytest.fail("optimised again"))
    kept = replacements.build("optimal", OPTIONS["optimal"], bench).means
    assert all(torch.equal(kept[site], first[site]) for site in first)


@pytest.mark.parametrize("updates", [0, True, "8", 1001, None])
def test_updates_are_a_whole_number(updates):
    with pytest.raises(RequestError, match=r"replacement.optimal.updates: must be a whole number from 1 to 1000"):
        replacements.describe("optimal", {**CALIBRATION, "updates": updates})


def test_a_donor_is_the_other_half_of_a_minimal_pair():
    donors = ("a blue circle", "a blue star", "a red circle", "a red star", "two stars")
    assert nearest("a red circle", donors) == ("a blue circle", "a red star")
    assert nearest("A red circle", donors[2:3]) == ("a red circle",)  # there is no other
    for given, why in (({}, "donors"), ({"donors": {"name": "d", "items": ["x"]}}, "two different texts")):
        with pytest.raises(RequestError, match=why):
            replacements.describe("resample_pairs", given)
    items = {"name": "d", "items": list(donors)}
    identity = replacements.describe("resample_pairs", {"donors": items}).identity
    turned = {"name": "e", "items": list(donors[::-1])}
    assert replacements.describe("resample_pairs", {"donors": turned}).identity == identity


def test_each_image_is_resampled_from_its_own_donor(tiny_model, bench):
    layer = tiny_model.anatomy.layers[1]
    donors = {"donors": {"name": "d", "items": ["a blue circle", "two dogs", "a red star"]}}
    prompts = ("a red circle", "two cats")
    for seed, wanted in ((2, ("a blue circle", "two dogs")), (3, ("a red star", "two dogs"))):
        ours = lesioned(tiny_model, layer, "resample_pairs", donors, bench, prompts, seed)
        for image, prompt, donor in zip(ours, prompts, wanted, strict=True):
            theirs = lesioned(tiny_model, layer, "resample", {"prompt": donor}, bench, (prompt,), seed)
            assert np.abs(image - theirs[0]).max() < 1e-5
