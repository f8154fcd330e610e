"""One training step's arithmetic for any Stable Diffusion UNet: conditions in, loss out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from tqdm import tqdm

from lora.data import NOISE, Example, Pixels, randomness, read_pixels, rows_of
from lora.recipe import Recipe, Refused


def check(pipe: Any) -> None:
    """Raises Refused unless the pipeline is one of Stable Diffusion's kind: text, latents, a UNet."""
    name, unet = type(pipe).__name__, getattr(pipe, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        raise Refused(f"{name} has no UNet2DConditionModel to train; allowed: Stable Diffusion 1.x, 2.x, XL")
    if getattr(pipe, "vae", None) is None or not hasattr(pipe, "encode_prompt"):
        raise Refused(f"{name} has no latents or no text encoder; allowed: Stable Diffusion 1.x, 2.x, XL")
    if unet.config.in_channels != pipe.vae.config.latent_channels:
        raise Refused(f"the UNet of {name} reads more than latents (it inpaints or edits); take a text-to-image model")
    if pipe.config.get("requires_aesthetics_score"):
        raise Refused("an SDXL refiner cannot be trained here; take the base model")
    if unet.config.addition_embed_type not in (None, "text_time"):
        raise Refused(f"the UNet's added conditions ({unet.config.addition_embed_type}) are unknown here")


@dataclass(frozen=True)
class Batch:
    """clean, noise: latents (n, channels, h, w). times: (n,). texts: captions. sizes: (n, 6), SDXL's time ids."""

    clean: Tensor
    noise: Tensor
    times: Tensor
    texts: list[str]
    sizes: Tensor


class Denoising:
    """The task that a LoRA is trained on: predict the noise (or the velocity) in a noised image from its caption.

    Latents are encoded once, at the start; text features are computed for each caption once and kept.
    """

    def __init__(self, pipe: Any, encode: Callable[[list[str]], Any], recipe: Recipe, examples: Sequence[Example]):
        check(pipe)
        self.pipe, self.encode, self.recipe, self.examples = pipe, encode, recipe, examples
        self.side = recipe.side or pipe.unet.config.sample_size * pipe.vae_scale_factor
        if self.side % (2 * pipe.vae_scale_factor):
            raise Refused(f"the side must be a multiple of {2 * pipe.vae_scale_factor} pixels; got {self.side}")
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        if self.schedule.config.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise Refused(f"unknown prediction type {self.schedule.config.prediction_type!r}")
        self.latents: list[Tensor] = []  # of each example, mean and deviation: (1 or 2 for flips, 2, channels, h, w)
        self.sizes: list[Tensor] = []  # of each example, (6,)

    def prepare(self, show: bool = True) -> None:
        """Encode the images."""
        with _in_float32(self.pipe.vae) as vae, torch.no_grad():
            for example in tqdm(self.examples, desc="encode images", disable=not show, mininterval=2):
                pixels = read_pixels(example.path, self.side)
                both = [pixels.values, pixels.values.flip(-1)] if self.recipe.flip else [pixels.values]
                found = vae.encode(torch.stack(both).to(vae.device)).latent_dist
                self.latents.append(torch.stack([found.mean, found.std], dim=1).cpu())
                self.sizes.append(self._size(pixels))

    def _size(self, pixels: Pixels) -> Tensor:
        return torch.tensor([*pixels.original, *pixels.corner, self.side, self.side], dtype=torch.float32)

    def batch(self, index: int) -> Batch:
        """Batch `index` (from 0) of the run: images, noise and times depend on the index and the seed only."""
        recipe = self.recipe
        rows = rows_of(len(self.examples), recipe.batch, index, recipe.seed)
        generator = randomness(recipe.seed, NOISE, index)
        flipped = torch.rand(len(rows), generator=generator) < (0.5 if recipe.flip else 0.0)
        dropped = torch.rand(len(rows), generator=generator) < recipe.dropout
        moments = torch.stack([self.latents[row][int(flip)] for row, flip in zip(rows, flipped.tolist(), strict=True)])
        clean = moments[:, 0] + moments[:, 1] * torch.randn(moments[:, 0].shape, generator=generator)
        shift = getattr(self.pipe.vae.config, "shift_factor", None) or 0.0
        return Batch(
            clean=(clean - shift) * self.pipe.vae.config.scaling_factor,
            noise=torch.randn(clean.shape, generator=generator),
            times=torch.randint(self.schedule.config.num_train_timesteps, (len(rows),), generator=generator),
            texts=[
                "" if drop else self.examples[row].caption for row, drop in zip(rows, dropped.tolist(), strict=True)
            ],
            sizes=torch.stack([self.sizes[row] for row in rows]),
        )

    def loss(self, unet: Any, batch: Batch) -> Tensor:
        """Mean squared error of the UNet's prediction, a scalar."""
        device, dtype = self.pipe.unet.device, self.pipe.unet.dtype
        clean, noise, times = batch.clean.to(device), batch.noise.to(device), batch.times.to(device)
        noisy = self.schedule.add_noise(clean, noise, times)
        hidden, pooled = self._text(batch.texts)
        added = None
        if pooled is not None:
            added = {"text_embeds": pooled, "time_ids": batch.sizes.to(device, hidden.dtype)}
        guess = unet(noisy.to(dtype), times, encoder_hidden_states=hidden, added_cond_kwargs=added).sample
        kind = self.schedule.config.prediction_type
        target = {"epsilon": noise, "sample": clean}.get(kind)
        if target is None:
            target = self.schedule.get_velocity(clean, noise, times)
        return F.mse_loss(guess.float(), target.float())

    @torch.no_grad()
    def _text(self, texts: list[str]) -> tuple[Tensor, Tensor | None]:
        """Hidden states (n, tokens, channels) and, of SDXL, pooled features (n, channels)."""
        found = self.encode(texts)
        if self.pipe.unet.config.addition_embed_type == "text_time":
            return found[0], found[2]
        return found[0], None


@contextmanager
def _in_float32(vae: Any) -> Iterator[Any]:
    """SDXL's VAE gives NaN in float16."""
    before = vae.dtype
    if before == torch.float32:
        yield vae
        return
    vae.to(torch.float32)
    try:
        yield vae
    finally:
        vae.to(before)
