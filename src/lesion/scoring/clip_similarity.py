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

from lesion.scoring import Shot
from lesion.scoring._clip import ClipMetric
from lesion.scoring._embeddings import with_baselines


class ClipSimilarity(ClipMetric):
    direction = "similarity"
    identical = 1.0

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        return with_baselines(self.embedder, shots, self.batch_size)
