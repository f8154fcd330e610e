"""SSIM, the structural similarity of an image and its baseline. Range [-1, 1]; 1 for identical pixels.

    SSIM(x, y) = mean over pixels and channels of
                 (2 mx my + c1)(2 sxy + c2) / ((mx^2 + my^2 + c1)(sx^2 + sy^2 + c2)),  c1 = 0.01^2, c2 = 0.03^2

with means m, variances s^2 and covariance sxy under a Gaussian window (sigma 1.5, 11 x 11), on RGB values in [0, 1]
(Wang, Bovik, Sheikh and Simoncelli 2004). Torchmetrics computes it on CUDA, elsewhere scipy's Gaussian filter, which
takes one dimension after the other and so a small part of the time: equal to 1e-11. The window is mirrored at the
borders, where others drop the pixels that it does not fit around (scikit-image, the authors' code): values differ from
theirs by what the outermost five pixels are worth. In float64, good to 1e-9. Scores kept from earlier versions stay as
they are: in float32, in which those computed them, the variances cancel where both images are flat and bright, and
values are off by up to 4.9e-4 there in images of the embedded model, by up to 3.3e-3 in drawn ones of one colour but
for a small square.
Images of at least 6 x 6 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lesion.scoring import Metric, Shot

if TYPE_CHECKING:
    import torch


class Ssim(Metric):
    direction = "similarity"
    range = (-1.0, 1.0)
    identical = 1.0
    earlier_error = 4.9e-4

    def identity(self) -> str:
        return "ssim/1"

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        from lesion.scoring._pixels import batches

        device, similarity = "cpu", _by_scipy  # not all devices have float64
        if self.device.startswith("cuda"):
            device, similarity = self.device, _by_torchmetrics
        values = np.empty(len(shots))
        for rows, images, baselines in batches(shots, self.batch_size):
            x, y = (pixels.to(device).double() / 255 for pixels in (images, baselines))
            values[rows] = similarity(x, y)
        return values


def _by_torchmetrics(x: torch.Tensor, y: torch.Tensor) -> NDArray[np.float64]:
    """SSIM (n,) of two batches (n, 3, height, width), float64, values in [0, 1]."""
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    from lesion.scoring._exact import exact

    with exact(x.device):
        found = structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    assert isinstance(found, torch.Tensor)
    return found.cpu().numpy()


def _by_scipy(x: torch.Tensor, y: torch.Tensor) -> NDArray[np.float64]:
    """The same, of tensors on the CPU."""
    from scipy.ndimage import gaussian_filter

    def mean(values: torch.Tensor) -> NDArray[np.float64]:
        smooth: NDArray[np.float64] = gaussian_filter(values.numpy(), (0, 0, 1.5, 1.5), mode="mirror", truncate=3.5)
        return smooth

    mx, my = mean(x), mean(y)
    variances, covariance = (mean(x * x) - mx**2) + (mean(y * y) - my**2), mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    alike = (2 * mx * my + c1) * (2 * covariance + c2) / ((mx**2 + my**2 + c1) * (variances + c2))
    return np.asarray(alike.mean(axis=(1, 2, 3)))
