"""Bypass of whole blocks of a UNet, against plain hooks; of joint blocks see test_joint."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from conftest import settings
from denoisers import apart, build, hooked, inputs, lesion, same, under
from lesion.replacements import Bench
from lesion.replacements import _means as means
from lesion.replacements.mean import Mean
from lesion.replacements.resample import Resample
from lesion.study.prompts import Prompt
from lesion.surgery.anatomy import examine
from test_anatomy import SD15, SD15_PATHS, SDXL, on_meta
from test_surgery import SUBJECTS, cell, plain, run, zero

BY = ("attention", "transformer_block", "block", "stage")
TRANSFORMER = "up_blocks.0.attentions.1"
LAYERS = {
    "attention": (TRANSFORMER, [TRANSFORMER]),
    "transformer_block": (f"{TRANSFORMER}.transformer_blocks.0", [f"{TRANSFORMER}.transformer_blocks.0"]),
    "block": ("up_blocks.0", ["up_blocks.0.attentions.0", TRANSFORMER]),
    "stage": (
        "up_blocks",
        [f"up_blocks.{block}.attentions.{layer}" for block in range(2) for layer in range(2)],
    ),
}


def updated(change):
    """A hook: the block's input and `change` of what it adds to it."""

    def hook(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        if isinstance(output, tuple):
            return (hidden + change(output[0] - hidden),)
        return hidden + change(output - hidden)

    return hook


@pytest.mark.parametrize("by", BY)
def test_zero_is_the_blocks_input(by):
    denoiser, calls = build("unet"), inputs("unet", 4)
    anatomy, (layer, sites) = examine(denoiser, by, "block"), LAYERS[by]
    assert list(anatomy.sites[layer]) == sites
    plain_outputs = hooked(denoiser, {}, calls)
    ours = under(denoiser, anatomy, [lesion(layer, kind="block")] * 2, calls)
    reference = hooked(denoiser, dict.fromkeys(sites, updated(lambda update: update * 0)), calls)
    assert same(ours, reference)
    assert apart(ours, plain_outputs) > 1e-3
    assert same(under(denoiser, anatomy, [lesion(layer, kind="block", strength=0.0)] * 2, calls), plain_outputs)
    some = under(denoiser, anatomy, [None, lesion(layer, kind="block", branch="cond", window=(0.0, 0.5))], calls)
    for step, (one, other) in enumerate(zip(some, plain_outputs)):
        kept = [torch.equal(one[row], other[row]) for row in range(4)]
        assert kept == [True, True, True, step >= 2]
    half = under(denoiser, anatomy, [lesion(layer, kind="block", strength=0.5)] * 2, calls)
    assert apart(half, hooked(denoiser, dict.fromkeys(sites, updated(lambda update: update / 2)), calls)) < 1e-5
    assert not any("forward" in vars(module) for module in denoiser.modules())


TRANSFORMERS = {"pixart": "transformer_blocks.1", "sana": "transformer_blocks.0", "hunyuan": "blocks.3"}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_and_their_parts_of_transformers(name):
    """All kinds by zero, and means of what they add: Sana's feed-forward works on a feature map."""
    denoiser, calls, layer = build(name), inputs(name, 2), TRANSFORMERS[name]
    plain_outputs = hooked(denoiser, {}, calls)

    def whole(change):
        return lambda module, args, kwargs, output: change(output)

    for kind, (leaf, hook) in {
        "block": ("", updated),
        "cross_attention": (".attn2", whole),
        "self_attention": (".attn1", whole),
        "feed_forward": (".ff", whole),
    }.items():
        anatomy, site = examine(denoiser, kind=kind), f"{layer}{leaf}"
        assert anatomy.sites[layer] == (site,)
        width = anatomy.by_path[site].channels
        table = torch.arange(2.0 * width).reshape(1, 2, width).expand(len(calls), 2, width) / width

        def mean(values, table=table):
            rows = table[0]  # unconditional and conditional
            return (rows[:, :, None, None] if values.dim() == 4 else rows[:, None]).expand_as(values)

        ours = under(denoiser, anatomy, [lesion(layer, kind=kind)], calls)
        assert same(ours, hooked(denoiser, {site: hook(lambda values: values * 0)}, calls)), kind
        assert apart(ours, plain_outputs) > 1e-4, kind
        ours = under(denoiser, anatomy, [lesion(layer, kind=kind)], calls, Mean({site: table}))
        assert apart(ours, hooked(denoiser, {site: hook(mean)}, calls)) < 1e-4, kind
        assert same(under(denoiser, anatomy, [lesion(layer, kind=kind, strength=0.0)], calls), plain_outputs)


@pytest.mark.parametrize("by", BY[:2])
def test_a_block_bypassed_in_every_row_is_not_run(by):
    denoiser, calls = build("unet"), inputs("unet", 2)
    layer, (site,) = LAYERS[by]
    inside = next(module for path, module in denoiser.named_modules() if path.endswith("attn2") and site in path)
    runs = []
    inside.register_forward_hook(lambda *_: runs.append(1))
    under(denoiser, examine(denoiser, by, "block"), [lesion(layer, kind="block")] * 2, calls)
    assert not runs
    under(denoiser, examine(denoiser, by, "block"), [lesion(layer, kind="block"), None], calls)
    assert runs


@pytest.mark.parametrize("by", BY[:2])
def test_resample_takes_the_donors_update(by):
    denoiser, calls = build("unet"), inputs("unet", 2)
    layer, sites = LAYERS[by]
    anatomy = examine(denoiser, by, "block")
    ours = under(denoiser, anatomy, [lesion(layer, kind="block"), None], calls, Resample("x", guided=False))
    swapped = dict.fromkeys(sites, updated(lambda update: update[[1, 1]]))
    assert apart(ours, hooked(denoiser, swapped, calls)) < 1e-5
    assert apart(ours, hooked(denoiser, {}, calls)) > 1e-3


@pytest.mark.parametrize(("by", "kind"), [("attention", "block"), ("transformer_block", "block"),
                                          ("head", "cross_attention")])  # fmt: skip
def test_means_of_updates_and_heads(tiny_model, tmp_path, by, kind):
    """Against means by plain hooks over one pipeline call; and as a replacement of a feature map."""
    model = dataclasses.replace(tiny_model, anatomy=examine(tiny_model.denoiser, by, kind))
    bench = Bench(model, settings(), tmp_path, batch_size=2)
    found = means.calibrated(bench, "own", [Prompt("a red circle"), Prompt("x")], [3])
    assert set(found) == set(model.anatomy.by_path)
    site = model.anatomy.layers[2].sites[0]
    seen = []

    def note(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        if by == "head":
            seen.append(hidden[..., : site.channels].double().unflatten(0, (2, 2)).mean(dim=(1, 2)))
            return
        update = (output[0] if isinstance(output, tuple) else output).double() - hidden.double()
        update = update.flatten(2).mT if update.dim() == 4 else update
        seen.append(update.unflatten(0, (2, 2)).mean(dim=(1, 2)))

    handle = model.denoiser.get_submodule(site.hook.module).register_forward_hook(note, with_kwargs=True)
    model.pipe(["a red circle", "x"], generator=[torch.Generator().manual_seed(3) for _ in range(2)],
               num_inference_steps=4, guidance_scale=3.0, height=16, width=16)  # fmt: skip
    handle.remove()
    by_hand = torch.stack(seen)  # (calls, branches, channels)
    if by == "head":
        assert site.path.endswith(".heads.0")
        assert found[site.path].shape == (4, 2, site.channels + 1)
        assert (found[site.path][..., -1] == 1).all()
        assert torch.allclose(found[site.path][..., :-1].double(), by_hand, atol=1e-5)
        return
    assert found[site.path].shape == (4, 2, site.channels)
    assert torch.allclose(found[site.path].double(), by_hand, atol=1e-5)
    denoiser, calls = model.denoiser, inputs("unet", 2)
    ours = under(denoiser, model.anatomy, [lesion(site.path, kind="block")], calls, Mean(found))
    reference = []
    for step, call in enumerate(calls):
        rows = found[site.path][step]

        def mean(update, rows=rows):
            return (rows[:, :, None, None] if update.dim() == 4 else rows[:, None]).expand_as(update)

        reference += hooked(denoiser, {site.path: updated(mean)}, [call])
    assert apart(ours, reference) < 1e-5


def test_a_bypass_in_a_pipeline_is_a_plain_hook(tiny_folder, tiny_model):
    from diffusers import StableDiffusionPipeline

    model = dataclasses.replace(tiny_model, anatomy=examine(tiny_model.denoiser, "attention", "block"))
    layer = model.anatomy.paths[3]
    ours = run(model, [cell(model, subject, zero(layer, kind="block")) for subject in SUBJECTS])
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.get_submodule(layer).register_forward_hook(lambda module, args, output: (args[0],))
    theirs = pipe(
        [prompt for prompt, _ in SUBJECTS],
        generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in SUBJECTS],
        num_inference_steps=4, guidance_scale=3.0, height=16, width=16, output_type="np",
    ).images  # fmt: skip
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, plain(tiny_folder, SUBJECTS))


def test_blocks_of_the_published_unets():
    for config, number, blocks in ((SD15, 16, 16), (SDXL, 11, 70)):
        denoiser = on_meta(config)
        anatomy = examine(denoiser, "attention", "block")
        assert len(anatomy.paths) == number
        assert all(sites == (layer,) for layer, sites in anatomy.sites.items())
        assert len(examine(denoiser, "transformer_block", "block").paths) == blocks
        stages = examine(denoiser, "stage", "block")
        assert list(stages.paths) == ["down_blocks", "mid_block", "up_blocks"]
        assert len(stages.by_path) == number
    assert list(examine(on_meta(SD15), "attention", "block").paths) == SD15_PATHS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["replacement=null_prompt"], ["replacement", "null_prompt", "cross_attention"]),
    ],
)
def test_what_makes_no_sense_is_refused(cli, arguments, words):
    code, _, err = cli("layers.kind=block", *arguments)
    assert code == 2
    assert all(word in err for word in words), err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("kind", ["joint_attention", "text_to_image"])
def test_a_kind_the_model_has_none_of(cli, kind):
    code, _, err = cli(f"layers.kind={kind}")
    assert code == 2
    assert "layers.kind" in err
    assert "allowed: cross_attention, self_attention, feed_forward, block" in err
    assert len(err.strip().splitlines()) == 1
    code, _, err = cli("layers.kind=text_to_image", "replacement=mean")
    assert code == 2
    assert "mean suits layers.kind=" in err
