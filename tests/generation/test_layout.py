"""Layout guidance: its loss by hand, its gradient by differences, its steps, and what must stay as it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, PNDMScheduler
from PIL import Image

from conftest import settings, tiny_spec
from lesion import models
from lesion.denoising.run import Client, DenoiserCall, Denoising
from lesion.generation.capture import Capturing
from lesion.generation.generate import call, generate, generators, steering, under_lesions
from lesion.generation.layout import Steering, Target, box_mask, grid, layout_losses, sigma_squared
from lesion.models.words import words_of
from lesion.replacements.mean import Mean
from lesion.replacements.resample import Resample
from lesion.replacements.steering_off import SteeringOff
from lesion.replacements.zero import Zero
from lesion.study.boxes import Box
from lesion.study.capture import Capture
from lesion.study.grid import Cell
from lesion.study.inits import with_inits
from lesion.study.lesions import Lesion, Replacement
from lesion.study.prompts import Prompt
from lesion.study.steering import Layout
from lesion.surgery.attention import text_attention
from lesion.surgery.operation import replacement_key

PROMPTS = [
    Prompt("a red circle", boxes=(Box("circle", (0.0, 0.0, 0.5, 0.5)),)),
    Prompt("two stars", boxes=(Box("two", (0.0, 0.0, 1.0, 0.5)), Box("stars", (0.5, 0.25, 1.0, 1.0)))),
]
OFF = {"steering_off:[]": SteeringOff()}
LAYOUT = Layout(("mid_block.attentions.0", "up_blocks.0.attentions.1"), 1e3, 0.0, 2, 3, "noise_share", "covered")


def cells(model, layout=LAYOUT, lesion=None, prompts=PROMPTS):
    return [Cell(model.identity, prompt, 0, settings(steering=layout), lesion) for prompt in prompts]


def client(model, layout=LAYOUT, prompts=PROMPTS):
    targets = [
        [Target(words_of(model.pipe, prompt.text).find(box.words), box.box) for box in prompt.boxes]
        for prompt in prompts
    ]
    return Steering(layout, text_attention(model.denoiser), targets)


def test_the_loss_is_that_of_the_publication_by_hand():
    torch.manual_seed(0)
    maps = [torch.rand(2, 3, 16, 5).softmax(-1), torch.rand(2, 3, 4, 5).softmax(-1)]
    boxes = [[((1, 2), (0.0, 0.0, 0.5, 0.5))], [((3,), (0.5, 0.0, 1.0, 1.0)), ((0, 4), (0.0, 0.5, 1.0, 1.0))]]
    expected = []
    for row, own in enumerate(boxes):
        loss = 0.0
        for one in maps:
            side = int(one.shape[2] ** 0.5)
            for columns, (x_min, y_min, x_max, y_max) in own:
                for column in columns:
                    for head in one[row, :, :, column].reshape(3, side, side):
                        inside = head[int(y_min * side) : int(y_max * side), int(x_min * side) : int(x_max * side)]
                        loss += float((1 - inside.sum() / head.sum()) ** 2) / 3 / len(columns) / len(own) / len(maps)
        expected.append(loss)
    masks, tokens = [torch.zeros(2, 2, 16), torch.zeros(2, 2, 4)], torch.zeros(2, 2, 5)
    for row, own in enumerate(boxes):
        for number, (columns, box) in enumerate(own):
            tokens[row, number, list(columns)] = 1
            for mask, side in zip(masks, (4, 2), strict=True):
                mask[row, number] = box_mask(box, side, side, "whole").flatten()
    assert torch.allclose(layout_losses(maps, masks, tokens, torch.ones(2, 2)), torch.tensor(expected), atol=1e-6)
    alone = layout_losses(maps[:1], masks[:1], tokens, torch.ones(1, 2))
    weights = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert torch.allclose(layout_losses(maps, masks, tokens, weights), alone, atol=1e-6)


def test_masks_and_grids():
    assert box_mask((0.3, 0.0, 0.8, 0.5), 2, 4, "whole").tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
    covered = box_mask((0.125, 0.0, 0.5, 0.75), 2, 4, "covered")
    assert torch.allclose(covered, torch.tensor([[0.5, 1, 0, 0], [0.25, 0.5, 0, 0]]))
    assert (grid(64, 1.0), grid(96, 1.5), grid(24, 2 / 3)) == ((8, 8), (12, 8), (4, 6))
    with pytest.raises(RuntimeError, match="no grid"):
        grid(7, 1.0)


def test_the_gradient_is_that_of_finite_differences(tiny_model):
    denoiser, steering = tiny_model.denoiser.double(), client(tiny_model)
    torch.manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 77, 16).double()
    run, weights = Denoising(tiny_model.pipe, denoiser, 2, [steering]), torch.ones(2, 2)
    asked = DenoiserCall([latents, torch.tensor(500)], {"encoder_hidden_states": text})
    with torch.no_grad(), steering.attached(run):
        _, gradient = steering._gradient(run, asked, latents[:0], latents, weights)
        for _ in range(3):
            along = torch.randn_like(latents)
            above, below = (
                steering._gradient(run, asked, latents[:0], latents + sign * 1e-4 * along, weights)[0]
                for sign in (1, -1)
            )
            slope = (above - below).sum() / 2e-4
            assert float(slope) == pytest.approx(float((gradient * along).sum()), rel=1e-4)
    denoiser.float()


def unsteered(model):
    """The images of the prompts that the pipeline makes alone, (n, height, width, 3)."""
    return call(model, PROMPTS, generators([0, 0]), settings()).permute(0, 2, 3, 1).numpy()


class Seen(Client):
    """The input of each denoiser call and the sample of each step, as they arrive."""

    def __init__(self):
        self.inputs, self.samples, self.kwargs = [], [], []

    def before_call(self, run, call):
        self.inputs.append(call.sample.clone())
        self.kwargs.append(dict(call.kwargs))

    def before_step(self, run, step):
        self.samples.append(step.sample.clone())


def kept_maps(unet, site, kept):
    """Keep the attention scores of a cross-attention, as diffusers' own method computes them."""

    def look(module, args, kwargs):
        query, key = module.to_q(args[0]), module.to_k(kwargs["encoder_hidden_states"])
        scores = module.get_attention_scores(*map(module.head_to_batch_dim, (query, key)))
        kept.append(scores.unflatten(0, (len(query), -1)))

    return unet.get_submodule(site).register_forward_pre_hook(look, with_kwargs=True)


DEAD = "down_blocks.0.attentions.0"
MEANS = torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(0))
LESIONED = {"mean": lambda sites: Mean(dict.fromkeys(sites, MEANS)), "resample": lambda sites: Resample("a cat", True)}
HOOKS = {
    "mean": lambda module, args, output: MEANS[0, 1].expand_as(output),
    "resample": lambda module, args, output: output[2:].repeat(2, 1, 1),
}


@pytest.fixture
def of_form(tiny_model, tiny_sdxl_folder, tmp_path):
    """Return by name a model, settings and prompts with boxes; of img2img with init images."""

    def made(form):
        model, asked, prompts = tiny_model, settings(), PROMPTS
        if form == "sdxl":
            model, asked = (
                models.load(models.resolve(tiny_spec(tiny_sdxl_folder)), "cpu"),
                settings(height=32, width=32),
            )
        if form == "img2img":
            Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                tmp_path / "init.png"
            )
            asked = settings(task="img2img", steps=6, noising=0.7)  # 4 of 6 steps
            prompts = with_inits(tuple(PROMPTS), str(tmp_path / "init.png"), "key")
        if form in ("euler", "pndm"):
            kind = {"euler": EulerDiscreteScheduler, "pndm": PNDMScheduler}[form]
            model.pipe.scheduler = kind.from_config(model.pipe.scheduler.config)
        return model, asked, prompts

    return made


@pytest.mark.parametrize("form", ["euler", "ddim", "sdxl", "img2img", "mean", "resample"])
def test_a_step_is_sigma_squared_times_the_gradient_with_respect_to_the_latents(of_form, form):
    """Of the first step, against a plain forward pass; also where a lesion changes what comes before the maps."""
    model, asked, prompts = of_form(form)
    unet, anatomy = model.denoiser, text_attention(model.denoiser)
    layout = replace(LAYOUT, iterations=1, steps=1, step_size="sigma_squared", layers=anatomy.paths[-1:], scale=10.0)
    lesion = Lesion("leave_one_out", DEAD, (DEAD,), Replacement(form)) if form in LESIONED else None
    made = [Cell(model.identity, prompt, 0, replace(asked, steering=layout), lesion) for prompt in prompts]
    lesions, everyone, work = [lesion] * 2, list(prompts), {}
    if lesion:
        work = {replacement_key(lesion): LESIONED[form](anatomy.sites[DEAD])}
    if form == "resample":
        lesions, everyone = [*lesions, None, None], [*prompts, Prompt("a cat"), Prompt("a cat")]
    steers, before, after = steering(model, made, lesions), Seen(), Seen()
    clients = [*under_lesions(model, lesions, work), before, steers, after]
    call(model, everyone, generators([0] * len(everyone)), made[0].settings, clients)

    scheduler, latents = model.pipeline(asked.task).scheduler, before.samples[0].detach().clone().requires_grad_()
    scheduler.set_timesteps(asked.steps)
    index = len(scheduler.timesteps) - 4
    time, kept = scheduler.timesteps[index], []
    handles = [kept_maps(unet, site, kept) for site in anatomy.sites[layout.layers[0]]]
    if lesion:
        handles += [unet.get_submodule(site).register_forward_hook(HOOKS[form]) for site in anatomy.sites[DEAD]]
    given = before.kwargs[0]
    text = {"encoder_hidden_states": given["encoder_hidden_states"][len(everyone) :]}  # the conditional half
    if added := given.get("added_cond_kwargs"):
        text["added_cond_kwargs"] = {name: value[len(everyone) :] for name, value in added.items()}
    unet(scheduler.scale_model_input(latents, time), time, **text)
    for handle in handles:
        handle.remove()
    masks, tokens = torch.zeros(2, 2, kept[0].shape[2]), torch.zeros(2, 2, kept[0].shape[3])
    for row, boxes in enumerate(steers.targets[:2]):
        for number, target in enumerate(boxes):
            masks[row, number] = box_mask(target.box, *grid(kept[0].shape[2], 1.0), "covered").flatten()
            tokens[row, number, list(target.columns)] = 1
    maps = [one[:2] for one in kept]
    loss = layout_losses(maps, [masks] * len(maps), tokens, torch.ones(len(maps), 2)).sum()
    (gradient,) = torch.autograd.grad(loss, latents)
    if hasattr(scheduler, "sigmas"):
        variance = float(scheduler.sigmas[index]) ** 2
    else:
        alpha = float(scheduler.alphas_cumprod[time])
        variance = (1 - alpha) / alpha
    moved = latents.detach().clone()
    moved[:2] -= 10 * variance * gradient[:2]
    assert (moved[:2] - latents[:2]).abs().amax(dim=(1, 2, 3)).gt(1e-3).all()
    assert torch.allclose(after.samples[0], moved, rtol=1e-4, atol=1e-4)
    expected = scheduler.scale_model_input(moved, time)
    assert torch.allclose(after.inputs[0], torch.cat([expected, expected]), rtol=1e-4, atol=1e-4)


def test_sigma_of_schedulers_with_alphas_and_infinite_ones():
    pndm = PNDMScheduler(skip_prk_steps=True)
    pndm.set_timesteps(4)
    alpha = float(pndm.alphas_cumprod[int(pndm.timesteps[3])])
    assert sigma_squared(pndm, len(pndm.timesteps), 3) == pytest.approx((1 - alpha) / alpha)
    assert sigma_squared(pndm, 2, 0) == sigma_squared(pndm, len(pndm.timesteps), len(pndm.timesteps) - 2)


def test_steering_moves_attention_into_the_boxes_and_is_the_same_alone_again_and_checkpointed(tiny_model):
    plain = unsteered(tiny_model)
    still, masses, after = {}, {}, {}
    assert np.array_equal(
        generate(tiny_model, cells(tiny_model, replace(LAYOUT, iterations=0)), {}, masses=still), plain
    )
    together = generate(tiny_model, cells(tiny_model), {}, masses=masses)
    assert np.abs(together - plain).max() > 0.01
    assert all(new > old for new, old in zip(masses.values(), still.values(), strict=True))
    assert np.array_equal(generate(tiny_model, cells(tiny_model), {}), together)
    checkpointed = replace(LAYOUT, checkpointing=True)
    assert np.array_equal(generate(tiny_model, cells(tiny_model, checkpointed), {}, masses=after), together)
    assert list(after.values()) == list(masses.values())
    for row, cell in enumerate(cells(tiny_model)):
        assert np.abs(generate(tiny_model, [cell], {})[0] - together[row]).max() < 1e-3
    assert np.array_equal(unsteered(tiny_model), plain)  # nothing stays behind
    assert all(parameter.requires_grad for parameter in tiny_model.denoiser.parameters())


def test_layers_left_out_of_the_loss_and_lesions_while_steering(tiny_model):
    together = generate(tiny_model, cells(tiny_model), {})
    off = Lesion("leave_one_out", LAYOUT.layers[0], LAYOUT.layers[:1], Replacement("steering_off"))
    only = generate(tiny_model, cells(tiny_model, replace(LAYOUT, layers=LAYOUT.layers[1:])), {})
    assert np.abs(only - together).max() > 1e-3
    assert np.array_equal(generate(tiny_model, cells(tiny_model, lesion=off), OFF), only)
    none = replace(off, layers=LAYOUT.layers)
    plain = unsteered(tiny_model)
    assert np.array_equal(generate(tiny_model, cells(tiny_model, lesion=none), OFF), plain)
    zero = Lesion("leave_one_out", "down_blocks.0.attentions.0", ("down_blocks.0.attentions.0",), Replacement("zero"))
    work = {"zero:[]": Zero()}
    lesioned = generate(tiny_model, cells(tiny_model, lesion=zero), work)
    still = generate(tiny_model, cells(tiny_model, replace(LAYOUT, iterations=0), lesion=zero), work)
    assert np.abs(lesioned - together).max() > 1e-3 and np.abs(lesioned - still).max() > 1e-3


def test_a_gradient_runs_only_the_images_and_the_part_of_the_denoiser_that_it_needs(tiny_model, monkeypatch):
    rows = {"conv_in": [], "conv_out": [], "up_blocks.0": []}

    def count(path, args, kwargs):
        if torch.is_grad_enabled():
            rows[path].append(len(args[0] if args else kwargs["hidden_states"]))

    handles = [
        tiny_model.denoiser.get_submodule(path).register_forward_pre_hook(
            lambda module, args, kwargs, path=path: count(path, args, kwargs), with_kwargs=True
        )
        for path in rows
    ]
    bare = [PROMPTS[0], Prompt("a green ring")]
    off = Lesion("only_one", LAYOUT.layers[0], LAYOUT.layers[1:], Replacement("steering_off"))
    generate(tiny_model, cells(tiny_model), {})
    assert rows == {"conv_in": [2] * 6, "conv_out": [], "up_blocks.0": [2] * 6}
    generate(tiny_model, cells(tiny_model, prompts=bare, lesion=off), OFF)
    assert rows == {"conv_in": [2] * 6 + [1] * 6, "conv_out": [], "up_blocks.0": [2] * 6}
    generate(tiny_model, cells(tiny_model, lesion=replace(off, layers=LAYOUT.layers)), OFF)  # nothing steers
    monkeypatch.setattr(torch.autograd, "grad", None)
    generate(tiny_model, cells(tiny_model, replace(LAYOUT, threshold=1.0)), {})  # all are below it: looked at once
    assert rows["conv_in"] == [2] * 6 + [1] * 6 + [2] * 3
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("form", ["pndm", "euler", "sdxl", "img2img"])
def test_whole_runs_are_steered_under_other_schedulers_models_and_tasks(of_form, form):
    model, asked, prompts = of_form(form)
    layout = replace(LAYOUT, layers=text_attention(model.denoiser).paths[-1:])

    def made(number, **changes):
        masses = {}
        given = [
            Cell(model.identity, one, 0, replace(asked, steering=replace(layout, **changes)), None)
            for one in prompts[:number]
        ]
        return generate(model, given, {}, masses=masses), list(masses.values())

    (steered, masses), (unsteered, still) = made(2), made(2, iterations=0)
    plain = [Cell(model.identity, one, 0, asked, None) for one in prompts]
    assert np.array_equal(unsteered, generate(model, plain, {}))
    assert np.isfinite(steered).all() and np.abs(steered - unsteered).max() > 1e-3
    assert all(new > old for new, old in zip(masses, still, strict=True))
    assert np.abs(made(1)[0] - steered[:1]).max() < 1e-3


def test_attention_maps_are_kept_of_steered_images_and_change_none(tiny_model):
    asked = Capture().chosen(text_attention(tiny_model.denoiser).paths)
    maps = {}
    for iterations in (0, 2):
        made = cells(tiny_model, replace(LAYOUT, iterations=iterations))
        capturing = Capturing(tiny_model, made, asked)
        images = generate(tiny_model, made, {}, capturing=capturing)
        assert np.array_equal(images, generate(tiny_model, made, {}))
        maps[iterations] = capturing.maps
    layer = LAYOUT.layers[-1]
    for still, steered in zip(maps[0], maps[2], strict=True):  # the maps are those of the steered images
        assert not np.array_equal(still.layers["cond"][layer], steered.layers["cond"][layer])
