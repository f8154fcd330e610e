"""Every supported pipeline class, on tiny pipelines of the real classes: the baseline is plain diffusers to the bit,
settings mean what they say, lesions are plain hooks, and what a class cannot do is refused."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import settings, tiny_spec
from lesion import models
from lesion.generation.generate import generate
from lesion.generation.snapshots import States, first_step
from lesion.models import loading
from lesion.replacements import Bench, build
from lesion.study.grid import Cell
from lesion.study.inits import with_inits
from lesion.study.lesions import Lesion, Replacement
from lesion.study.prompts import Prompt
from lesion.surgery.anatomy import AnatomyError, examine
from lesion.surgery.operation import replacement_key
from pipelines import BUILDERS, side

TEXTS, SEEDS = ("a red circle", "Two STARS <b>"), (0, 7)
CROSS = ("pixart_alpha", "pixart_sigma", "sana", "hunyuan_dit")  # transformers with cross-attention
JOINT = ("sd3", "sd35", "flux", "flux_schnell")
# Its language model has the 28 layers that the pipeline reads from: minutes over all tests.
KLEIN = pytest.param("flux2_klein", marks=pytest.mark.slow)
OWN = ("sd", "sdxl")  # have tests of their own
EACH = [KLEIN if name == "flux2_klein" else name for name in BUILDERS if name not in OWN]
EMBEDDED_GUIDANCE = ("flux", "flux_schnell", "lcm", "flux2")
PLAINLY = {"use_resolution_binning": False, "clean_caption": False, "complex_human_instruction": None}


def loaded(folder: Path, **changes):
    return models.load(models.resolve(tiny_spec(folder, **changes)), "cpu")


def asked(name: str, model, **changes):
    size = {"height": side(name), "width": side(name), "steps": 3, "scheduler": type(model.pipe.scheduler).__name__}
    return settings(**{**size, **changes}, embedded_guidance=name in EMBEDDED_GUIDANCE or None)


def cells(name, model, lesion=None, texts=TEXTS, seeds=SEEDS, inits=None, **changes):
    given = asked(name, model, **changes)
    prompts = [Prompt(text) for text in texts]
    if inits:
        prompts = [with_inits([prompt], init, "key")[0] for prompt, init in zip(prompts, inits, strict=True)]
    return [Cell(model.identity, prompt, seed, given, lesion) for prompt, seed in zip(prompts, seeds, strict=True)]


@cache
def plain_pipeline(folder: Path):
    return diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)


def silent(module, args, kwargs, output):
    return torch.zeros_like(output)


def plain(name, folder, hooks=(), seeds=SEEDS, texts=TEXTS, pipe=None, **changes):
    """The images of plain diffusers. hooks: of modules of the denoiser by their paths."""
    pipe = pipe or plain_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    known = inspect.signature(type(pipe).__call__).parameters
    given = {"height": side(name), "width": side(name), "num_inference_steps": 3, "guidance_scale": 3.0, **changes}
    given = {key: value for key, value in {**PLAINLY, **given}.items() if key in known}
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    noise = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    if type(pipe).__name__.startswith("QwenImage"):  # as its model card calls it
        given |= {"true_cfg_scale": given.pop("guidance_scale"), "negative_prompt": [" "] * len(texts)}
    with ExitStack() as hooked:
        for path, hook in dict(hooks).items():
            module = denoiser.get_submodule(path)
            hooked.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        return pipe(prompt=list(texts), generator=noise, output_type="np", **given).images


@pytest.mark.parametrize("name", EACH)
def test_baseline_is_plain_diffusers_to_the_bit(name, folder_of):
    folder = folder_of(name)
    model = loaded(folder)
    assert type(model.pipe).__name__ == model_class(folder)
    for guidance in (3.0, 0.0):
        given = cells(name, model, guidance=guidance)
        ours = generate(model, given, {})
        assert np.array_equal(ours, plain(name, folder, guidance_scale=guidance)), guidance
        assert np.array_equal(generate(model, given, {}), ours)  # out of the text memory
        if name == "flux_schnell":  # guidance has no place in it
            break
    assert ours.shape == (2, side(name), side(name), 3) and np.isfinite(ours).all() and ours.std() > 0.01
    assert not np.array_equal(ours[0], ours[1])
    swapped = generate(model, cells(name, model, texts=TEXTS[::-1], guidance=guidance), {})
    assert not np.array_equal(swapped, ours)  # the text matters


def model_class(folder: Path) -> str:
    return models.resolve(tiny_spec(folder)).index["_class_name"]


@pytest.mark.parametrize("name", [name for name in EACH if name != "flux2"])
def test_each_prompt_goes_through_each_encoder_once(name, folder_of):
    model = loaded(folder_of(name))
    encoders = [part for key, part in model.pipe.components.items() if key.startswith("text_encoder") and part]
    rows = {id(encoder): 0 for encoder in encoders}

    def counting(encoder):
        def count(*args, **kwargs):
            rows[id(encoder)] += len(args[0] if args else kwargs["input_ids"])
            return forward(*args, **kwargs)

        forward, encoder.forward = encoder.forward, count

    model.texts.kept.clear()
    for encoder in encoders:
        counting(encoder)
    try:
        together = generate(model, cells(name, model, steps=2), {})
        expected = 2 if name in EMBEDDED_GUIDANCE else 4  # two prompts; the empty one twice, not alone
        assert set(rows.values()) == {expected}
        again = generate(model, cells(name, model, texts=TEXTS[::-1], seeds=SEEDS[::-1], steps=2), {})
        assert set(rows.values()) == {expected}
        for _ in range(2):  # one at a time
            alone = [
                generate(model, cells(name, model, texts=(text,), seeds=(seed,), steps=2), {})[0]
                for text, seed in zip(TEXTS, SEEDS, strict=True)
            ]
            assert set(rows.values()) == {expected + (2 if name in EMBEDDED_GUIDANCE else 3)}
    finally:
        for encoder in encoders:
            del encoder.forward
    assert np.allclose(together, again[::-1], atol=1e-5)
    assert np.allclose(together, alone, atol=1e-5)
    first = plain(name, folder_of(name), texts=TEXTS[:1], seeds=SEEDS[:1], num_inference_steps=2)[0]
    assert np.array_equal(alone[0], first)


@pytest.mark.parametrize("name", ["sd3", "sd35", "flux", "sd2", "lcm", "qwen_image", "z_image"])
def test_img2img_baseline_is_plain_diffusers_to_the_bit(name, folder_of, tmp_path):
    folder, model = folder_of(name), loaded(folder_of(name))
    dice, inits = np.random.default_rng(0), []
    for number in range(2):
        inits.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(dice.integers(0, 256, (side(name), side(name), 3), dtype=np.uint8)).save(inits[-1])
    task = {"task": "img2img", "noising": 0.7, "steps": 4}
    ours = generate(model, cells(name, model, inits=inits, **task), {})
    cls = {
        "sd3": diffusers.StableDiffusion3Img2ImgPipeline,
        "sd35": diffusers.StableDiffusion3Img2ImgPipeline,
        "flux": diffusers.FluxImg2ImgPipeline,
        "sd2": diffusers.StableDiffusionImg2ImgPipeline,
        "lcm": diffusers.LatentConsistencyModelImg2ImgPipeline,
        "qwen_image": diffusers.QwenImageImg2ImgPipeline,
        "z_image": diffusers.ZImageImg2ImgPipeline,
    }[name]
    pictures = [Image.open(path).convert("RGB") for path in inits]
    base = plain_pipeline(folder)
    parts = {**base.components, **({"requires_safety_checker": False} if name in ("sd2", "lcm") else {})}
    theirs = plain(name, folder, pipe=cls(**parts), image=pictures, strength=0.7, num_inference_steps=4)
    assert np.array_equal(ours, theirs)


def lesion_of(*layers, **changes):
    return Lesion("leave_one_out", layers[0], layers, Replacement("zero"), **changes)


def lesioned(model, given, options=None, **more):
    fillers = {}
    for lesion in {cell.lesion for cell in given if cell.lesion}:
        bench = Bench(model, given[0].settings, more.get("folder"), 2)
        fillers[replacement_key(lesion)] = build(lesion.replacement.name, options or {}, bench)
    return generate(model, given, fillers, *more.get("rest", ()))


@pytest.mark.parametrize("name", [*CROSS, "sd2", "lcm"])
def test_zero_is_a_plain_hook_to_the_bit(name, folder_of):
    folder, model = folder_of(name), loaded(folder_of(name))
    for kind in ("cross_attention", "self_attention"):
        anatomy = examine(model.denoiser, kind=kind)
        layer = anatomy.paths[1]
        there = loading.Model(**{**vars(model), "anatomy": anatomy})
        ours = lesioned(there, cells(name, there, lesion_of(layer, kind=kind)))
        assert np.array_equal(ours, plain(name, folder, dict.fromkeys(anatomy.sites[layer], silent)))
        assert not np.array_equal(ours, plain(name, folder))


@pytest.mark.parametrize("name", CROSS)
def test_all_layers_zeroed_are_blind_to_the_text(name, folder_of):
    """Of PixArt and Sana: text enters by cross-attention only. Hunyuan-DiT also reads it pooled, in its norms."""
    model = loaded(folder_of(name))
    every = lesion_of(*model.anatomy.paths)
    ours = lesioned(model, cells(name, model, every))
    swapped = lesioned(model, cells(name, model, every, texts=TEXTS[::-1]))
    assert np.array_equal(ours, swapped) == (name != "hunyuan_dit")


@pytest.mark.parametrize("name", CROSS)
@pytest.mark.parametrize("replacement", ["null_prompt", "donor_prompt", "resample"])
def test_other_text_in_every_layer(name, replacement, folder_of):
    """Every layer reading another text is that text's image, where text enters nowhere else."""
    model = loaded(folder_of(name))
    options = {} if replacement == "null_prompt" else {"prompt": TEXTS[1]}
    swap = Lesion("all", "", model.anatomy.paths, Replacement(replacement, options), branch="cond")
    ours = lesioned(model, cells(name, model, swap, texts=TEXTS[:1] * 2), options)
    assert not np.array_equal(ours, generate(model, cells(name, model, texts=TEXTS[:1] * 2), {}))
    if name != "hunyuan_dit":  # it also reads the text pooled
        other = ("", "") if replacement == "null_prompt" else TEXTS[1:] * 2
        assert np.allclose(ours, generate(model, cells(name, model, texts=other), {}), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in (*CROSS, "sd2", "lcm", "sd3", "flux", "flux_schnell", "qwen_image", "z_image")),
        ("sd2", {"channels_last": True}),
        ("sd3", {"scheduler": "flow_heun"}),
    ],
)
def test_a_late_lesion_goes_on_from_the_baseline_to_the_bit(name, changes, folder_of, tmp_path):
    """FLUX.1-dev too, whose scheduler wants the size of the image before it tells its steps."""
    model, kind = loaded(folder_of(name), **changes), "cross_attention"
    if name in (*JOINT, *BRANCHED):
        kind = "block"
        model = loading.Model(**{**vars(model), "anatomy": examine(model.denoiser, kind=kind)})
    window = (0.4, 1.0)  # from call 2 of 4; of Heun's 7 from call 3, between the halves of a step
    late = cells(name, model, lesion_of(*model.anatomy.paths, window=window, kind=kind), steps=4)
    whole = lesioned(model, late)
    states = States(tmp_path)
    baselines = cells(name, model, steps=4)
    untouched = generate(model, baselines, {}, states, [window])
    assert np.array_equal(untouched, generate(model, baselines, {}))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2 and states.usable
    calls = []
    ends = ("conv_in", "proj_out", "t_embedder")
    probe = next(getattr(model.denoiser, end) for end in ends if hasattr(model.denoiser, end))
    hook = probe.register_forward_hook(lambda *_: calls.append(1))
    assert np.array_equal(lesioned(model, late, rest=(states, [window])), whole)
    total = 7 if "scheduler" in changes else 4
    late_calls = total - first_step(window, total)
    each = 2 if name == "qwen_image" else 1  # calls a step
    late_calls, total = each * late_calls, each * total
    assert len(calls) == late_calls
    fresh = States(tmp_path / "fresh")  # nothing kept: the baselines run as far as the window first
    assert np.array_equal(lesioned(model, late, rest=(fresh, [window])), whole)
    hook.remove()
    assert len(calls) == late_calls + total
    assert not np.array_equal(whole, untouched)


BRANCHED = {"qwen_image": "transformer_blocks.0", "flux2_klein": "transformer_blocks.0", "z_image": "layers.0"}


@pytest.mark.parametrize("name", ["qwen_image", KLEIN, "z_image"])
def test_branches_of_pipelines_that_call_for_each_or_put_the_conditional_first(name, folder_of):
    """Against a plain hook that counts the calls of the block, or knows the order of the rows."""
    folder, layer, calls = folder_of(name), BRANCHED[name], []
    model = loaded(folder)
    there = loading.Model(**{**vars(model), "anatomy": examine(model.denoiser, kind="block")})
    untouched = plain(name, folder)
    found = {}
    for branch in ("cond", "uncond"):
        found[branch] = lesioned(there, cells(name, there, lesion_of(layer, kind="block", branch=branch)))
        calls.clear()

        def hook(module, args, kwargs, output, branch=branch):
            if name == "z_image":
                rows = {"cond": slice(0, 2), "uncond": slice(2, 4)}[branch]
                output[rows] = args[0][rows]
                return output
            calls.append(None)  # conditional, unconditional, conditional, …
            now = "cond" if len(calls) % 2 else "uncond"
            return (kwargs["encoder_hidden_states"], kwargs["hidden_states"]) if branch == now else output

        assert np.array_equal(found[branch], plain(name, folder, {layer: hook})), branch
        assert not np.array_equal(found[branch], untouched)
    assert not np.array_equal(found["cond"], found["uncond"])


def bypassed(module, args, kwargs, output):
    """A block of joint attention that hands on what it was given: (text, image)."""
    return None if output[0] is None else kwargs["encoder_hidden_states"], kwargs["hidden_states"]


JOINT_HOOKS = {
    "block": ("", bypassed),
    "joint_attention": (".attn", lambda module, args, kwargs, output: (torch.zeros_like(output[0]), *output[1:])),
    "feed_forward": (".ff", silent),
}


@pytest.mark.parametrize("name", JOINT)
def test_joint_lesions_are_plain_hooks_to_the_bit(name, folder_of):
    folder, model = folder_of(name), loaded(folder_of(name))
    untouched, layer = plain(name, folder), "transformer_blocks.0"
    for kind, (leaf, hook) in JOINT_HOOKS.items():
        there = loading.Model(**{**vars(model), "anatomy": examine(model.denoiser, kind=kind)})
        ours = lesioned(there, cells(name, there, lesion_of(layer, kind=kind)))
        assert np.array_equal(ours, plain(name, folder, {layer + leaf: hook})), kind
        assert not np.array_equal(ours, untouched), kind
    there = loading.Model(**{**vars(model), "anatomy": examine(model.denoiser, kind="text_to_image")})
    deaf = lesioned(there, cells(name, there, lesion_of(*there.anatomy.paths, kind="text_to_image")))
    assert not np.array_equal(deaf, untouched)


@pytest.mark.parametrize("name", JOINT)
def test_joint_attention_has_no_cross_attention_layers(name, folder_of):
    model = loaded(folder_of(name))
    assert model.text_sites == ()
    with pytest.raises(AnatomyError, match="Transformer2DModel"):
        examine(model.denoiser)


@pytest.mark.parametrize("name", ["pixart_sigma", "sana", "hunyuan_dit", "sd3", "flux", "sdxl"])
def test_attention_maps_of_every_family(name, folder_of, tiny_sdxl_folder):
    """The words' columns are those of the model's own text, entries add up, and images stay as they are."""
    from lesion.generation.capture import Capturing
    from lesion.study.capture import Capture
    from lesion.surgery.attention import text_attention

    model = loaded(tiny_sdxl_folder if name == "sdxl" else folder_of(name))
    some = cells(name, model)
    capture = Capture().chosen(text_attention(model.denoiser).paths)
    capturing = Capturing(model, some, capture)
    images = generate(model, some, {}, capturing=capturing)
    assert np.array_equal(images, generate(model, some, {}))
    for text, maps in zip(TEXTS, capturing.maps, strict=True):
        assert list(maps.layers["cond"]) == list(capture.layers)
        assert set(text.lower().replace("<", "").replace(">", "").split()) < set(maps.entries["cond"])
        for values in maps.layers["cond"].values():
            share = values[0, 0].sum(0)
            assert share.max() < 1 if name in ("sd3", "flux") else np.allclose(share, 1, atol=1e-5)
            assert (values[0, 0, :-2].mean((1, 2)) > 0).all()  # of the words
