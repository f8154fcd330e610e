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

TOKENS = {"sd3": 77 + 256, "flux": 512}  # of a text; CLIP's alone elsewhere
CLIP_TOKENS = 77


@dataclass(frozen=True)
class Size:
    """A model and a size of image. small: widths and depths shrunk, for trying the code and for what is run."""

    model: str
    side: int
    small: bool = False

    @property
    def joint(self) -> bool:
        """Whether its texts and images attend jointly."""
        return self.model in architectures.TRANSFORMERS

    def denoiser(self, device: str) -> Any:
        name, config = "UNet2DConditionModel", {}
        if self.joint:
            name, config = architectures.TRANSFORMERS[self.model]
            config = {**config, **(architectures.SMALL_TRANSFORMERS[self.model] if self.small else {})}
        elif self.model == "embedded":
            config = diffusers.UNet2DConditionModel.load_config(EMBEDDED / "unet")
        else:
            config = {
                **architectures.UNETS[self.model],
                **(architectures.SMALL_UNETS[self.model] if self.small else {}),
            }
        with torch.device(device):
            return getattr(diffusers, name).from_config(config).eval().requires_grad_(False)

    @property
    def vae(self) -> dict[str, Any]:
        """The autoencoder's config."""
        if self.model == "embedded":
            return dict(diffusers.AutoencoderKL.load_config(EMBEDDED / "vae"))
        return architectures.JOINT_VAE if self.joint else architectures.VAE

    @property
    def latents(self) -> int:
        """The side of an image's latents."""
        return self.side // 2 ** (len(self.vae["block_out_channels"]) - 1)

    def decoder(self, device: str) -> tuple[Any, Tensor]:
        """The decoder with the latents of one image."""
        with torch.device(device):
            vae = diffusers.AutoencoderKL.from_config(self.vae).eval().requires_grad_(False)
            latents = torch.zeros(1, vae.config.latent_channels, self.latents, self.latents, requires_grad=True)
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


class Call:
    """One denoiser call with both branches of guidance of one image (FLUX has one), in which all attention to the text
    has strengths.
    """

    def __init__(self, size: Size, denoiser: Any):
        self.denoiser = denoiser
        self.given = _given(size, denoiser)
        kind = "text_to_image" if size.joint else "cross_attention"
        anatomy = examine(denoiser, kind=kind)
        lesions = [Lesion("leave_one_out", path, (path,), Replacement("zero"), kind=kind) for path in anatomy.paths]
        self.strengths = torch.zeros(len(lesions), 1)
        self.client = Strengths(anatomy, lesions, self.strengths, {replacement_key(lesions[0]): Zero()})
        device = next(denoiser.parameters()).device
        self.strengths = self.client.strengths = self.strengths.to(device).requires_grad_()

    def plain(self) -> Tensor:
        """What it puts out, without strengths."""
        found: Tensor = self.denoiser(**self.given).sample
        return found

    def __call__(self) -> Tensor:
        pipe = SimpleNamespace(_num_timesteps=1, scheduler=SimpleNamespace(step=None))
        with Denoising(pipe, self.denoiser, 1, [self.client]).running():
            return self.plain()


def _given(size: Size, denoiser: Any) -> dict[str, Any]:
    """Arguments of the denoiser's call, on its device."""
    config, side = denoiser.config, size.latents
    rows = 1 if size.model == "flux" else 2
    with torch.device(next(denoiser.parameters()).device):
        width = config.joint_attention_dim if size.joint else config.cross_attention_dim
        given: dict[str, Any] = {"encoder_hidden_states": torch.zeros(rows, TOKENS.get(size.model, CLIP_TOKENS), width)}
        if size.joint:
            given |= {"pooled_projections": torch.zeros(rows, config.pooled_projection_dim)}
            given |= {"timestep": torch.ones(rows)}
        if size.model == "flux":  # its latents come in patches of 2 x 2
            places = [torch.arange(side // 2)] * 2
            given |= {"hidden_states": torch.zeros(rows, (side // 2) ** 2, config.in_channels, requires_grad=True)}
            given |= {"guidance": torch.ones(rows), "txt_ids": torch.zeros(TOKENS["flux"], 3)}
            given |= {"img_ids": torch.cat([torch.zeros((side // 2) ** 2, 1), torch.cartesian_prod(*places)], dim=1)}
            return given
        latents = torch.zeros(rows, config.in_channels, side, side, requires_grad=True)
        if size.joint:
            return {**given, "hidden_states": latents}
        given |= {"sample": latents, "timestep": torch.zeros((), dtype=torch.long)}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            given |= {"added_cond_kwargs": {"text_embeds": torch.zeros(2, pooled), "time_ids": torch.zeros(2, 6)}}
        return given


def counted(size: Size) -> tuple[int, int]:
    """Bytes of one denoiser call and of the decoder, an image in float32; half of that in half precision."""
    denoiser = size.denoiser("meta")
    decoder, latents = size.decoder("meta")
    with _fused():
        return kept(Call(size, denoiser), denoiser), kept(lambda: decoder(latents), decoder)
