"""Knobs of a model: offloading, the autoencoder, arguments of the call, classes that nobody listed, and refusals."""

from __future__ import annotations

import json
import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from conftest import settings, tiny_spec
from lesion import models
from lesion.errors import RequestError
from lesion.generation.generate import generate
from lesion.models import ModelSpec, loading, resolve
from lesion.models.calling import AS_ASKED, arguments
from lesion.models.source import TEMPLATED
from lesion.study.grid import Cell
from lesion.study.prompts import Prompt
from pipelines import BUILDERS, side
from test_loras import made
from test_surgery import SUBJECTS, plain, zero


class OwnPipeline(StableDiffusionPipeline):
    """A class that diffusers does not know."""

    def __call__(self, *args, tint: float = 0.0, **kwargs):
        found = super().__call__(*args, **kwargs)
        found.images = found.images + tint
        return found

    __call__.__signature__ = None  # replaced below: the arguments of its parent and its own


def _signature():
    import inspect

    parent = inspect.signature(StableDiffusionPipeline.__call__)
    own = inspect.Parameter("tint", inspect.Parameter.KEYWORD_ONLY, default=0.0)
    rest = [item for item in parent.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    return parent.replace(parameters=[*rest, own])


OwnPipeline.__call__.__signature__ = _signature()


def loaded(folder, **changes):
    return models.load(resolve(tiny_spec(folder, **changes)), "cpu")


def test_offloading_needs_an_accelerator(tiny_folder, cli):
    for offload in ("model", "sequential"):
        with pytest.raises(RequestError, match=r"model.offload: .* allowed on device=cpu: none"):
            loaded(tiny_folder, offload=offload)
    with pytest.raises(RequestError, match=r"model.offload: got 'disk'; allowed: none, model, sequential"):
        resolve(tiny_spec(tiny_folder, offload="disk"))
    for given, words in (
        (["model.offload=model", "device=cpu"], "model.offload: moves weights"),
        (["model.offload=disk"], "model.offload: got 'disk'; allowed: none, model, sequential"),
        (["model.offload=model", "performance.compile=true"], "model.offload: works without performance.compile"),
    ):
        code, _, err = cli(*given)
        assert code == 2 and words in err and len(err.strip().splitlines()) == 1, err


def test_offloading_is_asked_of_diffusers(tiny_folder, monkeypatch):
    """Without a GPU here: that the pipeline's own method is called for the device, in the place of moving all."""
    called = []
    for name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        monkeypatch.setattr(
            StableDiffusionPipeline, name, lambda self, device, name=name: called.append((name, device))
        )
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    for offload in ("model", "sequential"):
        loading._place(pipe, offload, "cuda:1")
    assert called == [("enable_model_cpu_offload", "cuda:1"), ("enable_sequential_cpu_offload", "cuda:1")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloading_changes_no_bit(tiny_folder, offload):
    def images(**changes):
        loading.forget()
        model = models.load(resolve(tiny_spec(tiny_folder, **changes)), "cuda")
        return made(model), made(model, zero(model.anatomy.paths[1]))

    whole, waiting = images(), images(offload=offload)
    assert all(np.array_equal(a, b) for a, b in zip(whole, waiting, strict=True))


def test_offloading_makes_no_cells_of_its_own_but_slicing_and_tiling_do(tiny_folder):
    def key(**changes):
        source = resolve(tiny_spec(tiny_folder, **changes))
        return Cell(models.identity_of(source, "cuda"), Prompt("a"), 0, settings(), None).key

    assert key(offload="model") == key()
    assert len({key(), key(vae_slicing=True), key(vae_tiling=True)}) == 3


def test_slicing_and_tiling_reach_the_autoencoder(tiny_folder):
    base = plain(tiny_folder, SUBJECTS)
    sliced, tiled = loaded(tiny_folder, vae_slicing=True), loaded(tiny_folder, vae_tiling=True)
    assert (sliced.pipe.vae.use_slicing, sliced.pipe.vae.use_tiling) == (True, False)
    assert (tiled.pipe.vae.use_slicing, tiled.pipe.vae.use_tiling) == (False, True)
    assert np.abs(made(sliced) - base).max() < 1e-5
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.vae.enable_tiling()
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32, "width": 32, "output_type": "np"}
    noise = [torch.Generator("cpu").manual_seed(seed) for _, seed in SUBJECTS]
    theirs = pipe([text for text, _ in SUBJECTS], generator=noise, **given).images
    cells = [Cell(tiled.identity, Prompt(text), seed, settings(height=32, width=32), None) for text, seed in SUBJECTS]
    ours = generate(tiled, cells, {})
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, generate(loaded(tiny_folder), cells, {}))


def test_another_autoencoder(tiny_folder, tiny_sdxl_folder, tmp_path):
    folder = shutil.copytree(tiny_folder / "vae", tmp_path / "vae")
    same = resolve(tiny_spec(tiny_folder, vae=str(folder)))
    assert np.array_equal(made(models.load(same, "cpu")), plain(tiny_folder, SUBJECTS))
    vae = diffusers.AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(0.2)
    vae.save_pretrained(folder)
    other = resolve(tiny_spec(tiny_folder, vae=str(folder)))
    assert len({other.fingerprint, same.fingerprint, resolve(tiny_spec(tiny_folder)).fingerprint}) == 3
    brighter = made(models.load(other, "cpu"))
    before = plain(tiny_folder, SUBJECTS)
    inside = (before > 0.01) & (before < 0.89)  # of the rest the pixels were cut off
    assert inside.mean() > 0.5 and np.allclose(brighter[inside], before[inside] + 0.1, atol=1e-5)
    for name, words in (("/nonesuch", "no folder"), (str(tmp_path), "holds no autoencoder")):
        with pytest.raises(RequestError, match=f"model.vae: .*{words}"):
            resolve(tiny_spec(tiny_folder, vae=name))


def test_in_half_precision_the_autoencoder_of_sdxl_decodes_in_single(tiny_sdxl_folder, tmp_path):
    """Its own weights overflow in float16; the config says so (force_upcast). The fixed one says it needs none."""
    fixed = tmp_path / "fixed"
    shutil.copytree(tiny_sdxl_folder / "vae", fixed)
    config = json.loads((fixed / "config.json").read_text())
    assert config["force_upcast"]
    (fixed / "config.json").write_text(json.dumps({**config, "force_upcast": False}))
    for vae, expected in ((None, torch.float32), (str(fixed), torch.float16)):
        model = loaded(tiny_sdxl_folder, dtype="float16", vae=vae)
        assert model.pipe.vae.dtype == torch.float16
        seen = []
        model.pipe.vae.decoder.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].dtype))
        images = made(model)
        assert seen == [expected]
        assert np.isfinite(images).all() and images.std() > 0.01


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in ("flux2", "flux2_klein", "z_image")])
def test_settings_mean_what_they_say(name, folder_of):
    """What the encoders are handed is the prompt as it stands, and the denoiser's latents have the size asked for."""
    model = loaded(folder_of(name))
    tall = side(name) * 2
    seen = []
    tokenizers = [part for key, part in model.pipe.components.items() if key.startswith("tokenizer") and part]
    cell = Cell(model.identity, Prompt("A <b>cat</b> &amp; http://x.org"), 0,
                settings(height=tall, width=side(name), steps=2, guidance=1.0), None)  # fmt: skip
    texts = []
    for tokenizer in {id(one): one for one in tokenizers}.values():
        cls = type(tokenizer)
        if not hasattr(cls, "_watched"):
            call = cls.__call__

            def watched(self, text, *args, call=call, **kwargs):
                texts.append(text)
                return call(self, text, *args, **kwargs)

            cls.__call__, cls._watched = watched, call
    try:
        model.denoiser.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        image = generate(model, [cell], {})[0]
    finally:
        for tokenizer in tokenizers:
            cls = type(tokenizer)
            if "_watched" in vars(cls):
                cls.__call__ = cls._watched
                del cls._watched
    assert image.shape == (tall, side(name), 3)
    flat = [text for item in texts for text in ([item] if isinstance(item, str) else item)]
    if type(model.pipe).__name__.startswith(TEMPLATED):  # the prompt stands in the template as it is
        assert any(cell.prompt.text in text for text in flat)
    else:
        assert {text.lower() for text in flat if text} == {cell.prompt.text.lower()}
    factor = model.pipe.vae_scale_factor
    places = (
        seen[0].shape[1] * 4 if seen[0].dim() == 3 else seen[0].shape[-1] * seen[0].shape[-2]
    )  # FLUX: 2 x 2 a token
    assert places * factor**2 == tall * side(name)


def test_arguments_of_the_call(tiny_folder, tmp_path):
    source = resolve(tiny_spec(tiny_folder, arguments=(("guidance_rescale", "0.7"),)))
    assert source.fingerprint != resolve(tiny_spec(tiny_folder)).fingerprint
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "np"}
    noise = [torch.Generator("cpu").manual_seed(seed) for _, seed in SUBJECTS]
    theirs = pipe([text for text, _ in SUBJECTS], generator=noise, guidance_rescale=0.7, **given).images
    assert np.array_equal(made(models.load(source, "cpu")), theirs)
    assert not np.array_equal(theirs, plain(tiny_folder, SUBJECTS))
    for name in ("height", "prompt", "nonesuch"):
        with pytest.raises(RequestError, match=f"model.arguments: StableDiffusionPipeline takes no '{name}' here"):
            resolve(tiny_spec(tiny_folder, arguments=((name, "1"),)))
    spec = ModelSpec.of({"name": "a", "id": "b", "arguments": {"x": [1, {"y": None}]}, "loras": None}, {})
    assert spec.arguments == (("x", '[1, {"y": null}]'),)


def test_a_pipeline_class_of_ones_own(tiny_folder, tmp_path, monkeypatch):
    """Of no use in a list: its denoiser is recognised, its class is found by its module."""
    name = f"{__name__}.OwnPipeline"
    own = loaded(tiny_folder, pipeline=name, arguments=(("tint", "0.25"),))
    assert type(own.pipe) is OwnPipeline
    assert np.array_equal(made(own), plain(tiny_folder, SUBJECTS) + 0.25)
    layer = own.anatomy.paths[0]
    assert np.array_equal(made(own, zero(layer)), plain(tiny_folder, SUBJECTS, own.anatomy.sites[layer]) + 0.25)
    for bad in ("NoPipeline", "no.module.Class", "AutoencoderKL", "json.dumps", "../x", ".Class", "a..b"):
        with pytest.raises(RequestError, match=rf"model.pipeline: '{re.escape(bad)}' is no pipeline class; allowed"):
            resolve(tiny_spec(tiny_folder, pipeline=bad))
    folder = shutil.copytree(tiny_folder, tmp_path / "odd")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "OddPipeline"}))
    with pytest.raises(RequestError, match=r"model.id: 'OddPipeline' is no pipeline class; .* as model.pipeline"):
        resolve(tiny_spec(folder))
    assert resolve(tiny_spec(folder, pipeline=name)).pipeline == name


@pytest.mark.parametrize(
    ("cls", "scale"), [("StableDiffusionSAGPipeline", "sag"), ("StableDiffusionPAGPipeline", "pag")]
)
def test_classes_of_diffusers_that_nobody_listed(cls, scale, tiny_folder):
    """Without their further guidance, which would run the denoiser on more rows than two an image."""
    model = loaded(tiny_folder, pipeline=cls, arguments=((f"{scale}_scale", "0.0"),))
    assert type(model.pipe).__name__ == cls
    baseline = made(model)
    assert np.isfinite(baseline).all()
    assert not np.array_equal(baseline, made(model, zero(*model.anatomy.paths)))


def test_skipped_layers_of_clip_are_those_that_diffusers_skips(tiny_folder):
    """transformers 5 has no `text_model`, of which diffusers' `clip_skip` asks for the last norm."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)

    def encoded(text):
        ids = pipe.tokenizer(
            [text], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            return pipe.text_encoder(ids, output_hidden_states=True)

    model = loaded(tiny_folder, arguments=(("clip_skip", "1"),))
    for text, seed in SUBJECTS:
        ours = generate(model, [Cell(model.identity, Prompt(text), seed, settings(steps=2), None)], {})
        with torch.no_grad():
            embeds = pipe.text_encoder.final_layer_norm(encoded(text).hidden_states[-2])
        theirs = pipe(
            prompt_embeds=embeds, negative_prompt_embeds=encoded("")[0], guidance_scale=3.0, height=16, width=16,
            num_inference_steps=2, generator=[torch.Generator("cpu").manual_seed(seed)], output_type="np",
        )  # fmt: skip
        assert np.array_equal(ours, theirs.images)
    assert not np.array_equal(made(model), made(loaded(tiny_folder)))


def test_without_a_denoiser_one_line_says_what_there_is(tiny_folder, tmp_path, cli):
    folder = shutil.copytree(tiny_folder, tmp_path / "odd")
    index = json.loads((folder / "model_index.json").read_text())
    index["painter"] = index.pop("unet")
    (folder / "model_index.json").write_text(json.dumps(index))
    code, _, err = cli(f"model.id={folder}")
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert "no denoiser named unet or transformer" in err and "painter" in err


def test_few_steps_without_guidance(tiny_sdxl_folder):
    """As SDXL-Lightning and Turbo: trailing Euler, one row an image."""
    model = loaded(tiny_sdxl_folder, scheduler="euler_trailing")
    rows = []
    model.denoiser.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    cells = [Cell(model.identity, Prompt(t), s, settings(guidance=0.0, steps=2), None) for t, s in SUBJECTS]
    ours = generate(model, cells, {})
    assert rows == [len(SUBJECTS)] * 2
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_folder)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    noise = [torch.Generator("cpu").manual_seed(seed) for _, seed in SUBJECTS]
    given = {"num_inference_steps": 2, "guidance_scale": 0.0, "height": 16, "width": 16, "output_type": "np"}
    assert np.array_equal(ours, pipe([text for text, _ in SUBJECTS], generator=noise, **given).images)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("flux", ["branch=cond"], "branch: FluxPipeline takes guidance as an input and has one branch; allowed: both"),
        ("flux_schnell", ["generation.negative_prompt=x"], "generation.negative_prompt: FluxPipeline takes guidance"),
        ("lcm", ["branch=uncond"], "branch: LatentConsistencyModelPipeline takes guidance as an input"),
        (
            "lcm",
            ["generation.negative_prompt=x"],
            "generation.negative_prompt: LatentConsistencyModelPipeline takes no",
        ),
        ("pixart_alpha", ["generation.task=img2img"], "generation.task: diffusers has no img2img for PixArtAlphaP"),
        ("flux2", ["generation.task=img2img"], "generation.task: diffusers has no img2img for Flux2Pipeline"),
        ("z_image", ["generation.guidance=1"], "generation.guidance: ZImagePipeline adds guidance times"),
        (
            "z_image",
            ["capture=maps", "layers.kind=block"],
            "capture: ZImagePipeline puts a template around its prompts",
        ),
        (
            "qwen_image",
            ["steering=layout", "prompts.items=[{text:a cat,boxes:[{words:cat,box:[0,0,1,1]}]}]", "layers.kind=block"],
            "steering: QwenImagePipeline puts a template around its prompts, so words cannot be told apart",
        ),
    ],
)
def test_what_a_class_cannot_do_is_refused_before_it_loads(name, given, words, cli, folder_of, tmp_path, monkeypatch):
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "i.png")
    folder = folder_of(name)
    monkeypatch.setattr("lesion.models.load", lambda *args: pytest.fail("loaded"))
    init = [f"generation.init={tmp_path / 'i.png'}"] if "img2img" in given[0] else []
    code, _, err = cli(f"model.id={folder}", "generation.guidance=3.5", "layers.include=null", *given, *init)
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize("name", ["pixart_sigma", "sana", "hunyuan_dit", "lcm", "sd2"])
def test_from_command_to_table(name, cli, folder_of):
    folder = folder_of(name)
    size = [f"generation.{which}={side(name)}" for which in ("height", "width")]
    code, _, err = cli(
        f"model.id={folder}", "layers.include=null", "selection=leave_one_out", "prompts.items=[a red circle]", *size
    )
    assert code == 0, err
    (frame,) = cli.frames()
    number = {"hunyuan_dit": 4, "lcm": 7, "sd2": 4}.get(name, 3)
    assert (frame.status == "ok").all() and len(frame) == 1 + number
    assert frame.clip_similarity.notna().all()


def test_arguments_are_only_those_a_class_takes(tiny_model):
    given = arguments(tiny_model.pipe, settings(), ["a"], [None], more={"clip_skip": 1})
    assert not set(AS_ASKED) & set(given) and given["clip_skip"] == 1
    assert "negative_prompt" not in given
    assert (
        arguments(tiny_model.pipe, settings(negative_prompt="b"), ["a"] * 2, [None] * 2)["negative_prompt"] == ["b"] * 2
    )


def test_what_only_loading_finds_is_refused_without_a_trace(cli, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "odd")
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "none_such"}))
    code, _, err = cli(f"model.id={folder}")
    said = [line for line in err.split("\n") if line.rpartition("\r")[2].strip()]  # less the bar, which is wiped
    assert code == 2 and len(said) == 1 and "cannot be loaded: a config has 'none_such'" in said[0], err
    assert [path.name for path in cli.folder.iterdir()] == ["odd"]
