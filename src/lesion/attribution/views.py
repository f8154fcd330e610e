"""What an effect is measured in: a unit vector of each image, through which gradients flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lesion.scoring._clip import Embedder

View = Callable[[Tensor, Tensor], Tensor]  # images (n, 3, height, width) in [0, 1] and final latents (n, …) -> (n, d)
_OF_PIL = ("MaybeConvertMode", "MaybeToTensor", "ToTensor", "_convert_to_rgb", "function")  # what tensors are already


def embedded(embedder: Embedder) -> View:
    """The scorer's CLIP embedding of the image.

    Its preprocessing runs on tensors: resizing then differs from the scorer's by the rounding to whole pixel values,
    which moves an embedding by less than 0.01 of its length. Raises RuntimeError for preprocessing that cannot.
    """
    steps = [step for step in embedder.preprocess.transforms if not _for_pil(step)]
    if unknown := [type(step).__name__ for step in steps if not isinstance(step, torch.nn.Module)]:
        raise RuntimeError(f"gradients cannot flow through the scorer's preprocessing ({unknown[0]})")

    def view(images: Tensor, latents: Tensor) -> Tensor:
        pixels = images.to(embedder.device, torch.float32)
        for step in steps:
            pixels = step(pixels)
        return _unit(embedder.model.encode_image(pixels))

    return view


def latent(images: Tensor, latents: Tensor) -> Tensor:
    """The final latents in one line."""
    return _unit(latents.float().flatten(1))


def texts(embedder: Embedder, prompts: Sequence[str]) -> Tensor:
    """The scorer's CLIP embeddings of prompts, (n, d) of length 1."""
    found = embedder.texts(list(prompts), len(prompts))
    return torch.from_numpy(found).float().to(embedder.device)


def _for_pil(step: Any) -> bool:
    return type(step).__name__ in _OF_PIL


def _unit(vectors: Tensor) -> Tensor:
    one: Tensor = vectors / vectors.norm(dim=1, keepdim=True)
    return one
