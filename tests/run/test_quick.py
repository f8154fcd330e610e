"""`lesioned` on a user's own pipeline, against plain hooks on another one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from lesion.errors import RequestError
from lesion.run.quick import lesioned


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, prompts=("a red circle", "two stars"), guidance=3.0):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    how = {"num_inference_steps": 3, "guidance_scale": guidance, "height": 16, "width": 16, "output_type": "np"}
    return pipe(list(prompts), generator=generators, **how).images


def hooked(pipe, change, **how):
    """With a plain hook on every cross-attention of the first down block."""
    sites = [
        path for path, _ in pipe.unet.named_modules() if path.startswith("down_blocks.0") and path.endswith("attn2")
    ]
    handles = [pipe.unet.get_submodule(site).register_forward_hook(change) for site in sites]
    found = drawn(pipe, **how)
    for handle in handles:
        handle.remove()
    return found


def zeroed(module, args, output):
    return torch.zeros_like(output)


def test_it_is_a_plain_hook_in_every_call_and_nothing_stays(pipe):
    plain = drawn(pipe)
    before = dict(vars(pipe.unet)), dict(vars(pipe.scheduler))
    with lesioned(pipe, "down_blocks.0.*", "zero"):
        assert np.array_equal(drawn(pipe), hooked(pipe, zeroed))
        one = {"prompts": ("a blue square",), "guidance": 1.0}
        assert np.array_equal(drawn(pipe, **one), hooked(pipe, zeroed, **one))
    assert np.array_equal(drawn(pipe), plain)
    assert not np.array_equal(hooked(pipe, zeroed), plain)
    assert vars(pipe.unet).keys() == before[0].keys() and "set_timesteps" not in vars(pipe.scheduler)


def test_an_interrupted_call_does_not_shift_the_next(pipe):
    def late(module, args, output, calls=[]):  # noqa: B006
        calls.append(1)
        return output if len(calls) <= 1 else torch.zeros_like(output)

    def stop(pipe, step, time, given):
        raise KeyboardInterrupt

    with lesioned(pipe, "down_blocks.0.attentions.0", window=(1 / 3, 1.0)):
        with pytest.raises(KeyboardInterrupt):
            pipe("x", num_inference_steps=3, height=16, width=16, callback_on_step_end=stop)
        ours = drawn(pipe)
    assert np.array_equal(ours, hooked(pipe, late))


def test_branches_texts_and_nesting(pipe):
    half = drawn(pipe)
    with lesioned(pipe, "down_blocks.0.*", branch="uncond"):
        unconditional = drawn(pipe)
    expected = hooked(pipe, lambda module, args, output: torch.cat([output[:2] * 0, output[2:]]))
    assert np.array_equal(unconditional, expected) and not np.array_equal(unconditional, half)
    with lesioned(pipe, "*", "donor_prompt", prompt="a blue square", branch="cond"):
        donor = drawn(pipe, ("a red circle",))
    assert np.array_equal(donor, drawn(pipe, ("a blue square",)))
    with lesioned(pipe, "*", "null_prompt"):
        blind = drawn(pipe, ("a red circle",))
    assert np.abs(blind - drawn(pipe, ("",))).max() < 1e-5
    with lesioned(pipe, "down_blocks.0.*"), lesioned(pipe, ["mid_block.*", "up_blocks.*"]):
        nested = drawn(pipe)
    with lesioned(pipe, ["down_blocks.0.*", "mid_block.*", "up_blocks.*"]):
        assert np.array_equal(nested, drawn(pipe))


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"layers": "down_blocks.9.*"}, "layers"),
        ({"replacement": "mean"}, "replacement"),
        ({"replacement": "zeros"}, "replacement"),
        ({"replacement": "donor_prompt"}, "replacement.donor_prompt.prompt"),
        ({"window": (0.5, 0.5)}, "window"),
        ({"branch": "left"}, "branch"),
        ({"strength": 2}, "strength"),
        ({"kind": "joint_attention"}, "layers.kind"),
    ],
)
def test_what_cannot_be_done_is_one_line(pipe, given, key):
    with pytest.raises(RequestError) as error, lesioned(pipe, **{"layers": "*", **given}):
        pass
    assert error.value.key == key and "\n" not in str(error.value)
