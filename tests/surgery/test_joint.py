"""Lesions of joint attention (SD3, FLUX) against plain hooks and attention written out by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch.utils.flop_counter import FlopCounterMode

from denoisers import TEXT, apart, build, hooked, inputs, lesion, same, under
from lesion.replacements.resample import Resample
from lesion.surgery.anatomy import AnatomyError, examine, kinds_of
from lesion.surgery.intervention import Intervention
from shipped import assert_shipped

LAYERS = {
    "sd3": ["transformer_blocks.0", "transformer_blocks.1"],
    "flux": ["transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"],
}
CASES = [(name, layer) for name, layers in LAYERS.items() for layer in layers]
KINDS = ("joint_attention", "text_to_image", "feed_forward", "block")
each_layer = pytest.mark.parametrize(("name", "layer"), CASES)


def image_only(change):
    """A hook that changes the image's part of a joint attention's, or a single block's concatenated, output."""

    def hook(module, args, kwargs, output):
        if isinstance(output, tuple):
            return change(output[0]), *output[1:]
        return torch.cat([output[:, :TEXT], change(output[:, TEXT:])], dim=1)

    return hook


def site_hooks(name, layer, kind, change):
    """Plain hooks in which `change` is applied to what a lesion of this kind replaces."""
    single = layer.startswith("single")
    if kind == "joint_attention":
        return {f"{layer}.attn": image_only(change)}
    if kind == "feed_forward" and single:
        return {f"{layer}.act_mlp": image_only(change)}
    if kind == "feed_forward":
        return {f"{layer}.ff": lambda module, args, kwargs, output: change(output)}

    def block(module, args, kwargs, output):
        text, image = kwargs["encoder_hidden_states"], kwargs["hidden_states"]
        new_text = None if output[0] is None else text + change(output[0] - text)
        return new_text, image + change(output[1] - image)

    return {layer: block}


@pytest.mark.parametrize("kind", ["joint_attention", "feed_forward", "block"])
@each_layer
def test_zero_is_a_plain_hook_to_the_bit(name, layer, kind):
    denoiser, calls = build(name), inputs(name, 2)
    anatomy = examine(denoiser, kind=kind)
    assert list(anatomy.paths) == LAYERS[name]
    plain = hooked(denoiser, {}, calls)
    assert same(under(denoiser, anatomy, [None, None], calls), plain)
    ours = under(denoiser, anatomy, [lesion(layer, kind=kind)] * 2, calls)
    assert same(ours, hooked(denoiser, site_hooks(name, layer, kind, lambda values: values * 0), calls))
    assert apart(ours, plain) > 1e-3
    assert same(hooked(denoiser, {}, calls), plain)


@each_layer
def test_a_bypassed_block_puts_out_its_input(name, layer):
    """Of both streams, in the order in which the block returns them: the block itself need not run."""
    denoiser, calls, seen = build(name), inputs(name, 2), []
    anatomy = examine(denoiser, kind="block")

    def note(module, args, kwargs, output):
        text, image = output
        seen.append(torch.equal(image, kwargs["hidden_states"]))
        seen.append(text is None or torch.equal(text, kwargs["encoder_hidden_states"]))

    handle = denoiser.get_submodule(layer).register_forward_hook(note, with_kwargs=True)
    under(denoiser, anatomy, [lesion(layer, kind="block")] * 2, calls)
    assert seen == [True] * 2 * len(calls)
    seen.clear()  # and where not every row is bypassed, those that are
    under(denoiser, anatomy, [lesion(layer, kind="block"), None], calls)
    handle.remove()
    assert not any(seen[::2])


def blind_attention(attn, hidden, text, rotary):
    """Attention by hand in which image queries have no text keys: outputs before projection, image and text.

    text: None where `hidden` has the text in front.
    """

    def heads(tensor, norm=None):
        tensor = tensor.unflatten(-1, (attn.heads, -1))  # (rows, tokens, heads, channels)
        return tensor if norm is None else norm(tensor)

    query, key, value = heads(attn.to_q(hidden), attn.norm_q), heads(attn.to_k(hidden), attn.norm_k), attn.to_v(hidden)
    value = heads(value)
    if text is not None:  # the order of tokens does not matter to a softmax: text first, as its rotary positions are
        query = torch.cat([heads(attn.add_q_proj(text), attn.norm_added_q), query], dim=1)
        key = torch.cat([heads(attn.add_k_proj(text), attn.norm_added_k), key], dim=1)
        value = torch.cat([heads(attn.add_v_proj(text)), value], dim=1)
    if rotary is not None:
        query, key = (apply_rotary_emb(part, rotary, sequence_dim=1) for part in (query, key))
    scores = torch.einsum("bqhc,bkhc->bhqk", query, key) / query.shape[-1] ** 0.5
    scores[:, :, TEXT:, :TEXT] = -torch.inf
    mixed = torch.einsum("bhqk,bkhc->bqhc", scores.softmax(dim=-1), value).flatten(2)
    return mixed[:, TEXT:], mixed[:, :TEXT]


@each_layer
def test_text_to_image_is_a_masked_softmax(name, layer):
    denoiser, calls = build(name), inputs(name, 2)
    anatomy = examine(denoiser, kind="text_to_image")

    def hook(module, args, kwargs, output):
        text = kwargs.get("encoder_hidden_states")
        image, words = blind_attention(module, kwargs["hidden_states"], text, kwargs.get("image_rotary_emb"))
        if layer.startswith("single"):
            assert torch.allclose(words, output[:, :TEXT], atol=1e-5)  # the text's half is as ever
            return torch.cat([words, image], dim=1)
        words = words if getattr(module, "context_pre_only", False) else module.to_add_out(words)
        assert torch.allclose(words, output[1], atol=1e-5)
        return module.to_out[0](image), words

    reference = hooked(denoiser, {f"{layer}.attn": hook}, calls)
    ours = under(denoiser, anatomy, [lesion(layer, kind="text_to_image")] * 2, calls)
    assert apart(ours, reference) < 1e-5
    assert apart(ours, hooked(denoiser, {}, calls)) > 1e-3


@each_layer
def test_the_second_pass_takes_projections_from_the_first_and_runs_on_lesioned_rows(name, layer):
    """Counted on a device that computes nothing: image to image attention and, behind it, the output projection."""
    with torch.device("meta"):
        denoiser = build(name)
    call = {key: value.to("meta") for key, value in inputs(name, 6)[0].items()}  # three images, both branches
    anatomy = examine(denoiser, kind="text_to_image")

    def operations(lesions):
        with FlopCounterMode(display=False) as counter:
            under(denoiser, anatomy, lesions, [call])
        return counter.get_total_flops()

    given, tokens = lesion(layer, kind="text_to_image"), 16 if name == "sd3" else 9
    a_row = 4 * tokens**2 * 24 + (0 if layer.startswith("single") else 2 * tokens * 24**2)
    bare = operations([None] * 3)
    for lesions, rows in {(given, None, None): 2, (None, given, given): 4, (given, given, given): 6}.items():
        assert operations(lesions) - bare == rows * a_row


def test_text_to_image_of_all_blocks_leaves_pooled_text_alone():
    """FLUX's image reads the text by attention in its blocks only: without, other words change nothing."""
    denoiser, calls = build("flux"), inputs("flux", 2)
    anatomy = examine(denoiser, kind="text_to_image")
    others = [{**call, "encoder_hidden_states": call["encoder_hidden_states"].flip(0, 1)} for call in calls]
    given = [lesion(*anatomy.paths, kind="text_to_image")] * 2
    assert apart(under(denoiser, anatomy, given, calls), under(denoiser, anatomy, given, others)) < 1e-6
    assert apart(hooked(denoiser, {}, calls), hooked(denoiser, {}, others)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@each_layer
def test_strength_windows_branches_and_batches(name, layer, kind):
    denoiser, calls = build(name), inputs(name, 4)  # two images, both branches
    anatomy = examine(denoiser, kind=kind)
    plain = hooked(denoiser, {}, calls)

    def rows(ours):
        """For each call and row, whether it is as un-lesioned, to the bit."""
        return [[torch.equal(one[row], other[row]) for row in range(4)] for one, other in zip(ours, plain)]

    def given(**changes):
        return lesion(layer, kind=kind, **changes)

    assert same(under(denoiser, anatomy, [given(strength=0.0)] * 2, calls), plain)
    whole = under(denoiser, anatomy, [given()] * 2, calls)
    assert rows(whole) == [[False] * 4] * 4
    assert rows(under(denoiser, anatomy, [None, given()], calls)) == [[True, False, True, False]] * 4
    assert rows(under(denoiser, anatomy, [given(branch="cond"), None], calls)) == [[True, True, False, True]] * 4
    late = under(denoiser, anatomy, [given(window=(0.5, 1.0))] * 2, calls)
    assert rows(late) == [[True] * 4] * 2 + [[False] * 4] * 2
    assert same(under(denoiser, anatomy, [given(window=(0.0, 1.0))] * 2, calls), whole)
    alone = under(denoiser, anatomy, [given()], [_rows(call, [1, 3]) for call in calls])
    assert apart([one[[1, 3]] for one in whole], alone) < 1e-5
    if kind != "text_to_image":
        half = under(denoiser, anatomy, [given(strength=0.25)] * 2, calls)
        assert apart(half, hooked(denoiser, site_hooks(name, layer, kind, lambda values: values * 0.75), calls)) < 1e-5
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in denoiser.modules())


def _rows(call, chosen):
    return {name: value if name.endswith("ids") else value[chosen] for name, value in call.items()}


class Ramp(Intervention):
    """Another value for each step, branch and channel, and for the text's half."""

    def fill(self, site, call, branches, output):
        channels = torch.arange(output.shape[-1]) / output.shape[-1]
        return (call + 1) * 0.1 + branches[:, None, None] * 0.3 + channels + (0.5 if site.endswith(":text") else 0)


@pytest.mark.parametrize("kind", ["joint_attention", "feed_forward", "block"])
@each_layer
def test_values_go_where_they_belong(name, layer, kind):
    denoiser, calls = build(name), inputs(name, 2)
    anatomy = examine(denoiser, kind=kind)
    ours = under(denoiser, anatomy, [lesion(layer, kind=kind)], calls, Ramp())
    step, branches = [0], torch.tensor([0, 1])

    def ramp(values, text=False):
        return Ramp().fill(":text" if text else "", step[0], branches, values).expand_as(values)

    hooks = site_hooks(name, layer, kind, ramp)
    if kind == "block":

        def block(module, args, kwargs, output):
            text, image = kwargs["encoder_hidden_states"], kwargs["hidden_states"]
            return None if output[0] is None else text + ramp(text, True), image + ramp(image)

        hooks = {layer: block}
    reference = []
    for step[0], call in enumerate(calls):
        reference += hooked(denoiser, hooks, [call])
    assert apart(ours, reference) < 1e-5


@pytest.mark.parametrize("kind", ["joint_attention", "feed_forward", "block"])
@each_layer
def test_resample_takes_the_companions_values(name, layer, kind):
    """One branch (FLUX's guidance is distilled): an image and its companion, whose values it gets."""
    denoiser, calls = build(name), inputs(name, 2)
    anatomy = examine(denoiser, kind=kind)
    ours = under(denoiser, anatomy, [lesion(layer, kind=kind), None], calls, Resample("a donor", guided=False))
    swap = site_hooks(name, layer, kind, lambda values: values[[1, 1]])
    assert apart(ours, hooked(denoiser, swap, calls)) < 1e-5
    assert apart(ours, hooked(denoiser, {}, calls)) > 1e-3


@each_layer
def test_blocks_run_again_under_another_condition(name, layer):
    """A toy rerunner on blocks that return tuples: in it, the block's first linear layer has no bias."""
    from contextlib import contextmanager

    denoiser, calls = build(name), inputs(name, 2)
    anatomy = examine(denoiser, kind="block")

    class Unbiased(Intervention):
        changes = "condition"

        @contextmanager
        def rerun(self, site, module):
            projection = module.attn.to_q
            bias, projection.bias = projection.bias, None
            try:
                yield
            finally:
                projection.bias = bias

    ours = under(denoiser, anatomy, [lesion(layer, kind="block"), None], calls, Unbiased())
    plain = hooked(denoiser, {}, calls)
    with Unbiased().rerun(layer, denoiser.get_submodule(layer)):
        reference = hooked(denoiser, {}, calls)
    assert apart([one[:1] for one in ours], [one[:1] for one in reference]) < 1e-6
    assert same([one[1:] for one in ours], [one[1:] for one in plain])
    assert apart(reference, plain) > 1e-4


@pytest.mark.parametrize("kind", ["joint_attention", "block"])
@each_layer
def test_only_the_lesioned_half_is_taken_from_a_rerun(name, layer, kind):
    from contextlib import contextmanager

    denoiser, calls, halves = build(name), inputs(name, 2), []
    path = f"{layer}.attn" if kind == "joint_attention" else layer

    class Scaled(Intervention):
        changes = "condition"

        @contextmanager
        def rerun(self, site, module):
            attention = denoiser.get_submodule(f"{layer}.attn")
            attention.to_v.weight.data.mul_(2)
            yield
            attention.to_v.weight.data.div_(2)

    def note(module, args, kwargs, output):
        if not isinstance(output, tuple):
            output = output[:, TEXT:], output[:, :TEXT]
        halves.append([half for half in output if half is not None])

    def first(calls, lesions):
        handle = denoiser.get_submodule(path).register_forward_hook(note, with_kwargs=True)
        halves.clear()
        under(denoiser, examine(denoiser, kind=kind), lesions, calls, Scaled())
        handle.remove()
        return halves[0]

    plain = first(calls, [None, None])
    changed = first(calls, [lesion(layer, kind=kind)] * 2)
    partly = first(calls, [lesion(layer, kind=kind, strength=0.5)] * 2)
    image_at = 0 if kind == "joint_attention" or len(plain) == 1 else 1
    for half, (was, now, some) in enumerate(zip(plain, changed, partly)):
        kept = kind == "joint_attention" and half != image_at
        assert torch.equal(was, now) == torch.equal(was, some) == kept, half
        assert torch.allclose(some, (was + now) / 2, atol=1e-5)


def test_a_guidance_in_calls_of_its_own_is_refused():
    """Two calls a step, as `true_cfg_scale` makes them, cannot be told apart."""
    from types import SimpleNamespace

    from lesion.denoising.run import Denoising
    from lesion.replacements.zero import Zero
    from lesion.surgery.operation import Lesions, replacement_key

    denoiser, calls = build("flux"), inputs("flux", 1)
    pipe = SimpleNamespace(_num_timesteps=2, scheduler=SimpleNamespace(timesteps=range(2)))
    anatomy, one = examine(denoiser, kind="block"), lesion("transformer_blocks.0", kind="block")
    with (
        pytest.raises(RuntimeError, match="called more often than the 2 timesteps"),
        Denoising(pipe, denoiser, 1, [Lesions(anatomy, [one], {replacement_key(one): Zero()})]).running(),
    ):
        for call in calls:
            denoiser(**call)


@each_layer
def test_hooks_come_off_after_an_error(name, layer):
    denoiser, calls = build(name), inputs(name, 2)
    plain = hooked(denoiser, {}, calls)
    for kind in KINDS:

        def fail(module, args, kwargs, output):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            handle = denoiser.get_submodule(layer).register_forward_hook(fail, with_kwargs=True)
            under(denoiser, examine(denoiser, kind=kind), [lesion(layer, kind=kind)] * 2, calls)
        handle.remove()
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in denoiser.modules())
    assert same(hooked(denoiser, {}, calls), plain)


FLUX = {"guidance_embeds": True}  # the rest of black-forest-labs/FLUX.1-dev's config are the class's defaults
SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
SD35 = {**SD3, "qk_norm": "rms_norm", "pos_embed_max_size": 384, "dual_attention_layers": list(range(13))}


def on_meta(name, config):
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, name).from_config(config)


@pytest.mark.parametrize(
    ("name", "config", "paths", "heads", "channels"),
    [
        ("SD3Transformer2DModel", SD3, [f"transformer_blocks.{i}" for i in range(24)], 24, 1536),
        (
            "FluxTransformer2DModel",
            FLUX,
            [f"transformer_blocks.{i}" for i in range(19)] + [f"single_transformer_blocks.{i}" for i in range(38)],
            24,
            3072,
        ),
    ],
)
def test_published_architectures(name, config, paths, heads, channels):
    denoiser = on_meta(name, config)
    assert kinds_of(denoiser) == (*KINDS, "text_stream")
    for kind in kinds_of(denoiser):
        for by in ("attention", "transformer_block"):
            anatomy = examine(denoiser, by, kind)
            assert list(anatomy.paths) == paths
            assert [len(layer.sites) for layer in anatomy.layers] == [1] * len(paths)
    site = examine(denoiser, kind="joint_attention").layers[0].sites[0]
    assert (site.path, site.channels, site.heads) == ("transformer_blocks.0.attn", channels, heads)
    assert {site.channels for site in examine(denoiser, kind="block").by_path.values()} == {channels}
    anatomy = examine(denoiser, "head", "joint_attention")
    assert len(set(anatomy.paths)) == len(paths) * heads
    assert anatomy.paths[heads] == f"{paths[1]}.attn.heads.0"
    if name.startswith("Flux"):
        assert examine(denoiser, kind="feed_forward").layers[-1].sites[0].channels == 4 * channels
    with pytest.raises(AnatomyError, match=f"{name} has no cross-attention module; allowed: joint_attention, ") as end:
        examine(denoiser)
    assert end.value.key == "layers.kind"
    assert_shipped(denoiser, config)


def test_the_second_attention_of_sd35_is_self_attention():
    denoiser = on_meta("SD3Transformer2DModel", SD35)
    assert kinds_of(denoiser) == ("self_attention", *KINDS, "text_stream")
    assert list(examine(denoiser, kind="self_attention").by_path) == [
        f"transformer_blocks.{i}.attn2" for i in range(13)
    ]
    assert_shipped(denoiser, SD35)
    assert len(examine(denoiser, kind="joint_attention").layers) == 24
    tiny, calls = build("sd3", dual_attention_layers=(0,), qk_norm="rms_norm"), inputs("sd3", 2)
    for kind, hook in {
        "self_attention": {"transformer_blocks.0.attn2": lambda module, args, kwargs, output: output * 0},
        "joint_attention": {"transformer_blocks.0.attn": image_only(lambda values: values * 0)},
    }.items():
        ours = under(tiny, examine(tiny, kind=kind), [lesion("transformer_blocks.0", kind=kind)] * 2, calls)
        assert same(ours, hooked(tiny, hook, calls))
