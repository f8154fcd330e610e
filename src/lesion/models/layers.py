"""The layers of a model's denoiser, known from its config: shipped as data, remembered, or examined.

`layers.json` holds the lists of the embedded model and of the published architectures of conf/model, for every
`layers.by` and `layers.kind` (scripts/known_models.py writes it). Another denoiser of diffusers is built once on the
meta device, which takes diffusers and torch, and its list is kept in a cache folder. Whatever the source, the list is
compared with the real model once that is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lesion
from lesion.errors import RequestError
from lesion.store.digests import cache_folder
from lesion.store.files import atomically

if TYPE_CHECKING:
    from lesion.models.source import Source

FILE = Path(__file__).with_name("layers.json")
FORMAT = 2  # raise it when another list would come of the same config: kinds, names or order of layers
# Config values that change widths, inputs or numbers in the modules, but not which modules or heads there are.
SHAPELESS = frozenset(
    {
        *("sample_size", "in_channels", "out_channels", "patch_size", "act_fn", "activation_fn", "dropout", "norm_eps"),
        *("norm_num_groups", "center_input_sample", "flip_sin_to_cos", "freq_shift", "downsample_padding"),
        *("mid_block_scale_factor", "upcast_attention", "resnet_out_scale_factor", "time_cond_proj_dim"),
        *("guidance_embeds", "interpolation_scale", "pos_embed_max_size", "use_linear_projection", "mlp_ratio"),
        *("hidden_size", "text_len", "text_len_t5", "pooled_projection_dim", "learn_sigma", "conditioning_dim"),
        *("use_style_cond_and_image_meta_size", "caption_channels", "caption_projection_dim", "axes_dims_rope"),
    }
)


def layer_paths(source: Source, by: str, kind: str) -> tuple[str, ...]:
    """Module paths of the layers of a denoiser in forward order, without its weights.

    Raises RequestError where it has none of this kind and grouping.
    """
    found = _shipped_list(source, by, kind)
    if found is None:
        wanted = (source.spec, source.fingerprint, by, kind)
        if wanted not in _memory:
            _memory[wanted] = _remembered(source, by, kind)
        found = _memory[wanted]
    if isinstance(found, Mapping):
        raise RequestError(found["key"], found["message"])
    return tuple(found)


_memory: dict[Any, Any] = {}  # of this process: lists of models that are not shipped


def check(paths: Sequence[str], source: Source, by: str, kind: str) -> None:
    """Raises RequestError where a loaded denoiser has other layers than `layer_paths` says, and forgets such a list."""
    if tuple(paths) == layer_paths(source, by, kind):
        return
    _memory.clear()
    place = _place(source, by, kind)
    if place is None:
        todo = "is its code what it was when the study began?"
    elif _shipped_list(source, by, kind) is not None:
        todo = "the list that ships with lesion does not fit this diffusers: install the one of constraints.txt"
    else:
        place.unlink(missing_ok=True)
        todo = f"the list remembered in {place} is removed: run the same command again"
    raise RequestError("model.id", f"the loaded model has other layers than its config says; {todo}")


def identify(name: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Key of the lists of a denoiser class of diffusers: of all config values that could change them.

    defaults: of every value that the class takes, if they are known.
    """
    known = {key: value for key, value in config.items() if key in defaults or not defaults}
    shaping = {key: value for key, value in {**defaults, **known}.items() if key[0] != "_" and key not in SHAPELESS}
    return hashlib.sha256(json.dumps([FORMAT, name, shaping], sort_keys=True).encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def _shipped() -> dict[str, Any]:
    """defaults: by class. lists: of paths; a path with a number stands for so many heads. models: key -> {by: {kind:
    number of the list, or key and message of the refusal}}.
    """
    data: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return data


def _shipped_list(source: Source, by: str, kind: str) -> Any:
    """None where the file does not have this model."""
    shipped = _shipped()
    library, name = source.components[source.denoiser]
    if library != "diffusers" or name not in shipped["defaults"]:
        return None
    lists = shipped["models"].get(identify(name, source.denoiser_config, shipped["defaults"][name]))
    if lists is None:
        return None
    found = lists[by][kind]
    return unfolded(shipped["lists"][found]) if isinstance(found, int) else found


def unfolded(entries: list[Any]) -> list[str]:
    """Paths, from entries that are a path, or [path, heads] for the layers `path.heads.0`, `path.heads.1`, …"""
    paths: list[str] = []
    for entry in entries:
        paths += [entry] if isinstance(entry, str) else [f"{entry[0]}.heads.{head}" for head in range(entry[1])]
    return paths


def examined(denoiser: Any, by: str, kind: str) -> Any:
    """The list of a built denoiser, or key and message of the refusal."""
    from lesion.surgery.anatomy import AnatomyError, examine

    try:
        return list(examine(denoiser, by, kind).paths)
    except AnatomyError as error:
        return {"key": error.key, "message": str(error)}


def _place(source: Source, by: str, kind: str) -> Path | None:
    """File of a remembered list; None for a class outside diffusers, whose code may change without a new version."""
    library, name = source.components[source.denoiser]
    if library != "diffusers":
        return None
    versions = [lesion.__version__, importlib.metadata.version("diffusers")]
    key = hashlib.sha256(json.dumps([identify(name, source.denoiser_config, {}), by, kind, *versions]).encode())
    return cache_folder() / "layers" / f"{key.hexdigest()[:32]}.json"


def _remembered(source: Source, by: str, kind: str) -> Any:
    place = None
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        place = _place(source, by, kind)
        if place is not None and (found := _read(place)) is not None:
            return found
    found = examined(source.skeleton(source.denoiser), by, kind)
    if place is not None:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomically(place) as temporary:
                temporary.write_text(json.dumps({"found": found, "digest": _digest(found)}), encoding="utf-8")
    return found


def _read(place: Path) -> Any:
    """None for what is not there or is damaged."""
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
        found = data["found"]
        return found if data["digest"] == _digest(found) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(found: Any) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
