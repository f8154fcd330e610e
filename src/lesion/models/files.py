"""The form of a model's files, looked at before anything loads them: configs that parse, weights with a whole header.

Only safetensors are opened; pickled weights, which can run code, are refused by their names.
"""

from __future__ import annotations

import json
import re
import stat
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from lesion.errors import RequestError

CONFIG_BYTES, HEADER_BYTES = 64 << 20, 100 << 20  # the most that is read; safetensors itself reads no longer header
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
POINTER = b"version https://git-lfs"
BITS = {"BOOL": 8, "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8,
        "U16": 16, "U32": 32, "U64": 64}  # fmt: skip
MOST = 100_000_000
_SIZES = re.compile(
    r"hidden_size|intermediate_size|vocab_size|sample_size|patch_size|in_channels|out_channels|latent_channels|d_model|"
    r"d_ff|d_kv|block_out_channels|cross_attention_dim|joint_attention_dim|max_position_embeddings|image_size|"
    r"num_(?:hidden_layers|attention_heads|layers|single_layers|heads|key_value_heads)"
)
_WITHOUT_WEIGHTS = re.compile(r"Tokenizer|Processor|FeatureExtractor|Scheduler|Guider|Guidance")


def read_mapping(path: Path, key: str) -> dict[str, Any]:
    """A JSON file that holds a mapping. Raises RequestError, naming the key, for anything else."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise RequestError(key, f"{str(path)!r} is no regular file")
        with path.open("rb") as file:
            text = file.read(CONFIG_BYTES + 1)
        if len(text) > CONFIG_BYTES:
            raise RequestError(key, f"{str(path)!r} has more than {CONFIG_BYTES >> 20} MiB, which is no config")
        data = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise RequestError(key, f"{str(path)!r} is no valid JSON: {error}") from None
    except OSError as error:
        raise RequestError(key, f"{str(path)!r} cannot be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise RequestError(key, f"{str(path)!r} holds no mapping")
    return data


def check_components(folder: Path, components: Mapping[str, tuple[str, str]], variant: str | None, key: str) -> None:
    """Raises RequestError unless every component has its folder, a config and whole weights.

    components: name -> (library, class). variant: of the weights, where a component has it; one must.
    """
    used: set[str | None] = set()
    for name, (library, cls) in components.items():
        place = folder / name
        if not place.is_dir():
            raise RequestError(key, f"{str(folder)!r} has no folder for its component {name} ({cls})")
        for path in sorted(place.glob("*.json" if "Tokenizer" in cls else "*config.json")):
            _check_sizes(path, read_mapping(path, key), key)
        if not _WITHOUT_WEIGHTS.search(cls):
            used.add(check_weights(place, library, variant, key))
        elif not any(place.iterdir()):
            raise RequestError(key, f"{str(place)!r} is empty; it is to hold {cls}")
    if variant and used and variant not in used:
        raise RequestError("model.variant", f"{str(folder)!r} has no weights of a variant {variant!r}; allowed: null")


def _check_sizes(path: Path, config: Mapping[str, Any], key: str) -> None:
    """Raises RequestError for a size that no network can have."""
    for name, value in config.items():
        if _SIZES.fullmatch(name):
            least = 0 if name.endswith("layers") else 1
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, int | float) and not isinstance(one, bool) and not least <= one <= MOST:
                    raise RequestError(key, f"{str(path)!r} says {name} = {value}; possible: {least} to {MOST:,}")


def check_weights(place: Path, library: str, variant: str | None, key: str) -> str | None:
    """The variant of the weights that are used, None for the plain ones.

    Raises RequestError unless a folder has a config and the weights of a model, of diffusers or of transformers.
    """
    if not (place / "config.json").is_file():
        raise RequestError(key, f"{str(place)!r} has no config.json")
    stems = {"diffusers": ["diffusion_pytorch_model"], "transformers": ["model"]}.get(
        library, ["model", "diffusion_pytorch_model"]
    )
    for stem in stems:
        for name in (variant, None) if variant else (None,):
            whole = place / f"{stem}{f'.{name}' if name else ''}.safetensors"
            index = place / f"{stem}.safetensors.index{f'.{name}' if name else ''}.json"
            if index.is_file():
                for shard in _shards(index, key):
                    check_safetensors(shard, key)
                return name
            if whole.is_file():
                check_safetensors(whole, key)
                return name
    usual = f"{stems[0]}.safetensors"
    names = sorted(path.name for path in place.iterdir() if path.is_file())
    pattern = rf"(?:{'|'.join(stems)})(?:\.safetensors\.index)?\.([^.]+?)(?:-\d+-of-\d+)?\.(?:safetensors|json)"
    variants = sorted({found[1] for one in names if (found := re.fullmatch(pattern, one)) and found[1] != "index"})
    if variants:
        told = f"has no {usual}, but weights of the variant {' and '.join(variants)}; give model.variant={variants[0]}"
    elif pickled := [name for name in names if name.endswith(PICKLED)]:
        told = f"has no {usual}, but {pickled[0]}: pickled weights can run code and are not opened; convert them"
    else:
        told = f"has no weights: {usual}"
    raise RequestError(key, f"{str(place)!r} {told}")


def _shards(index: Path, key: str) -> list[Path]:
    names = read_mapping(index, key).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise RequestError(key, f"{str(index)!r} names no files of weights")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for path in files:
        if path.name.endswith(PICKLED) or path.parent != index.parent:
            raise RequestError(key, f"{str(index)!r} names {path.name!r}; allowed: .safetensors files beside it")
        if not path.is_file():
            raise RequestError(key, f"{str(index)!r} names {path.name!r}, which is not there")
    return files


def check_safetensors(path: Path, key: str) -> list[str]:
    """The names of a file's tensors, by its header. Raises RequestError for one that is cut short or something else.

    The format: 8 bytes with the length of the header, little-endian; the header, a JSON mapping of names to dtype,
    shape and place; the tensors one after the other to the end of the file.
    """

    def refuse(what: str) -> RequestError:
        return RequestError(key, f"{str(path)!r} {what}")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(POINTER))
            if start == POINTER:
                raise refuse("is a git-lfs pointer in the place of the weights; `git lfs pull` fetches them")
            if len(start) < 8:
                raise refuse("is empty" if not start else "is no safetensors file")
            (length,) = struct.unpack("<Q", start[:8])
            if not 2 <= length <= HEADER_BYTES or start[8:9] != b"{":
                raise refuse("is no safetensors file, whatever its name says")
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 8 + length + max(int(entry["data_offsets"][1]) for entry in tensors.values())
        odd = [name for name, entry in tensors.items() if not _plausible(entry)]
    except (ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError):
        if 8 + length > size:
            raise refuse("is cut short within its header") from None
        raise refuse("is no safetensors file: its header names no tensors") from None
    if odd:
        raise refuse(f"says of {odd[0]!r} what cannot be: {tensors[odd[0]]}")
    if end != size:
        raise refuse(f"has {size} bytes where its header says {end}: it is cut short or damaged")
    return sorted(tensors)


def _plausible(entry: Mapping[str, Any]) -> bool:
    """Whether a tensor takes the bytes that its shape and dtype say; of dtypes unknown here, any."""
    first, last = entry["data_offsets"]
    bits = BITS.get(entry["dtype"])
    return 0 <= first <= last and (bits is None or 8 * (last - first) == bits * prod(entry["shape"]))
