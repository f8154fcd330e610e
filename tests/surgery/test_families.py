"""Lesions of Qwen-Image, FLUX.2 and Z-Image against plain hooks and attention written out by hand."""

from __future__ import annotations

import pytest
import torch

from denoisers import TEXT, apart, build, hooked, inputs, lesion, same, under
from lesion.replacements.double import Double
from lesion.replacements.identity import Identity
from lesion.surgery.anatomy import examine, kinds_of
from shipped import assert_shipped

IMAGE = 32  # image tokens of the tiny Z-Image: 16, padded to a multiple of 32; they come first
LAYERS = {
    "qwen": ["transformer_blocks.0", "transformer_blocks.1"],
    "flux2": ["transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"],
    "zimage": ["layers.0", "layers.1"],
    "sd3": ["transformer_blocks.0", "transformer_blocks.1"],
    "flux": ["transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"],
}
NEW = [(name, layer) for name in ("qwen", "flux2", "zimage") for layer in LAYERS[name]]
ALL = [(name, layer) for name, layers in LAYERS.items() for layer in layers]


def joined(name, layer):
    """Whether text and image are one sequence in this block."""
    return name == "zimage" or layer.startswith("single")


def image_of(name, tokens, change):
    """The sequence with its image tokens changed."""
    if name == "zimage":
        return torch.cat([change(tokens[:, :IMAGE]), tokens[:, IMAGE:]], dim=1)
    return torch.cat([tokens[:, :TEXT], change(tokens[:, TEXT:])], dim=1)


def attention_hooks(name, layer, change):
    """Plain hooks in which `change` is applied to what the attention adds to the image."""
    leaf = ".attention" if name == "zimage" else ".attn"
    if name == "flux2" and joined(name, layer):  # in front of the projection that it shares with the MLP

        def before(module, args, kwargs, output):
            values = args[0]
            width = module.out_features  # of the attention, as many as the block has
            first = image_of(name, values[..., :width], change)
            return torch.nn.functional.linear(torch.cat([first, values[..., width:]], dim=-1), module.weight)

        return {f"{layer}.attn.to_out": before}

    def hook(module, args, kwargs, output):
        return image_of(name, output, change) if joined(name, layer) else (change(output[0]), *output[1:])

    return {layer + leaf: hook}


def feed_forward_hooks(name, layer, change):
    leaf = {"qwen": ".img_mlp", "zimage": ".feed_forward"}.get(name, ".ff")
    if not joined(name, layer):
        return {layer + leaf: lambda module, args, kwargs, output: change(output)}
    leaf = ".attn.mlp_act_fn" if name == "flux2" else leaf
    return {layer + leaf: lambda module, args, kwargs, output: image_of(name, output, change)}


def block_hooks(name, layer, change):
    def hook(module, args, kwargs, output):
        image = args[0] if args else kwargs["hidden_states"]
        if joined(name, layer):
            return image + change(output - image)
        text = kwargs["encoder_hidden_states"]
        return text + change(output[0] - text), image + change(output[1] - image)

    return {layer: hook}


HOOKS = {"joint_attention": attention_hooks, "feed_forward": feed_forward_hooks, "block": block_hooks}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(("name", "layer"), NEW)
def test_zero_and_double_are_plain_hooks(name, layer, kind):
    denoiser, calls = build(name), inputs(name, 2)
    anatomy = examine(denoiser, kind=kind)
    assert [path for path in anatomy.paths if "refiner" not in path] == LAYERS[name]
    plain = hooked(denoiser, {}, calls)
    assert same(under(denoiser, anatomy, [None, None], calls), plain)
    ours = under(denoiser, anatomy, [lesion(layer, kind=kind)] * 2, calls)
    assert same(ours, hooked(denoiser, HOOKS[kind](name, layer, lambda values: values * 0), calls))
    assert apart(ours, plain) > 1e-3
    one = under(denoiser, anatomy, [None, lesion(layer, kind=kind)], calls)
    assert same([call[0] for call in one], [call[0] for call in plain])
    assert same([call[1] for call in one], [call[1] for call in ours])
    doubled = [lesion(layer, kind=kind, replacement="double")] * 2
    theirs = hooked(denoiser, HOOKS[kind](name, layer, lambda values: values * 2), calls)
    assert apart(under(denoiser, anatomy, doubled, calls, Double()), theirs) < 1e-5
    assert same(hooked(denoiser, {}, calls), plain)


@pytest.mark.parametrize(("name", "layer"), NEW)
def test_image_queries_cannot_see_text_keys(name, layer, monkeypatch):
    """The reference is a mask over the scores of the fused kernel, within the block."""
    denoiser, calls = build(name), inputs(name, 2)
    anatomy = examine(denoiser, kind="text_to_image")
    ours = under(denoiser, anatomy, [lesion(layer, kind="text_to_image")] * 2, calls)
    kernel = torch.nn.functional.scaled_dot_product_attention

    def deaf(query, key, value, attn_mask=None, **more):
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
        if name == "zimage":
            seen[:IMAGE, IMAGE:] = False
        else:
            seen[TEXT:, :TEXT] = False
        seen = seen if attn_mask is None else seen & attn_mask
        return kernel(query, key, value, attn_mask=seen, **more)

    def start(module, args):
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", deaf)

    handle = denoiser.get_submodule(layer).register_forward_pre_hook(start)
    theirs = hooked(denoiser, {layer: lambda *_: monkeypatch.undo()}, calls)
    handle.remove()
    assert apart(ours, theirs) < 1e-5
    assert apart(ours, hooked(denoiser, {}, calls)) > 1e-3


@pytest.mark.parametrize(("name", "layer"), ALL)
def test_the_text_that_a_block_reads(name, layer):
    """Zero, doubled and tripled as a plain hook in front of the block makes it (arXiv 2601.02211)."""
    denoiser, calls = build(name), inputs(name, 2)
    anatomy = examine(denoiser, kind="text_stream")
    assert list(anatomy.paths) == LAYERS[name]
    plain = hooked(denoiser, {}, calls)

    def reading(factor):
        def before(module, args, kwargs):
            args, kwargs = list(args), dict(kwargs)
            if joined(name, layer) and name in ("flux2", "zimage"):
                tokens = args[0] if args else kwargs["hidden_states"]
                text = tokens[:, IMAGE:] if name == "zimage" else tokens[:, :TEXT]
                image = tokens[:, :IMAGE] if name == "zimage" else tokens[:, TEXT:]
                both = [image, text * factor] if name == "zimage" else [text * factor, image]
                if args:
                    args[0] = torch.cat(both, dim=1)
                else:
                    kwargs["hidden_states"] = torch.cat(both, dim=1)
            else:
                kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"] * factor
            return tuple(args), kwargs

        handle = denoiser.get_submodule(layer).register_forward_pre_hook(before, with_kwargs=True)
        found = hooked(denoiser, {}, calls)
        handle.remove()
        return found

    zeroed = under(denoiser, anatomy, [lesion(layer, kind="text_stream")] * 2, calls)
    assert same(zeroed, reading(0)) and apart(zeroed, plain) > 1e-3
    for strength in (1.0, 2.0):
        one = lesion(layer, kind="text_stream", replacement="double", strength=strength)
        mine = under(denoiser, anatomy, [None, one], calls, Double())
        assert same([call[0] for call in mine], [call[0] for call in plain])
        theirs = reading(1 + strength)
        assert apart([call[1] for call in mine], [call[1] for call in theirs]) < 1e-5


@pytest.mark.parametrize("name", ["qwen", "flux2", "zimage"])
def test_all_heads_without_their_part_are_the_attention_without_any(name):
    denoiser, calls = build(name), inputs(name, 2)
    heads, whole = examine(denoiser, "head", "joint_attention"), examine(denoiser, kind="joint_attention")
    assert len(heads.paths) == 3 * len(whole.paths)
    for layer in whole.paths:
        mine = [path for path in heads.paths if path.startswith(layer)]
        ours = under(denoiser, heads, [lesion(*mine, kind="joint_attention")] * 2, calls)
        assert same(ours, under(denoiser, whole, [lesion(layer, kind="joint_attention")] * 2, calls)), layer
        one = under(denoiser, heads, [lesion(mine[0], kind="joint_attention")] * 2, calls)
        assert apart(one, hooked(denoiser, {}, calls)) > 1e-4 and apart(one, ours) > 1e-4


@pytest.mark.parametrize("name", ["unet", "pixart", "hunyuan", "sd3", "zimage"])
def test_identity_keeps_each_querys_own_value(name):
    """The reference puts values in the place of what the fused kernel finds, at every self-attention."""
    denoiser = build(name, dual_attention_layers=(0, 1)) if name == "sd3" else build(name)
    calls = inputs(name, 2)
    anatomy = examine(denoiser, kind="self_attention")
    (layer, *_), kernel = anatomy.paths, torch.nn.functional.scaled_dot_product_attention
    lesions = [lesion(layer, kind="self_attention", replacement="identity")] * 2
    ours = under(denoiser, anatomy, lesions, calls, Identity())
    handles = []
    for path in anatomy.sites[layer]:
        module = denoiser.get_submodule(path)

        def own(*_):
            torch.nn.functional.scaled_dot_product_attention = lambda query, key, value, *rest, **more: value

        def back(*_):
            torch.nn.functional.scaled_dot_product_attention = kernel

        handles += [module.register_forward_pre_hook(own), module.register_forward_hook(back)]
    theirs = hooked(denoiser, {}, calls)
    for handle in handles:
        handle.remove()
    assert apart(ours, theirs) < 1e-6
    assert apart(ours, hooked(denoiser, {}, calls)) > 1e-4
    half = [lesion(layer, kind="self_attention", replacement="identity", window=(0.0, 0.5)), None]
    some = under(denoiser, anatomy, half, calls, Identity())
    assert same([call[0] for call in some[:2]], [call[0] for call in ours[:2]])


@pytest.mark.parametrize(("name", "config"), [("qwen", {}), ("flux2", {}), ("zimage", {})])
def test_published_layers_ship(name, config):
    with torch.device("meta"):
        denoiser = type(build(name)).from_config(config)
    assert_shipped(denoiser, config)
    blocks = {"qwen": 60, "flux2": 8 + 48, "zimage": 30}[name]
    assert len(examine(denoiser, kind="text_to_image").paths) == blocks
    kinds = ("joint_attention", "text_to_image", "feed_forward", "block", "text_stream")
    assert set(kinds_of(denoiser)) == {*kinds, *(("self_attention",) if name == "zimage" else ())}
