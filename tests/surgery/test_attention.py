"""Attention maps against diffusers' own scores, and against the queries and keys that reach the fused kernel."""

from __future__ import annotations

import pytest
import torch
from diffusers import SanaTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from denoisers import TEXT, build, inputs, same
from lesion.surgery.attention import probabilities, text_attention, watched

SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,  # in UNets of diffusers this is the number of heads
}


def captured(denoiser, call, rows=slice(None)):
    """Our maps of one denoiser call by site path, and the call's output."""
    maps = {}
    sites = text_attention(denoiser).by_path.values()
    with torch.no_grad(), watched(denoiser, sites, lambda one: maps.update({one.site.path: one.probabilities(rows)})):
        output = denoiser(**call).sample
    return maps, output


def reference(denoiser, call, monkeypatch):
    """Softmax of the queries and keys that the model's own processors hand to the fused kernel, by site path."""
    kernel, current, maps = torch.nn.functional.scaled_dot_product_attention, [], {}

    def spy(query, key, value, attn_mask=None, *rest, **more):
        if current:
            scores = query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5
            maps[current[-1]] = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
        return kernel(query, key, value, attn_mask, *rest, **more)

    handles = []
    for path in text_attention(denoiser).by_path:
        module = denoiser.get_submodule(path)
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: current.append(path)))
        handles.append(module.register_forward_hook(lambda *_: current.clear()))
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        denoiser(**call)
    for handle in handles:
        handle.remove()
    return maps


def family(name):
    """A tiny denoiser with its norms of queries and keys, and a call with masks where it takes some."""
    call = inputs(name, 2)[0]
    if name == "sd3":
        return build("sd3", qk_norm="rms_norm"), call
    if name in ("unet", "pixart", "sana"):
        call["encoder_attention_mask"] = torch.ones(call["encoder_hidden_states"].shape[:2])
        call["encoder_attention_mask"][1, 3:] = 0
    if name == "sana":
        torch.manual_seed(0)
        return SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2,
            num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=12,
            sample_size=8, qk_norm="rms_norm_across_heads",
        ).eval(), call  # fmt: skip
    if name == "pixart":
        denoiser = build(name)
        denoiser.set_attn_processor(AttnProcessor2_0())
        return denoiser, call
    return build(name), call


@pytest.mark.parametrize("name", ["unet", "pixart", "sana", "hunyuan", "sd3", "flux"])
def test_maps_are_the_softmax_of_the_models_own_queries_and_keys(name, monkeypatch):
    denoiser, call = family(name)
    with torch.no_grad():
        plain = denoiser(**call).sample
    ours, output = captured(denoiser, call)
    assert torch.equal(output, plain)
    theirs = reference(denoiser, call, monkeypatch)
    assert ours.keys() == theirs.keys() == text_attention(denoiser).by_path.keys()
    for path, found in ours.items():
        expected = theirs[path]
        image = expected.shape[-1] - TEXT
        if name == "sd3":  # image first
            expected = expected[:, :, :image, image:]
        elif name == "flux":  # text first
            expected = expected[:, :, TEXT:, :TEXT]
        assert found.dtype == torch.float32
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) < 1e-6
        sums = found.sum(-1)
        if name in ("sd3", "flux"):
            assert bool((sums < 0.99).all())  # the rest is on the image
        else:
            assert torch.allclose(sums, torch.ones_like(sums), atol=1e-6)
        if "encoder_attention_mask" in call:
            assert float(found[1, :, :, 3:].max()) < 1e-6 < float(found[0, :, :, 3:].max())


@pytest.mark.parametrize("upcast", [False, True])
def test_maps_equal_get_attention_scores(upcast):
    """The plain processor computes them with diffusers' own method; also for half of the rows only."""
    denoiser, call = build("unet"), inputs("unet", 2)[0]
    denoiser.set_attn_processor(AttnProcessor())
    scores = {}
    for path in text_attention(denoiser).by_path:
        module = denoiser.get_submodule(path)
        module.upcast_attention = upcast

        def noting(*args, path=path, own=module.get_attention_scores, **kwargs):
            scores[path] = own(*args, **kwargs)
            return scores[path]

        module.get_attention_scores = noting
    ours, _ = captured(denoiser, call)
    half, _ = captured(denoiser, call, slice(1, 2))
    assert len(scores) == 7
    for path, theirs in scores.items():
        theirs = theirs.unflatten(0, (2, -1))
        assert float((ours[path] - theirs).abs().max()) < 1e-6
        assert float((half[path] - theirs[1:]).abs().max()) < 1e-6


def test_a_long_joint_softmax_in_parts_is_the_same(monkeypatch):
    denoiser, call = build("flux"), inputs("flux", 2)[0]
    whole, _ = captured(denoiser, call)
    monkeypatch.setattr("lesion.surgery.attention.SCORES_AT_ONCE", 1)
    assert all(torch.allclose(one, whole[path], atol=1e-6) for path, one in captured(denoiser, call)[0].items())


def test_gradients_are_those_of_finite_differences():
    denoiser = build("unet").double()
    module = denoiser.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    torch.manual_seed(3)
    hidden = torch.randn(1, 4, module.query_dim, dtype=torch.double, requires_grad=True)
    text = torch.randn(1, 3, 16, dtype=torch.double)

    def loss(hidden):
        return (probabilities(module, (hidden, text), {})[..., 1] ** 2).sum()

    assert torch.autograd.gradcheck(loss, hidden)


def test_shapes_of_an_sd15_unet():
    """The table of one forward pass at 512 x 512: 16 maps of (2, 8, pixels, 77)."""
    with torch.device("meta"):
        denoiser = UNet2DConditionModel(**SD15)
        call = {
            "sample": torch.empty(2, 4, 64, 64),
            "timestep": torch.empty(2),
            "encoder_hidden_states": torch.empty(2, 77, 768),
        }
    maps, _ = captured(denoiser, call)
    order = text_attention(denoiser).by_path
    pixels = [4096, 4096, 1024, 1024, 256, 256, 64, 256, 256, 256, 1024, 1024, 1024, 4096, 4096, 4096]
    assert [tuple(maps[path].shape) for path in order] == [(2, 8, side, 77) for side in pixels]


def test_what_has_no_softmax_over_text_is_refused_and_nothing_stays_behind():
    denoiser, calls = build("sana"), inputs("sana", 2)
    linear = denoiser.transformer_blocks[0].attn1
    with pytest.raises(RuntimeError, match="no softmax"):
        probabilities(linear, (torch.randn(1, 4, 8), torch.randn(1, 3, 8)), {})
    with pytest.raises(RuntimeError, match="without a text"):
        probabilities(denoiser.transformer_blocks[0].attn2, (torch.randn(1, 4, 8),), {})
    captured(denoiser, calls[0])
    assert not any(module._forward_pre_hooks for module in denoiser.modules())
    assert same([captured(denoiser, calls[0])[1]], [denoiser(**calls[0]).sample])
