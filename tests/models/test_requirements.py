"""What is refused of a model from its configs alone: no weight is read, and no code of its folder runs."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from contextlib import nullcontext

import pytest
import torch

from conftest import settings, tiny_spec
from lesion.errors import RequestError
from lesion.models import ModelSpec, calling, requirements, resolve
from lesion.run.job import _check_switches
from pipelines import BUILDERS
from test_defaults import UNET, VAE, written

SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}
TOKENIZER = {"_class_name": "CLIPTokenizer", "model_max_length": 77}
ENCODER = {"_class_name": "CLIPTextModel", "num_hidden_layers": 12, "max_position_embeddings": 77}
SECOND = {"_class_name": "CLIPTextModelWithProjection", "num_hidden_layers": 32, "projection_dim": 1280}
BASE = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816}  # fmt: skip


def sd(folder, pipeline="StableDiffusionPipeline", unet=(), tokenizer=(), parts=(), vae=(), scheduler=()):
    """A Stable Diffusion of configs alone; what is given is laid over them."""
    others = {
        "scheduler": {**SCHEDULER, **dict(scheduler)},
        "text_encoder": ENCODER,
        **dict(parts),
        "tokenizer": {key: value for key, value in {**TOKENIZER, **dict(tokenizer)}.items() if value is not None},
    }
    return written(folder, pipeline, {**UNET, "sample_size": 64, **dict(unet)}, {**VAE, **dict(vae)}, **others)


def sdxl(folder, **unet):
    return sd(folder, "StableDiffusionXLPipeline", {**BASE, **unet}, parts={"text_encoder_2": SECOND})


def checked(folder, asked=(), **spec):
    source = resolve(tiny_spec(folder, **spec))
    requirements.check(source, settings(**{"scheduler": source.scheduler, **dict(asked)}))


WITH_MORE = ("StableDiffusionInpaintPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionControlNetPipeline",
             "StableDiffusionGLIGENPipeline", "StableDiffusionInstructPix2PixPipeline", "FluxFillPipeline",
             "StableDiffusionUpscalePipeline", "StableDiffusionAdapterPipeline", "FluxControlPipeline")  # fmt: skip
OTHERWISE = ("StableDiffusionLDM3DPipeline", "StableUnCLIPPipeline", "StableDiffusionAttendAndExcitePipeline",
             "StableDiffusionPanoramaPipeline", "AnimateDiffPipeline", "TextToVideoSDPipeline", "LTXPipeline",
             "StableDiffusionPipelineSafe")  # fmt: skip
SAG, PAG = "StableDiffusionSAGPipeline", "StableDiffusionPAGPipeline"
REFUSED = [
    *((name, {"pipeline": name}, {}, f"model.id: {name} wants more than text") for name in WITH_MORE),
    *((name, {"pipeline": name}, {}, f"model.id: {name} makes no single image, or runs its den") for name in OTHERWISE),
    ("pag", {"pipeline": PAG}, {}, r"model.arguments: .* further rows, .*; allowed: {pag_scale: 0.0}; got None"),
    ("sag", {"pipeline": SAG}, {"arguments": (("sag_scale", "0.75"),)}, "model.arguments: .*sag_scale: 0.0}; got 0.75"),
    ("inpainting", {"unet": {"in_channels": 9}}, {}, "model.id: the unet of .* reads 9 channels .* has 4"),
    ("labels", {"unet": {"num_class_embeds": 10}}, {}, "model.id: the unet of .* wants class labels"),
    ("projected", {"unet": {"class_embed_type": "projection"}}, {}, "model.id: .* wants class labels"),
    ("image", {"unet": {"encoder_hid_dim_type": "image_proj"}}, {}, "model.id: .* wants an image embedding"),
    ("added", {"unet": BASE}, {}, r"model.id: the unet of .* wants a condition \(text_time\)"),
    ("length", {"tokenizer": {"model_max_length": None}}, {}, "model.id: .* no model_max_length; .* encoder, 77"),
    ("huge", {"tokenizer": {"model_max_length": 1e30}}, {}, "model.id: .* no model_max_length"),
    ("longer", {"tokenizer": {"model_max_length": 512}}, {}, "model.id: .* model_max_length 512, .* reads 3 to 77"),
    ("shorter", {"tokenizer": {"model_max_length": 0}}, {}, "model.id: .* model_max_length 0, .* reads 3 to 77"),
    ("true", {"tokenizer": {"model_max_length": True}}, {}, "model.id: .* no model_max_length"),
    *((name, {"scheduler": {"num_train_timesteps": value}}, {}, "model.id: .* num_train_timesteps .*; allowed: 1 to 10")
      for name, value in (("timesteps as text", "x"), ("huge timesteps", 10**11))),
    ("steps", {}, {"asked": {"steps": 1001}}, "generation.steps: the model has 1000 timesteps; allowed: 1 to 1000"),
    ("few", {"scheduler": {"num_train_timesteps": 50}}, {"asked": {"steps": 51}}, "generation.steps: .* 1 to 50"),
    ("skip", {}, {"arguments": (("clip_skip", "13"),)}, "model.arguments: clip_skip must be null .* 0 to 12 .* got 13"),
    ("word", {}, {"arguments": (("clip_skip", '"a"'),)}, "model.arguments: clip_skip must be null"),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "asked", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_a_model_needs_is_told_from_its_configs(parts, asked, words, tmp_path):
    folder = sd(tmp_path, **parts)
    with pytest.raises(RequestError, match=words) as caught:
        checked(folder, **asked)
    assert "\n" not in str(caught.value)


def test_what_works_is_not_refused(tmp_path, folder_of):
    checked(sd(tmp_path / "sd"), {"steps": 1000}, arguments=(("clip_skip", "12"),))
    checked(sdxl(tmp_path / "sdxl"))
    checked(sd(tmp_path / "control", "StableDiffusionControlNetPipeline"), pipeline="StableDiffusionPipeline")
    checked(sd(tmp_path / "pag", PAG), arguments=(("pag_scale", "0.0"),))
    checked(sd(tmp_path / "gligen", unet={"attention_type": "gated"}))
    checked(sd(tmp_path / "xl", "StableDiffusionXLImg2ImgPipeline"), {"task": "img2img", "noising": 0.5})
    own = "test_model_knobs.OwnPipeline"
    checked(sd(tmp_path / "own", unet={"in_channels": 9}), pipeline=own)
    for name in ("sd", "sdxl"):
        checked(folder_of(name))
    source = resolve(ModelSpec("embedded", "embedded"))
    requirements.check(source, settings())
    for name in BUILDERS:
        checked(folder_of(name), {"height": 32, "width": 32})


def test_a_unet_of_another_model_is_none_of_sdxl(tmp_path):
    folder = sd(tmp_path, "StableDiffusionXLPipeline", parts={"text_encoder_2": SECOND})
    with pytest.raises(RequestError, match=r"model.id: .* has addition_embed_type None, where .* text_time"):
        checked(folder)


def test_shared_rows_are_for_denoisers_that_read_the_text_in_cross_attention_alone(tmp_path, tiny_folder):
    for folder, shares in ((tiny_folder, True), (sd(tmp_path / "sd"), True), (sdxl(tmp_path / "sdxl"), False)):
        source = resolve(tiny_spec(folder, shared_rows=True))
        assert source.shares_rows is shares and source.spec.switches == ("shared_rows",)
        with nullcontext() if shares else pytest.raises(RequestError, match=r"performance.shared_rows: this UNet2DC"):
            _check_switches(source)


def test_the_refiner_of_sdxl_makes_no_image_from_text(tmp_path):
    refiner = sdxl(tmp_path, projection_class_embeddings_input_dim=2560)
    with pytest.raises(RequestError, match=r"model.id: the unet of .* wants 2560 .* gives 2816: is it the refiner"):
        checked(refiner)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("timesteps", "generation.steps"),
        ("sigmas", "generation.steps"),
        ("prompt_embeds", "the prompts"),
        ("negative_prompt_embeds", "generation.negative_prompt"),
        ("ip_adapter_image", "no IP adapter"),
        ("callback_on_step_end_tensor_inputs", "it is code"),
        ("num_inference_steps", "other keys"),
    ],
)
def test_arguments_that_override_a_setting_are_refused(name, why, tmp_path):
    words = rf"model.arguments: StableDiffusionPipeline takes no '{name}' here: {why}.*; allowed: clip_skip, cross_att"
    with pytest.raises(RequestError, match=words):
        resolve(tiny_spec(sd(tmp_path), arguments=((name, "[1]"),)))


def test_arguments_of_other_classes_that_override_a_setting(tmp_path):
    for pipeline, name in (("StableDiffusionXLPipeline", "denoising_end"), ("StableDiffusionXLPipeline", "prompt_2"),
                           ("FluxPipeline", "true_cfg_scale")):  # fmt: skip
        with pytest.raises(RequestError, match=f"model.arguments: {pipeline} takes no '{name}' here: "):
            resolve(tiny_spec(sd(tmp_path / name, pipeline), arguments=((name, "2"),)))
    kept = (("negative_original_size", "[8, 8]"), ("original_size", "[8, 8]"), ("guidance_rescale", "0.5"))
    assert resolve(tiny_spec(sdxl(tmp_path / "kept"), arguments=kept)).spec.arguments == kept


def test_arguments_of_another_type_are_refused(tmp_path):
    wrong = {"eta": ('"abc"', "true", "[0.5]", "null"), "guidance_rescale": ("{}",),
             "cross_attention_kwargs": ("[1]",)}  # fmt: skip
    folder = sd(tmp_path)
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(
                RequestError, match=rf"^model.arguments: {name} of .* must be .*; got {re.escape(value)}$"
            ):
                requirements.check(resolve(tiny_spec(folder, arguments=((name, value),))), settings())
    right = (("cross_attention_kwargs", "null"), ("eta", "1"))
    requirements.check(resolve(tiny_spec(folder, arguments=right)), settings())

    def call(self, a, b, c: dict[str, int] | float = 0.1, d: torch.Tensor | str = "", e=1, f: bool = None): ...  # noqa: RUF013

    call.__annotations__ |= {"a": "Optional[List[Union[str, Tuple[int, int]]]]", "b": "typing.Optional[int]"}
    of = dict(calling.takes(type("Made", (), {"__call__": call})))
    assert of == {"self": "", "a": "list|null", "b": "int|null", "c": "dict|float", "d": "", "e": "", "f": "bool|null"}


def test_a_negative_prompt_that_is_not_read_is_refused(cli):
    code, _, err = cli("generation.negative_prompt=x", "generation.guidance=1")
    assert code == 2 and "generation.negative_prompt: is not read with generation.guidance <= 1" in err
    code, _, err = cli("generation.negative_prompt=x", "generation.guidance=1.5", "dry_run=true")
    assert code == 0, err


INDEX = [
    ({"_class_name": "my_code.Pipeline"}, r"names the class 'my_code.Pipeline'; allowed: one of diffusers, or package"),
    ({"_class_name": ["pipeline", "Pipeline"]}, "names the class"),
    ({"unet": ["my_code", "UNet"]}, "names a class of 'my_code' for unet; allowed: diffusers, transformers"),
    ({"unet": ["os.path", "join"]}, "for unet; allowed: a library and a class"),
    ({"unet": ["diffusers", "UNet", "more"]}, "for unet; allowed: a library and a class"),
    ({"unet": ["diffusers", "models.UNet"]}, "for unet; allowed: a library and a class"),
    ({"../unet": ["diffusers", "UNet2DConditionModel"]}, "has a component '../unet' that leads out of its folder"),
    ({"/tmp": ["diffusers", "UNet2DConditionModel"]}, "has a component '/tmp' that leads out of its folder"),
    ({"linked": ["diffusers", "UNet2DConditionModel"]}, "has a component 'linked' that leads out of its folder"),
    ({"coded": ["diffusers", "UNet2DConditionModel"]}, r"has code in coded/diffusers.py"),
]


@pytest.mark.parametrize(("change", "words"), INDEX)
def test_an_index_runs_no_code_and_stays_in_its_folder(change, words, tmp_path, monkeypatch):
    folder = sd(tmp_path / "model")
    (tmp_path / "my_code.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    (folder / "linked").symlink_to(tmp_path)
    (folder / "coded").mkdir()
    (folder / "coded" / "diffusers.py").write_text("raise SystemExit('ran')")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **change}))
    asked = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *rest: _only_known(name, asked, *rest))
    with pytest.raises(RequestError, match=f"model.id: model_index.json of .* {words}"):
        resolve(tiny_spec(folder))


def _only_known(name, real, *rest):
    assert name.partition(".")[0] in ("diffusers", "transformers", "lesion"), name
    return real(name, *rest)


def test_what_real_indexes_hold_is_read(tiny_folder, tmp_path):
    """A safety checker of a pipeline's own module, nulls, and settings that are lists."""
    folder = shutil.copytree(tiny_folder, tmp_path / "real")
    index = json.loads((folder / "model_index.json").read_text())
    more = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "layers": [9, 18],
            "feature_extractor": [None, None], "requires_safety_checker": True}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps({**index, **more}))
    assert "layers" not in resolve(tiny_spec(folder)).components
