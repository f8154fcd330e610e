"""The form of a model's files, looked at before anything loads them: configs that parse, weights with a whole header.

Only safetensors are opened; pickled weights, which can run code, are refused by their names.
"""

from __future__ import annotations

import json
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lesion.errors import RequestError

CONFIG_BYTES, HEADER_BYTES = 64 << 20, 100 << 20  # the most that is read; safetensors itself reads no longer header
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
POINTERS = (b"version https://git-lfs", b"version https://hawser")  # the second before git-lfs had its name
POINTED = "is a git-lfs pointer in the place of the file; `git lfs pull` fetches it"
# Names of keys of configs that say how large a network or a schedule is; the least and the most they may say.
_BOUNDS = tuple(
    (re.compile(names), least, most, whole)
    for names, least, most, whole in (
        (r"(?:\w+_)?layers(?:_per_block)?|depth|num_(?:res_)?blocks", 0, 10_000, True),
        (
            r"(?:hidden|intermediate|vocab|sample|patch|image)_size|(?:in|out|latent|block_out)_channels|d_model|d_ff|"
            r"d_kv|(?:cross|joint)_attention_dim|(?:attention_)?head_dim|max_position_embeddings|norm_num_groups|"
            r"(?:n|num)(?:_attention|_key_value|_kv)?_heads",
            1, 100_000_000, True,
        ),
        (r"steps_offset", 0, 1000, True),
        (r"beta_(?:start|end)", 0, 1, False),
        (r"scaling_factor", 1e-9, 10**9, False),
    )
)  # fmt: skip
_DEEPEST = 20
_WITHOUT_WEIGHTS = re.compile(r"Tokenizer|Processor|FeatureExtractor|Scheduler|Guider|Guidance")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "tekken.json")
_BYTES = "ByT5"  # whose tokenizers have no vocabulary


@contextmanager
def reading(key: str) -> Iterator[None]:
    """Within it files are looked at. Raises RequestError, naming the key, where the system does not let one."""
    try:
        yield
    except OSError as error:  # a name too long, a folder that may not be entered
        raise RequestError(key, f"{str(error.filename)!r} cannot be read: {error.strerror}") from None


def read_mapping(path: Path, key: str) -> dict[str, Any]:
    """A JSON file that holds a mapping. Raises RequestError, naming the key, for anything else."""
    try:
        return mapping(path)
    except ValueError as error:
        raise RequestError(key, f"{str(path)!r} {error}") from None


def mapping(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping. Raises ValueError, which says what is wrong with it, for anything else."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("is no regular file")
        with path.open("rb") as file:
            text = file.read(CONFIG_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if len(text) > CONFIG_BYTES:
        raise ValueError(f"has more than {CONFIG_BYTES >> 20} MiB, which is no config")
    if text.startswith(POINTERS):
        raise ValueError(POINTED)
    try:
        data = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError("holds no mapping")
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
        for path in sorted(place.glob("*config.json")):
            _check_values(path, read_mapping(path, key), key)
        if not _WITHOUT_WEIGHTS.search(cls):
            used.add(check_weights(place, library, variant, key))
        elif not any(place.iterdir()):
            raise RequestError(key, f"{str(place)!r} is empty; it is to hold {cls}")
        elif "Tokenizer" in cls and not cls.startswith(_BYTES):
            _check_vocabulary(place, cls, key)
    if variant and used and variant not in used:
        raise RequestError("model.variant", f"{str(folder)!r} has no weights of a variant {variant!r}; allowed: null")


def _check_vocabulary(place: Path, cls: str, key: str) -> None:
    """Raises RequestError for a tokenizer without its words: transformers would take every text for unknown words."""
    found = sorted({path for pattern in _VOCABULARIES for path in place.glob(pattern)})
    if not found:
        raise RequestError(key, f"{str(place)!r} has no words of {cls}: {', '.join(_VOCABULARIES[:-1])}")
    for path in found:
        if path.suffix == ".json":
            data = read_mapping(path, key)
            if not data or (path.name == "tokenizer.json" and not isinstance(data.get("model"), dict)):
                raise RequestError(key, f"{str(path)!r} has no words of {cls}")
            continue
        if not path.is_file() or not path.stat().st_size:
            raise RequestError(key, f"{str(path)!r} is {'empty' if path.is_file() else 'no regular file'}")
        with path.open("rb") as file:
            if file.read(len(POINTERS[0])).startswith(POINTERS):
                raise RequestError(key, f"{str(path)!r} {POINTED}")
    if [path.name for path in found] == ["vocab.json"] and not (place / "merges.txt").is_file():
        raise RequestError(key, f"{str(place)!r} has a vocab.json without its merges.txt")


def _check_values(path: Path, config: Mapping[str, Any], key: str) -> None:
    """Raises RequestError for what no network and no schedule can have, and for configs in configs without end."""
    level: list[tuple[str, Any]] = [("", config)]
    for _ in range(_DEEPEST):
        below: list[tuple[str, Any]] = []
        for name, value in level:
            if isinstance(value, dict):
                below += [(f"{name}.{one}" if name else one, inner) for one, inner in value.items()]
            elif isinstance(value, list):
                below += [(name, inner) for inner in value]
            elif not isinstance(value, bool) and (value is not None or name == "scaling_factor"):
                _check_bounds(path, name, value, key)
        level = below
    if level:
        raise RequestError(key, f"{str(path)!r} is nested too deep; possible: {_DEEPEST} lists or mappings")


def _check_bounds(path: Path, name: str, value: Any, key: str) -> None:
    last = name.rpartition(".")[2]
    for names, least, most, whole in _BOUNDS:
        if names.fullmatch(last):
            fits = isinstance(value, int | float) and least <= value <= most and not (whole and value % 1)
            if not fits:
                possible = f"{'whole numbers' if whole else 'numbers'} from {least:,} to {most:,}"
                raise RequestError(key, f"{str(path)!r} says {name} = {str(value)[:80]}; possible: {possible}")


def check_weights(place: Path, library: str, variant: str | None, key: str) -> str | None:
    """The variant of the weights that are used, None for the plain ones.

    Raises RequestError unless a folder has a config and whole weights of a model, of diffusers or of transformers.
    """
    found, used = weights(place, library, variant, key)
    for path in found:
        check_safetensors(path, key)
    return used


def weights(place: Path, library: str, variant: str | None, key: str) -> tuple[list[Path], str | None]:
    """The files of a component's weights, and which variant they are, None for the plain ones.

    Raises RequestError where there are none, or the folder has no config.
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
                return _shards(index, key), name
            if whole.is_file():
                return [whole], name
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
    files = []
    for name in sorted(set(names.values())):
        path = index.parent / name
        if path.suffix != ".safetensors" or name != path.name:
            raise RequestError(key, f"{str(index)!r} names {name!r}; allowed: .safetensors files beside it")
        if not path.is_file():
            raise RequestError(key, f"{str(index)!r} names {name!r}, which is not there")
        files.append(path)
    return files


def check_safetensors(path: Path, key: str) -> list[str]:
    """The names of a file's tensors, by its header, which safetensors itself reads and checks; no tensor is read.

    Raises RequestError for a file that is cut short or something else. The format: 8 bytes with the length of the
    header, little-endian; the header, a JSON mapping of names to dtype, shape and place; the tensors one after the
    other to the end of the file.
    """

    def refuse(what: str) -> RequestError:
        return RequestError(key, f"{str(path)!r} {what}")

    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise refuse("is no regular file")
        with path.open("rb") as file:
            start = file.read(len(POINTERS[0]))
        if start.startswith(POINTERS):
            raise refuse(POINTED)
        if len(start) < 8:
            raise refuse("is empty" if not start else "is no safetensors file")
        (length,) = struct.unpack("<Q", start[:8])
        if not 2 <= length <= HEADER_BYTES or start[8:9] != b"{":
            raise refuse("is no safetensors file, whatever its name says")
        if 8 + length > state.st_size:
            raise refuse("is cut short within its header")
        with safe_open(str(path), "np") as weights:
            names = sorted(weights.keys())
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise refuse(f"is cut short or damaged: {str(error).rpartition('header: ')[2]}") from None
    if not names:
        raise refuse("holds no tensors")
    return names
