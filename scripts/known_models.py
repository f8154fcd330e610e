"""Writes what ships of known models, so that a study of one is laid out without importing diffusers.

    python scripts/known_models.py           src/lesion/models/layers.json and facts.json
    python scripts/known_models.py --check   writes nothing; exit code 1 where a file is not what this script makes

To be run again when the installed diffusers changes, or what `lesion.surgery.anatomy` finds (then with another
`layers.FORMAT`). The denoisers are built on the meta device from the configs below: no weight, no download.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import open_clip
import torch
from omegaconf import OmegaConf

from lesion import tasks
from lesion.config.schema import conf_dir
from lesion.models import EMBEDDED, calling, facts, layers, schedulers
from lesion.models.defaults import OF_CALL, argument_of, default_of_class
from lesion.models.source import needed_parts
from lesion.study.layers import GRANULARITIES, KINDS, WITH_HEADS

SD = {"sample_size": 64, "layers_per_block": 2, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "joint_attention_dim": 4096}
SD35 = {**SD3, "qk_norm": "rms_norm"}
PIXART = {
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 128,
}
# The published configs, less what `layers.SHAPELESS` leaves out and what is the class's default anyway.
DENOISERS: dict[str, tuple[str, dict[str, Any]]] = {
    "embedded": ("UNet2DConditionModel", json.loads((EMBEDDED / "unet" / "config.json").read_text(encoding="utf-8"))),
    "sd15": ("UNet2DConditionModel", SD),
    "sd21": ("UNet2DConditionModel", {**SD, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]}),
    "sdxl": ("UNet2DConditionModel", SDXL),
    "pixart": ("PixArtTransformer2DModel", {**PIXART, "caption_channels": 4096, "norm_type": "ada_norm_single"}),
    "hunyuan_dit": (
        "HunyuanDiT2DModel",
        {"num_layers": 40, "hidden_size": 1408, "sample_size": 128, "in_channels": 4, "patch_size": 2},
    ),
    "sana": ("SanaTransformer2DModel", {}),
    "sd3_medium": ("SD3Transformer2DModel", SD3),
    "sd35_medium": ("SD3Transformer2DModel", {**SD35, "dual_attention_layers": list(range(13))}),
    "sd35_large": ("SD3Transformer2DModel", {**SD35, "num_layers": 38, "num_attention_heads": 38}),
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "flux2_dev": ("Flux2Transformer2DModel", {}),
    "flux2_klein": (
        "Flux2Transformer2DModel",
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    ),
    "qwen_image": ("QwenImageTransformer2DModel", {}),
    "z_image": ("ZImageTransformer2DModel", {}),
}
PIPELINES = (
    *("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"),
    *("PixArtAlphaPipeline", "PixArtSigmaPipeline", "HunyuanDiTPipeline", "SanaPipeline"),
    *("LatentConsistencyModelPipeline", "QwenImagePipeline", "Flux2Pipeline", "Flux2KleinPipeline", "ZImagePipeline"),
)


def built(name: str) -> Any:
    """The denoiser of this name on the meta device."""
    cls, config = DENOISERS[name]
    with torch.device("meta"):
        return getattr(diffusers, cls).from_config(config)


def folded(paths: list[str]) -> list[Any]:
    """The opposite of `layers.unfolded`."""
    entries: list[Any] = []
    for path in paths:
        attention, _, head = path.partition(".heads.")
        if not head:
            entries.append(path)
        elif head == "0":
            entries.append([attention, 1])
        else:
            entries[-1][1] += 1
    assert layers.unfolded(entries) == paths
    return entries


def layer_lists() -> dict[str, Any]:
    defaults = {cls: schedulers.defaults_of(cls) for cls in sorted({cls for cls, _ in DENOISERS.values()})}
    lists: list[list[Any]] = []
    models: dict[str, Any] = {}
    for name, (cls, config) in DENOISERS.items():
        denoiser = built(name)
        found: dict[str, dict[str, Any]] = {}
        for by in GRANULARITIES:
            found[by] = {}
            for kind in KINDS:
                one = layers.examined(denoiser, by, kind)
                if isinstance(one, list):
                    entries = folded(one) if by == "head" and kind in WITH_HEADS else one
                    if entries not in lists:
                        lists.append(entries)
                    one = lists.index(entries)
                found[by][kind] = one
        models[layers.identify(cls, config, defaults[cls])] = found
    return {"defaults": defaults, "models": models, "lists": lists}


def class_facts() -> dict[str, Any]:
    pipelines = {}
    for name in PIPELINES:
        cls = getattr(diffusers, name)
        pipelines[name] = {
            "arguments": dict(calling.takes(cls)),
            "defaults": {
                argument: default_of_class(cls, argument)
                for argument in sorted({*OF_CALL.values(), argument_of(name, "guidance")})
            },
            **{task: bool(tasks.of(task).counterpart(name)) for task in tasks.known() if not tasks.of(task).own},
            "single_file": hasattr(cls, "from_single_file"),
            "parts": needed_parts(cls),
        }
    classes = sorted({cls for cls, _ in DENOISERS.values()})
    blocks = {name: bool(getattr(getattr(diffusers, name), "_repeated_blocks", None)) for name in classes}
    asked = sorted(set(schedulers.SCHEDULERS.values()))
    scorers = [OmegaConf.load(path) for path in sorted((conf_dir() / "scorer").glob("*.yaml"))]
    clips = [[one.clip_model, one.clip_pretrained] for one in scorers if one.clip_pretrained]
    for model, tag in clips:
        assert tag in open_clip.list_pretrained_tags_by_model(model), (model, tag)
    return {
        "open_clip": open_clip.__version__,
        "clips": [clip for number, clip in enumerate(clips) if clip not in clips[:number]],
        "diffusers": diffusers.__version__,
        "pipelines": pipelines,
        "denoisers": {name: {"repeated_blocks": named} for name, named in blocks.items()},
        "schedulers": {name: schedulers.switches_of(name) for name in asked},
    }


def compact(value: Any) -> str:
    """JSON, an entry of a mapping a line, so that two changes of the files can be merged."""
    if isinstance(value, dict):
        entries = (f'"{key}":{json.dumps(value[key], separators=(",", ":"), sort_keys=True)}' for key in sorted(value))
        return "{\n " + ",\n ".join(entries) + "}"
    return json.dumps(value, separators=(",", ":"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    check, wrong = parser.parse_args().check, 0
    made: dict[Path, dict[str, Any]] = {layers.FILE: layer_lists(), facts.FILE: class_facts()}
    for path, data in made.items():
        text = "{" + ",".join(f'\n"{key}":{compact(data[key])}' for key in sorted(data)) + "\n}\n"
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            print(f"{path} is not what this script makes: run it without --check", file=sys.stderr)
            wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())
