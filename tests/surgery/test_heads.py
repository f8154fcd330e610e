"""Lesions of single attention heads against their contribution computed by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from denoisers import TEXT, apart, build, hooked, inputs, lesion, same, under
from lesion.replacements.resample import Resample
from lesion.surgery.anatomy import examine
from lesion.surgery.intervention import Intervention
from test_anatomy import SD15, SDXL, on_meta

CASES = [
    ("unet", "cross_attention", "down_blocks.1.attentions.0.transformer_blocks.0.attn2"),
    ("unet", "self_attention", "mid_block.attentions.0.transformer_blocks.0.attn1"),
    ("sd3", "joint_attention", "transformer_blocks.0.attn"),
    ("sd3", "joint_attention", "transformer_blocks.1.attn"),
    ("flux", "joint_attention", "transformer_blocks.0.attn"),
    ("flux", "joint_attention", "single_transformer_blocks.1.attn"),
]
each_attention = pytest.mark.parametrize(("name", "kind", "path"), CASES)


def head_hooks(denoiser, path, heads, change=lambda x: x * 0, keeps_bias=False):
    """Plain hooks that take the contribution W_h x_h + b/H of these heads away and put W_h change(x_h) there.

    keeps_bias: whether the head's share of the bias stays.
    """
    module = denoiser.get_submodule(path)
    width = module.inner_dim // module.heads
    slices = [slice(head * width, (head + 1) * width) for head in heads]
    if not hasattr(module, "to_out"):  # FLUX's single blocks: the projection comes after, without a bias of its own

        def single(module, args, kwargs, output):
            output = output.clone()
            for mine in slices:
                output[:, TEXT:, mine] = change(output[:, TEXT:, mine])
            return output

        return {path: single}

    def projection(module, args, kwargs, output):
        for mine in slices:
            before = args[0][..., mine]
            output = output + (change(before) - before) @ module.weight[:, mine].T
            output = output if keeps_bias else output - module.bias / denoiser.get_submodule(path).heads
        return output

    return {f"{path}.to_out.0": projection}


@each_attention
def test_one_head_is_its_slice_of_the_projection(name, kind, path):
    denoiser, calls = build(name), inputs(name, 2)
    anatomy = examine(denoiser, "head", kind)
    plain = hooked(denoiser, {}, calls)
    heads = denoiser.get_submodule(path).heads
    assert heads > 1
    found = []
    for head in range(heads):
        ours = under(denoiser, anatomy, [lesion(f"{path}.heads.{head}", kind=kind)] * 2, calls)
        assert apart(ours, hooked(denoiser, head_hooks(denoiser, path, [head]), calls)) < 1e-5
        assert apart(ours, plain) > 1e-4
        found.append(ours)
    assert apart(found[0], found[1]) > 1e-4


@each_attention
def test_all_heads_are_the_layer_to_the_bit(name, kind, path):
    denoiser, calls = build(name), inputs(name, 2)
    heads = [layer for layer in examine(denoiser, "head", kind).paths if layer.startswith(f"{path}.")]
    (layer,) = [layer for layer, sites in examine(denoiser, kind=kind).sites.items() if path in sites]
    by_heads = under(denoiser, examine(denoiser, "head", kind), [lesion(*heads, kind=kind)] * 2, calls)
    at_once = under(denoiser, examine(denoiser, kind=kind), [lesion(layer, kind=kind)] * 2, calls)
    assert same(by_heads, at_once)
    assert apart(by_heads, hooked(denoiser, {}, calls)) > 1e-3


@each_attention
def test_strength_windows_branches_and_batches_of_heads(name, kind, path):
    denoiser, calls = build(name), inputs(name, 4)  # two images, both branches
    anatomy = examine(denoiser, "head", kind)
    plain = hooked(denoiser, {}, calls)

    def given(*heads, **changes):
        return lesion(*(f"{path}.heads.{head}" for head in heads), kind=kind, **changes)

    def kept(ours):
        return [[torch.equal(one[row], other[row]) for row in range(4)] for one, other in zip(ours, plain)]

    assert same(under(denoiser, anatomy, [given(0, strength=0.0), None], calls), plain)
    mixed = under(denoiser, anatomy, [given(0), given(1)], calls)
    for image, head in enumerate((0, 1)):
        other = hooked(denoiser, head_hooks(denoiser, path, [head]), calls)
        assert apart([one[[image, image + 2]] for one in mixed], [one[[image, image + 2]] for one in other]) < 1e-5
    assert kept(under(denoiser, anatomy, [None, given(0, 1)], calls)) == [[True, False, True, False]] * 4
    assert kept(under(denoiser, anatomy, [given(1, branch="uncond"), None], calls)) == [[False, True, True, True]] * 4
    late = under(denoiser, anatomy, [given(0, window=(0.5, 1.0))] * 2, calls)
    assert kept(late) == [[True] * 4] * 2 + [[False] * 4] * 2
    assert not any("forward" in vars(module) for module in denoiser.modules())


@each_attention
def test_other_values_keep_the_bias(name, kind, path):
    """Half strength by zero, and a companion's values: of what the head puts into the projection."""
    denoiser, calls = build(name), inputs(name, 2)
    anatomy, head = examine(denoiser, "head", kind), f"{path}.heads.1"
    ours = under(denoiser, anatomy, [lesion(head, kind=kind), None], calls, Resample("a donor", guided=False))
    hooks = head_hooks(denoiser, path, [1], lambda x: x[[1, 1]], keeps_bias=True)
    assert apart(ours, hooked(denoiser, hooks, calls)) < 1e-5
    assert apart(ours, hooked(denoiser, {}, calls)) > 1e-4

    class Mean(Intervention):
        def fill(self, site, call, branches, output):
            return output.mean(dim=(0, 1), keepdim=True)

        reads_output = True

    ours = under(denoiser, anatomy, [lesion(head, kind=kind)] * 2, calls, Mean())

    def mean(x):
        return x.mean(dim=(0, 1), keepdim=True).expand_as(x)

    assert apart(ours, hooked(denoiser, head_hooks(denoiser, path, [1], mean, keeps_bias=True), calls)) < 1e-5


def test_heads_of_the_published_unets():
    sd15, sdxl = examine(on_meta(SD15), "head"), examine(on_meta(SDXL), "head")
    assert len(set(sd15.paths)) == 16 * 8
    assert sd15.paths[8] == "down_blocks.0.attentions.1.transformer_blocks.0.attn2.heads.0"
    assert [layer.place for layer in sd15.layers] == ["down"] * 48 + ["mid"] * 8 + ["up"] * 72
    assert [layer.resolution for layer in sd15.layers][::8][:7] == [64, 64, 32, 32, 16, 16, 8]
    assert len(set(sdxl.paths)) == 10 * 10 + 60 * 20
    assert {layer.sites[0].head_dim for layer in sdxl.layers} == {64}


def test_heads_of_a_transformer_with_cross_attention():
    with torch.device("meta"):
        denoiser = PixArtTransformer2DModel(num_layers=2, num_attention_heads=4, cross_attention_dim=288, sample_size=8)
    assert list(examine(denoiser, "head").paths) == [
        f"transformer_blocks.{block}.attn2.heads.{head}" for block in range(2) for head in range(4)
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["layers.kind=feed_forward"], ["layers.by", "feed_forward has no attention heads"]),
        (["layers.kind=block"], ["layers.by", "block has no attention heads"]),
        (["layers.kind=text_to_image"], ["layers.by", "text_to_image has no attention heads"]),
        (["replacement=null_prompt"], ["replacement", "null_prompt", "layers.by=head"]),
        (["performance.compile=true"], ["performance.compile", "layers.by=head"]),
    ],
)
def test_what_makes_no_sense_is_refused(cli, arguments, words):
    code, _, err = cli("layers.by=head", "layers.include=null", *arguments)
    assert code == 2
    assert all(word in err for word in words), err
    assert len(err.strip().splitlines()) == 1


def test_from_command_to_table(cli):
    site = "mid_block.attentions.0.transformer_blocks.0.attn2"
    code, _, err = cli(
        "layers.by=head",
        f"layers.include=[{site}.*]",
        "replacement=[zero,mean,resample]",
        "replacement.resample.prompt=two stars",
        "selection=[leave_one_out,all]",
        "generation.steps=2",
    )
    assert code == 0, err
    (frame,) = cli.frames()
    assert set(frame.layer[frame.selection == "leave_one_out"]) >= {f"{site}.heads.0", f"{site}.heads.1"}
    assert (frame.status == "ok").all()
