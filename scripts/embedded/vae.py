"""Stage `vae`: an AutoencoderKL that turns 64x64 pictures into 16x16x4 latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

from embedded.common import Average, Run, backward, loop, pick, scenes

STEPS, BATCH, RATE, SCENES = 3600, 32, 2e-3, 49152
CROP = 32  # pixels; no layer looks further than its convolutions, so most steps train on quarter-size crops
WHOLE = 0.8  # share of the steps after which whole pictures are shown, 12 at a time


def build() -> AutoencoderKL:
    return AutoencoderKL(
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


def _gradient(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def train(run: Run) -> None:
    torch.manual_seed(1)
    images, _ = scenes(run, SCENES)
    vae = build().to(run.device).train()
    average = Average(vae, 0.998)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-4)

    def step_fn(step: int, generator: torch.Generator) -> dict[str, float]:
        whole = step >= WHOLE * STEPS
        x = images[pick(len(images), 12 if whole else BATCH, generator)]
        if not whole:
            top, left = (4 * torch.randint(9, (2,), generator=generator)).tolist()
            x = x[..., top : top + CROP, left : left + CROP]
        x = x.to(run.device).float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist  # float32: bf16 is slower for convolutions this narrow
        noise = torch.randn(posterior.mean.shape, generator=generator).to(run.device)
        y = vae.decode(posterior.mean + posterior.std * noise).sample
        l1, mse = F.l1_loss(y, x), F.mse_loss(y, x)
        edges = sum(F.l1_loss(a, b) for a, b in zip(_gradient(y), _gradient(x), strict=True))
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        backward(l1 + mse + edges + 2e-4 * kl, optimizer)
        return {"psnr": float(10 * torch.log10(4 / mse.detach())), "kl": float(kl.detach())}

    loop(run, "vae", run.steps(STEPS), {"vae": vae}, optimizer, step_fn, {"vae": average})
    final = average.module
    latents = encode(final, images[: min(2048, len(images))], run)
    final.register_to_config(scaling_factor=float(1 / latents.float().std()))
    final.save_pretrained(run.folder / "vae")


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, run: Run) -> torch.Tensor:
    """Posterior means, unscaled, (n, 4, 16, 16) float16."""
    out = []
    for chunk in tqdm(images.split(64), desc="encode", mininterval=5):
        out.append(vae.encode(chunk.to(run.device).float() / 127.5 - 1).latent_dist.mean.half().cpu())
    return torch.cat(out)
