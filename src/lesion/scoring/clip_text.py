"""CLIP image-text similarity of an image and its prompt (CLIPScore without its factor and its clipping). Range [-1, 1].

    clip_text(x, p) = <e(x), t(p)> / (|e(x)| |t(p)|)

with e and t the image and text embeddings of an open_clip model, before any logit scale, in float32. The tokenizer cuts
a prompt at the model's context length; a warning says so, once for each prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lesion.scoring import ScorerSpec, Shot
from lesion.scoring._clip_weights import clip_identity
from lesion.scoring._embeddings import cosine

if TYPE_CHECKING:
    from lesion.scoring._clip import Embedder


class ClipText:
    column = "clip_text"

    def __init__(self, clip: Embedder, batch_size: int):
        self.clip, self.batch_size = clip, batch_size

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        images = self.clip.images([shot.image for shot in shots], self.batch_size)
        return cosine(images, self.clip.texts([shot.prompt for shot in shots], self.batch_size))


def identity(spec: ScorerSpec) -> str:
    return f"clip_text/1 ({clip_identity(spec)})"


def build(spec: ScorerSpec, device: str) -> ClipText:
    from lesion.scoring._clip import embedder

    return ClipText(embedder(spec, device), spec.batch_size)
