"""Stage `export`: writes the finished diffusers folder, and the CLIP beside it, in half precision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTextModel

from embedded import unet as unet_stage
from embedded.common import Run
from embedded.text import build as build_text
from embedded.text import load_tokenizer


def assemble(run: Run) -> StableDiffusionPipeline:
    """The pipeline of the averaged weights as they stand at the last checkpoint, float32."""
    state = torch.load(run.folder / "unet.pt", map_location="cpu", weights_only=True)
    tokenizer = load_tokenizer(run)
    unet, text = unet_stage.build(), build_text(tokenizer)
    unet.load_state_dict(state["averages"]["unet"])
    text.load_state_dict(state["averages"]["text"])
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(run.folder / "vae"),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=unet_stage.noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def start_from(folder: Path, run: Run) -> None:
    """Fill a new run folder from a finished model, so that the `text` and `unet` stages train it further."""
    for part in ("tokenizer", "clip"):
        shutil.copytree(folder / part, run.folder / part, dirs_exist_ok=True)
    shutil.copytree(folder / "unet", run.folder / "unet_start", dirs_exist_ok=True)
    for cls, part, name in ((AutoencoderKL, "vae", "vae"), (CLIPTextModel, "text_encoder", "text_start")):
        cls.from_pretrained(folder / part, torch_dtype=torch.float32).save_pretrained(run.folder / name)  # kept in half
    for stage in ("vae", "tokenizer", "clip"):
        (run.folder / f"{stage}.done").touch()


def export(run: Run) -> None:
    assemble(run).to(torch.float16).save_pretrained(run.target)
    for config in run.target.glob("*/config.json"):  # where it was trained is nobody's business, and changes the hash
        data = json.loads(config.read_text(encoding="utf-8"))
        data.pop("_name_or_path", None)
        config.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    shutil.copytree(run.folder / "clip", run.target / "clip", dirs_exist_ok=True)
