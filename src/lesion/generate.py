"""A batch of cells -> their images. With `surgery` and `means` the only code that runs a model."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lesion.models import Model
from lesion.study import Cell, Settings
from lesion.surgery import Filler, lesioned


def make_deterministic(seed: int = 0) -> None:
    """Seeds every generator there is and asks cuDNN and cuBLAS for repeatable kernels.

    The noise of an image does not depend on these seeds: it comes from the image's own generator.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32
    torch.backends.cuda.matmul.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def call(model: Model, prompts: Sequence[str], seeds: Sequence[int], settings: Settings) -> NDArray[np.float32]:
    """The plain pipeline call: (n, height, width, 3) float in [0, 1].

    Noise: one CPU generator an image, seeded with its seed, so it depends on neither device nor batch.
    """
    images = model.pipe(
        prompt=list(prompts),
        negative_prompt=None if settings.negative_prompt is None else [settings.negative_prompt] * len(prompts),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        height=settings.height,
        width=settings.width,
        output_type="np",
    ).images
    return np.asarray(images)


def generate(model: Model, cells: Sequence[Cell], fillers: Mapping[str, Filler]) -> NDArray[np.float32]:
    """The images of a batch, (n, height, width, 3) float in [0, 1]; all cells have the same settings.

    fillers: the replacements at work, by `surgery.replacement_key`.
    """
    lesions = [cell.lesion for cell in cells]
    with torch.inference_mode(), lesioned(model.denoiser, model.pipe.scheduler, model.anatomy, lesions, fillers):
        return call(model, [cell.prompt.text for cell in cells], [cell.seed for cell in cells], cells[0].settings)


def to_pixels(image: NDArray[np.float32]) -> tuple[NDArray[np.uint8], str]:
    """uint8 pixels as diffusers makes them, and the reason why the image is invalid ("" if it is fine)."""
    reason = ""
    if not np.isfinite(image).all():
        reason = "image has non-finite values"
        image = np.nan_to_num(image, nan=0.0, posinf=1.0, neginf=0.0)
    pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
    if not reason and pixels.max() <= 1:
        reason = "image is all black"
    return pixels, reason
