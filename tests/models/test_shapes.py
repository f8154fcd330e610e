"""Weights and adapters of another shape than configs say: refused by the headers of their files, nothing loaded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import tiny_spec
from lesion import models
from lesion.errors import RequestError
from lesion.models import Lora, resolve, shapes

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **more: pytest.fail("loaded"))
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def widened(file: Path, name: str) -> None:
    weights = load_file(file)
    weights[name] = torch.cat([weights[name], weights[name][:1]])
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("file", "name", "told"),
    [
        (f"unet/{WEIGHTS}", "conv_in.weight", "unet: conv_in.weight is 17 x 4 x 3 x 3, by its config 16 x 4 x 3 x 3"),
        (f"vae/{WEIGHTS}", "encoder.conv_in.bias", "vae: encoder.conv_in.bias is 9, by its config 8"),
        (
            "text_encoder/model.safetensors",
            "embeddings.position_embedding.weight",
            "text_encoder: .*position_embedding.weight is 78 x 16, by its config 77 x 16",
        ),
    ],
)
def test_weights_of_another_shape_are_refused_before_any_is_read(copy, file, name, told):
    name = next(one for one in load_file(copy / file) if one.endswith(name))
    widened(copy / file, name)
    with pytest.raises(RequestError, match=f"^model.id: .* of another shape than its configs say: {told}$"):
        models.load(resolve(tiny_spec(copy)), "cpu")


def test_shards_are_looked_at_and_packed_weights_left_to_the_loader(copy):
    whole = copy / "unet" / WEIGHTS
    names = sorted(load_file(whole))
    widened(whole, "conv_out.weight")
    widened(whole, "conv_out.bias")
    whole.rename(copy / "unet" / "a.safetensors")
    (copy / "unet" / f"{WEIGHTS}.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")})
    )
    with pytest.raises(RequestError, match=r"unet: conv_out.bias is 5, by its config 4; so 1 other$"):
        shapes.check(resolve(tiny_spec(copy)))
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "x"}}))
    shapes.check(resolve(tiny_spec(copy)))


@pytest.mark.parametrize(
    "names",
    [
        "unet.{}.lora_A.weight unet.{}.lora_B.weight",
        "unet.{}.lora.down.weight unet.{}.lora.up.weight",
        "lora_unet_{}.lora_down.weight lora_unet_{}.lora_up.weight",
    ],
)
def test_adapters_of_another_model_are_refused_by_the_shapes_of_their_names(copy, tmp_path, names):
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"  # 16 x 16 in this UNet
    spelled = path.replace(".", "_") if names.startswith("lora_unet") else path
    down, up = (name.format(spelled) for name in names.split())

    def source(width: int, height: int):
        file = tmp_path / "lora.safetensors"
        save_file({down: torch.zeros(2, width), up: torch.zeros(height, 2)}, file)
        return resolve(tiny_spec(copy, loras=(Lora(str(file)),)))

    shapes.check(source(16, 16))
    for width, height, told in (
        (32, 16, f"{down} is 2 x 32, for a weight of 16 x 16"),
        (16, 8, f"{up} is 8 x 2, for a weight of 16 x 16"),
    ):
        with pytest.raises(
            RequestError, match=f"^model.loras: .* does not fit StableDiffusionPipeline: {re.escape(told)}$"
        ):
            models.load(source(width, height), "cpu")


def test_what_does_not_fit_leaves_no_trace(cli, copy, tmp_path):
    widened(copy / "unet" / WEIGHTS, "conv_in.weight")
    moved = copy.rename(tmp_path.parent / f"{tmp_path.name}-model")
    for more in ([], ["tracker=wandb"], ["confirm.hypotheses=[changes]", "prompts.items=[a,b]"]):
        code, _, err = cli(f"model.id={moved}", *more)
        assert (code, err.count("\n")) == (2, 1) and "another shape" in err, err
        assert list(cli.folder.iterdir()) == [], more
