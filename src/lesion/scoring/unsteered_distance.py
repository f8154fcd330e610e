"""How far steering has moved an image: mean absolute difference of its pixels from the unsteered image, in [0, 1].

    D(x, y) = mean |x - y| / 255

over all pixels and RGB channels on values 0-255. y is the image of the same prompt, seed and settings with neither
steering nor a lesion; it is made beside the study and kept in the store. No value for unsteered images. Of an image
that is lesioned while it is steered, it tells the effect of both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lesion.scoring._metric import Metric, Shot


class UnsteeredDistance(Metric):
    direction = "property"
    range = (0.0, 1.0)
    boxed = steered = True
    beside = "unsteered"

    def identity(self) -> str:
        return f"{self.name}/1"

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        pairs = ((shot.image.astype(np.int16), shot.baseline) for shot in shots)
        return np.array([np.abs(image - unsteered).mean() / 255 for image, unsteered in pairs])
