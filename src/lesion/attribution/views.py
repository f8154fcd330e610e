"""What an effect is measured in: a unit vector of each image, through which gradients flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lesion.scoring._clip import Embedder

View = Callable[[Tensor, Tensor], Tensor]  # images (n, 3, height, width) in [0, 1] and final latents (n, …) -> (n, d)


def embedded(embedder: Embedder) -> View:
    """The scorer's CLIP embedding of the image."""
    return lambda images, latents: embedder.tensors(images)


def latent(images: Tensor, latents: Tensor) -> Tensor:
    """The final latents in one line."""
    flat = latents.float().flatten(1)
    one: Tensor = flat / flat.norm(dim=1, keepdim=True)
    return one
