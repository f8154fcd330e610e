"""What can be lesioned in a denoiser: its sites, grouped in layers, in the order of the forward pass.

Works on real weights and on a model built on the meta device alike, so a request is checked before any weight loads.
Knows UNets, and transformers whose blocks keep self-attention, cross-attention and feed-forward apart (PixArt, Sana,
Hunyuan-DiT); any class whose modules are named so will do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

PLACES = ("down", "mid", "up")
KINDS = ("cross_attention", "self_attention", "feed_forward")
GRANULARITIES = ("attention", "transformer_block", "block", "stage")
_LEAVES = {"attn1": "self_attention", "attn2": "cross_attention", "ff": "feed_forward"}
_SITE = re.compile(
    r"(?P<block>(?:(?P<attention>.*\battentions\.\d+)\.)?(?:transformer_blocks|blocks)\.\d+)\.(?P<leaf>attn1|attn2|ff)"
)
_STAGE = re.compile(r"(?P<place>down|mid|up)_blocks?(?:\.(?P<block>\d+))?(?:\.|$)")


class AnatomyError(Exception):
    """The denoiser has nothing that this anatomy recognises."""


@dataclass(frozen=True)
class Site:
    """One module whose output can be replaced.

    path: its module path. channels: width of its output. heads, head_dim: attention heads and channels of each.
    text_dim: channels of the text features it reads. The last three are 0 where there are none.
    """

    path: str
    channels: int
    heads: int
    head_dim: int
    text_dim: int


@dataclass(frozen=True)
class Layer:
    """A named group of sites.

    path: its module path. index: place in the forward order, from 0. place: down, mid or up; "" outside UNets.
    resolution: side of its feature map in latent pixels at the model's own sample size (0 if the config gives none).
    """

    path: str
    index: int
    place: str
    resolution: int
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Anatomy:
    layers: tuple[Layer, ...]
    kind: str = "cross_attention"

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(layer.path for layer in self.layers)

    @property
    def sites(self) -> dict[str, tuple[str, ...]]:
        """Site paths of each layer path."""
        return {layer.path: tuple(site.path for site in layer.sites) for layer in self.layers}


def examine(denoiser: nn.Module, by: str = "attention", kind: str = "cross_attention") -> Anatomy:
    """The layers of a denoiser, in forward order.

    kind: which modules are sites. by: how they are grouped: `attentions.N` (in transformers without these, the block),
    transformer block, UNet block (`down_blocks.1`) or UNet stage (`down_blocks`).
    Raises AnatomyError where there are none.
    """
    groups: dict[str, list[Site]] = {}
    unet = hasattr(denoiser, "down_blocks")
    if not unet and by in ("block", "stage"):
        raise AnatomyError(
            f"{type(denoiser).__name__} has no UNet blocks to group layers by {by}; "
            "allowed: attention, transformer_block"
        )
    for path, module in denoiser.named_modules():
        match = _SITE.fullmatch(path)
        if match and _kind(module, match["leaf"]) == kind:
            groups.setdefault(_GROUPS[by](match), []).append(_site(path, module))
    if not groups:
        raise AnatomyError(
            f"{type(denoiser).__name__} has no {kind.replace('_', '-')} module of the form "
            "'….attentions.N.transformer_blocks.M.attn2', 'transformer_blocks.N.attn2' or 'blocks.N.attn2' "
            "(attn1 for self-attention, ff for feed-forward)"
        )
    resolutions = _resolutions(denoiser)
    ordered = sorted(groups, key=depth) if unet else list(groups)  # a transformer names its blocks in forward order
    return Anatomy(
        tuple(
            Layer(
                path,
                index,
                _stage(path)[0] if unet else "",
                resolutions.get(path.split(".attentions")[0], 0),
                tuple(sorted(groups[path], key=lambda site: depth(site.path)) if unet else groups[path]),
            )
            for index, path in enumerate(ordered)
        ),
        kind,
    )


_GROUPS: dict[str, Callable[[re.Match[str]], str]] = {
    "attention": lambda match: match["attention"] or match["block"],
    "transformer_block": lambda match: match["block"],
    "block": lambda match: match["block"].partition(".attentions")[0],
    "stage": lambda match: match["block"].partition(".")[0],
}


def _kind(module: nn.Module, leaf: str) -> str:
    """Of a module with this name; an attention that is told what it attends to is asked (some UNets use attn1 so)."""
    crosses = getattr(module, "is_cross_attention", None)
    if leaf != "ff" and isinstance(crosses, bool):
        return "cross_attention" if crosses else "self_attention"
    return _LEAVES[leaf]


def _site(path: str, module: Any) -> Site:
    heads = int(getattr(module, "heads", 0))
    crosses = bool(getattr(module, "is_cross_attention", False))
    return Site(
        path=path,
        channels=_channels(module),
        heads=heads,
        head_dim=int(getattr(module, "inner_dim", 0)) // heads if heads else 0,
        text_dim=int(module.cross_attention_dim) if crosses else 0,
    )


def _channels(module: Any) -> int:
    """Width of what a module puts out: its own word for it, or its last weight's."""
    if isinstance(width := getattr(module, "out_dim", None), int):
        return width
    weights = [parameter for name, parameter in module.named_parameters() if name.endswith("weight")]
    return int(weights[-1].shape[0])


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
