"""Folders of transformers models that metrics read: by path, from the hub's cache, or downloaded once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub

from lesion.models import files
from lesion.models.hub import answers as hub_answers
from lesion.store.digests import digest_of

CONFIG, WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")
INDEX = "model.safetensors.index.json"  # of weights in several files
TEXTS = ("*.json", "*.txt", "*.jinja", "*.model")  # configs, tokenizers, templates of chats


def resolve(name: str, kind: str, key: str, more: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """Return config and weights of a model's folder, or of a name on the hub.

    kind: the `model_type` that its config must have.
    key: of the config, under which a folder can be named.
    more: further files that the folder must have.

    Raises ValueError for another kind of model, FileNotFoundError where there is none; one line each.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        config = folder / CONFIG
        weights = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
        missing = [file for file in (CONFIG, *more) if not (folder / file).is_file()]
        if missing or weights is None:
            raise FileNotFoundError(f"the folder needs {', '.join((CONFIG, *more))} and {' or '.join(WEIGHTS)}")
    else:
        check_name(name)
        config, weights = _from_hub(name, key, more)
    check_kind(config, kind)
    return config, weights


def folder_of(name: str, key: str) -> Path:
    """Return the folder of a model whose weights are safetensors, in one file or several.

    name: a local folder, or a name on the hub: from its cache, or downloaded once.
    key: of the config, under which a folder can be named.

    Raises FileNotFoundError where there is none or a file is missing, ValueError for an index that cannot be read.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = snapshot(name, f"download it once where there is network, or set {key} to a folder of it")
    if lacking := [file for file in (CONFIG, *_weights(folder)) if not (folder / file).is_file()]:
        raise FileNotFoundError(f"the folder lacks {lacking[0]}")
    return folder


def snapshot(name: str, advice: str) -> Path:
    """Return the folder of a name on the hub with its whole model: from the hub's cache, or downloaded.

    Raises FileNotFoundError in one line that ends with `advice`.
    """
    check_name(name)
    cached = huggingface_hub.try_to_load_from_cache(name, CONFIG)
    if isinstance(cached, str):
        folder = Path(cached).parent
        if all((folder / file).is_file() for file in _weights(folder)):
            return folder
    with reaching_the_hub(advice):
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*TEXTS, "*.safetensors"]))


def _weights(folder: Path) -> tuple[str, ...]:
    """The names of the files that the weights are, or would be, in."""
    index = folder / INDEX
    if (folder / WEIGHTS[0]).is_file() or not index.is_file():
        return WEIGHTS[:1]
    named = mapping(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{INDEX} is no index of weights")
    return tuple(sorted({str(file) for file in named.values()}))


def digest_of_folder(folder: Path) -> str:
    """Return a digest of all that a model of this folder computes with, 16 hex digits."""
    texts = {path for pattern in TEXTS for path in folder.glob(pattern) if path.is_file()}
    return digest_of((*sorted(texts), *(folder / file for file in _weights(folder))))


def architecture(folder: Path) -> str:
    """Return the class of transformers that a folder's config names; "" where it names none."""
    found = mapping(folder / CONFIG).get("architectures")
    return str(found[0]) if isinstance(found, list) and found else ""


def mapping(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping. Raises ValueError for anything else."""
    try:
        return files.mapping(file)
    except ValueError as error:
        raise ValueError(f"{file.name} {error}") from None


def check_name(name: str) -> None:
    """Raise FileNotFoundError for what cannot be a name on the hub."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError("no such folder, and no name on the hub (ORG/REPO)")


def check_kind(config: Path, kind: str) -> None:
    """Raise ValueError for a config whose `model_type` is another."""
    if (found := str(mapping(config).get("model_type", "no model"))) != kind:
        raise ValueError(f"{CONFIG} is of {found}; allowed: {kind}")


def _from_hub(name: str, key: str, more: tuple[str, ...]) -> tuple[Path, Path]:
    for file in WEIGHTS:
        found = [huggingface_hub.try_to_load_from_cache(name, part) for part in (CONFIG, file, *more)]
        if all(isinstance(part, str) for part in found):
            return Path(str(found[0])), Path(str(found[1]))
    advice = f"download it once where there is network, or set {key} to a folder of it"
    with reaching_the_hub(advice):
        parts = [huggingface_hub.hf_hub_download(name, part) for part in (CONFIG, WEIGHTS[0], *more)]
    return Path(parts[0]), Path(parts[1])


@contextmanager
def reaching_the_hub(advice: str) -> Iterator[None]:
    """Within it something is downloaded. Raises FileNotFoundError in one line that ends with `advice` if it fails."""
    if not hub_answers():
        raise FileNotFoundError(f"not in the hub's cache, and the hub does not answer; {advice}")
    try:
        yield
    except Exception as error:  # the hub's client has errors of many types
        raise FileNotFoundError(f"cannot be had from the hub ({str(error).splitlines()[0]}); {advice}") from None


def loaded(model_class: Any, folder: Path, device: Any, dtype: str = "float32") -> Any:
    """Return a model of transformers for inference. Raises ValueError where its folder lacks weights."""
    import torch

    model, report = model_class.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"the weights lack {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    return model.to(device).eval().requires_grad_(False)
