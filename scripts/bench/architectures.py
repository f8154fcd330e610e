"""Pipelines of the published architectures with random weights: as slow as the real ones, and nothing to download.

The values are those of the models' published configs; `small` shrinks widths and depths, for trying the code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

VOCABULARY = 49408
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
# Their texts and images attend jointly: class and published config.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
    ),
}
SMALL_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "sd3": {"num_layers": 3, "num_attention_heads": 4, "caption_projection_dim": 256, "joint_attention_dim": 256},
    "flux": {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 256},
}
JOINT_VAE = {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 32},
    "sdxl": {
        "block_out_channels": (32, 32, 64),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 64,
        "attention_head_dim": (2, 2, 4),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    },
}
NAMES = tuple(UNETS)


def tokenizer() -> CLIPTokenizer:
    """Without merges: every text is spelled in bytes. The token count does not matter, prompts are padded to 77."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=77)


def _text(words: CLIPTokenizer, sizes: dict[str, int], act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=77,
        projection_dim=sizes["hidden_size"],
        hidden_act=act,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **sizes,
    )


def networks(name: str, words: CLIPTokenizer, small: bool = False) -> dict[str, torch.nn.Module]:
    """The neural networks of a pipeline by their component names, on torch's default device and dtype."""
    unet = {**UNETS[name], **(SMALL_UNETS[name] if small else {})}
    vae = {**VAE, **({"block_out_channels": (32,) * 4, "layers_per_block": 1} if small else {})}
    vae |= {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True} if name == "sdxl" else {}
    found = {
        "unet": diffusers.UNet2DConditionModel(**unet),
        "vae": diffusers.AutoencoderKL(**vae),
        "text_encoder": CLIPTextModel(_text(words, SMALL_TEXT if small else CLIP_L, "quick_gelu")),
    }
    if name == "sdxl":
        second = _text(words, SMALL_TEXT if small else CLIP_BIG_G, "gelu")
        found["text_encoder_2"] = CLIPTextModelWithProjection(second)
    return found


def build(name: str, folder: Path, device: str, small: bool = False) -> Path:
    """Write the pipeline in float16 to `folder` (unless it is there), with weights drawn on `device`."""
    if (folder / "model_index.json").is_file():
        return folder
    words, default = tokenizer(), torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device(device):  # initialising billions of weights takes a CPU minutes
            parts = networks(name, words, small)
    finally:
        torch.set_default_dtype(default)
    if name == "sdxl":
        scheduler = diffusers.EulerDiscreteScheduler(**NOISE, timestep_spacing="leading")
        pipe = diffusers.StableDiffusionXLPipeline(
            **parts, tokenizer=words, tokenizer_2=words, scheduler=scheduler, add_watermarker=False
        )
    else:
        scheduler = diffusers.PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False)
        pipe = diffusers.StableDiffusionPipeline(
            **parts,
            tokenizer=words,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.to("cpu").save_pretrained(folder)
    return folder
