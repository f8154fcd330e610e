"""LPIPS, a learned perceptual distance between an image and its baseline. At least 0; 0 for identical pixels.

    LPIPS(x, y) = sum over layers l of mean over positions of sum over channels c of w_lc (f_lc(x) - f_lc(y))^2

with features f of AlexNet, each position's scaled to unit length, and the learned weights w of version 0.1 (Zhang,
Isola, Efros, Shechtman and Wang 2018; computed by torchmetrics). Needs AlexNet's ImageNet weights: torchvision
downloads them (233 MB) or finds them in its cache. Images of at least 31 x 31 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lesion.scoring import ScorerError, ScorerSpec, Shot

if TYPE_CHECKING:
    import torch


class Lpips:
    column = "lpips"

    def __init__(self, net: torch.nn.Module, device: torch.device, batch_size: int):
        self.net, self.device, self.batch_size = net, device, batch_size

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        from lesion.scoring._exact import exact
        from lesion.scoring._pixels import batches

        values = np.empty(len(shots))
        with exact(self.device):
            for rows, images, baselines in batches(shots, self.batch_size):
                x, y = (pixels.to(self.device).float() / 127.5 - 1 for pixels in (images, baselines))
                values[rows] = self.net(x, y).flatten().cpu().numpy()
        values[[shot.unchanged for shot in shots]] = 0.0
        return values


@lru_cache(maxsize=4)
def _net(device: torch.device) -> torch.nn.Module:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    net: torch.nn.Module = LearnedPerceptualImagePatchSimilarity(net_type="alex").net
    return net.to(device)


def identity(spec: ScorerSpec) -> str:
    return "lpips/1 (alex)"


def build(spec: ScorerSpec, device: str) -> Lpips:
    import torch
    from torchvision.models import AlexNet_Weights  # type: ignore[import-untyped]

    try:
        net = _net(torch.device(device))
    except Exception as error:  # network, cache and file errors of many types; each means there are no weights
        url = AlexNet_Weights.DEFAULT.url
        target = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        raise ScorerError(
            f"scorer {spec.name}: lpips needs AlexNet's weights ({error}); put {url} at {target} "
            "or take lpips out of scorer.metrics"
        ) from error
    return Lpips(net, torch.device(device), spec.batch_size)
