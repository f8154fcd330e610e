"""Writes a Stable Diffusion 1.x pipeline as one .safetensors file in the original (LDM) layout.

The inverse of the renaming that diffusers does when it reads such files; for pipelines with SD 1.x's block counts.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
WHOLE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _unet_prefixes() -> dict[str, str]:
    found = {"mid_block.attentions.0.": "middle_block.1."}
    for j in range(2):
        found[f"mid_block.resnets.{j}."] = f"middle_block.{2 * j}."
    for i in range(4):
        for j in range(2):
            found[f"down_blocks.{i}.resnets.{j}."] = f"input_blocks.{3 * i + j + 1}.0."
            found[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{3 * i + j + 1}.1."
        for j in range(3):
            found[f"up_blocks.{i}.resnets.{j}."] = f"output_blocks.{3 * i + j}.0."
            found[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{3 * i + j}.1."
        found[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{3 * (i + 1)}.0.op."
        found[f"up_blocks.{i}.upsamplers.0."] = f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}."
    return found


def _rename(key: str, prefixes: dict[str, str]) -> str:
    for ours, theirs in prefixes.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def _unet(key: str) -> str:
    for ours, theirs in WHOLE.items():
        if key.startswith(ours + "."):
            return theirs + key.removeprefix(ours)
    new = _rename(key, _unet_prefixes())
    if "resnets" in key:
        head, name, tail = new.rsplit(".", 2)
        new = f"{head}.{RESNET[name]}.{tail}"
    return new


def _vae(key: str, levels: int) -> str:
    prefixes = {}
    for i in range(levels):
        for j in range(3):
            prefixes[f"encoder.down_blocks.{i}.resnets.{j}."] = f"encoder.down.{i}.block.{j}."
            prefixes[f"decoder.up_blocks.{i}.resnets.{j}."] = f"decoder.up.{levels - 1 - i}.block.{j}."
        prefixes[f"encoder.down_blocks.{i}.downsamplers.0."] = f"encoder.down.{i}.downsample."
        prefixes[f"decoder.up_blocks.{i}.upsamplers.0."] = f"decoder.up.{levels - 1 - i}.upsample."
    for side in ("encoder", "decoder"):
        for j in range(2):
            prefixes[f"{side}.mid_block.resnets.{j}."] = f"{side}.mid.block_{j + 1}."
        prefixes[f"{side}.conv_norm_out."] = f"{side}.norm_out."
    return _rename(key, prefixes).replace("conv_shortcut", "nin_shortcut")


def write_single_file(folder: Path, target: Path) -> Path:
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    levels = len(pipe.vae.config.block_out_channels)
    state = {f"model.diffusion_model.{_unet(key)}": value for key, value in pipe.unet.state_dict().items()}
    state |= {f"first_stage_model.{_vae(key, levels)}": value for key, value in pipe.vae.state_dict().items()}
    text = {key if key.startswith("text_model.") else f"text_model.{key}": value for key, value in
            pipe.text_encoder.state_dict().items()}  # fmt: skip
    state |= {f"cond_stage_model.transformer.{key}": value for key, value in text.items()}
    save_file({key: value.contiguous() for key, value in state.items()}, target)
    return target
