"""Gradients against finite lesions, planted truths, and the ways in which models are built."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from conftest import settings, tiny_spec
from denoisers import TEXT, apart, build, hooked, inputs, under
from denoisers import lesion as lesion_of
from lesion import models, replacements
from lesion.attribution import views
from lesion.attribution.estimate import estimate
from lesion.attribution.strengths import Strengths
from lesion.denoising.run import COND, Denoising
from lesion.generation.generate import generate
from lesion.models import loading
from lesion.replacements.mean import Mean
from lesion.replacements.zero import Zero
from lesion.run.job import examined
from lesion.scoring import Shot, metric_class
from lesion.scoring._clip import _embedder
from lesion.scoring._clip_weights import resolve
from lesion.study.grid import Cell
from lesion.study.inits import with_inits
from lesion.study.layers import Layers
from lesion.study.lesions import Lesion, Replacement
from lesion.study.prompts import Prompt
from lesion.study.tokens import expanded
from lesion.surgery.anatomy import Anatomy, Layer, Site, examine
from lesion.surgery.hook_points import HookPoint
from lesion.surgery.operation import replacement_key
from lesion.surgery.tokens import Places, with_tokens
from test_components import CALIBRATION

ZERO = Replacement("zero")


def lesions_of(model, kind="cross_attention", by="attention", **more):
    return [
        Lesion("leave_one_out", path, (path,), **{"replacement": ZERO, **more}, kind=kind)
        for path in model.anatomy.paths
    ]


def precise(model, by="attention", kind=None):
    """In float64, where differences of strength 0.01 are exact to seven digits. No other test gets it."""
    loading.forget()
    model.pipe.to(torch.float64)
    kind = kind or model.anatomy.kind
    return replace(model, anatomy=examine(model.denoiser, by, kind), identity=replace(model.identity, dtype="float64"))


def cells_of(model, lesion=None, init=None, **changes):
    asked = settings(**{"steps": 2, **changes})
    prompts = [Prompt(text) for text in ("a cat", "two dogs")]
    prompts = with_inits(prompts, init, "generation.init") if init else prompts
    return [Cell(model.identity, prompt, 7, asked, lesion) for prompt in prompts]


def view(images, latents):
    """Four numbers of an image, so that four directions are exact."""
    drawn = torch.randn(images[0].numel(), 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return images.double().flatten(1) @ drawn


def seen(model, lesion, interventions, **changes):
    images = generate(model, cells_of(model, lesion, **changes), interventions)
    return view(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), None).numpy()


def by_differences(model, lesions, interventions, **changes):
    """1/2 |J|^2 from the study's own lesions at strengths 0.01 and 0.02, to second order."""
    base = seen(model, None, {}, **changes)
    found = []
    for lesion in lesions:
        one, two = (seen(model, replace(lesion, strength=h), interventions, **changes) for h in (0.01, 0.02))
        found.append(0.5 * (((-3 * base + 4 * one - two) / 0.02) ** 2).sum(axis=1))
    return np.array(found)


@pytest.fixture
def wide_open(monkeypatch):
    """Images that are not clipped to [0, 1]: random weights leave that range, where nothing changes any more."""
    from diffusers.image_processor import VaeImageProcessor

    monkeypatch.setattr(VaeImageProcessor, "denormalize", staticmethod(lambda images: images * 0.5 + 0.5))


def test_effects_are_those_of_small_lesions_and_nothing_changes_at_strength_0(tiny_model, wide_open):
    model = precise(tiny_model)
    window = [(lesion, half) for lesion in lesions_of(model)[::3] for half in ((0.0, 0.5), (0.5, 1.0))]
    lesions = [replace(lesion, window=half) for lesion, half in window]
    lesions += [replace(lesions_of(model)[2], branch="cond"), replace(lesions_of(model)[2], branch="uncond")]
    interventions = {replacement_key(lesions[0]): Zero()}
    cells = cells_of(model)
    found = estimate(model, lesions, cells, interventions, view, probes=4)
    expected = by_differences(model, lesions, interventions)
    assert expected.max() > 1e-4
    np.testing.assert_allclose(found.effects, expected, rtol=0.02, atol=1e-4 * expected.max())
    plain = generate(model, cells, {})
    assert np.array_equal(found.images.permute(0, 2, 3, 1).float().numpy(), plain)
    again = estimate(model, lesions, cells, interventions, view, probes=2, seed=5)
    kept = estimate(model, lesions, cells, interventions, view, probes=2, seed=5, checkpointing=True)
    assert np.array_equal(estimate(model, lesions, cells, interventions, view, probes=2, seed=5).effects, again.effects)
    np.testing.assert_allclose(kept.effects, again.effects, rtol=1e-9)
    assert not np.allclose(again.effects, estimate(model, lesions, cells, interventions, view, 2, 6).effects)


def test_of_several_points_the_derivatives_are_averaged_before_they_are_squared(tiny_model, wide_open):
    model = precise(tiny_model)
    lesion = replace(lesions_of(model)[2], window=(0.0, 0.5))
    interventions = {replacement_key(lesion): Zero()}

    def slope(point):
        above, below = (seen(model, replace(lesion, strength=point + h), interventions) for h in (0.01, -0.01))
        return (above - below) / 0.02

    points = (0.2, 0.8)
    expected = 0.5 * (np.mean([slope(point) for point in points], axis=0) ** 2).sum(axis=1)
    squared_first = 0.5 * np.mean([(slope(point) ** 2).sum(axis=1) for point in points], axis=0)
    assert (expected < 0.95 * squared_first).all()
    found = estimate(model, [lesion], cells_of(model), interventions, view, probes=4, points=points)
    np.testing.assert_allclose(found.effects[0], expected, rtol=0.01)


def test_a_site_that_puts_out_nothing_has_exactly_no_effect(tiny_model):
    lesions = lesions_of(tiny_model)
    dead = tiny_model.denoiser.get_submodule(f"{lesions[3].layer}.transformer_blocks.0.attn2.to_out.0")
    for weight in dead.parameters():
        weight.data.zero_()
    found = estimate(tiny_model, lesions, cells_of(tiny_model), {replacement_key(lesions[0]): Zero()}, view, 4)
    assert (found.effects[3] == 0).all() and (np.delete(found.effects, 3, axis=0) > 0).any(axis=1).all()


def test_heads_of_a_unet_and_the_direction_of_the_mean(tiny_model, wide_open):
    model = precise(tiny_model, by="head")
    one = Replacement("mean", {"calibration": "planted"})
    lesions = lesions_of(model, replacement=one)[:4]
    drawn = torch.Generator().manual_seed(1)
    means = {
        path: torch.randn(2, 2, site.channels + 1, generator=drawn, dtype=torch.float64)
        for path, site in model.anatomy.by_path.items()
    }
    interventions = {replacement_key(lesions[0]): Mean(means)}
    found = estimate(model, lesions, cells_of(model), interventions, view, 4)
    np.testing.assert_allclose(found.effects, by_differences(model, lesions, interventions), rtol=0.02)


def test_img2img(tiny_model, wide_open, tmp_path):
    """From an init image, in the steps that are made of it."""
    init = tmp_path / "init.png"
    drawn = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(drawn).save(init)
    model = precise(tiny_model)
    lesions = [replace(lesions_of(model)[2], window=half) for half in ((0.0, 0.5), (0.5, 1.0))]
    interventions = {replacement_key(lesions[0]): Zero()}
    asked = {"task": "img2img", "steps": 3, "noising": 0.7, "init": str(init)}  # 2 of 3 steps
    found = estimate(model, lesions, cells_of(model, **asked), interventions, view, 4)
    expected = by_differences(model, lesions, interventions, **asked)
    np.testing.assert_allclose(found.effects, expected, rtol=0.02, atol=1e-4 * expected.max())
    assert (expected > 1e-9).all()
    plain = generate(model, cells_of(model, **asked), {})
    assert np.array_equal(found.images.permute(0, 2, 3, 1).float().numpy(), plain)


@pytest.mark.parametrize(
    ("name", "kind", "replacement"),
    [
        ("sd3", "text_to_image", "zero"),
        ("sd3", "block", "zero"),
        ("sd3", "text_stream", "zero"),
        ("sd3", "joint_attention", "mean"),
        ("sd3", "block", "mean"),
        ("flux", "text_to_image", "zero"),
        ("flux", "block", "mean"),
    ],
)
def test_joint_transformers(name, kind, replacement, folder_of, wide_open, tmp_path):
    loading.forget()
    model = precise(models.load(models.resolve(tiny_spec(folder_of(name))), "cpu"), kind=kind)
    asked = {"scheduler": "FlowMatchEulerDiscreteScheduler", "embedded_guidance": True if name == "flux" else None}
    cells = cells_of(model, **asked)
    options = CALIBRATION if replacement == "mean" else {}
    lesions = lesions_of(model, kind, replacement=replacements.describe(replacement, options))[:2]
    bench = replacements.Bench(model, cells[0].settings, tmp_path, 2)
    interventions = {replacement_key(lesions[0]): replacements.build(replacement, options, bench)}
    found = estimate(model, lesions, cells, interventions, view, 4)
    expected = by_differences(model, lesions, interventions, **asked)
    rtol = 0.05 if kind == "text_stream" else 0.03  # the smallest of its effects is near what float32 rounds
    np.testing.assert_allclose(found.effects, expected, rtol=rtol, atol=1e-4 * expected.max())
    assert (expected.max(axis=1) > 1e-9).all()
    plain = generate(model, cells, {})
    assert np.array_equal(found.images.permute(0, 2, 3, 1).float().numpy(), plain)


def by_token(folder, kind, by, names):
    """In float64, with sets of tokens as layers."""
    loading.forget()
    source = models.resolve(tiny_spec(folder))
    layers = Layers.of({"by": by, "tokens": names, "kind": kind, "include": None, "exclude": None,
                        "component": "denoiser"})  # fmt: skip
    model = examined(models.load(source, "cpu"), source, layers)
    loading.forget()
    model.pipe.to(torch.float64)
    return replace(model, identity=replace(model.identity, dtype="float64"))


@pytest.mark.parametrize("by", ["token", "attention_token"])
@pytest.mark.parametrize("replacement", ["zero", "double"])
def test_values_of_text_tokens(by, replacement, tiny_folder, wide_open):
    model = by_token(tiny_folder, "cross_attention", by, ["re:^(cat|dogs)$", "padding"])
    one = replacements.describe(replacement, {})
    lesions = lesions_of(model, replacement=one)[:4]
    lesions += [replace(lesions[0], window=(0.5, 1.0)), replace(lesions[1], branch="uncond")]
    interventions = {replacement_key(lesions[0]): replacements.find(replacement)()}
    cells = cells_of(model)
    found = estimate(model, lesions, cells, interventions, view, 4)
    expected = by_differences(model, lesions, interventions)
    assert (expected[:4] > 1e-9).all()
    np.testing.assert_allclose(found.effects, expected, rtol=0.02, atol=1e-4 * expected.max())
    kept = estimate(model, lesions, cells, interventions, view, 4, checkpointing=True)
    np.testing.assert_allclose(kept.effects, found.effects, rtol=1e-9)
    assert np.array_equal(found.images.permute(0, 2, 3, 1).float().numpy(), generate(model, cells, {}))


def test_values_of_text_tokens_at_strengths_beyond_0(tiny_folder, wide_open):
    """Two sets at one site and strength are what both do together; the slope there is that of a study's lesions."""
    model = by_token(tiny_folder, "cross_attention", "token", ["words", "padding"])
    lesions = lesions_of(model)
    interventions = {replacement_key(lesions[0]): Zero()}
    both = Lesion("custom", "", model.anatomy.paths, ZERO, kind=model.anatomy.kind)
    above, below = (seen(model, replace(both, strength=0.5 + h), interventions) for h in (0.01, -0.01))
    found = estimate(model, [both], cells_of(model), interventions, view, 4, points=(0.5,))
    np.testing.assert_allclose(found.effects[0], 0.5 * (((above - below) / 0.02) ** 2).sum(axis=1), rtol=0.01)
    made = generate(model, cells_of(model, replace(both, strength=0.5)), interventions)
    np.testing.assert_allclose(found.images.permute(0, 2, 3, 1).float().numpy(), made, atol=1e-5)


def test_values_of_text_tokens_for_the_image_of_a_joint_transformer(folder_of, wide_open):
    model = by_token(folder_of("sd3"), "text_to_image", "attention_token", ["words", "end"])
    for name, module in model.denoiser.named_modules():
        if name.endswith("add_v_proj"):  # text that says enough for differences of float32 images
            module.weight.data *= 30
    lesions = lesions_of(model)
    interventions = {replacement_key(lesions[0]): Zero()}
    asked = {"scheduler": "FlowMatchEulerDiscreteScheduler"}
    found = estimate(model, lesions, cells_of(model, **asked), interventions, view, 4)
    expected = by_differences(model, lesions, interventions, **asked)
    assert expected.max() > 1e-9
    np.testing.assert_allclose(found.effects, expected, rtol=0.03, atol=1e-3 * expected.max())
    plain = generate(model, cells_of(model, **asked), {})
    assert np.array_equal(found.images.permute(0, 2, 3, 1).float().numpy(), plain)


@pytest.mark.parametrize(("name", "layer"), [("sd3", "transformer_blocks.0"), ("flux", "transformer_blocks.0"),
                                             ("flux", "single_transformer_blocks.0")])  # fmt: skip
def test_strengths_of_text_tokens_are_those_of_lesions_in_every_joint_attention(name, layer):
    denoiser, calls = build(name), inputs(name, 3)
    anatomy = with_tokens(examine(denoiser, kind="text_to_image"), ["one", "two"])
    places = Places([{(COND, "one"): (0, 2), (COND, "two"): (1,)}] * 3, TEXT)
    lesions = [lesion_of(path, kind="text_to_image") for path in expanded([layer], ["one", "two"])]
    strengths = torch.zeros(2, 3)
    strengths[0, 0], strengths[1, 1] = 0.3, 1.0
    pipe = SimpleNamespace(_num_timesteps=len(calls), scheduler=SimpleNamespace(step=None))
    client = Strengths(anatomy, lesions, strengths, {replacement_key(lesions[0]): Zero()}, places=places)
    with torch.no_grad(), Denoising(pipe, denoiser, 3, [client]).running():
        ours = [denoiser(**call).sample for call in calls]
    real = [replace(lesions[0], strength=0.3), lesions[1], None]
    assert apart(ours, under(denoiser, anatomy, real, calls, Zero(), places)) < 1e-5
    plain = hooked(denoiser, {}, calls)
    assert apart([one[:1] for one in ours], [one[:1] for one in plain]) > 1e-4
    assert apart([one[1:2] for one in ours], [one[1:2] for one in plain]) > 1e-4


class Sum(nn.Module):
    """x + sum A_i x: linear in the strength of every site."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(3, 3, dtype=torch.float64) for _ in range(4)).requires_grad_(False)

    def forward(self, sample):
        return sample + sum(part(sample) for part in self.parts)


def test_on_a_linear_model_gradients_are_the_lesions_and_add_up():
    denoiser = Sum()
    paths = [f"parts.{number}" for number in range(4)]
    sites = [Site(path, 3, 0, 0, 0, HookPoint(path)) for path in paths]
    anatomy = Anatomy(tuple(Layer(site.path, n, "", 0, (site,)) for n, site in enumerate(sites)))
    lesions = [Lesion("custom", path, (path,), ZERO) for path in paths] + [Lesion("custom", "", tuple(paths[:2]), ZERO)]
    sample = torch.randn(2, 5, 3, dtype=torch.float64)

    def made(strengths):
        pipe = SimpleNamespace(_num_timesteps=1, scheduler=SimpleNamespace(step=None))
        client = Strengths(anatomy, lesions, strengths, {replacement_key(lesions[0]): Zero()})
        with Denoising(pipe, denoiser, 2, [client]).running():
            return denoiser(sample)

    base = made(torch.zeros(5, 2, dtype=torch.float64))
    real = [made(one[:, None].expand(5, 2)) - base for one in torch.eye(5, dtype=torch.float64)]
    jacobian = torch.autograd.functional.jacobian(made, torch.zeros(5, 2, dtype=torch.float64))
    slopes = [jacobian[..., number, :].diagonal(dim1=0, dim2=-1).permute(2, 0, 1) for number in range(5)]
    for slope, change in zip(slopes, real, strict=True):
        torch.testing.assert_close(slope, change)
    torch.testing.assert_close(real[4], real[0] + real[1])
    assert float(real[0].abs().max()) > 0.1


def test_the_view_is_the_scorers_embedding(tiny_clip):
    embedder = _embedder(*resolve(f"local-dir:{tiny_clip}", None), torch.device("cpu"))
    smooth = np.linspace(0, 255, 48 * 48 * 3).reshape(48, 48, 3)
    images = np.stack([smooth, smooth[::-1], smooth.transpose(1, 0, 2)]).astype(np.uint8)
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    found = views.embedded(embedder)(tensors, tensors).detach().numpy()
    assert np.linalg.norm(found - embedder.images(list(images), 3), axis=1).max() < 0.01
    assert Image.fromarray(images[0]).size == (48, 48)


SIGNED = {
    "clip_text": {},
    "clip_choice": {"choices": ["cat", "dogs", "star"]},
    "donor_distance": {"prompt": "a star"},
}


def smoothed(module):
    """Without kinks, over which no difference says what the slope is."""
    for name, child in module.named_children():
        setattr(module, name, nn.SiLU()) if isinstance(child, nn.ReLU) else smoothed(child)


@pytest.mark.parametrize("name", SIGNED)
def test_changes_of_signed_metrics_are_those_of_small_lesions(name, tiny_model, tiny_clip, wide_open):
    """The metric that scores images says the same of tensors, and its slope there is that of lesions."""
    _embedder.cache_clear()
    metric = metric_class(name).of({"model": f"local-dir:{tiny_clip}", **SIGNED[name]}, "x")
    metric.load("cpu", 8)
    _embedder.cache_clear()  # none but this test has it smooth and in float64, where small differences are exact
    smoothed(metric.embedder.model.double())
    model = precise(tiny_model)
    lesions = lesions_of(model)[:3]
    interventions = {replacement_key(lesions[0]): Zero()}
    cells = cells_of(model)
    texts = [cell.prompt.text for cell in cells]
    beside = list(generate(model, [replace(cell, prompt=Prompt("a star")) for cell in cells], {}, rounded=True))

    def measured(images):
        return metric.of_tensors(images, texts, beside)

    def real(lesion):
        images = generate(model, cells_of(model, lesion), interventions)
        with torch.no_grad():
            return measured(torch.from_numpy(images).permute(0, 3, 1, 2)).double().numpy()

    found = estimate(model, lesions, cells, interventions, view, 1, signed={name: measured})
    slopes = []
    for lesion in lesions:
        base, one, two = (real(replace(lesion, strength=h)) for h in (0.0, 0.01, 0.02))
        slopes.append((-3 * base + 4 * one - two) / 0.02)
    np.testing.assert_allclose(found.signed[name], slopes, rtol=0.02, atol=0.01 * np.abs(slopes).max())
    assert (np.array(slopes) < 0).any() and (np.array(slopes) > 0).any()
    images = (found.images.clamp(0, 1) * 255).round()
    pixels = images.to(torch.uint8).permute(0, 2, 3, 1).numpy()
    shots = [Shot(str(n), image, "b", other, text) for n, (image, other, text) in enumerate(
        zip(pixels, beside, texts, strict=True))]  # fmt: skip
    expected = metric(shots)
    with torch.no_grad():
        np.testing.assert_allclose(measured(images / 255), expected, atol=2e-2 * max(1, np.abs(expected).max()))


def test_a_pipeline_whose_call_cannot_be_had_is_refused():
    class Odd:
        def __call__(self):
            return None

    client = SimpleNamespace(throughout=True)
    with pytest.raises(RuntimeError, match="gradients cannot flow through Odd"):
        _ = Denoising(Odd(), nn.Identity(), 1, [client]).pipeline  # type: ignore[list-item]
