"""Replacements that give a layer another text or another run's output, against a dozen lines of plain diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from conftest import settings
from lesion import replacements
from lesion.generation.generate import generate
from lesion.study.lesions import Lesion, Replacement
from lesion.surgery.operation import replacement_key
from test_surgery import SUBJECTS, cell, plain, run

DONOR = "a green cross"
TEXTS = ("donor_prompt", "resample")


def lesion(name, layers, prompt=None, **changes):
    options = {} if prompt is None else {"prompt": prompt}
    return Lesion("leave_one_out", layers[0], tuple(layers), Replacement(name, options), **changes)


def images(model, given, subjects=SUBJECTS, **changes):
    options = dict(given.replacement.identity)
    bench = replacements.Bench(model, settings(**changes), None, 4)
    filler = replacements.build(given.replacement.name, options, bench)
    return generate(model, [cell(model, s, given, **changes) for s in subjects], {replacement_key(given): filler})


def told(folder, sites, text_of, guidance=3.0):
    """Plain diffusers in which `sites` read text_of(their text): (rows, tokens, channels) of all rows."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def hook(module, args, kwargs):
        return args, {**kwargs, "encoder_hidden_states": text_of(pipe, kwargs["encoder_hidden_states"])}

    for site in sites:
        pipe.unet.get_submodule(site).register_forward_pre_hook(hook, with_kwargs=True)
    return pipe(
        [prompt for prompt, _ in SUBJECTS],
        generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in SUBJECTS],
        num_inference_steps=4,
        guidance_scale=guidance,
        height=16,
        width=16,
        output_type="np",
    ).images


def encoded(pipe, prompt):
    ids = pipe.tokenizer(
        prompt, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return pipe.text_encoder(ids)[0]


def test_null_prompt_reads_the_unconditional_text(tiny_folder, tiny_model):
    for layer in tiny_model.anatomy.paths[::3]:
        ours = images(tiny_model, lesion("null_prompt", [layer]))
        reference = told(tiny_folder, tiny_model.anatomy.sites[layer], lambda pipe, text: text[:3].repeat(2, 1, 1))
        assert np.array_equal(ours, reference)
        assert not np.array_equal(ours, plain(tiny_folder, SUBJECTS))


def test_null_prompt_without_guidance_is_the_empty_prompt(tiny_folder, tiny_model):
    layers = tiny_model.anatomy.paths
    ours = images(tiny_model, lesion("null_prompt", layers), guidance=1.0)
    sites = [site for layer in layers for site in tiny_model.anatomy.sites[layer]]
    reference = told(tiny_folder, sites, lambda pipe, text: encoded(pipe, "").expand_as(text), guidance=1.0)
    assert np.array_equal(ours, reference)


@pytest.mark.parametrize("branch", ["both", "cond"])
def test_donor_prompt_reads_the_donors_text(tiny_folder, tiny_model, branch):
    layer = tiny_model.anatomy.paths[2]

    def text_of(pipe, text):
        donor = encoded(pipe, DONOR).expand_as(text)
        return donor if branch == "both" else torch.cat([text[:3], donor[3:]])

    ours = images(tiny_model, lesion("donor_prompt", [layer], DONOR, branch=branch))
    assert np.array_equal(ours, told(tiny_folder, tiny_model.anatomy.sites[layer], text_of))


def test_resample_takes_the_donors_own_output(tiny_folder, tiny_model):
    """Two plain runs: the donor's, whose outputs are kept by step, then one into which they are put."""
    layer = tiny_model.anatomy.paths[3]
    (site,) = tiny_model.anatomy.sites[layer]
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    kept = []

    def make(prompts, hook):
        handle = pipe.unet.get_submodule(site).register_forward_hook(hook)
        noise = [torch.Generator("cpu").manual_seed(seed) for _, seed in SUBJECTS]
        made = pipe(
            prompts, generator=noise, num_inference_steps=4, guidance_scale=3.0, height=16, width=16, output_type="np"
        )
        handle.remove()
        return made.images

    make([DONOR] * 3, lambda module, args, output: kept.append(output))
    reference = make([prompt for prompt, _ in SUBJECTS], lambda module, args, output: kept.pop(0))
    ours = images(tiny_model, lesion("resample", [layer], DONOR))
    assert np.abs(ours - reference).max() < 1e-5  # a batch twice as large rounds differently
    assert np.abs(ours - plain(tiny_folder, SUBJECTS)).max() > 1e-3


@pytest.mark.parametrize("name", TEXTS)
def test_ones_own_prompt_as_donor_is_the_baseline(tiny_folder, tiny_model, name):
    subject = SUBJECTS[1]
    given = lesion(name, tiny_model.anatomy.paths, subject[0], branch="cond")
    ours = images(tiny_model, given, [subject])
    baseline = plain(tiny_folder, [subject])
    if name == "donor_prompt":
        assert np.array_equal(ours, baseline)
    else:
        assert np.abs(ours - baseline).max() < 1e-5  # made in a batch of two


@pytest.mark.parametrize("name", ["null_prompt", *TEXTS])
def test_strength_and_windows(tiny_model, name):
    layers, donor = tiny_model.anatomy.paths, DONOR if name in TEXTS else None
    baseline = run(tiny_model, [cell(tiny_model, subject) for subject in SUBJECTS])
    made = {
        strength: images(tiny_model, lesion(name, layers, donor, branch="cond", strength=strength))
        for strength in (0.0, 0.5, 1.0)
    }
    assert np.array_equal(made[0.0], baseline)
    assert 0 < np.abs(made[0.5] - baseline).mean() < np.abs(made[1.0] - baseline).mean()
    late = images(tiny_model, lesion(name, layers, donor, branch="cond", window=(0.5, 1.0)))
    assert 0 < np.abs(late - baseline).mean() < np.abs(made[1.0] - baseline).mean()
    assert not any("forward" in vars(module) for module in tiny_model.denoiser.modules())


@pytest.mark.parametrize("name", ["null_prompt", *TEXTS])
def test_a_batch_agrees_with_each_cell_alone(tiny_model, name):
    donor = DONOR if name in TEXTS else None
    given = lesion(name, tiny_model.anatomy.paths[1:3], donor)
    together = images(tiny_model, given)
    for image, subject in zip(together, SUBJECTS, strict=True):
        assert np.abs(image - images(tiny_model, given, [subject])[0]).max() < 1e-4


REFUSALS = [
    (["replacement=donor_prompt"], ["replacement.donor_prompt.prompt"]),
    (["replacement=resample", "replacement.resample.prompt=5"], ["replacement.resample.prompt", "5"]),
    (["replacement=donor_prompt", "replacement.donor_prompt.prompt=' '"], ["replacement.donor_prompt.prompt"]),
    (["replacement=null_prompt", "layers.kind=self_attention"], ["replacement", "null_prompt", "cross_attention"]),
    (["replacement=null_prompt", "branch=uncond"], ["replacement", "null_prompt", "both, cond"]),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSALS, ids=lambda value: " ".join(value))
def test_what_makes_no_sense_is_refused(cli, arguments, words):
    code, _, err = cli(*arguments)
    assert code == 2
    assert all(word in err for word in words), err
    assert len(err.strip().splitlines()) == 1


def test_from_command_to_table(cli):
    code, _, err = cli(
        "replacement=[null_prompt,donor_prompt,resample]",
        "replacement.donor_prompt.prompt=two stars",
        "replacement.resample.prompt=two stars",
        "selection=leave_one_out",
        "branch=cond",
    )
    assert code == 0, err
    (frame,) = cli.frames()
    own = frame[(frame.prompt == "two stars") & frame.replacement.isin(["donor_prompt", "resample"])]
    assert len(own) == 6
    assert (own.clip_similarity > 1 - 1e-5).all()
    others = frame[(frame.prompt != "two stars") & (frame.selection != "none")]
    assert (others.clip_similarity < 1 - 1e-6).any()
