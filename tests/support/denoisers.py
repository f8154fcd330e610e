"""Tiny denoisers of every family, called directly under lesions, and the same calls with plain hooks."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)

from conftest import small_unet
from lesion.denoising.run import Denoising
from lesion.replacements.zero import Zero
from lesion.study.lesions import Lesion, Replacement
from lesion.surgery.operation import Lesions, replacement_key

STEPS, TEXT = 4, 5  # denoiser calls; text tokens of the joint models


def build(name, seed=0, **changes):
    """One tiny denoiser by the family's name."""
    torch.manual_seed(seed)
    if name == "unet":
        denoiser = small_unet()
    elif name == "sd3":
        denoiser = SD3Transformer2DModel(
            **{
                "sample_size": 4,
                "patch_size": 1,
                "in_channels": 4,
                "num_layers": 2,
                "attention_head_dim": 8,
                "num_attention_heads": 3,
                "caption_projection_dim": 24,
                "joint_attention_dim": 12,
                "pooled_projection_dim": 16,
                "out_channels": 4,
                "pos_embed_max_size": 8,
                **changes,
            }
        )
    elif name == "pixart":
        denoiser = PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=12,
            cross_attention_dim=24,
            out_channels=8,
            use_additional_conditions=False,
        )
    elif name == "sana":
        denoiser = SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=12,
            sample_size=8,
        )
    elif name == "hunyuan":
        denoiser = HunyuanDiT2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=4,  # the last ones have long skips
            attention_head_dim=8,
            num_attention_heads=3,
            hidden_size=24,
            cross_attention_dim=12,
            cross_attention_dim_t5=8,
            pooled_projection_dim=4,
            text_len=5,
            text_len_t5=5,
            activation_fn="gelu-approximate",
        )
    elif name == "qwen":
        denoiser = QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=3,
            joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
        )  # fmt: skip
    elif name == "flux2":
        denoiser = Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=3,
            joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2),
        )  # fmt: skip
    elif name == "zimage":
        denoiser = ZImageTransformer2DModel(
            in_channels=4, dim=24, n_layers=2, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=12,
            axes_dims=[2, 2, 4], axes_lens=[256, 32, 32],
        )  # fmt: skip
    else:
        denoiser = FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=3,
            joint_attention_dim=12,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=True,
        )
    for parameter in denoiser.parameters():  # biases and norms that do something
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return denoiser.eval()


def inputs(name, rows, seed=1):
    """Arguments of each denoiser call of one image: `rows` rows."""
    dice = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=dice)

    calls = []
    for step in range(STEPS):
        timestep = torch.full((rows,), 900.0 - 200 * step)
        if name == "unet":
            call = {"sample": noise(rows, 4, 8, 8), "timestep": timestep, "encoder_hidden_states": noise(rows, 7, 16)}
        elif name in ("pixart", "sana", "hunyuan"):
            call = {"timestep": timestep, "encoder_hidden_states": noise(rows, 5, 12)}
            call |= {"hidden_states": noise(rows, 4, 8, 8)}
            if name == "pixart":
                call |= {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
            if name == "hunyuan":
                call |= {
                    "text_embedding_mask": torch.ones(rows, 5),
                    "encoder_hidden_states_t5": noise(rows, 5, 8),
                    "text_embedding_mask_t5": torch.ones(rows, 5),
                    "image_meta_size": torch.ones(rows, 6),
                    "style": torch.zeros(rows, dtype=torch.int64),
                    "image_rotary_emb": [noise(16, 8), noise(16, 8)],
                }
        elif name == "qwen":  # the second row's text is padded
            mask = torch.ones(rows, TEXT, dtype=torch.bool)
            mask[1:, TEXT - 2 :] = False
            call = {"hidden_states": noise(rows, 9, 16), "timestep": timestep / 1000}
            call |= {"encoder_hidden_states": noise(rows, TEXT, 12), "encoder_hidden_states_mask": mask}
            call |= {"img_shapes": [[(1, 3, 3)]] * rows}
        elif name == "zimage":  # texts of different lengths, in a list
            lengths = [5 if row % 2 else 40 for row in range(rows)]
            call = {"x": list(noise(rows, 4, 1, 8, 8)), "t": timestep / 1000}
            call |= {"cap_feats": [noise(length, 12) for length in lengths]}
        elif name == "flux2":
            places = torch.stack(torch.meshgrid(*map(torch.arange, (1, 3, 3, 1)), indexing="ij"), -1).reshape(-1, 4)
            call = {"hidden_states": noise(rows, 9, 16), "encoder_hidden_states": noise(rows, TEXT, 12)}
            call |= {"timestep": timestep / 1000, "guidance": torch.full((rows,), 3.5), "img_ids": places}
            call |= {"txt_ids": torch.cat([torch.zeros(TEXT, 3), torch.arange(TEXT)[:, None]], dim=1)}
        else:
            call = {"pooled_projections": noise(rows, 16), "encoder_hidden_states": noise(rows, TEXT, 12)}
            if name == "sd3":
                call |= {"hidden_states": noise(rows, 4, 4, 4), "timestep": timestep}
            else:
                places = torch.stack(torch.meshgrid(*map(torch.arange, (1, 3, 3)), indexing="ij"), -1).reshape(-1, 3)
                call |= {
                    "hidden_states": noise(rows, 9, 4),
                    "timestep": timestep / 1000,
                    "guidance": torch.full((rows,), 3.5),
                    "img_ids": places.float(),
                    "txt_ids": torch.zeros(TEXT, 3),
                }
        calls.append(call)
    return calls


def lesion(*layers, replacement="zero", **changes):
    return Lesion("custom", "", tuple(layers), Replacement(replacement), **changes)


def under(denoiser, anatomy, lesions, calls, intervention=None, places=None):
    """The denoiser's outputs, a tensor a call, with image i of the rows under lesions[i]."""
    interventions = {replacement_key(one): intervention or Zero() for one in lesions if one}
    pipe = SimpleNamespace(_num_timesteps=len(calls), scheduler=SimpleNamespace(timesteps=range(len(calls))))
    with Denoising(pipe, denoiser, len(lesions), [Lesions(anatomy, lesions, interventions, places)]).running():
        return [whole(denoiser(**call).sample) for call in calls]


def whole(sample):
    """One tensor, also where a denoiser puts out a list with one a row (Z-Image)."""
    return torch.stack(sample) if isinstance(sample, list) else sample


def hooked(denoiser, hooks, calls):
    """The outputs with plain forward hooks: module path -> hook(module, args, kwargs, output)."""
    handles = [
        denoiser.get_submodule(path).register_forward_hook(hook, with_kwargs=True) for path, hook in hooks.items()
    ]
    with torch.inference_mode():
        found = [whole(denoiser(**call).sample) for call in calls]
    for handle in handles:
        handle.remove()
    return found


def same(ours, theirs):
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def apart(ours, theirs):
    """The largest absolute difference."""
    return max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True))
