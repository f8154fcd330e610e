"""Layout guidance: steered against unsteered images, and against a plain loop of the published kind."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor

from bench.report import Row, aimed, alternate, ratios
from bench.setup import Options, Setup, generating, loaded, plain
from lesion.generation.generate import generate, generators
from lesion.generation.layout import Target as Boxed
from lesion.generation.layout import box_mask, grid, sigma_squared
from lesion.models.words import words_of
from lesion.study.grid import Cell
from lesion.study.steering import Layout
from lesion.surgery.attention import text_attention

# The published layers: the middle block and the first up block with attention. Of the embedded model also those of
# experiment=layout, whose gradients need nearly the whole denoiser.
PUBLISHED = {
    "embedded": ("mid_block.*", "up_blocks.1.*"),
    "sd15": ("mid_block.*", "up_blocks.1.*"),
    "sdxl": ("mid_block.*", "up_blocks.0.*"),
}
FINE = {"embedded": ("up_blocks.3.*",)}


class Keeping(AttnProcessor):
    """Computes attention as diffusers' plain processor does, and keeps its probabilities: (heads, pixels, tokens)."""

    maps: torch.Tensor | None = None

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        scores = attn.get_attention_scores

        def kept(query: Any, key: Any, mask: Any = None) -> Any:
            self.maps = scores(query, key, mask)
            return self.maps

        attn.get_attention_scores = kept
        try:
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        finally:
            del attn.get_attention_scores


def plain_steering(pipe: Any, cells: Sequence[Cell], layout: Layout) -> tuple[float, list[np.ndarray]]:
    """Seconds an image, and the images, of a loop as published: one image at a time, attention processors swapped.

    Before each of the first steps, up to `iterations` times: the whole denoiser on the conditional half with gradients,
    the loss, and the latents moved by its gradient.
    """
    sites = text_attention(pipe.unet).sites
    paths = [path for layer in layout.layers for path in sites[layer]]
    keeping = {f"{path}.processor": Keeping() for path in paths}
    pipe.unet.set_attn_processor({name: keeping.get(name, AttnProcessor()) for name in pipe.unet.attn_processors})
    pipe.unet.requires_grad_(False)
    scheduler, images, began = pipe.scheduler, [], time.perf_counter()
    for cell in cells:
        settings, words = cell.settings, words_of(pipe, cell.prompt.text, {})
        boxes = [Boxed(words.find(box.words), box.box) for box in cell.prompt.boxes]
        positive, negative = pipe.encode_prompt(cell.prompt.text, pipe.device, 1, True, "")
        both = torch.cat([negative, positive]).detach()
        scheduler.set_timesteps(settings.steps, device=pipe.device)
        shape = (1, pipe.unet.config.in_channels, *(side // pipe.vae_scale_factor for side in (settings.height,) * 2))
        generator = generators([cell.noise_seed])[0]
        latents = torch.randn(shape, generator=generator, dtype=both.dtype).to(pipe.device) * scheduler.init_noise_sigma
        total = len(scheduler.timesteps)
        for number, step in enumerate(scheduler.timesteps):
            scale = float(scheduler.scale_model_input(torch.ones(1, device=pipe.device), step))
            if number < layout.steps:
                variance = sigma_squared(scheduler, total, number)
                share = variance / (1 + variance) if np.isfinite(variance) else 1.0
                for _ in range(layout.iterations):
                    moving = latents.detach().requires_grad_()
                    with torch.enable_grad():
                        pipe.unet(scheduler.scale_model_input(moving, step), step, encoder_hidden_states=both[1:])
                        loss = _loss([one.maps for one in keeping.values()], boxes, layout.mask)
                        if float(loss.detach()) < layout.threshold:
                            break
                        (gradient,) = torch.autograd.grad(loss, moving)
                    factor = share / scale**2 if layout.step_size == "noise_share" else variance
                    latents = latents - layout.scale * factor * gradient
            with torch.no_grad():
                asked = scheduler.scale_model_input(torch.cat([latents] * 2), step)
                without, with_text = pipe.unet(asked, step, encoder_hidden_states=both).sample.chunk(2)
                guided = without + settings.guidance * (with_text - without)
                latents = scheduler.step(guided, step, latents).prev_sample
        with torch.no_grad():
            image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        images.append((image / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).float().cpu().numpy())
    return (time.perf_counter() - began) / len(cells), images


def _loss(maps: Sequence[Any], boxes: Sequence[Boxed], form: str) -> torch.Tensor:
    """(1 - attention inside the box / all attention)^2, averaged over heads, tokens, boxes and maps."""
    total = 0
    for one in maps:
        height, width = grid(one.shape[1], 1.0)
        for box in boxes:
            mask = box_mask(box.box, height, width, form).flatten().to(one)
            for column in box.columns:
                seen = one[:, :, column]
                inside = (seen * mask).sum(-1) / seen.sum(-1)
                total = total + ((1 - inside) ** 2).mean() / len(box.columns) / len(boxes) / len(maps)
    return torch.as_tensor(total)


def steering(this: Setup, options: Options) -> tuple[str, list[Row]]:
    """A batch of steered images against the same unsteered, and against the same one at a time in the plain loop."""
    if options.quick and this.model != "embedded":
        this = replace(this, side=128)  # at 64 the smallest feature map is one value, which cannot be normalised
    scenes = min(this.batch, this.loop, 72)
    own = [word for word in this.overrides(scenes) if not word.startswith(("prompts", "seeds"))]
    own += ["prompts=boxes", f"prompts.sample={scenes}", "seeds=[0]", "selection=none"]
    rows: list[Row] = []
    for layers in filter(None, (FINE.get(this.model), PUBLISHED[this.model])):
        found, apart, layout = _sides(this, options, own, layers)
        by = f"steered by {', '.join(f'`{layer}`' for layer in layers)}"
        what = {"steered": by, "plain loop": f"the same in a plain loop, {by}"}
        rows += [Row(side, f"seconds an image, {what.get(side, side)}", found[side], " s") for side in found]
        rows.append(Row("cost", f"{by} / unsteered, seconds", ratios(found["steered"], found["unsteered"]), "x"))
        faster = ratios(found["plain loop"], found["steered"])
        rows.append(aimed("steering", this.model, "steering", f"plain loop / batch, {by}", faster))
        rows.append(Row("same images", "largest mean difference of pixels of loop and batch, 0 to 1", [apart]))
    note = (
        f"{scenes} scenes of prompts=boxes, steered in a batch (at most {layout.iterations} moves in each of the first "
        f"{layout.steps} steps; threshold {layout.threshold:g}); the same unsteered in a batch; and the same steered "
        "in a plain loop of the published kind: one image at a time, attention processors swapped, the whole denoiser "
        "called for each gradient. Nothing is scored or written. Where moves overshoot, as on maps of few cells, they "
        f"amplify rounding until images differ: docs/layout.md. {this.said().rpartition(',')[0]}."
    )
    return note, rows


def _sides(
    this: Setup, options: Options, own: Sequence[str], layers: Sequence[str]
) -> tuple[dict[str, list[float]], float, Layout]:
    """Seconds an image of each side, how far the images of batch and loop are apart, and what steers."""
    _, study, model = loaded(
        [
            *own,
            "steering=layout",
            f"steering.layers=[{','.join(layers)}]",
            "steering.step_size=noise_share",
            "steering.mask=covered",
        ]
    )
    _, unsteered, _ = loaded(own)
    cells, others = list(study.cells()), list(unsteered.cells())
    layout = study.settings.steering
    assert layout is not None
    pipe = plain(this)
    pipe.scheduler = model.pipe.scheduler.from_config(model.pipe.scheduler.config)
    made: list[list[np.ndarray]] = []

    def looped() -> float:
        seconds, images = plain_steering(pipe, cells, layout)
        made.append(images)
        return seconds

    plain_steering(pipe, cells[:1], layout)
    ours = generate(model, cells, {})
    generate(model, others, {})
    sides = {
        "steered": lambda: generating(model, cells, len(cells), {}) / len(cells),
        "unsteered": lambda: generating(model, others, len(others), {}) / len(others),
        "plain loop": looped,
    }
    found = alternate(options.repeats, sides)
    apart = max(float(np.abs(one - other).mean()) for one, other in zip(ours, made[-1], strict=True))
    return found, apart, layout
