"""What can be lesioned in a denoiser: its sites, grouped in layers, in the order of the forward pass.

Works on real weights and on a model built on the meta device alike, so a request is checked before any weight loads.
Goes by names, so that a class nobody listed will do: blocks `….attentions.N.transformer_blocks.M` in UNets and `STEM.N`
in transformers (whatever the stem), which hold `attn`, `attn1`, `attn2`, `attention` (modules with to_q) and `ff`,
`feed_forward`, `img_mlp`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from lesion.study.layers import KINDS, WITH_HEADS
from lesion.surgery.hook_points import (
    ROOT,
    FromText,
    Heads,
    HeadsBeforeProjection,
    HeadsOfTokens,
    HookPoint,
    ImageStream,
    ImageTokens,
    TextStream,
    Update,
)

PLACES = ("down", "mid", "up")
_SITE = re.compile(
    r"(?P<block>(?:(?P<attention>.*\battentions\.\d+)\.)?[A-Za-z_]\w*\.\d+)"
    r"\.(?P<leaf>attn[12]?|attention|ff|feed_forward|img_mlp|act_mlp|attn\.mlp_act_fn)"
)
_STAGE = re.compile(r"(?P<place>down|mid|up)_blocks?(?:\.(?P<block>\d+))?(?:\.|$)")


class AnatomyError(Exception):
    """The denoiser has nothing that this anatomy recognises. key: the config key to change."""

    def __init__(self, message: str, key: str = "model.id"):
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class Site:
    """One place whose contribution can be replaced.

    path: its module path; of an attention head, the attention's with `.heads.H` behind.
    channels: width of what is replaced.
    heads, head_dim: attention heads and channels of each; 0 where there are none.
    text_dim: channels of the text features it reads; 0 where it reads none.
    hook: how what is replaced is read and written.
    head: which part of a hook point of several heads it is; None for all that the hook point reads.
    """

    path: str
    channels: int
    heads: int
    head_dim: int
    text_dim: int
    hook: HookPoint = field(default=HookPoint(""), repr=False)
    head: int | None = None

    def parts(self, output: Any) -> list[tuple[int, str]]:
        """The parts of the hook point's quantity that are its own, each with a name.

        The text's half of a block has the site's path with `:text` behind.
        """
        if self.head is not None:
            return [(self.head, self.path)]
        return [(part, f"{self.path}:text" if part else self.path) for part in range(self.hook.parts(output))]


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
    by: str = "attention"

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(layer.path for layer in self.layers)

    @property
    def sites(self) -> dict[str, tuple[str, ...]]:
        """Site paths of each layer path."""
        return {layer.path: tuple(site.path for site in layer.sites) for layer in self.layers}

    @cached_property
    def by_path(self) -> dict[str, Site]:
        """Every site by its path, in forward order."""
        return {site.path: site for layer in self.layers for site in layer.sites}


def examine(denoiser: nn.Module, by: str = "attention", kind: str = "cross_attention") -> Anatomy:
    """The layers of a denoiser, in forward order.

    kind: what the sites are (docs/lesions.md). by: how they are grouped: `attentions.N` (in transformers without these,
    the block), transformer block, UNet block (`down_blocks.1`), UNet stage (`down_blocks`), or each attention head a
    layer of its own.
    Raises AnatomyError where there are none.
    """
    groups: dict[str, list[Site]] = {}
    unet = hasattr(denoiser, "down_blocks")
    name = type(denoiser).__name__
    if not unet and by in ("block", "stage"):
        raise AnatomyError(
            f"{name} has no UNet blocks to group layers by {by}; allowed: attention, transformer_block, head",
            "layers.by",
        )
    if by == "head" and kind not in WITH_HEADS:
        raise AnatomyError(f"{kind} has no attention heads; with layers.by=head: {', '.join(WITH_HEADS)}", "layers.by")
    for part in _parts(denoiser):
        for layer, site in _lesionable(denoiser, part, by, kind):
            sites = groups.setdefault(layer, [])
            if site not in sites:
                sites.append(site)
    if not groups:
        if others := kinds_of(denoiser):
            raise AnatomyError(f"{name} has no {kind.replace('_', '-')} module; allowed: {', '.join(others)}",
                               "layers.kind")  # fmt: skip
        raise AnatomyError(
            f"{name} has no {kind.replace('_', '-')} module, nor others of the form "
            "'….attentions.N.transformer_blocks.M.attn2' or 'BLOCKS.N.attn2' (attn, attn1: self- or joint attention)"
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
        by,
    )


def kinds_of(denoiser: nn.Module) -> tuple[str, ...]:
    """The kinds of site that a denoiser has: allowed values of `layers.kind`."""
    found = {kind for part in _parts(denoiser) for kind in _kinds(part)}
    return tuple(kind for kind in KINDS if kind in found or (found and kind == "block"))


def text_sites(denoiser: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that read the text by cross-attention, in the order of `named_modules`."""
    return tuple(part.path for part in _parts(denoiser) if "cross_attention" in _kinds(part))


def attentions_of(denoiser: nn.Module) -> dict[str, str]:
    """The kind of every attention that can be lesioned, by its module path."""
    kinds = {part.path: _kinds(part) for part in _parts(denoiser)}
    return {path: of[0] for path, of in kinds.items() if of and of[0] != "feed_forward"}


@dataclass(frozen=True)
class _Part:
    """A module that the pattern of sites matches, and the block it is in."""

    path: str
    match: re.Match[str]
    module: Any
    block: Any

    @property
    def concatenated(self) -> str:
        """Where its block hands it text and image in one sequence: the path of the module whose call tells where the
        image is (`TextLength`); "" where both come apart or there is no text.
        """
        name, path = type(self.block).__name__, self.match["block"]
        if name == "Flux2SingleTransformerBlock":
            return ROOT
        if name == "ZImageTransformerBlock":
            return "noise_refiner.0" if path.startswith("layers.") else ""
        if getattr(getattr(self.block, "attn", None), "pre_only", False) is not True:
            return ""
        return path if "encoder_hidden_states" in inspect.signature(self.block.forward).parameters else ""

    @property
    def joint(self) -> bool:
        return getattr(self.module, "added_kv_proj_dim", None) is not None


def _parts(denoiser: nn.Module) -> Iterator[_Part]:
    for path, module in denoiser.named_modules():
        if match := _SITE.fullmatch(path):
            yield _Part(path, match, module, denoiser.get_submodule(match["block"]))


def _kinds(part: _Part) -> tuple[str, ...]:
    """What a module is a site of; an attention that is told what it attends to is asked (some UNets use attn1 so)."""
    leaf, module = part.match["leaf"], part.module
    if leaf in ("ff", "feed_forward", "img_mlp"):
        return ("feed_forward",)
    if leaf.endswith(("act_mlp", "mlp_act_fn")):
        return ("feed_forward",) if part.concatenated else ()
    if not any(hasattr(module, name) for name in ("to_q", "to_qkv", "to_qkv_mlp_proj")):
        return ()
    if part.joint or part.concatenated:
        return ("joint_attention", "text_to_image", "text_stream")
    crosses = getattr(module, "is_cross_attention", None)
    if not isinstance(crosses, bool):
        crosses = leaf == "attn2"
    return ("cross_attention",) if crosses else ("self_attention",)


def _lesionable(denoiser: nn.Module, part: _Part, by: str, kind: str) -> Iterator[tuple[str, Site]]:
    """The sites of this kind that a module gives, each with the path of its layer."""
    kinds, match = _kinds(part), part.match
    if kind == "block" and kinds:
        path = match["block"] if by == "transformer_block" else match["attention"] or match["block"]
        yield _GROUPS[by](match), Site(path, _width_of_block(part), 0, 0, 0, Update(path))
    elif kind == "text_stream" and kind in kinds:
        path, together = match["block"], part.concatenated
        apart = together in ("", path)  # FLUX.1's single blocks join text and image themselves
        hook = TextStream(path) if apart else TextStream(path, together, single=True)
        yield _GROUPS[by](match), Site(path, _width_of_block(part), 0, 0, 0, hook)
    elif kind in kinds and by == "head":
        for site in _heads(part):
            yield site.path, site
    elif kind in kinds:
        yield _GROUPS[by](match), _site(part, kind)


_GROUPS: dict[str, Callable[[re.Match[str]], str]] = {
    "attention": lambda match: match["attention"] or match["block"],
    "transformer_block": lambda match: match["block"],
    "block": lambda match: match["block"].partition(".attentions")[0],
    "stage": lambda match: match["block"].partition(".")[0],
}


def _site(part: _Part, kind: str) -> Site:
    module, path, block = part.module, part.path, part.concatenated
    hook = HookPoint(path)
    if kind == "text_to_image":
        hook = FromText(path, block, single=bool(block))
    elif hasattr(module, "to_qkv_mlp_proj"):
        hook = HeadsBeforeProjection(f"{path}.to_out", block, width=int(module.inner_dim))
    elif block:
        hook = ImageTokens(path, block)
    elif kind == "joint_attention":
        hook = ImageStream(path)
    heads = int(getattr(module, "heads", 0))
    crosses = bool(getattr(module, "is_cross_attention", False))
    return Site(
        path=path,
        channels=_channels_of(part),
        heads=heads,
        head_dim=int(getattr(module, "inner_dim", 0)) // heads if heads else 0,
        text_dim=int(module.added_kv_proj_dim) if part.joint else int(module.cross_attention_dim) if crosses else 0,
        hook=hook,
    )


def _channels_of(part: _Part) -> int:
    leaf, module = part.match["leaf"], part.module
    if leaf == "act_mlp":
        return int(part.block.mlp_hidden_dim)
    if leaf == "attn.mlp_act_fn":
        return int(part.block.attn.mlp_hidden_dim)
    return int(module.inner_dim) if hasattr(module, "to_qkv_mlp_proj") else _channels(module)


def _heads(part: _Part) -> Iterator[Site]:
    module, path, block = part.module, part.path, part.concatenated
    heads, inner = int(module.heads), int(module.inner_dim)
    if hasattr(module, "to_qkv_mlp_proj"):
        hook: HookPoint = HeadsBeforeProjection(f"{path}.to_out", block, heads=heads, width=inner)
    elif block and not isinstance(getattr(module, "to_out", None), nn.ModuleList):
        hook = HeadsOfTokens(path, block, heads=heads)
    elif isinstance(getattr(module, "to_out", None), nn.ModuleList):
        hook = Heads(f"{path}.to_out.0", block, heads=heads)
    else:
        raise AnatomyError(f"{path} has no output projection to_out.0 whose input its heads could share", "layers.by")
    width = inner // heads
    for head in range(heads):  # behind a head's channels comes the share of the bias; see `hook_points.Heads`
        yield Site(f"{path}.heads.{head}", width, 1, width, 0, hook, head)


def _width_of_block(part: _Part) -> int:
    widths = (getattr(module, "query_dim", None) for module in part.block.modules())
    return next((width for width in widths if isinstance(width, int)), 0)


def _channels(module: Any) -> int:
    """Width of what a module puts out: its own word for it, or its last weight's."""
    if isinstance(width := getattr(module, "out_dim", None), int):
        return width
    if isinstance(last := getattr(module, "w2", None), nn.Linear):  # of Z-Image's feed-forward
        return last.out_features
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
