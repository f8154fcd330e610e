"""Whether a pipeline's guidance runs its denoiser on two rows an image, unconditional and conditional."""

from __future__ import annotations

import inspect
from typing import Any


def two_branches(pipeline: Any, denoiser: Any, guidance: float) -> bool:
    """Classifier-free guidance in one call: rows of both branches. pipeline: a diffusers pipeline or its class.

    False where the scale is an input of the denoiser instead (guidance-distilled: FLUX, LCM).
    """
    if guidance <= 1:
        return False
    if (
        "true_cfg_scale" in inspect.signature(pipeline.__call__).parameters
    ):  # beside which `guidance_scale` is distilled
        return False
    return getattr(denoiser.config, "time_cond_proj_dim", None) is None
