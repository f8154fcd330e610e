"""A denoising run's events suffice for what looks into a run and what steers it, without touching its core."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from conftest import settings
from lesion.denoising.run import Client, Enough
from lesion.generation.generate import call, generators
from lesion.study.prompts import Prompt

PROMPTS, SEEDS = [Prompt("a red circle"), Prompt("two stars")], [0, 1]


class Looking(Client):
    """Softmax probabilities of one site's attention to the text, from its own projections, beside the computation."""

    def __init__(self, site):
        self.site, self.maps, self.numbers = site, [], []

    @contextmanager
    def attached(self, run):
        def look(module, args, kwargs):
            hidden, text = args[0] if args else kwargs["hidden_states"], kwargs["encoder_hidden_states"]
            query, key = (module.head_to_batch_dim(part) for part in (module.to_q(hidden), module.to_k(text)))
            self.maps.append(module.get_attention_scores(query, key))
            self.numbers.append((run.call, run.branches(len(hidden)).tolist()))

        handle = run.denoiser.get_submodule(self.site).register_forward_pre_hook(look, with_kwargs=True)
        yield
        handle.remove()


class Steering(Client):
    """Moves the latents before the first steps, against the gradient of the attention paid to the first token."""

    gradients = True

    def __init__(self, site, scale, steps=2):
        self.site, self.scale, self.steps = site, scale, steps
        self.losses = []

    def before_call(self, run, call):
        self.moved = None
        if run.call >= self.steps:
            return
        looking = Looking(self.site)
        rows = call.sample[run.branches(len(call.sample)) == 1].detach()
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(run.aside())
            stack.enter_context(looking.attached(run))
            latents = rows.clone().requires_grad_()
            own = {
                name: value[-len(rows) :] if torch.is_tensor(value) else value for name, value in call.kwargs.items()
            }
            run.denoiser(latents, *call.args[1:], **own)
            loss = looking.maps[-1][..., 0].mean()
            (gradient,) = torch.autograd.grad(loss, latents)
        self.losses.append(float(loss))
        self.moved = rows - self.scale * gradient
        call.args[0] = torch.cat([self.moved] * (len(call.sample) // len(rows)))

    def before_step(self, run, step):
        if self.moved is not None:
            step.sample = self.moved


def made(model, *clients):
    return call(model, PROMPTS, generators(SEEDS), settings(), clients)


def test_a_client_that_looks_changes_no_bit(tiny_model):
    plain, site = made(tiny_model), tiny_model.anatomy.sites[tiny_model.anatomy.paths[0]][0]
    looking = Looking(site)
    assert np.array_equal(made(tiny_model, looking), plain)
    assert looking.numbers == [(number, [0, 0, 1, 1]) for number in range(4)]
    assert len(looking.maps) == 4
    for probabilities in looking.maps:  # (rows x heads, pixels, tokens)
        assert probabilities.shape[-1] == 77
        assert torch.allclose(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]), atol=1e-6)


def test_a_client_that_steers_moves_the_latents_by_a_gradient(tiny_model):
    plain, site = made(tiny_model), tiny_model.anatomy.sites[tiny_model.anatomy.paths[0]][0]
    still = Steering(site, 0.0)
    assert np.array_equal(made(tiny_model, still), plain)  # extra denoiser calls count for nothing
    assert len(still.losses) == 2
    assert not np.array_equal(made(tiny_model, Steering(site, 1e4)), plain)
    assert np.array_equal(made(tiny_model), plain)  # nothing stays behind


def test_latents_after_a_step_are_those_of_plain_diffusers(tiny_model, tiny_folder):
    class Noting(Client):
        def __init__(self):
            self.latents, self.calls = [], set()

        def after_step(self, run, step):
            self.latents.append(step.latents.clone())
            self.calls.add((run.steps, run.call, run.calls))

    noting, seen = Noting(), []
    made(tiny_model, noting)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    pipe(
        [one.text for one in PROMPTS],
        generator=generators(SEEDS),
        num_inference_steps=4,
        guidance_scale=3.0,
        height=16,
        width=16,
        callback_on_step_end=lambda pipe, step, time, given: seen.append(given["latents"]) or given,
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(noting.latents, seen, strict=True))
    assert noting.calls == {(step, step - 1, 4) for step in range(1, 5)}


def test_a_client_may_answer_in_place_of_denoiser_and_scheduler_and_end_the_run(tiny_model):
    class Answering(Client):
        def before_call(self, run, call):
            call.output = (torch.zeros_like(call.sample),)

        def before_step(self, run, step):
            if run.steps == 2:
                raise Enough
            step.latents = step.sample + 1

    calls = []
    handle = tiny_model.denoiser.conv_in.register_forward_hook(lambda *_: calls.append(1))
    try:
        made(tiny_model, Answering())
    except Enough:
        calls.append("enough")
    handle.remove()
    assert calls == ["enough"]
    assert "forward" not in vars(tiny_model.denoiser) and "step" not in vars(tiny_model.pipe.scheduler)
