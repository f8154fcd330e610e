"""img2img: the same images as plain diffusers, every lesion in it, and init images as part of a cell."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from conftest import settings
from lesion import replacements
from lesion.errors import RequestError
from lesion.generation.generate import generate
from lesion.generation.snapshots import States
from lesion.study.grid import Cell
from lesion.study.inits import with_inits
from lesion.study.lesions import Lesion, Replacement
from lesion.study.prompts import Prompt, parse_prompts
from lesion.surgery.operation import replacement_key
from test_components import bypassed, lesion_of, loaded, zeroed
from test_components import made as made_by_components

SEEDS = (0, 7)
MIDDLE = "decoder.mid_block.attentions.0"
IMG2IMG = {"task": "img2img", "steps": 6, "noising": 0.7}  # 4 of 6 steps


@pytest.fixture
def inits(tmp_path):
    """Two prompts with an init image each, one of them of another size than the study's."""
    dice = np.random.default_rng(0)
    for name, side in (("one", 16), ("two", 40)):
        Image.fromarray(dice.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    return with_inits((Prompt("a red circle", id="one"), Prompt("two stars", id="two")), str(tmp_path), "key")


def cells(model, prompts, lesion=None, **changes):
    asked = settings(**{**IMG2IMG, **changes})
    return [Cell(model.identity, prompt, seed, asked, lesion) for prompt, seed in zip(prompts, SEEDS)]


def made(model, given, *rest):
    fillers = {}
    for lesion in {cell.lesion for cell in given if cell.lesion}:
        bench = replacements.Bench(model, given[0].settings, None, 4)
        fillers[replacement_key(lesion)] = replacements.build(lesion.replacement.name, {}, bench)
    return generate(model, given, fillers, *rest)


def plain(folder, prompts, zeroed=(), from_call=0, strength=0.7, hooks=lambda pipe: ()):
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(1))
    for site in zeroed:
        pipe.unet.get_submodule(site).register_forward_hook(
            lambda module, args, output: torch.zeros_like(output) if len(calls) > from_call else output
        )
    for module, hook in hooks(pipe):
        module.register_forward_hook(hook, prepend=True)
    pictures = [
        Image.open(prompt.image).convert("RGB").resize((16, 16), Image.Resampling.LANCZOS) for prompt in prompts
    ]
    return pipe(
        [prompt.text for prompt in prompts],
        image=pictures,
        strength=strength,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS],
        num_inference_steps=6,
        guidance_scale=3.0,
        output_type="np",
    ).images


def zero(*layers, **changes):
    return Lesion("leave_one_out", layers[0], layers, Replacement("zero"), **changes)


def test_baseline_is_plain_diffusers_to_the_bit(tiny_folder, tiny_model, inits):
    assert np.array_equal(made(tiny_model, cells(tiny_model, inits)), plain(tiny_folder, inits))
    whole = made(tiny_model, cells(tiny_model, inits, noising=1.0))
    assert np.array_equal(whole, plain(tiny_folder, inits, strength=1.0))


@pytest.mark.parametrize(("window", "from_call"), [((0.0, 1.0), 0), ((0.5, 1.0), 2)])
def test_lesions_and_their_windows_count_the_steps_that_are_made(tiny_folder, tiny_model, inits, window, from_call):
    layer = tiny_model.anatomy.paths[1]
    images = made(tiny_model, cells(tiny_model, inits, zero(layer, window=window)))
    assert np.array_equal(images, plain(tiny_folder, inits, tiny_model.anatomy.sites[layer], from_call))
    assert not np.array_equal(images, plain(tiny_folder, inits))


@pytest.mark.parametrize(
    ("component", "layer", "hooks"),
    [
        ("text_encoder", "encoder.layers.1", bypassed("text_encoder", "encoder.layers.1")),
        ("vae", MIDDLE, zeroed("vae", f"{MIDDLE}.to_out.0")),
    ],
)
def test_text_encoders_and_decoders_are_lesioned_too(tiny_folder, inits, component, layer, hooks):
    model = loaded(tiny_folder, component)
    images = made_by_components(model, cells(model, inits, lesion_of(f"{component}.{layer}")))
    assert np.array_equal(images, plain(tiny_folder, inits, hooks=hooks))
    assert not np.array_equal(images, plain(tiny_folder, inits))


def test_a_late_lesion_goes_on_from_the_baseline_to_the_bit(tiny_model, inits, tmp_path):
    late = cells(tiny_model, inits, zero(*tiny_model.anatomy.paths, window=(0.5, 1.0)))
    whole = made(tiny_model, late)
    states = States(tmp_path / "states")
    made(tiny_model, cells(tiny_model, inits), states, [(0.5, 1.0)])
    assert len(list((tmp_path / "states").rglob("*-2.safetensors"))) == 2
    assert states.calls(late) == 4
    calls = []
    handle = tiny_model.denoiser.conv_in.register_forward_hook(lambda *_: calls.append(1))
    assert np.array_equal(made(tiny_model, late, states, [(0.5, 1.0)]), whole)
    handle.remove()
    assert len(calls) == 2


def test_the_init_image_is_part_of_the_cell_by_its_content(tiny_model, inits, tmp_path):
    first, second = inits
    (renamed,) = with_inits(
        (Prompt(first.text, id="x", image=str(_copy(first.image, tmp_path / "b.png"))),), None, "key"
    )
    (other,) = with_inits((Prompt(first.text, image=second.image),), None, "key")
    keys = [cells(tiny_model, [prompt])[0].key for prompt in (first, renamed, other, Prompt(first.text))]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert cells(tiny_model, [first], noising=0.5)[0].key not in keys


def test_an_init_image_that_changes_between_two_jobs_is_read_anew(tiny_model, inits):
    first, second = inits
    before = made(tiny_model, cells(tiny_model, [first]))
    shutil.copy(second.image, first.image)
    (changed,) = with_inits((Prompt(first.text, image=first.image),), None, "key")
    after = made(tiny_model, cells(tiny_model, [changed]))
    assert np.array_equal(after, made(tiny_model, cells(tiny_model, [replace(second, text=first.text)])))
    assert not np.array_equal(before, after)


def _copy(source, target):
    return shutil.copy(source, target)


def test_init_images_that_cannot_be_used_are_refused(tmp_path):
    prompts = (Prompt("a", id="a"), Prompt("b", id="b"))
    (tmp_path / "a.png").write_bytes(b"no image")
    for init, words in ((None, "'a' has no init image"), (str(tmp_path), "'b'"), (str(tmp_path / "c.png"), "c.png")):
        with pytest.raises(RequestError, match="key") as error:
            with_inits(prompts[1:] if init == str(tmp_path) else prompts, init, "key")
        assert words in str(error.value)
    with pytest.raises(RequestError, match="no image that can be read"):
        with_inits(prompts[:1], str(tmp_path), "key")


def test_a_prompt_file_may_name_init_images(tmp_path):
    (tmp_path / "p.csv").write_text(f"text,image\na cat,{tmp_path / 'one.png'}\na dog,\n")
    _, prompts, _ = parse_prompts({"path": str(tmp_path / "p.csv")})
    assert [prompt.image for prompt in prompts] == [str(tmp_path / "one.png"), ""]


def test_from_command_to_table(cli, inits, tmp_path):
    code, _, err = cli(
        "generation.task=img2img",
        f"generation.init={inits[0].image}",
        "generation.strength=0.7",
        "replacement=[zero,mean]",
        "selection=leave_one_out",
        "window=[[0,1],[0.5,1]]",
    )
    assert code == 0, err
    (frame,) = cli.frames()
    assert set(frame.task) == {"img2img"}
    assert set(frame.init) == {"one.png"}
    assert set(frame.noising) == {0.7}
    assert frame.clip_similarity.notna().all()
    assert frame[frame.selection != "none"].groupby(["replacement", "window_start"]).size().tolist() == [6] * 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generation.task=img2img"], ["generation.init", "no init image"]),
        (["generation.init=x.png"], ["generation.init", "img2img only"]),
        (["generation.task=img2img", "generation.init=/nonesuch.png"], ["generation.init", "/nonesuch.png"]),
        (["generation.task=img2img", "generation.init=@", "generation.strength=0"], ["generation.strength", "(0, 1]"]),
        (["generation.task=img2img", "generation.init=@", "generation.strength=0.3"], ["generation.strength", "none"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_makes_no_sense_is_refused(cli, inits, arguments, words):
    code, _, err = cli(*(argument.replace("@", inits[0].image) for argument in arguments))
    assert code == 2
    assert all(word in err for word in words), err
    assert len(err.strip().splitlines()) == 1
