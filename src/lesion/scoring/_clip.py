"""What the CLIP metrics share: one open_clip model a process, embeddings kept, float32."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lesion.scoring._clip_weights import advice, identity, load, resolve
from lesion.scoring._embeddings import Memory, Vectors, digest, unit
from lesion.scoring._metric import Metric, OptionError, ScorerError
from lesion.scoring._resizing import of_transforms

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
_OF_PIL = ("MaybeConvertMode", "MaybeToTensor", "ToTensor", "_convert_to_rgb", "function")  # what tensors are already


class Embedder:
    """Unit-length embeddings of images and prompts by one open_clip model.

    Images are remembered by a digest of their pixels, so that a baseline is embedded once however many lesions are
    compared with it, and an image that a lesion left as it was gets its baseline's very embedding.
    """

    def __init__(self, model: Any, preprocess: Any, tokenizer: Any, device: torch.device):
        self.model, self.preprocess, self.tokenizer = model, preprocess, tokenizer
        self.device = device
        self._batches = of_transforms(getattr(preprocess, "transforms", ()), device)
        self.context_length: int = tokenizer.context_length
        self.images: Memory[NDArray[np.uint8]] = Memory(digest, self._embed_images)
        self.texts: Memory[str] = Memory(str, self._embed_texts)
        self._cut: set[str] = set()

    @property
    def scale(self) -> float:
        """What cosines are multiplied by before a softmax, as it was learned."""
        return float(self.model.logit_scale.exp())

    def tensors(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings through which gradients flow, (n, d) of length 1. images: (n, 3, height, width) in [0, 1].

        Its preprocessing runs on tensors: resizing then differs from that of `images` by the rounding to whole pixel
        values, which moves an embedding by less than 0.01 of its length. Raises RuntimeError for preprocessing that
        cannot.
        """
        import torch

        steps = [step for step in self.preprocess.transforms if type(step).__name__ not in _OF_PIL]
        if unknown := [type(step).__name__ for step in steps if not isinstance(step, torch.nn.Module)]:
            raise RuntimeError(f"gradients cannot flow through the scorer's preprocessing ({unknown[0]})")
        pixels = images.to(self.model.logit_scale)
        for step in steps:
            pixels = step(pixels)
        vectors = self.model.encode_image(pixels)
        one: torch.Tensor = vectors / vectors.norm(dim=1, keepdim=True)
        return one

    def _embed_images(self, images: list[NDArray[np.uint8]]) -> Vectors:
        import torch

        from lesion.scoring._exact import exact

        if self._batches:
            pixels = self._batches(images)
        else:
            pixels = torch.stack([self.preprocess(Image.fromarray(image)) for image in images])
        with exact(self.device):
            return unit(self.model.encode_image(pixels.to(self.model.logit_scale)))

    def _embed_texts(self, prompts: list[str]) -> Vectors:
        from lesion.scoring._exact import exact

        tokens = self.tokenizer(prompts)  # (n, context_length)
        wider = self.tokenizer(prompts, context_length=self.context_length + 1)
        # A cut prompt ends with the end token where the wider window still shows a word.
        for prompt, cut in zip(prompts, (wider[:, :-1] != tokens).any(1).tolist(), strict=True):
            if cut and prompt not in self._cut:
                self._cut.add(prompt)
                shown = repr(prompt if len(prompt) <= 80 else prompt[:77] + "...")
                log.warning("clip_text sees only the first %d tokens of prompt %s", self.context_length, shown)
        with exact(self.device):
            return unit(self.model.encode_text(tokens.to(self.device)))


class ClipMetric(Metric):
    """A metric on the embeddings of one open_clip model; those of one model share it."""

    range = (-1.0, 1.0)
    models = "an open_clip model"
    shared: ClassVar[Mapping[str, str]] = {"model": "clip_model", "pretrained": "clip_pretrained"}

    def __init__(self, model: str, pretrained: str | None = None):
        """model: `embedded`, an open_clip name, `hf-hub:ORG/REPO` or `local-dir:FOLDER`. pretrained: of an open_clip
        name, a pretrained tag or a checkpoint file.
        """
        self.model, self.pretrained = model, pretrained

    def identity(self) -> str:
        return f"{self.name}/1 ({identity(*resolve(self.model, self.pretrained))})"

    def check(self) -> None:
        try:
            resolve(self.model, self.pretrained)
        except (ValueError, FileNotFoundError) as error:
            option = "pretrained" if "clip_pretrained" in str(error) else "model"
            raise OptionError(option, f"{self.model!r}: {error}; {advice(self.model)}") from None

    def load(self, device: str, batch_size: int) -> None:
        import torch

        super().load(device, batch_size)
        try:
            self.embedder = _embedder(*resolve(self.model, self.pretrained), torch.device(device))
        except Exception as error:  # open_clip, hub, file and device errors of many types
            name = f"{self.model} ({self.pretrained})" if self.pretrained else self.model
            raise ScorerError(f"cannot load CLIP {name}: {error} -- {advice(self.model)}") from error


@lru_cache(maxsize=4)
def _embedder(model: str, pretrained: str | None, device: torch.device) -> Embedder:
    return Embedder(*load(model, pretrained, device), device)
