"""Calibration means against a mean computed by hand, and the `mean` replacement against plain hooks."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from conftest import settings
from lesion import replacements
from lesion.generation.generate import generate
from lesion.replacements import Bench
from lesion.replacements import _means as means
from lesion.study.grid import Cell, ModelIdentity
from lesion.study.lesions import Lesion
from lesion.study.prompts import Prompt
from lesion.surgery.anatomy import Anatomy
from lesion.surgery.operation import replacement_key

PROMPTS, SEEDS = ["a red circle", "two stars", "x"], [4, 9]
ASKED = [Prompt(text) for text in PROMPTS]
OPTIONS = {"calibration": {"prompts": {"name": "own", "items": PROMPTS}, "seeds": SEEDS}}


def outputs_by_hand(folder, site, guidance):
    """Every output of a site over the calibration set, one pipeline call an image: (images, calls, branches, n, c)."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    seen: list[torch.Tensor] = []
    pipe.unet.get_submodule(site).register_forward_hook(lambda module, args, output: seen.append(output.double()))
    images = []
    for prompt in PROMPTS:
        for seed in SEEDS:
            seen.clear()
            generator = torch.Generator("cpu").manual_seed(seed)
            pipe(prompt, generator=generator, num_inference_steps=4, guidance_scale=guidance, height=16, width=16)
            images.append(torch.stack(seen))
    return torch.stack(images)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_means_are_the_mean(tiny_folder, tiny_model, tmp_path, guidance):
    bench = Bench(tiny_model, settings(guidance=guidance), tmp_path, batch_size=4)  # 6 images: a full and a part batch
    found = means.calibrated(bench, "own", ASKED, SEEDS)
    assert set(found) == {site for sites in tiny_model.anatomy.sites.values() for site in sites}
    for layer in (0, 3, 5):
        site = tiny_model.anatomy.layers[layer].sites[0].path
        by_hand = outputs_by_hand(tiny_folder, site, guidance).mean(dim=(0, 3))  # over images and positions
        if guidance > 1:
            assert found[site].shape == (4, 2, tiny_model.anatomy.layers[layer].sites[0].channels)
            assert torch.allclose(found[site].double(), by_hand, atol=1e-5)
            assert not torch.allclose(found[site][:, 0], found[site][:, 1], atol=1e-3)  # branches do differ
            assert not torch.allclose(found[site][0], found[site][3], atol=1e-3)  # and so do steps
        else:
            assert torch.allclose(found[site][:, 1].double(), by_hand[:, 0], atol=1e-5)
            assert found[site][:, 0].isnan().all()


def test_means_are_kept_with_their_provenance_and_used_again(tiny_model, tmp_path, monkeypatch, caplog):
    bench = Bench(tiny_model, settings(), tmp_path, batch_size=4)
    first = means.calibrated(bench, "own", ASKED, SEEDS)
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        provenance = json.loads(file.metadata()["provenance"])
    assert provenance["prompts"] == PROMPTS
    assert provenance["seeds"] == SEEDS
    assert provenance["calibration"] == "own"
    assert provenance["fingerprint"] == tiny_model.identity.fingerprint
    assert provenance["settings"]["steps"] == 4
    with monkeypatch.context() as patch:
        patch.setattr(means, "measure", lambda *args: pytest.fail("measured again"))
        again = means.calibrated(bench, "another name", ASKED, SEEDS)
    assert all(torch.equal(again[site], first[site]) for site in first)
    whole = path.read_bytes()
    for damaged in (whole[:100], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):  # torn, or a bit flipped
        path.write_bytes(damaged)
        caplog.clear()
        again = means.calibrated(bench, "own", ASKED, SEEDS)
        assert all(torch.equal(again[site], first[site]) for site in first)
        assert caplog.text.count("is damaged and removed") == 1
    means.calibrated(Bench(tiny_model, settings(steps=3), tmp_path, 4), "own", ASKED, SEEDS)
    means.calibrated(bench, "own", ASKED[:2], SEEDS)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_means_of_another_device_or_with_switches_are_others(tmp_path, monkeypatch):
    """As cells are; on a CPU without switches they are found where they were kept before."""
    monkeypatch.setattr(means, "measure", lambda *args: {"site": torch.zeros(1, 2, 3)})
    plain = ModelIdentity("tiny", "f00d", "float32")
    for identity in (
        plain,
        dataclasses.replace(plain, device="cuda"),
        dataclasses.replace(plain, switches=("tf32",)),
    ):
        model = SimpleNamespace(identity=identity, anatomy=Anatomy((), "cross_attention", "attention"))
        before = set(tmp_path.iterdir())
        means.calibrated(Bench(model, settings(), tmp_path, 4), "own", ASKED, SEEDS)
        (path,) = set(tmp_path.iterdir()) - before
        if identity is plain:
            assert path.stem == "ad06b05463b3644c822642d9a0dc6303"


def test_mean_replacement_is_a_plain_hook(tiny_folder, tiny_model, tmp_path):
    """A dozen lines of plain diffusers give the same image."""
    bench = Bench(tiny_model, settings(), tmp_path, batch_size=4)
    layer = tiny_model.anatomy.layers[1]
    lesion = Lesion("leave_one_out", layer.path, (layer.path,), replacements.describe("mean", OPTIONS))
    fillers = {replacement_key(lesion): replacements.build("mean", OPTIONS, bench)}
    cells = [Cell(tiny_model.identity, Prompt(text), 3, settings(), lesion) for text in ("a dog", "a cat")]
    ours = generate(tiny_model, cells, fillers)

    site = layer.sites[0].path
    table = outputs_by_hand(tiny_folder, site, 3.0).mean(dim=(0, 3)).float()  # (calls, branches, channels)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    calls = []

    def replace(module, args, output):
        calls.append(None)
        mean = table[len(calls) - 1].repeat_interleave(2, dim=0)  # uncond, uncond, cond, cond
        return mean[:, None].expand_as(output)

    pipe.unet.get_submodule(site).register_forward_hook(replace)
    generators = [torch.Generator("cpu").manual_seed(3) for _ in range(2)]
    theirs = pipe(["a dog", "a cat"], generator=generators, num_inference_steps=4, guidance_scale=3.0,
                  height=16, width=16, output_type="np").images  # fmt: skip
    assert np.abs(ours - theirs).max() < 1e-4  # the table is summed in another order
    plain = generate(tiny_model, [Cell(tiny_model.identity, Prompt("a dog"), 3, settings(), None)], {})
    assert np.abs(ours[0] - plain[0]).max() > 2e-3


def test_the_calibration_set_is_part_of_the_identity():
    def identity(prompts=PROMPTS, seeds=SEEDS, name="own"):
        return replacements.describe(
            "mean", {"calibration": {"prompts": {"name": name, "items": prompts}, "seeds": seeds}}
        ).identity

    assert identity() == identity(name="other name")
    assert identity() != identity(prompts=PROMPTS[:2])
    assert identity() != identity(seeds=[4])
