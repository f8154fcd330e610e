"""The attention maps of a study: which, where they are kept, and how much room they take at most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lesion.config.parsing import Request
from lesion.errors import RequestError
from lesion.models import Source, layers
from lesion.models.defaults import patch_side, vae_scale
from lesion.store.images import Store
from lesion.store.maps import Maps
from lesion.study.capture import BYTES, Capture, pixels
from lesion.study.grid import Study
from lesion.study.lesions import covers
from lesion.study.words import words_in

FILE_BYTES = 8192  # of a file beside its numbers: names, shapes and provenance
# Text tokens by the beginning of the pipeline's name; of others 77.
_TEXTS = {
    "StableDiffusion3": 77 + 256,
    "Flux": 512,
    "Hunyuan": 77 + 256,
    "PixArtAlpha": 120,
    "PixArt": 300,
    "Sana": 300,
}


def captured(request: Request, source: Source) -> Capture | None:
    """What is captured, its layers chosen from the model's; None for nothing. Raises RequestError naming the key."""
    if request.capture is None:
        return None
    if source.embedded_guidance and request.capture.branch != "cond":
        raise RequestError("capture.branch", f"{source.pipeline} has one branch; allowed: cond")
    try:
        paths = layers.layer_paths(source, "attention", "cross_attention")
    except RequestError:
        try:
            paths = layers.layer_paths(source, "attention", "text_to_image")
        except RequestError:
            raise RequestError(
                "capture", f"{source.pipeline} has no attention from image to text; allowed: none"
            ) from None
    return request.capture.chosen(paths)


def maps_of(request: Request, source: Source) -> Maps | None:
    """Where the maps of a study are kept; None where it has none."""
    capture = captured(request, source)
    return Maps(request.store, capture) if capture else None


def known(store: Store, maps: Maps | None) -> Callable[[str], bool]:
    """Tell by key which cells a store lists with all that is asked of them, without opening a file."""
    images = store.known().lists
    if maps is None:
        return images
    listed = maps.listed
    return lambda key: key in listed and images(key)


def bound(study: Study, source: Source, capture: Capture) -> tuple[int, str]:
    """Return the most bytes that the maps of one image take, and how they are counted, in words."""
    settings, config = study.settings, source.denoiser_config
    levels = len(config.get("block_out_channels") or ())
    side = vae_scale(source) * patch_side(source)
    height, width = settings.height // side, settings.width // side
    places = sum(pixels(path, height, width, levels) for path in capture.layers or ())
    heads = _heads(config) if capture.heads_apart else 1
    steps = [any(covers(window, one, settings.steps) for window in capture.steps) for one in range(settings.steps)]
    kept = sum(steps) if capture.steps_apart else 1
    entries = _entries(study, source, capture)
    branches = len(capture.branches)
    total = places * entries * heads * kept * branches * BYTES + FILE_BYTES
    words = (
        f"{places} places in {len(capture.layers or ())} layers x {entries} entries x {heads} heads x {kept} steps x "
        f"{branches} branches x {BYTES} bytes + {FILE_BYTES} bytes"
    )
    return total, words


def _entries(study: Study, source: Source, capture: Capture) -> int:
    if capture.tokens == "all":
        return next((length for name, length in _TEXTS.items() if source.pipeline.startswith(name)), 77)
    texts = [prompt.text for prompt in study.prompts] if "cond" in capture.branches else []
    texts += [study.settings.negative_prompt or ""] if "uncond" in capture.branches else []
    return max(len(words_in(text)) for text in texts) + 2


def _heads(config: Mapping[str, Any]) -> int:
    """The most heads of a layer: the configs of UNets call them attention_head_dim where they do not name them."""
    for name in ("num_cross_attention_heads", "num_attention_heads", "attention_head_dim"):
        if (value := config.get(name)) is not None:
            return max(value) if isinstance(value, list) else int(value)
    return 8
