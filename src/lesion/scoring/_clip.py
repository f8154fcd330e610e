"""The CLIP that several metrics share: one open_clip model a process, embeddings kept, float32."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lesion.scoring import ScorerError, ScorerSpec
from lesion.scoring._clip_weights import advice, load, resolve
from lesion.scoring._embeddings import Memory, Vectors, cosine, digest, unit
from lesion.scoring._exact import exact

__all__ = ["Embedder", "cosine", "embedder"]

log = logging.getLogger(__name__)


class Embedder:
    """Unit-length embeddings of images and prompts by one open_clip model.

    Images are remembered by a digest of their pixels, so that a baseline is embedded once however many lesions are
    compared with it, and an image that a lesion left as it was gets its baseline's very embedding.
    """

    def __init__(self, model: Any, preprocess: Any, tokenizer: Any, device: torch.device):
        self.model, self.preprocess, self.tokenizer = model, preprocess, tokenizer
        self.device = device
        self.context_length: int = tokenizer.context_length
        self.images: Memory[NDArray[np.uint8]] = Memory(digest, self._embed_images)
        self.texts: Memory[str] = Memory(str, self._embed_texts)
        self._cut: set[str] = set()

    def _embed_images(self, images: list[NDArray[np.uint8]]) -> Vectors:
        pixels = torch.stack([self.preprocess(Image.fromarray(image)) for image in images])  # (n, 3, size, size)
        with exact(self.device):
            return unit(self.model.encode_image(pixels.to(self.device)))

    def _embed_texts(self, prompts: list[str]) -> Vectors:
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


def embedder(spec: ScorerSpec, device: str) -> Embedder:
    """The shared embedder for `spec`, loaded on first use; ScorerError when it cannot be."""
    try:
        return _embedder(*resolve(spec.clip_model, spec.clip_pretrained), torch.device(device))
    except Exception as error:  # open_clip, hub, file and device errors of many types
        raise ScorerError(
            f"scorer {spec.name}: cannot load CLIP {spec.clip_model}"
            f"{f' ({spec.clip_pretrained})' if spec.clip_pretrained else ''}: {error} -- {advice(spec.clip_model)}"
        ) from error


@lru_cache(maxsize=4)
def _embedder(model: str, pretrained: str | None, device: torch.device) -> Embedder:
    return Embedder(*load(model, pretrained, device), device)
