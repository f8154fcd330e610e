"""Stage `vae`: an AutoencoderKL that turns 64x64 pictures into 16x16x4 latents.

What a small UNet can learn depends on the latents more than on its own size: a code that reconstructs well may be
nearly white noise in space, and then shapes are hardly learnt (see Skorokhodov et al. 2025, arXiv:2502.14831). So three
channels are kept near the picture itself, each 4x4 block's mean colour in whitened coordinates; the fourth is free to
carry detail. The posterior has a fixed width instead of a KL term, under which channels died.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

from embedded.common import Average, Run, backward, loop, pick, scenes

STEPS, BATCH, RATE, SCENES = 2200, 32, 2e-3, 24576
# Standard deviation of the scaled latents. Stable Diffusion's schedule is made for 64x64 latents; in 16x16 less is
# redundant, and noise hides shapes sooner. This puts its middle where Karras et al. 2022 (arXiv:2206.00364) train most.
SCALE = 2.5
CROP = 32  # pixels; no layer looks further than its convolutions, so most steps train on quarter-size crops
NOISE = 0.1  # standard deviation of the posterior
DETAIL = 0.5  # standard deviation of the free channel; the others' is about 1
LAYOUT, FREE = 0.3, 0.05  # weights of the penalties on the three channels and on the free one
WHOLE = 0.8  # share of the steps after which whole pictures are shown, 12 at a time


def build() -> AutoencoderKL:
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        force_upcast=False,
    )
    with torch.no_grad():  # the second half of the moments is the logarithm of the variance
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = 2 * math.log(NOISE)
    return vae


def _gradient(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def whitening(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (3) and matrix (3, 3) that turn the block means of pictures in [-1, 1] into uncorrelated unit variances."""
    colours = F.avg_pool2d(images.float() / 127.5 - 1, 4).transpose(0, 1).flatten(1)
    values, vectors = torch.linalg.eigh(torch.cov(colours))
    vectors = vectors * vectors.sum(0).sign()  # an eigenvector's sign is any
    return colours.mean(1), (vectors / values.sqrt()).T


def train(run: Run) -> None:
    torch.manual_seed(1)
    images, _ = scenes(run, SCENES)
    vae = build().to(run.device).train()
    average = Average(vae, 0.998)
    mean, matrix = (part.to(run.device) for part in whitening(images[:2048]))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-4)

    def step_fn(step: int, generator: torch.Generator) -> dict[str, float]:
        whole = step >= WHOLE * STEPS
        x = images[pick(len(images), 12 if whole else BATCH, generator)]
        if not whole:
            top, left = (4 * torch.randint(9, (2,), generator=generator)).tolist()
            x = x[..., top : top + CROP, left : left + CROP]
        x = x.to(run.device).float() / 127.5 - 1
        z = vae.encode(x).latent_dist.mean  # float32: bf16 is slower for convolutions this narrow
        noise = torch.randn(z.shape, generator=generator).to(run.device)
        y = vae.decode(z + NOISE * noise).sample
        l1, mse = F.l1_loss(y, x), F.mse_loss(y, x)
        edges = sum(F.l1_loss(a, b) for a, b in zip(_gradient(y), _gradient(x), strict=True))
        colours = torch.einsum("cd,bdhw->bchw", matrix, F.avg_pool2d(x, 4) - mean[:, None, None])
        layout = F.mse_loss(z[:, :3], colours)
        free = z[:, 3].mean() ** 2 + (z[:, 3].std() - DETAIL) ** 2
        backward(l1 + mse + edges + LAYOUT * layout + FREE * free, optimizer)
        return {"psnr": float(10 * torch.log10(4 / mse.detach())), "layout": float(layout.detach())}

    loop(run, "vae", run.steps(STEPS), {"vae": vae}, optimizer, step_fn, {"vae": average})
    final = average.module
    latents = encode(final, images[: min(2048, len(images))], run)
    final.register_to_config(scaling_factor=float(SCALE / latents.float().std()))
    final.save_pretrained(run.folder / "vae")


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, run: Run) -> torch.Tensor:
    """Posterior means, unscaled, (n, 4, 16, 16) float16."""
    out = []
    for chunk in tqdm(images.split(64), desc="encode", mininterval=5):
        out.append(vae.encode(chunk.to(run.device).float() / 127.5 - 1).latent_dist.mean.half().cpu())
    return torch.cat(out)
