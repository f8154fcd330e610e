"""What a model says itself where a request does not: image size, steps, guidance; and which sizes it can make.

Read from its JSON configs as diffusers reads them, without importing it for the classes of `facts`.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from lesion.errors import RequestError
from lesion.models import facts
from lesion.models.source import ModelSpec, Source, pipeline_class, resolve

OF_CALL = {"steps": "num_inference_steps", "guidance": "guidance_scale"}  # see `argument_of`
SIDES = ("height", "width")
LEAST = 8  # of which every pipeline wants a multiple, Sana's of 32, whatever the autoencoder
USUAL = 128  # diffusers' `default_sample_size` where the config of the denoiser has no `sample_size`
_WITH_USUAL = ("StableDiffusionXL", "StableDiffusion3", "Flux", "HunyuanDiT", "QwenImage", "ZImage")


def filled(generation: Mapping[str, Any], spec: Callable[[], ModelSpec]) -> tuple[dict[str, Any], str]:
    """The `generation` group of a request with a number for each null, and what was derived from where ("": nothing).

    spec: tells the model; asked only where there is a null.
    Raises RequestError for a model that is not there, or does not say what is wanted.
    """
    wanted = [name for name in (*SIDES, *OF_CALL) if generation[name] is None]
    if not wanted:
        return dict(generation), ""
    source = resolve(spec())
    found: dict[str, Any] = {}
    if sides := [name for name in SIDES if name in wanted]:
        size = dict(zip(SIDES, own_size(source), strict=True))
        found |= {name: size[name] for name in sides}
    for name in [name for name in OF_CALL if name in wanted]:
        found[name] = default_of_call(source.pipeline, argument_of(source.pipeline, name))
        if not isinstance(found[name], int | float):
            raise RequestError(f"generation.{name}", f"{source.pipeline} has no default of its own; give a number")
    words = []
    for names, where in ((SIDES, "the model's config"), (tuple(OF_CALL), f"the defaults of {source.pipeline}")):
        if values := [f"{name} {found[name]:g}" for name in names if name in found]:
            words.append(f"{', '.join(values)} from {where}")
    return {**generation, **found}, "; ".join(words)


def argument_of(pipeline: str, name: str) -> str:
    """The argument of a pipeline's call that takes the steps or the guidance, by its class name."""
    return "true_cfg_scale" if name == "guidance" and pipeline.startswith("QwenImage") else OF_CALL[name]


def default_of_call(pipeline: str, argument: str) -> Any:
    """The default of an argument of a pipeline's call, by its class name; None where it has none."""
    if known := facts.pipeline(pipeline):
        return known["defaults"][argument]
    return default_of_class(pipeline_class(pipeline), argument)


def default_of_class(cls: Any, argument: str) -> Any:
    """The default of an argument of a pipeline class's call; None where it has none."""
    parameter = inspect.signature(cls.__call__).parameters.get(argument)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def own_size(source: Source) -> tuple[int, int]:
    """Height and width in pixels that diffusers makes where none is given: `sample_size` times the autoencoder's scale.

    Raises RequestError where the config of the denoiser has no `sample_size`.
    """
    config, name = source.denoiser_config, source.pipeline
    sample = config.get("sample_size")
    if sample is None and name.startswith(_WITH_USUAL):
        sample = USUAL
    if isinstance(sample, int) and sample < 64 and _before_0_9(config) and _mends_old(name):
        sample = 64  # what was written before diffusers 0.9 says 32 in error
    sides: list[Any] = sample if isinstance(sample, list) else [sample, sample]
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise RequestError(
            "generation.height",
            f"the {source.denoiser} of {source.spec.id!r} has no sample_size; give height and width",
        )
    height, width = (int(side) * vae_scale(source) for side in sides)
    return height, width


def _before_0_9(config: Mapping[str, Any]) -> bool:
    written = config.get("_diffusers_version")
    return isinstance(written, str) and [int(part) for part in re.findall(r"\d+", written)[:2]] < [0, 9]


def _mends_old(pipeline: str) -> bool:
    return pipeline.startswith("StableDiffusion") and not pipeline.startswith(_WITH_USUAL)


def vae_scale(source: Source) -> int:
    """Pixels a latent, along a side."""
    config = source.vae_config
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if halvings := config.get("temperal_downsample"):  # Qwen-Image's
        return int(2 ** len(halvings))
    return 2 ** (len(levels) - 1) if levels else 32 if source.pipeline.startswith("Sana") else 8


def side_factor(source: Source) -> int:
    """What height and width must be a multiple of: of any other size the pipeline makes another one, or none.

    The autoencoder's scale times the denoiser's patches, or the 2 x 2 latents that FLUX packs into one token.
    """
    least = 32 if source.pipeline.startswith("Sana") else LEAST
    return math.lcm(least, vae_scale(source) * patch_side(source))


def patch_side(source: Source) -> int:
    """Latents that a token of the denoiser's has along a side; 1 in UNets."""
    config = source.denoiser_config
    latents, patch = source.vae_config.get("latent_channels"), config.get("patch_size")
    patch = patch if isinstance(patch, int) else 1
    if patches := config.get("all_patch_size"):  # Z-Image's
        return int(patches[0])
    packed = patch == 1 and latents and config.get("in_channels") == 4 * latents
    return 2 if packed or source.pipeline.startswith("Flux") else patch


def check_size(source: Source, height: int, width: int) -> None:
    """Raises RequestError for a size that the model cannot make, naming the next that it can."""
    factor = side_factor(source)
    for name, side in zip(SIDES, (height, width), strict=True):
        if side % factor:
            below = side // factor * factor
            near = " or ".join(str(one) for one in (below, below + factor) if one)
            raise RequestError(
                f"generation.{name}", f"{source.pipeline} makes multiples of {factor} pixels; got {side}, next: {near}"
            )
