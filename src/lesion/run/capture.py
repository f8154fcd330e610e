"""The attention maps of a study: which, where they are kept, and how much room they take at most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lesion.config.parsing import Request
from lesion.errors import RequestError
from lesion.models import Source, layers
from lesion.models.defaults import patch_side, vae_scale
from lesion.models.source import TEMPLATED
from lesion.store.images import Store
from lesion.store.maps import Maps
from lesion.study.capture import BYTES, Capture, pixels
from lesion.study.grid import Study
from lesion.study.lesions import covers
from lesion.study.plan import Tally, tally
from lesion.study.words import words_in

if TYPE_CHECKING:
    import pandas as pd

    from lesion.store.maps import ImageMaps

KEYS_PER_FILE = 1000  # are hashed while a file is opened and read, where a network is between
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
    return request.capture.chosen(attention_layers(source, "capture"))


def attention_layers(source: Source, key: str) -> tuple[str, ...]:
    """Layers in which a model's image looks at its text, in forward order. Raises RequestError naming `key`."""
    if source.pipeline.startswith(TEMPLATED):
        raise RequestError(
            key,
            f"{source.pipeline} puts a template around its prompts, so words cannot be told apart; allowed: none",
        )
    for kind in ("cross_attention", "text_to_image"):
        try:
            return layers.layer_paths(source, "attention", kind)
        except RequestError:
            continue
    raise RequestError(key, f"{source.pipeline} has no attention from image to text; allowed: none")


def maps_of(request: Request, source: Source) -> Maps | None:
    """Where the maps of a study are kept; None where it has none."""
    capture = captured(request, source)
    return Maps(request.store, capture) if capture else None


def in_store(study: Study, store: Store, maps: Maps | None) -> Tally:
    """Count the images of a study, and those that a store lists with all that is asked of them, opening few files."""
    images = store.known()
    # So few images of a large study are sooner asked for what they show than looked for among all its keys.
    few = len(images) * KEYS_PER_FILE < len(study)
    most = images.count(study.may_have) if few else len(images)
    if maps is None:
        return tally(study, images.lists, most)
    listed = maps.listed
    return tally(study, lambda key: key in listed and images.lists(key), min(most, len(listed)))


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


def measured(study: Study, store: Store, maps: Maps, failures: Mapping[str, str]) -> pd.DataFrame:
    """Measure the conditional maps of every image: maps.parquet, one row per image, layer that looks, and word.

    Columns: those that name the image (`layer` is the lesioned one); map_layer and map_index, its place in depth;
    word; aspect of the caption that the word is about, "" for others; the measures of `lesion.analysis.maps`. area is
    the share of the picture that the word's object covers: the mass of a map that is the same everywhere. Masks are
    the pixel reader's and exist for captions of the toy world only.
    """
    import pandas as pd

    parts: list[pd.DataFrame] = []
    if "cond" not in maps.capture.branches:
        return pd.DataFrame()
    for cell in study.cells():
        kept = None if cell.key in failures else maps.get(cell.key)
        if kept is None:
            continue
        lesion = cell.lesion
        about: dict[str, Any] = {
            "model": cell.model.name,
            "prompt_id": cell.prompt.id,
            "seed": cell.seed,
            "selection": lesion.selection if lesion else "none",
            "replacement": lesion.replacement.name if lesion else "",
            "layer": lesion.layer if lesion else "",
            "cell": cell.key,
        }
        parts.append(_measured(kept, cell.prompt.text, store.get(cell.key).pixels).assign(**about))
    if not parts:
        return pd.DataFrame()
    whole = pd.concat(parts, ignore_index=True)
    names = ["model", "prompt_id", "seed", "selection", "replacement", "layer", "cell"]
    return whole[[*names, *(name for name in whole if name not in names)]]


def _measured(kept: ImageMaps, caption: str, pixels: Any) -> pd.DataFrame:
    import pandas as pd

    from lesion.analysis.maps import against_masks, entropy
    from lesion.toy_world.masks import masks, spoken

    aspects = {word.name: word.aspect for word in spoken(caption)}
    seen = masks(caption, pixels) if aspects else {}
    words = list(kept.entries["cond"])
    records: list[pd.DataFrame] = []
    for index, layer in enumerate(kept.layers["cond"]):
        looks = np.stack([kept.of(layer, word) for word in words]).astype(np.float64)
        table = pd.DataFrame({"map_layer": layer, "map_index": index, "word": words})
        table["aspect"] = [aspects.get(word, "") for word in words]
        table["share"], table["entropy"] = looks.mean(axis=(1, 2)), entropy(looks)
        for name in ("area", "mass", "iou", "average_precision"):
            table[name] = float("nan")
        there = [number for number, word in enumerate(words) if word in seen]
        if there:
            inside = np.stack([seen[words[number]] for number in there])
            large = np.stack([_resized(looks[number], inside.shape[1:]) for number in there])
            found = {"area": inside.mean(axis=(1, 2)), **against_masks(large, inside)}
            for name, values in found.items():
                table.loc[there, name] = values
        records.append(table)
    return pd.concat(records, ignore_index=True)


def _resized(values: Any, form: tuple[int, ...]) -> Any:
    """A map at the size of the picture, by linear interpolation."""
    from PIL import Image

    picture = Image.fromarray(values.astype(np.float32))
    return np.asarray(picture.resize((form[1], form[0]), Image.Resampling.BILINEAR), dtype=np.float64)
