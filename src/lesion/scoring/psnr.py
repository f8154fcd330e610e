"""PSNR, the peak signal-to-noise ratio of an image against its baseline, in dB. Range [0, inf].

    PSNR(x, y) = 10 log10(255^2 / MSE(x, y))

with the mean squared error over all pixels and RGB channels on values 0-255 (computed by torchmetrics, float64).
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
        import torch
        from torchmetrics.functional.image import peak_signal_noise_ratio

        from lesion.scoring._pixels import batches

        values = np.empty(len(shots))
        # Not all devices have float64. Sums of squares of whole numbers are exact in it, whatever the device.
        device = self.device if torch.device(self.device).type == "cuda" else "cpu"
        for rows, images, baselines in batches(shots, self.batch_size):
            x, y = (pixels.to(device).double() for pixels in (images, baselines))
            found = peak_signal_noise_ratio(x, y, data_range=255.0, reduction="none", dim=(1, 2, 3))
            values[rows] = found.cpu().numpy()
        return values
