"""The layers of a pipeline's text encoders and of its autoencoder's decoder, known from their configs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lesion.errors import RequestError
from lesion.models import layers
from lesion.models.source import TEMPLATED
from lesion.study.components import DENOISER, KINDS, TEXT, VAE, decoder_layer
from lesion.study.tokens import expanded

if TYPE_CHECKING:
    from lesion.models.source import Source
    from lesion.study.layers import Layers

# Text encoders: where their layers are, and the config value that says how many.
_CLIP, _T5 = ("encoder.layers", "num_hidden_layers"), ("encoder.block", "num_layers")
ENCODERS: Mapping[str, tuple[str, str]] = {
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
    "T5EncoderModel": _T5,
    "UMT5EncoderModel": _T5,
}
AUTOENCODERS = ("AutoencoderKL", "AutoencoderKLFlux2")
KNOWN = {**dict.fromkeys(TEXT, tuple(ENCODERS)), VAE: AUTOENCODERS}  # classes by component


def layer_paths(source: Source, components: Sequence[str], by: str, kind: str) -> tuple[str, ...]:
    """Names of the layers of these components, in the order in which an image passes them, without their weights.

    Raises RequestError for a component that the model lacks, or of a class whose layers are not known.
    """
    return tuple(
        path
        for component in components
        for path in (
            layers.layer_paths(source, by, kind) if component == DENOISER else _paths(source, component, by, kind)
        )
    )


def asked_paths(source: Source, asked: Layers) -> tuple[str, ...]:
    """`layer_paths` of those that a study asks for, before it chooses some. Raises RequestError as that does."""
    if asked.tokens and source.pipeline.startswith(TEMPLATED):
        raise RequestError("layers.by", f"{source.pipeline} puts a template around its prompts: not with {asked.by}")
    found: list[str] = []
    for component in asked.components:
        own = layer_paths(source, (component,), asked.grouping, asked.kind)
        found += expanded(own, asked.tokens, asked.whole(component))
    return tuple(found)


def kinds(source: Source, component: str) -> tuple[str, ...]:
    """The values of `layers.kind` that a component of the pipeline has layers of; none if its class is not known."""
    found = []
    for kind in KINDS[component]:
        with suppress(RequestError):
            if _paths(source, component, "attention", kind):
                found.append(kind)
    return tuple(found)


def _paths(source: Source, component: str, by: str, kind: str) -> list[str]:
    if component not in source.components:
        there = [one for one in source.components if one.startswith("text_encoder") or one == VAE]
        raise RequestError(
            "layers.component", f"{source.pipeline} has no {component}; allowed: {', '.join([DENOISER, *there])}"
        )
    name = source.components[component][1]
    if component == VAE:
        config = source.vae_config
        name = str(config.get("_class_name", name))
        if name not in AUTOENCODERS or any(kind != "UpDecoderBlock2D" for kind in config.get("up_block_types", ())):
            raise _unknown(component, name, AUTOENCODERS)
        paths = _decoder(config, kind)
        if not paths:
            raise RequestError("layers.kind", f"the decoder of this {name} has no {kind}; allowed: block")
    else:
        if name not in ENCODERS:
            raise _unknown(component, name, ENCODERS)
        stem, number = ENCODERS[name]
        config = source.config(component)
        if not isinstance(config.get(number), int):
            raise RequestError("model.id", f"the config of {component} does not say {number}")
        return [f"{component}.{stem}.{place}" for place in range(config[number])]
    return list(dict.fromkeys(decoder_layer(path, by) for path in paths))


def _unknown(component: str, name: str, known: Any) -> RequestError:
    return RequestError("layers.component", f"{component} is a {name}; layers are known of {', '.join(known)}")


def _decoder(config: Mapping[str, Any], kind: str) -> list[str]:
    """Residual blocks of the decoder of `AutoencoderKL`, in forward order."""
    attends = config.get("mid_block_add_attention", True)
    middle = ["resnets.0", *(["attentions.0"] if attends else []), "resnets.1"]
    paths = [f"{VAE}.decoder.mid_block.{one}" for one in middle]
    for block in range(len(config.get("block_out_channels", (64,)))):
        paths += [
            f"{VAE}.decoder.up_blocks.{block}.resnets.{one}" for one in range(config.get("layers_per_block", 1) + 1)
        ]
    return [path for path in paths if kind == "block" or ".attentions." in path]
