"""What a model's own configs say of size, steps and guidance, and what sizes it can make: against diffusers itself."""

from __future__ import annotations

import inspect
import json

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from conftest import tiny_spec
from lesion.errors import RequestError
from lesion.models import ModelSpec, resolve
from lesion.models.defaults import check_size, default_of_call, filled, own_size, side_factor

VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [1, 1, 1, 1], "latent_channels": 4}
WIDE = {**VAE, "latent_channels": 16}
DEEP = {"_class_name": "AutoencoderDC", "encoder_block_out_channels": [1] * 6, "latent_channels": 32}
UNET = {"_class_name": "UNet2DConditionModel", "in_channels": 4}
NONE = dict.fromkeys(("height", "width", "steps", "guidance"))


def written(folder, pipeline, denoiser, vae=VAE, **others):
    """A model folder of configs alone: component -> config, beside the index."""
    name = "unet" if "UNet" in denoiser["_class_name"] else "transformer"
    parts = {name: denoiser, "vae": vae, **others}
    index = {"_class_name": pipeline}
    for part, config in parts.items():
        index[part] = ["transformers" if part.startswith(("t", "tokenizer")) and part != "transformer" else "diffusers",
                       config["_class_name"]]  # fmt: skip
        (folder / part).mkdir(parents=True, exist_ok=True)
        file = {"scheduler": "scheduler_config.json"}.get(part, "config.json")
        (folder / part / ("tokenizer_config.json" if part.startswith("tokenizer") else file)).write_text(
            json.dumps(config)
        )
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def transformer(name, **config):
    return {"_class_name": name, "in_channels": 4, "patch_size": 2, **config}


# class of the pipeline, denoiser, autoencoder -> height, width, factor, as published for these models
KNOWN = {
    "sd15": (("StableDiffusionPipeline", {**UNET, "sample_size": 64}), (512, 512, 8)),
    "sd21": (("StableDiffusionPipeline", {**UNET, "sample_size": [96, 64]}), (768, 512, 8)),
    "sd14": (
        ("StableDiffusionPipeline", {**UNET, "sample_size": 32, "_diffusers_version": "0.6.0"}),
        (512, 512, 8),
    ),
    "sdxl": (("StableDiffusionXLPipeline", {**UNET, "sample_size": 128}), (1024, 1024, 8)),
    "sdxl_silent": (("StableDiffusionXLPipeline", UNET), (1024, 1024, 8)),
    "sd3": (
        ("StableDiffusion3Pipeline", transformer("SD3Transformer2DModel", sample_size=128, in_channels=16), WIDE),
        (1024, 1024, 16),
    ),
    "flux": (
        ("FluxPipeline", transformer("FluxTransformer2DModel", patch_size=1, in_channels=64), WIDE),
        (1024, 1024, 16),
    ),
    "pixart": (
        ("PixArtSigmaPipeline", transformer("PixArtTransformer2DModel", sample_size=128)),
        (1024, 1024, 16),
    ),
    "hunyuan": (("HunyuanDiTPipeline", transformer("HunyuanDiT2DModel", sample_size=128)), (1024, 1024, 16)),
    "sana": (
        ("SanaPipeline", transformer("SanaTransformer2DModel", sample_size=32, patch_size=1, in_channels=32), DEEP),
        (1024, 1024, 32),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_sizes_of_published_models(name, tmp_path):
    given, (height, width, factor) = KNOWN[name]
    source = resolve(tiny_spec(written(tmp_path, *given)))
    assert own_size(source) == (height, width)
    assert side_factor(source) == factor
    check_size(source, height, width)
    for side, near in ((factor + 1, f"{factor} or {2 * factor}"), (factor - 1, f"{factor}$")):
        with pytest.raises(RequestError, match=rf"generation.width: .* multiples of {factor} pixels.* next: {near}"):
            check_size(source, height, side)


class Seen(Exception):
    pass


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux", "sd3", "hunyuan_dit", "pixart_sigma", "lcm"])
def test_diffusers_would_make_the_same(name, folder_of, monkeypatch):
    folder = folder_of(name)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    cls = type(pipe)

    def latents(*args, **kwargs):
        raise Seen({**dict(zip(inspect.signature(prepare).parameters, args, strict=False)), **kwargs})

    prepare = cls.prepare_latents
    monkeypatch.setattr(cls, "prepare_latents", latents)
    with pytest.raises(Seen) as caught:
        pipe("a", num_inference_steps=1, output_type="latent",
             **({"use_resolution_binning": False} if name in ("hunyuan_dit", "pixart_sigma") else {}))  # fmt: skip
    (seen,) = caught.value.args
    found, said = filled(NONE, lambda: tiny_spec(folder))
    assert (found["height"], found["width"]) == (seen["height"], seen["width"])
    defaults = inspect.signature(cls.__call__).parameters
    assert (
        found["steps"]
        == defaults["num_inference_steps"].default
        == default_of_call(cls.__name__, "num_inference_steps")
    )
    assert found["guidance"] == defaults["guidance_scale"].default
    assert f"height {seen['height']}" in said and cls.__name__ in said


def test_what_is_given_stays_and_what_no_config_says_is_asked_for(tmp_path):
    def never():
        raise AssertionError

    given = {"height": 8, "width": 8, "steps": 1, "guidance": 0.0, "task": "txt2img"}
    assert filled(given, never) == (given, "")
    source = written(tmp_path, "StableDiffusionPipeline", UNET)
    found, said = filled({**given, "guidance": None}, lambda: tiny_spec(source))
    assert found == {**given, "guidance": 7.5} and said == "guidance 7.5 from the defaults of StableDiffusionPipeline"
    with pytest.raises(RequestError, match=r"generation.height: the unet of .* has no sample_size; give height"):
        filled({**given, "width": None}, lambda: tiny_spec(source))


def test_a_folder_is_asked_for_its_own_size(cli, tiny_folder, tmp_path):
    """The cells are those of the same numbers given by hand."""
    plain = {"generation.height", "generation.width", "generation.steps"}
    cli.defaults = [one for one in cli.defaults if one.split("=")[0] not in plain]
    code, out, err = cli("dry_run=true")
    assert code == 0, err
    assert "each of 16 x 16 pixels (height x width), 50 steps, guidance 7.5, DDIMScheduler" in out
    assert "not given: height 16, width 16 from the model's config; steps 50, guidance 7.5 from the defaults of" in out
    few = ["generation.steps=2", "selection=none", "prompts.items=[a red circle]"]
    assert cli(*few)[0] == 0
    assert cli(*few, "generation.height=16", "generation.width=16", "generation.guidance=7.5")[0] == 0
    derived, given = cli.frames()
    assert derived.cell.tolist() == given.cell.tolist()
    assert {"height": 16, "width": 16, "steps": 2, "guidance": 7.5}.items() <= derived.iloc[0].to_dict().items()
    single = ["model=single_file", "model.id=x.safetensors", "model.pipeline=StableDiffusionPipeline"]
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    code, out, err = cli(*single, f"model.config={tiny_folder}", "dry_run=true")
    assert code == 0 and "each of 16 x 16 pixels" in out, err


def test_a_size_that_would_be_rounded_is_refused(cli, tmp_path):
    folder = written(tmp_path / "flux", *KNOWN["flux"][0])
    code, _, err = cli(f"model.id={folder}", "generation.height=1080", "generation.width=1920", "layers.kind=block")
    assert code == 2, err
    assert "generation.height: FluxPipeline makes multiples of 16 pixels; got 1080, next: 1072 or 1088" in err
    assert len(err.strip().splitlines()) == 1 and not list(cli.folder.glob("outputs/*"))
    assert resolve(ModelSpec("flux", str(folder))).pipeline == "FluxPipeline"
