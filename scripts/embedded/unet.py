"""Stage `unet`: a Stable Diffusion 1.5 UNet in miniature, trained with v-prediction on the cached latents."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel

from embedded.common import Average, Run, backward, loop, pick, scenes
from embedded.text import WIDTH, load_tokenizer, shape_positions, tokenize, trained_read_outs
from embedded.vae import SCALE, SCENES, encode
from lesion.toy_world import parse_caption

STEPS, BATCH, RATE, TEXT_RATE = 3500, 32, 8e-4, 0.3
DROPOUT = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
DECAY = 0.9985
READING = 0.1  # weight of the text encoder's read-outs
FOCUS = (0.75, 0.25)  # share of a batch, in the first 40% of the steps and after: relations at the highest noise levels
HIGH = 0.95  # from this share of the noise levels on: there it is settled which object stands where


def build() -> UNet2DConditionModel:
    """SD 1.5's block types and layers per block at a quarter of its latent size and a tenth of its widths."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(32, 64, 96, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,  # diffusers reads this as the number of heads here, as in SD 1.5's own config
        norm_num_groups=16,
    )
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    return unet


def noise_schedule() -> DDIMScheduler:
    """Zero terminal SNR with trailing steps (Lin et al. 2024, arXiv:2305.08891), or black scenes come out gray."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def latents_of(run: Run) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scaled latents (n, 4, 16, 16) float16, token ids (n, 32), ids of the empty caption (32)."""
    path = run.folder / "latents.pt"
    tokenizer = load_tokenizer(run)
    if not path.exists():
        images, captions = scenes(run, SCENES)
        vae = AutoencoderKL.from_pretrained(run.folder / "vae").eval().to(run.device)
        latents = encode(vae, images, run) * vae.config.scaling_factor
        torch.save({"latents": latents, "ids": tokenize(tokenizer, captions)}, path)
    data = torch.load(path, weights_only=True)
    return data["latents"], data["ids"], tokenize(tokenizer, [""])[0]


def _stratified(number: int, low: float, generator: torch.Generator) -> torch.Tensor:
    """`number` values in [low, 1), one in each of as many equal parts: less variance than independent draws."""
    return low + (1 - low) * (torch.arange(number) + torch.rand((), generator=generator)) / max(1, number)


def train(run: Run) -> None:
    torch.manual_seed(3)
    latents, ids, empty = latents_of(run)
    unet = build()
    start = run.folder / "unet_start"  # see `train_embedded.py --start-from`
    if start.exists():
        unet = UNet2DConditionModel.from_pretrained(start, torch_dtype=torch.float32)
    unet = unet.to(run.device).train()
    unet.set_attn_processor(AttnProcessor())  # faster than SDPA for training at this size on a CPU
    text = CLIPTextModel.from_pretrained(run.folder / "text_encoder", attn_implementation="eager")
    text = text.to(run.device).train()
    read_outs, captions = trained_read_outs(run), load_tokenizer(run).batch_decode(ids, skip_special_tokens=True)
    parsed = [parse_caption(caption.strip()) for caption in captions]
    related = torch.tensor([row for row, scene in enumerate(parsed) if scene and scene.relation])
    schedule = noise_schedule()
    total = run.steps(STEPS)
    optimizer = torch.optim.AdamW(
        [{"params": unet.parameters(), "lr": RATE}, {"params": text.parameters(), "lr": RATE * TEXT_RATE}],
        betas=(0.9, 0.99),
        weight_decay=0.01,
    )

    def step_fn(step: int, generator: torch.Generator) -> dict[str, float]:
        focused = int(BATCH * FOCUS[step > 0.4 * total])
        rows = pick(len(latents), BATCH, generator)
        rows[:focused] = related[pick(len(related), focused, generator)]
        clean, tokens = latents[rows].float(), ids[rows]
        dropped = torch.rand(BATCH, generator=generator) < DROPOUT
        tokens = torch.where(dropped[:, None], empty, tokens)
        noise = torch.randn(clean.shape, generator=generator)
        spread = torch.cat([_stratified(focused, HIGH, generator), _stratified(BATCH - focused, 0, generator)])
        times = (spread * schedule.config.num_train_timesteps).long()
        noisy, target = schedule.add_noise(clean, noise, times), schedule.get_velocity(clean, noise, times)
        with run.autocast():
            hidden = text(tokens.to(run.device)).last_hidden_state
            guess = unet(noisy.to(run.device), times.to(run.device), hidden).sample.float()
        alpha = schedule.alphas_cumprod[times]
        weight = 1 / (alpha + (1 - alpha) * SCALE**2)  # one over the target's variance: each noise level counts alike
        loss = ((guess - target.to(run.device)) ** 2).mean((1, 2, 3)).mul(weight.to(run.device)).mean()
        said = [row for row in range(BATCH) if not dropped[row]]
        asked = [(parsed[rows[row]], shape_positions(captions[rows[row]])) for row in said]
        read = read_outs(hidden[said].float(), *map(list, zip(*asked, strict=True)))
        backward(loss + READING * read["loss"], optimizer)
        return {"loss": float(loss.detach()), "read": float(read["loss"].detach())}

    averages = {"unet": Average(unet, DECAY), "text": Average(text, DECAY)}
    loop(run, "unet", total, {"unet": unet, "text": text}, optimizer, step_fn, averages)
