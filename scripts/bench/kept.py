"""Bytes that gradients of an attribution keep, counted without computing anything: on torch's meta device.

Every tensor that an operator saves for its gradient is counted once by its storage, weights left out. Attention is
counted as the fused kernels keep it: queries, keys, values, output, and one float32 a query and head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench import architectures
from lesion.attribution.strengths import Strengths
from lesion.denoising.run import Denoising
from lesion.models import EMBEDDED
from lesion.replacements.zero import Zero
from lesion.study.lesions import Lesion, Replacement
from lesion.surgery.anatomy import examine
from lesion.surgery.operation import replacement_key

TOKENS = 77  # of a text


@dataclass(frozen=True)
class Size:
    """A model and a size of image. small: widths and depths shrunk, for trying the code."""

    model: str
    side: int
    small: bool = False

    def configs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of the UNet and of the autoencoder."""
        if self.model == "embedded":
            unet, vae = diffusers.UNet2DConditionModel, diffusers.AutoencoderKL
            return unet.load_config(EMBEDDED / "unet"), vae.load_config(EMBEDDED / "vae")
        config = architectures.UNETS[self.model]
        if self.small:
            config = {**config, **architectures.SMALL_UNETS[self.model]}
        return config, architectures.VAE

    def unet(self, device: str) -> Any:
        with torch.device(device):
            return diffusers.UNet2DConditionModel.from_config(self.configs()[0]).eval().requires_grad_(False)

    def decoder(self, device: str) -> tuple[Any, Tensor]:
        """The decoder with the latents of one image."""
        with torch.device(device):
            vae = diffusers.AutoencoderKL.from_config(self.configs()[1]).eval().requires_grad_(False)
            side = self.side // 2 ** (len(vae.config.block_out_channels) - 1)
            latents = torch.zeros(1, vae.config.latent_channels, side, side, requires_grad=True)
        return nn.Sequential(vae.post_quant_conv or nn.Identity(), vae.decoder), latents


class _Fused(torch.autograd.Function):
    """What a fused attention saves, and nothing of what it computes."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        context.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output


@contextmanager
def _fused() -> Iterator[None]:
    before = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda query, key, value, *_, **__: _Fused.apply(query, key, value)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


def kept(work: Callable[[], Any], *parts: nn.Module) -> int:
    """Bytes that what `work` computes keeps for gradients, besides the weights of these parts."""
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = work()
    weights = {
        one.untyped_storage()._cdata for part in parts for one in (*part.parameters(), *part.buffers())
    }  # fmt: skip
    del found
    return sum(one.untyped_storage().nbytes() for place, one in storages.items() if place not in weights)


def denoiser_call(size: Size, unet: Any) -> Callable[[], Any]:
    """One denoiser call with both branches of guidance of one image, in which all cross-attention has strengths."""
    anatomy = examine(unet)
    lesions = [Lesion("leave_one_out", path, (path,), Replacement("zero")) for path in anatomy.paths]
    client = Strengths(anatomy, lesions, torch.zeros(len(lesions), 1), {replacement_key(lesions[0]): Zero()})
    device = next(unet.parameters()).device
    client.strengths = torch.zeros(len(lesions), 1, device=device, requires_grad=True)
    sides = len(size.configs()[1]["block_out_channels"]) - 1
    with torch.device(device):
        latents = torch.zeros(2, unet.config.in_channels, *[size.side // 2**sides] * 2, requires_grad=True)
        given: dict[str, Any] = {"encoder_hidden_states": torch.zeros(2, TOKENS, unet.config.cross_attention_dim)}
        if unet.config.addition_embed_type == "text_time":
            times = unet.config.addition_time_embed_dim
            pooled = unet.config.projection_class_embeddings_input_dim - 6 * times
            given["added_cond_kwargs"] = {"text_embeds": torch.zeros(2, pooled), "time_ids": torch.zeros(2, 6)}
        step = torch.zeros((), dtype=torch.long)

    def work() -> Any:
        pipe = SimpleNamespace(_num_timesteps=1, scheduler=SimpleNamespace(step=None))
        with Denoising(pipe, unet, 1, [client]).running():
            return unet(latents, step, **given).sample

    return work


def counted(size: Size) -> tuple[int, int]:
    """Bytes of one denoiser call and of the decoder, an image in float32; half of that in half precision."""
    unet = size.unet("meta")
    decoder, latents = size.decoder("meta")
    with _fused():
        return kept(denoiser_call(size, unet), unet), kept(lambda: decoder(latents), decoder)
