"""How far an image is from that of another prompt: 1 - CLIP similarity to the un-lesioned image of it. Range [0, 2].

    donor_distance(x, y) = 1 - <e(x), e(y)> / (|e(x)| |e(y)|)

with y the image that the same model makes of the prompt `prompt`, one of the study, with the same seed, settings and no
lesion, and e as in `clip_similarity`. Compared with the baseline's own distance it says whether a lesion moves the
image towards that prompt's or away from it. No value for images of that prompt itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lesion.scoring import OptionError, Shot
from lesion.scoring._clip import ClipMetric
from lesion.scoring._embeddings import with_baselines

if TYPE_CHECKING:
    from torch import Tensor


class DonorDistance(ClipMetric):
    direction = "property"
    range = (0.0, 2.0)
    signed = True
    beside = "donor"

    def __init__(self, model: str, pretrained: str | None = None, prompt: str | None = None):
        """prompt: of the study, whose images are compared with; others as of `ClipMetric`."""
        super().__init__(model, pretrained)
        self.prompt = prompt

    def identity(self) -> str:
        return f"{super().identity()} {self.prompt!r}"

    def check(self) -> None:
        super().check()
        if not self.prompt:
            raise OptionError("prompt", "names no prompt; allowed: one of the study, whose images are compared with")

    @property
    def donor(self) -> str | None:
        return self.prompt

    def asks(self, prompt: str) -> bool:
        return prompt != self.prompt

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        return 1 - with_baselines(self.embedder, shots, self.batch_size)

    def of_tensors(self, images: Tensor, prompts: Sequence[str], beside: Sequence[NDArray[np.uint8]]) -> Tensor:
        import torch

        vectors = self.embedder.tensors(images)
        others = torch.from_numpy(self.embedder.images(list(beside), self.batch_size)).to(vectors)
        return 1 - (vectors * others).sum(dim=1)
