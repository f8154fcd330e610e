"""PickScore: which of two images of a prompt people would prefer, as a number an image. Range [-100, 100].

    pick_score(x, p) = s <e(x), t(p)> / (|e(x)| |t(p)|)

with e and t the image and text embeddings of a CLIP fine-tuned on the choices of users, and s its learned logit scale
(at most 100), in float32, on the model's own preprocessing. Two images of one prompt are compared by their difference
d: the first is preferred with probability 1 / (1 + exp(-d)). Kirstain et al. 2023, arXiv:2305.01569. Any such model in
transformers' CLIPModel form will do, as HPSv2 converted to it (Wu et al. 2023, arXiv:2306.09341).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lesion.scoring import Metric, OptionError, ScorerError, Shot, _hub_models
from lesion.scoring._embeddings import Memory, Vectors, cosine, digest, unit
from lesion.store.digests import digest_of

if TYPE_CHECKING:
    import torch

FILES = ("preprocessor_config.json", "tokenizer.json")


class PickScore(Metric):
    direction = "prompt"
    range = (-100.0, 100.0)
    models = "a CLIP trained on preferences"

    def __init__(self, model: str = "yuvalkirstain/PickScore_v1"):
        """model: a name on the hub (ORG/REPO), or a folder."""
        self.model = model

    def identity(self) -> str:
        config, weights = self._resolved()
        files = (config, weights, *(config.parent / file for file in FILES))
        return f"{self.name}/1 ({self.model.rstrip('/').rpartition('/')[2]} {digest_of(files)})"

    def check(self) -> None:
        try:
            self._resolved()
        except (ValueError, OSError) as error:
            raise OptionError("model", f"{self.model!r}: {error}") from None

    def _resolved(self) -> tuple[Path, Path]:
        return _hub_models.resolve(self.model, "clip", "scorer.metrics.pick_score.model", FILES)

    def load(self, device: str, batch_size: int) -> None:
        import torch

        super().load(device, batch_size)
        try:
            self.preferences = _preferences(self._resolved()[0].parent, torch.device(device))
        except Exception as error:  # hub, file and device errors of many types
            raise ScorerError(f"cannot load the CLIP {self.model}: {error}") from error

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        images = self.preferences.images([shot.image for shot in shots], self.batch_size)
        texts = self.preferences.texts([shot.prompt for shot in shots], self.batch_size)
        return self.preferences.scale * cosine(images, texts)


class Preferences:
    """Unit-length embeddings of images and prompts, each computed once, and the logit scale of their model."""

    def __init__(self, model: Any, images: Any, tokenizer: Any, device: torch.device):
        self.model, self.preprocess, self.tokenizer, self.device = model, images, tokenizer, device
        self.images: Memory[NDArray[np.uint8]] = Memory(digest, self._of_images)
        self.texts: Memory[str] = Memory(str, self._of_texts)
        self.scale = float(model.logit_scale.exp())

    def _of_images(self, images: list[NDArray[np.uint8]]) -> Vectors:
        from lesion.scoring._exact import exact

        pixels = self.preprocess(list(images), return_tensors="pt")["pixel_values"]
        with exact(self.device):
            seen = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
            return unit(self.model.visual_projection(seen))

    def _of_texts(self, texts: list[str]) -> Vectors:
        from lesion.scoring._exact import exact

        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        given = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        with exact(self.device):
            return unit(self.model.text_projection(self.model.text_model(**given).pooler_output))


@lru_cache(maxsize=2)
def _preferences(folder: Path, device: torch.device) -> Preferences:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    return Preferences(
        _hub_models.loaded(CLIPModel, folder, device),
        AutoImageProcessor.from_pretrained(folder, local_files_only=True),
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
        device,
    )
