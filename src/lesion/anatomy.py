"""What can be lesioned in a denoiser: its sites, grouped in layers, in the order of the forward pass.

Works on real weights and on a model built on the meta device alike, so a request is checked before any weight loads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

PLACES = ("down", "mid", "up")
_LAYER = re.compile(r"(?P<layer>.*\battentions\.\d+)\.transformer_blocks\.\d+\.attn2")
_STAGE = re.compile(r"(?P<place>down|mid|up)_blocks?(?:\.(?P<block>\d+))?\.")


class AnatomyError(Exception):
    """The denoiser has nothing that this anatomy recognises."""


@dataclass(frozen=True)
class Site:
    """One cross-attention module whose output can be replaced.

    path: its module path. channels: width of its output. heads, head_dim: attention heads and channels of each.
    text_dim: channels of the text features it reads.
    """

    path: str
    channels: int
    heads: int
    head_dim: int
    text_dim: int


@dataclass(frozen=True)
class Layer:
    """A named group of sites: one `attentions.N`.

    path: its module path. index: place in the forward order, from 0. place: down, mid or up. resolution: side of its
    feature map in latent pixels at the model's own sample size (0 if the config gives none).
    """

    path: str
    index: int
    place: str
    resolution: int
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Anatomy:
    layers: tuple[Layer, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(layer.path for layer in self.layers)

    @property
    def sites(self) -> dict[str, tuple[str, ...]]:
        """Site paths of each layer path."""
        return {layer.path: tuple(site.path for site in layer.sites) for layer in self.layers}


def examine(denoiser: nn.Module) -> Anatomy:
    """The cross-attention layers of a UNet, in forward order.

    Raises AnatomyError where there are none.
    """
    groups: dict[str, list[Site]] = {}
    for path, module in denoiser.named_modules():
        match = _LAYER.fullmatch(path)
        if match and isinstance(module, Attention) and module.is_cross_attention:
            groups.setdefault(match["layer"], []).append(
                Site(path, module.out_dim, module.heads, module.inner_dim // module.heads, module.cross_attention_dim)
            )
    if not groups:
        raise AnatomyError(
            f"{type(denoiser).__name__} has no cross-attention module of the form "
            "'….attentions.N.transformer_blocks.M.attn2'"
        )
    resolutions = _resolutions(denoiser)
    ordered = sorted(groups, key=depth)
    return Anatomy(
        tuple(
            Layer(path, index, _stage(path)[0], resolutions.get(path.split(".attentions")[0], 0), tuple(groups[path]))
            for index, path in enumerate(ordered)
        )
    )


def _stage(path: str) -> tuple[str, int]:
    match = _STAGE.match(path)
    if match is None:
        raise AnatomyError(f"layer {path!r} is in no down, mid or up block")
    return match["place"], int(match["block"] or 0)


def depth(path: str) -> tuple[int, int, tuple[int, ...]]:
    """Sort key of a UNet module path by the order of the forward pass (named_modules lists up before mid)."""
    place, block = _stage(path)
    return PLACES.index(place), block, tuple(int(number) for number in re.findall(r"\.(\d+)", path))


def _resolutions(denoiser: Any) -> dict[str, int]:
    """Side of the feature map inside each block, in latent pixels; empty where the model states no sample size."""
    size = getattr(getattr(denoiser, "config", None), "sample_size", None)
    if not isinstance(size, int) or not hasattr(denoiser, "down_blocks"):
        return {}
    sides = {}
    for index, block in enumerate(denoiser.down_blocks):
        sides[f"down_blocks.{index}"] = size
        if getattr(block, "downsamplers", None) is not None:
            size = -(-size // 2)
    sides["mid_block"] = size
    for index, block in enumerate(denoiser.up_blocks):
        sides[f"up_blocks.{index}"] = size
        if getattr(block, "upsamplers", None) is not None:
            size *= 2
    return sides
