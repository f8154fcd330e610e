"""Tiny Stable Diffusion folders with the full models' lists of layers, for presets that name layers."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModelWithProjection

from conftest import small_pipeline


def _loud(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Makes the text matter: cross-attention of random weights hardly changes an image."""
    with torch.no_grad():
        for path, module in unet.named_modules():
            if path.endswith("attn2"):
                module.to_out[0].weight.mul_(8)
    return unet.eval()


def sd15_layout(folder: Path) -> Path:
    """SD 1.5's 16 cross-attention layers, on 16 x 16 images."""
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16,) * 4, cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8
    )
    small_pipeline(_loud(unet)).save_pretrained(folder)
    return folder


def sdxl_layout(folder: Path) -> Path:
    """SDXL's 11 cross-attention layers and 70 sites, on 16 x 16 images."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=(2, 2, 2),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        norm_num_groups=8,
    )
    base = small_pipeline()
    StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(base.text_encoder.config).eval(),
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=_loud(unet),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder
