"""CLIP image-image similarity of an image and its baseline. Range [-1, 1]; exactly 1 for identical pixels.

    clip_similarity(x, y) = <e(x), e(y)> / (|e(x)| |e(y)|)

with e an open_clip image embedding, before any logit scale, in float32 with open_clip's own preprocessing (which may
crop the long sides of images that are not square). The baseline scores exactly 1 by definition. Importance of a layer
is 1 minus this. Raw values have little headroom, so read them beside the noise floor (same prompt, other seed).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lesion.scoring import ScorerSpec, Shot
from lesion.scoring._clip import Embedder, clip_identity, cosine, embedder


class ClipSimilarity:
    column = "clip_similarity"

    def __init__(self, clip: Embedder, batch_size: int):
        self.clip, self.batch_size = clip, batch_size

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        embedded = self.clip.images([s.image for s in shots] + [s.baseline for s in shots], self.batch_size)
        values = cosine(embedded[: len(shots)], embedded[len(shots) :])
        values[[shot.unchanged for shot in shots]] = 1.0
        return values


def identity(spec: ScorerSpec) -> str:
    return f"clip_similarity/1 ({clip_identity(spec)})"


def build(spec: ScorerSpec, device: str) -> ClipSimilarity:
    return ClipSimilarity(embedder(spec, device), spec.batch_size)
