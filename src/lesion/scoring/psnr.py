"""PSNR, the peak signal-to-noise ratio of an image against its baseline, in dB. Range [0, inf].

    PSNR(x, y) = 10 log10(255^2 / MSE(x, y))

with the mean squared error over all pixels and RGB channels on values 0-255 (sums of whole numbers, exact).
Identical pixels have no noise: their PSNR is inf, baselines included. Leave these out, or use medians, when averaging.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lesion.scoring import Metric, Shot


class Psnr(Metric):
    direction = "similarity"
    range = (0.0, np.inf)
    identical = np.inf

    def identity(self) -> str:
        return "psnr/1"

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        from lesion.scoring._pixels import batches

        errors = np.empty(len(shots))
        for rows, images, baselines in batches(shots, self.batch_size):
            x, y = (pixels.to(self.device).int() for pixels in (images, baselines))
            errors[rows] = (x - y).square().flatten(1).sum(1).cpu().numpy() / x[0].numel()
        with np.errstate(divide="ignore"):
            return np.asarray(10 * np.log10(255**2 / errors))
