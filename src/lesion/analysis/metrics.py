"""Which metrics importance can be computed from: plain facts, had without pandas."""

from __future__ import annotations

SIMILARITIES = ("clip_similarity", "dino_similarity", "ssim")  # 1 for identical images
DISTANCES = ("lpips",)  # 0 for identical images
UNSUITED = {
    "psnr": "it has no finite value for identical images",
    "clip_text": "it compares an image with its prompt, not with the baseline",
}


def why_unsuited(metric: str) -> str | None:
    """Why a metric cannot be `scorer.importance`; None for a similarity to the baseline, 1 for identical images."""
    if metric in SIMILARITIES:
        return None
    if metric in DISTANCES:
        return "it is a distance, 0 for identical images"
    return UNSUITED.get(metric, "it is no similarity to the baseline")
