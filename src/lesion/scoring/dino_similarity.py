"""DINOv2 similarity of an image and its baseline. Range [-1, 1]; exactly 1 for identical pixels.

    dino_similarity(x, y) = <e(x), e(y)> / (|e(x)| |e(y)|)

with e the CLS token of DINOv2's last layer behind the final LayerNorm (`pooler_output` of transformers' Dinov2Model;
`x_norm_clstoken` of the original code), in float32, on the published preprocessing: the shorter side to 256 pixels
(bicubic), the middle 224 x 224, ImageNet mean and standard deviation. Oquab et al. 2023, arXiv:2304.07193. It sees
structure and parts where CLIP sees what a caption would say; "vital layers" of transformers are found by it (Avrahami
et al. 2024, arXiv:2411.14430). Importance of a layer is 1 minus this if `scorer.importance` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lesion.scoring import Metric, OptionError, ScorerError, Shot, _hub_models
from lesion.scoring._embeddings import Memory, Vectors, digest, unit, with_baselines
from lesion.scoring._resizing import Box, Preprocessing, every_byte
from lesion.store.digests import digest_of

if TYPE_CHECKING:
    import torch

RESIZE, CROP = 256, 224  # pixels: the shorter side, then the middle
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, on values in [0, 1]


class DinoSimilarity(Metric):
    direction = "similarity"
    range = (-1.0, 1.0)
    identical = 1.0
    models = "a DINOv2"
    shared: ClassVar[Mapping[str, str]] = {"model": "dino_model"}

    def __init__(self, model: str = "facebook/dinov2-base"):
        """model: a name on the hub (ORG/REPO), or a folder."""
        self.model = model

    def identity(self) -> str:
        name = self.model.rstrip("/").rpartition("/")[2]
        return f"{self.name}/1 ({name} {digest_of(resolve(self.model))})"

    def check(self) -> None:
        try:
            resolve(self.model)
        except (ValueError, OSError) as error:
            raise OptionError("model", f"{self.model!r}: {error}") from None

    def load(self, device: str, batch_size: int) -> None:
        import torch

        super().load(device, batch_size)
        try:
            config, _ = resolve(self.model)
            self.embedder = _embedder(config.parent, torch.device(device))
        except Exception as error:  # hub, file and device errors of many types
            raise ScorerError(f"cannot load DINOv2 {self.model}: {error}") from error

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        return with_baselines(self.embedder, shots, self.batch_size)


def preprocess(image: NDArray[np.uint8]) -> torch.Tensor:
    """As DINOv2's published `preprocessor_config.json` says (BitImageProcessor): bicubic, centre crop, ImageNet scale.

    image: (height, width, 3), 0-255. Returns (3, 224, 224), float32.
    """
    height, width, top, left = _box(*image.shape[:2])
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return _scaled(np.asarray(picture.crop((left, top, left + CROP, top + CROP))))


def _box(height: int, width: int) -> Box:
    """Height and width that an image is resized to, top and left of its middle."""
    short = min(height, width)
    height, width = RESIZE * height // short, RESIZE * width // short
    return height, width, (height - CROP) // 2, (width - CROP) // 2


def _scaled(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """(height, width, 3), 0-255 -> (3, height, width), float32, in ImageNet's scale."""
    import torch

    scaled = (torch.from_numpy(pixels.astype(np.float32) / 255) - torch.tensor(MEAN)) / torch.tensor(STD)
    return scaled.permute(2, 0, 1).contiguous()


class DinoEmbedder:
    """Unit-length CLS embeddings of images, each computed once (see `Memory`)."""

    def __init__(self, model: Any, device: torch.device):
        self.model, self.device = model, device
        self._preprocess = Preprocessing(preprocess, CROP, _box, _scaled(every_byte())[:, 0], device)
        self.images: Memory[NDArray[np.uint8]] = Memory(digest, self._embed)

    def _embed(self, images: list[NDArray[np.uint8]]) -> Vectors:
        from lesion.scoring._exact import exact

        pixels = self._preprocess(images)
        with exact(self.device):
            # The CLS token of the last layer behind the final LayerNorm: Dinov2Model's pooler_output.
            return unit(self.model(pixel_values=pixels).last_hidden_state[:, 0])


def resolve(name: str) -> tuple[Path, Path]:
    """Config and weights of a DINOv2 folder, or of a name on the hub; see `_hub_models.resolve`."""
    return _hub_models.resolve(name, "dinov2", "scorer.dino_model")


@lru_cache(maxsize=2)
def _embedder(folder: Path, device: torch.device) -> DinoEmbedder:
    from transformers import Dinov2Model

    return DinoEmbedder(_hub_models.loaded(Dinov2Model, folder, device), device)
