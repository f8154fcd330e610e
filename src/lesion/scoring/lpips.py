"""LPIPS, a learned perceptual distance between an image and its baseline. At least 0; 0 for identical pixels.

    LPIPS(x, y) = sum over layers l of mean over positions of sum over channels c of w_lc (f_lc(x) - f_lc(y))^2

with features f of AlexNet (option `net`: `alex`, or `vgg` for VGG-16, `squeeze` for SqueezeNet 1.1), each position's
scaled to unit length, and the learned weights w of version 0.1 (Zhang, Isola, Efros, Shechtman and Wang 2018; computed
by torchmetrics). Needs the network's ImageNet weights: torchvision downloads them (233, 528 or 5 MB) or finds them in
its cache. Images of at least 31 x 31 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lesion.scoring import Metric, ScorerError, Shot

if TYPE_CHECKING:
    import torch

WEIGHTS = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}  # of torchvision


class Lpips(Metric):
    direction = "distance"
    range = (0.0, np.inf)
    identical = 0.0
    models = "AlexNet, VGG-16 or SqueezeNet"

    def __init__(self, net: Literal["alex", "vgg", "squeeze"] = "alex"):
        self.net = net

    def identity(self) -> str:
        return f"lpips/1 ({self.net})"

    def load(self, device: str, batch_size: int) -> None:
        import torch
        import torchvision  # type: ignore[import-untyped]

        super().load(device, batch_size)
        try:
            self.network = _net(self.net, torch.device(device))
        except Exception as error:  # network, cache and file errors of many types; each means there are no weights
            url = getattr(torchvision.models, WEIGHTS[self.net]).DEFAULT.url
            target = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
            raise ScorerError(
                f"lpips needs the weights of its network {self.net} ({error}); put {url} at {target} "
                "or take lpips out of scorer.metrics"
            ) from error

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        import torch

        from lesion.scoring._exact import exact
        from lesion.scoring._pixels import batches

        values = np.empty(len(shots))
        with exact(torch.device(self.device)):
            for rows, images, baselines in batches(shots, self.batch_size):
                x, y = (pixels.to(self.device).float() / 127.5 - 1 for pixels in (images, baselines))
                values[rows] = self.network(x, y).flatten().cpu().numpy()
        return values


@lru_cache(maxsize=4)
def _net(net: Literal["alex", "vgg", "squeeze"], device: torch.device) -> torch.nn.Module:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    network: torch.nn.Module = LearnedPerceptualImagePatchSimilarity(net_type=net).net
    return network.to(device)
