"""CLIP image-image similarity of an image and its baseline. Range [-1, 1]; exactly 1 for identical pixels.

    clip_similarity(x, y) = <e(x), e(y)> / (|e(x)| |e(y)|)

with e an open_clip image embedding, before any logit scale, in float32 with open_clip's own preprocessing (which may
crop the long sides of images that are not square). The baseline scores exactly 1 by definition. Importance of a layer
is 1 minus this. Raw values have little headroom, so read them beside the noise floor (same prompt, other seed).
"""

from __future__ import annotations

from lesion.scoring import ScorerSpec
from lesion.scoring._clip_weights import clip_identity
from lesion.scoring._embeddings import BaselineCosine


def identity(spec: ScorerSpec) -> str:
    return f"clip_similarity/1 ({clip_identity(spec)})"


def build(spec: ScorerSpec, device: str) -> BaselineCosine:
    from lesion.scoring._clip import embedder

    return BaselineCosine("clip_similarity", embedder(spec, device), spec.batch_size)
