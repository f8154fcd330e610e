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

from lesion.scoring import Shot
from lesion.scoring._clip import ClipMetric
from lesion.scoring._embeddings import cosine

if TYPE_CHECKING:
    from torch import Tensor


class ClipText(ClipMetric):
    direction = "prompt"
    signed = True

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        images = self.embedder.images([shot.image for shot in shots], self.batch_size)
        return cosine(images, self.embedder.texts([shot.prompt for shot in shots], self.batch_size))

    def of_tensors(self, images: Tensor, prompts: Sequence[str], beside: Sequence[NDArray[np.uint8]]) -> Tensor:
        import torch

        vectors = self.embedder.tensors(images)
        texts: Tensor = torch.from_numpy(self.embedder.texts(list(prompts), self.batch_size)).to(vectors)
        return (vectors * texts).sum(dim=1)
