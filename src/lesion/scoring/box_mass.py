"""How much of the attention of the words that have boxes lies in these: measured while a steered image is made.

Mean over the denoising steps, the layers of `steering.layers`, heads, tokens and boxes. No value for unsteered images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lesion.scoring._metric import Metric, Shot


class BoxMass(Metric):
    direction = "property"
    range = (0.0, 1.0)
    boxed = steered = True

    def identity(self) -> str:
        return f"{self.name}/1"

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        return np.array([shot.box_mass for shot in shots])
