"""The components of a pipeline whose layers can be lesioned. Imports nothing of torch.

The denoiser runs at every step, the others once an image: text encoders before the first step, the autoencoder's
decoder after the last. Layers of the denoiser have their module path as name; others have their component in front,
as `text_encoder.encoder.layers.3`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

from lesion.errors import RequestError
from lesion.study import tokens
from lesion.study.checks import distinct, one_of
from lesion.study.lesions import Axes, Lesion

DENOISER, VAE = "denoiser", "vae"
TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")
COMPONENTS = (*TEXT, DENOISER, VAE)  # in the order in which an image passes them
KINDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(TEXT, ("self_attention", "feed_forward", "block")),
    VAE: ("self_attention", "block"),
}
GRANULARITIES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(TEXT, ("attention", "transformer_block", *tokens.BY)),
    VAE: ("attention", "transformer_block", "block", "stage"),
}
AFTER = (1.0, 1.0)  # stands for a window that opens once the last step is done


def parse_components(value: Any, by: str, kind: str) -> tuple[str, ...]:
    """The components of a request, in the order in which an image passes them.

    by, kind: of its layers. Raises RequestError naming the key and what is allowed.
    """
    asked = [one_of("layers.component", one, COMPONENTS) for one in distinct("layers.component", value)]
    for component in asked:
        for key, given, allowed in (("by", by, GRANULARITIES), ("kind", kind, KINDS)):
            if key == "kind" and by in tokens.BY:  # of tokens it is the self-attention
                continue
            if component in allowed and given not in allowed[component]:
                choices = ", ".join(allowed[component])
                raise RequestError(f"layers.{key}", f"{component} has no {given}; allowed with it: {choices}")
    return tuple(component for component in COMPONENTS if component in asked)


def check_axes(components: Sequence[str], axes: Axes) -> None:
    """Raise RequestError for windows and branches that make no sense on components that run once an image."""
    once = [component for component in components if component != DENOISER]
    if once and any(window != Lesion.window for window in axes.windows):
        start, end = Lesion.window
        raise RequestError("window", f"{once[0]} runs once an image, at no step; allowed with it: [{start}, {end}]")
    if VAE in once and any(branch != Lesion.branch for branch in axes.branches):
        raise RequestError("branch", f"{VAE} decodes one image, not two branches; allowed with it: {Lesion.branch}")


def decoder_layer(path: str, by: str) -> str:
    """The layer in which a residual block of the decoder is, `vae.decoder.up_blocks.1.resnets.0`, by granularity."""
    if by == "block":
        return path.partition(".resnets")[0].partition(".attentions")[0]
    return ".".join(path.split(".")[:3]) if by == "stage" else path


@cache
def component_of(layer: str) -> str:
    """The component that a layer is in, by the layer's name."""
    first, _, rest = layer.partition(".")
    return first if rest and first in KINDS else DENOISER


@lru_cache(4096)  # a study is planned cell by cell, and its cells share few lesions
def components_of(layers: tuple[str, ...]) -> tuple[str, ...]:
    """The components that these layers are in, in the order in which an image passes them."""
    found = {component_of(layer) for layer in layers}
    return tuple(component for component in COMPONENTS if component in found)


def family_of(layer: str) -> tuple[str, str]:
    """What layers have in common that are compared with one another: the component, and the set of text tokens."""
    return component_of(layer), tokens.layer_and_set(layer)[1]


@lru_cache(4096)
def families_of(layers: tuple[str, ...]) -> frozenset[tuple[str, str]]:
    """The families that these layers are of."""
    return frozenset(map(family_of, layers))


def part_of(lesion: Lesion | None, component: str) -> Lesion | None:
    """What a lesion does to a component; None if nothing."""
    if lesion is None or not lesion.strength:
        return None
    layers = tuple(layer for layer in lesion.layers if component_of(layer) == component)
    return lesion if layers == lesion.layers else replace(lesion, layers=layers) if layers else None


def begins(lesion: Lesion) -> tuple[float, float]:
    """The window before which a lesion leaves the denoising as it is in the baseline."""
    return AFTER if components_of(lesion.layers) == (VAE,) else lesion.window
