"""Finding and loading models: folders, single files, schedulers, precision, fingerprints; and the model that ships."""

from __future__ import annotations

import json
import logging
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file

from conftest import settings, tiny_spec
from lesion import models
from lesion.errors import RequestError
from lesion.generation.generate import generate
from lesion.models import EMBEDDED, SCHEDULERS, ModelSpec, loading, resolve, schedulers
from lesion.models.schedulers import FLOW
from lesion.models.source import resolve_dtype
from lesion.study.grid import Cell
from lesion.study.prompts import Prompt
from lesion.surgery.anatomy import examine
from single_file import write_single_file


def one_image(model, **changes):
    given = {"height": 64, "width": 64, "steps": 3, **changes}
    cell = Cell(model.identity, Prompt("a red circle on a white background"), 0, settings(**given), None)
    return generate(model, [cell], {})[0]


def test_the_embedded_model_has_the_topology_of_sd15():
    from test_anatomy import SD15_PATHS

    unet = resolve(ModelSpec("embedded", "embedded")).skeleton("unet")
    assert list(examine(unet).paths) == SD15_PATHS
    assert len(unet.attn_processors) == 32
    assert sum(isinstance(module, Attention) for module in unet.modules()) == 32
    assert [type(block).__name__ for block in unet.down_blocks] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert [type(block).__name__ for block in unet.up_blocks] == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3


def test_the_embedded_model_is_plain_diffusers():
    index = json.loads((EMBEDDED / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == [None, None]
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED, torch_dtype=torch.float32)
    assert {type(part).__name__ for part in pipe.components.values() if part is not None} == {
        "CLIPTokenizer", "CLIPTextModel", "AutoencoderKL", "UNet2DConditionModel", "DDIMScheduler"
    }  # fmt: skip
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) < 25e6
    assert not [path for path in EMBEDDED.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - set(FLOW)))
def test_every_scheduler_by_name(name, tiny_folder):
    source = resolve(tiny_spec(tiny_folder, scheduler=name))
    model = models.load(source, "cpu")
    assert type(model.pipe.scheduler).__name__ == SCHEDULERS[name]
    assert source.scheduler.startswith(SCHEDULERS[name])
    image = one_image(model, height=16, width=16, scheduler=source.scheduler)
    assert np.isfinite(image).all()
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    options = {
        "pndm": {"skip_prk_steps": True},
        "euler_trailing": {"timestep_spacing": "trailing"},
        "dpmpp_karras": {"use_karras_sigmas": True},
        "dpmpp_sde": {"algorithm_type": "sde-dpmsolver++"},
    }
    pipe.scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(pipe.scheduler.config, **options.get(name, {}))
    noise = [torch.Generator("cpu").manual_seed(0)]
    given = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "np"}
    assert np.array_equal(image, pipe(["a red circle on a white background"], generator=noise, **given).images[0])


def test_schedulers_of_one_class_are_told_apart(tiny_folder):
    sources = [resolve(tiny_spec(tiny_folder, scheduler=name)) for name in ("dpmpp", "dpmpp_karras", "dpmpp_sde")]
    assert sources[0].scheduler == "DPMSolverMultistepScheduler"
    assert len({source.fingerprint for source in sources}) == len({source.scheduler for source in sources}) == 3


def scheduler_of(folder, own, name):
    """What is written of a model whose own scheduler has this config, asked for with this scheduler."""
    for file, data in {"model_index.json": {"_class_name": "StableDiffusionPipeline",
                                            "scheduler": ["diffusers", own["_class_name"]]},
                       "scheduler/scheduler_config.json": own}.items():  # fmt: skip
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(data))
    return resolve(tiny_spec(folder, scheduler=name))


@pytest.mark.parametrize("skipping", [True, False, None])
def test_a_scheduler_by_name_is_told_from_the_models_own_where_it_steps_otherwise(tmp_path, skipping):
    config = {"_class_name": "PNDMScheduler", "steps_offset": 1}
    if skipping is not None:
        config["skip_prk_steps"] = skipping
    own, named = (scheduler_of(tmp_path, config, name) for name in (None, "pndm"))
    plain = diffusers.PNDMScheduler.from_config(config)
    steps = []
    for scheduler in (plain, schedulers.make("pndm", plain)):
        scheduler.set_timesteps(5)
        steps.append(scheduler.timesteps.tolist())
    same = steps[0] == steps[1]
    assert same == bool(skipping)
    assert (own.scheduler == named.scheduler) == (own.fingerprint == named.fingerprint) == same
    assert own.scheduler == "PNDMScheduler"


def test_fingerprints_stay_what_they_were(tmp_path):
    """A stored image must be found by later versions: a fingerprint is part of its key."""
    own = {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    found = {name: scheduler_of(tmp_path, own, name) for name in (None, "pndm", "ddim", "dpmpp_karras")}
    assert {name: (source.scheduler, source.fingerprint) for name, source in found.items()} == {
        None: ("PNDMScheduler", "564d2b1fa9968158557f22658a05a593"),
        "pndm": ("PNDMScheduler", "564d2b1fa9968158557f22658a05a593"),
        "ddim": ("DDIMScheduler", "f3b017a73cd1dae05d90601c29b66d89"),
        "dpmpp_karras": ("DPMSolverMultistepScheduler-karras", "d84728a0badb143d3d6645507af24f44"),
    }
    embedded = [resolve(ModelSpec("embedded", "embedded", scheduler=name)).scheduler for name in (None, "ddim", "pndm")]
    assert embedded == ["DDIMScheduler", "DDIMScheduler", "PNDMScheduler"]


def test_a_scheduler_of_another_kind_of_model_is_refused(tiny_folder, folder_of):
    for name in FLOW:
        with pytest.raises(RequestError, match=rf"model.scheduler: {name} does not fit .*; allowed: pndm"):
            resolve(tiny_spec(tiny_folder, scheduler=name))
    for kind in ("sd3", "flux"):
        folder = folder_of(kind)
        with pytest.raises(RequestError, match=r"model.scheduler: ddim does not fit .* a flow; allowed: flow_euler"):
            resolve(tiny_spec(folder, scheduler="ddim"))
    with pytest.raises(RequestError, match="flow_heun does not fit FluxPipeline"):
        resolve(tiny_spec(folder, scheduler="flow_heun"))
    for name in FLOW:
        model = models.load(resolve(tiny_spec(folder_of("sd3"), scheduler=name)), "cpu")
        assert type(model.pipe.scheduler).__name__ == SCHEDULERS[name]
        assert model.pipe.scheduler.config.shift == 3.0
        assert np.isfinite(one_image(model, height=16, width=16, scheduler=SCHEDULERS[name])).all()


def test_a_single_file_is_the_folder_it_was_made_from(tmp_path):
    file = write_single_file(EMBEDDED, tmp_path / "one.safetensors")
    spec = {"pipeline": "StableDiffusionPipeline", "config": str(EMBEDDED), "dtype": "float32"}
    single = models.load(resolve(ModelSpec("one", str(file), **spec)), "cpu")
    ours = one_image(single)
    folder = models.load(resolve(ModelSpec("embedded", "embedded", dtype="float32")), "cpu")
    assert np.array_equal(ours, one_image(folder))
    assert single.anatomy.paths == folder.anatomy.paths
    assert single.identity.fingerprint != folder.identity.fingerprint


def test_the_fingerprint_is_of_weights_and_configs(tiny_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    original = resolve(tiny_spec(tiny_folder)).fingerprint
    assert resolve(tiny_spec(copy)).fingerprint == original  # wherever it lies
    (copy / "README.md").write_text("of no matter")
    assert resolve(tiny_spec(copy)).fingerprint == original
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = resolve(tiny_spec(copy)).fingerprint
    assert changed != original
    config = json.loads((copy / "scheduler" / "scheduler_config.json").read_text())
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "beta_end": 0.02}))
    assert resolve(tiny_spec(copy)).fingerprint not in (original, changed)
    assert resolve(tiny_spec(tiny_folder, scheduler="euler")).fingerprint != original


def test_a_variant_is_found(tiny_folder, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    model = models.load(resolve(tiny_spec(tmp_path / "half", variant="fp16")), "cpu")
    assert model.denoiser.dtype == torch.float32  # as asked, whatever the files hold
    half = models.load(resolve(tiny_spec(tmp_path / "half", variant="fp16", dtype="bfloat16")), "cpu")
    assert {part.dtype for part in (half.pipe.unet, half.pipe.vae, half.pipe.text_encoder)} == {torch.bfloat16}
    assert half.identity.dtype == "bfloat16"


def _gated(folder):
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_type": "gated"}))


def _with(**values):
    def changed(folder):
        config = folder / "text_encoder" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | values))

    return changed


def _changed(part, change):
    def changed(folder):
        (file,) = (folder / part).glob("*.safetensors")
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})

    return changed


TEXT, CONV = "encoder.layers.0.layer_norm1.weight", "conv_out.weight"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_changed("text_encoder", lambda weights: weights.pop(TEXT)), f"lacks weights .*: {TEXT}$"),
        (_changed("unet", lambda weights: weights.pop(CONV)), f"lacks weights .*: {CONV}$"),
        (_changed("vae", lambda weights: weights.pop(f"decoder.{CONV}")), f"lacks weights .*: decoder.{CONV}$"),
        (_gated, r"lacks weights that its configs ask for: .*(fuser|position_net).* and \d+ more$"),  # GLIGEN's
        (
            _changed("text_encoder", lambda weights: weights.update({TEXT: torch.ones(3)})),
            f"another shape .*: {TEXT} is 3, by its config 16$",
        ),
        (
            _changed("unet", lambda weights: weights.update({CONV: torch.ones(3)})),
            f"another shape .*: {CONV} is 3, by its config 4 x 16 x 3 x 3$",
        ),
        (_with(hidden_act="none_such"), "cannot be loaded: a config has 'none_such', which its library does not know"),
    ],
)
def test_weights_that_do_not_fit_the_configs_are_refused(tiny_folder, tmp_path, spoil, words, capfd):
    """transformers would go on with random ones, and say so in a table that nobody reads."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    spoil(folder)
    with pytest.raises(RequestError, match=rf"^model.id: .*{words}"):
        models.load(resolve(tiny_spec(folder)), "cpu")
    assert "REPORT" not in capfd.readouterr().err


def test_weights_that_nothing_uses_are_told_in_a_line(tiny_folder, tmp_path, caplog, capfd):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    for part in ("text_encoder", "unet"):
        _changed(part, lambda weights: weights.update({f"odd.{part}": torch.ones(3)}))(folder)  # noqa: B023
    before = {name: vars(logging.getLogger(name)).copy() for name in ("diffusers", "transformers")}
    models.load(resolve(tiny_spec(folder)), "cpu")
    assert {name: vars(logging.getLogger(name)) for name in before} == before
    assert "has weights that nothing uses: odd." in caplog.text and "odd.unet" in caplog.text
    assert "REPORT" not in capfd.readouterr().err
    told = loading._Told()
    for text in (  # of transformers 4
        "Some weights of CLIPTextModel were not initialized from the model checkpoint at x and are newly initialized: "
        "['a.weight', 'b.bias']\nYou should probably TRAIN this model",
        "Some weights of CLIPTextModel were not initialized from the model checkpoint at x and are newly initialized "
        "because the shapes did not match:\n- c.weight: found shape torch.Size([3]) in the checkpoint",
    ):
        told.handle(logging.makeLogRecord({"msg": text, "levelno": logging.WARNING, "name": "transformers.x"}))
    assert told.missing == ["a.weight", "b.bias"] and told.odd == ["c.weight"]


def test_auto_precision():
    assert resolve_dtype("auto", "cpu") == "float32"
    assert resolve_dtype("auto", "cuda:1") == "float16"
    assert resolve_dtype("bfloat16", "cpu") == "bfloat16"


def test_a_safety_checker_is_taken_off(tiny_folder, tmp_path, monkeypatch):
    """It would blank images; found by loading a pipeline that has one."""
    loaded = diffusers.DiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    loaded.register_modules(safety_checker=torch.nn.Identity())
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: loaded)
    models.loading.forget()
    assert models.load(resolve(tiny_spec(tiny_folder)), "cpu").pipe.safety_checker is None
    models.loading.forget()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_noise_is_the_same_as_on_a_cpu():
    spec = ModelSpec("embedded", "embedded", dtype="float32")
    cpu = one_image(models.load(resolve(spec), "cpu"))
    gpu = one_image(models.load(resolve(spec), "cuda"))
    assert np.abs(cpu - gpu).mean() < 0.01
