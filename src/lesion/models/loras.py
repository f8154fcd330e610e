"""LoRA adapters: how they are asked for, where they lie, and how they get on a pipeline."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesion.errors import RequestError
from lesion.models import files
from lesion.models.hub import snapshot

KEY = "model.loras"
LOUDEST = 1000
HALVES = {"lora_A": "lora_B", "lora_down": "lora_up", "lora.down": "lora.up"}  # names of the two low-rank matrices
USUAL = "pytorch_lora_weights.safetensors"  # diffusers' own name


@dataclass(frozen=True)
class Lora:
    """One adapter. path: a folder, a .safetensors file or a hub name. weight: its scale. name: of the adapter."""

    path: str
    weight: float = 1.0
    name: str = ""
    file: str | None = None  # which .safetensors file of a folder or hub repository that has several


def parse(items: Any) -> tuple[Lora, ...]:
    """From the config's list of mappings. Raises RequestError."""
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise RequestError(KEY, f"must be a list of {{path, weight}}; got {items!r}")
    found: list[Lora] = []
    for number, item in enumerate(items):
        given = {"path": item} if isinstance(item, str) else item
        if not isinstance(given, Mapping) or not isinstance(given.get("path"), str) or not given["path"]:
            raise RequestError(KEY, f"needs a path for each adapter, e.g. {{path: my_lora, weight: 0.8}}; got {item!r}")
        if unknown := {str(key) for key in given} - {"path", "weight", "name", "file"}:
            raise RequestError(KEY, f"unknown key {min(unknown)!r}; allowed: path, weight, name, file")
        weight = given.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not -LOUDEST <= weight <= LOUDEST:
            told = f"must be a finite number from -{LOUDEST} to {LOUDEST}; got {str(weight)[:80]}"
            raise RequestError(f"{KEY}[{number}].weight", told)
        file = given.get("file")
        if file is not None and not (isinstance(file, str) and file.endswith(".safetensors") and "/" not in file):
            raise RequestError(f"{KEY}[{number}].file", f"must be the name of a .safetensors file; got {file!r}")
        name = given.get("name") or f"lora_{number}"
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):  # peft keeps it in parameter names
            raise RequestError(f"{KEY}[{number}].name", f"must be of letters, digits, _ and -; got {name!r}")
        if name in [lora.name for lora in found]:
            raise RequestError(KEY, f"names {name!r} twice; give each adapter a name of its own")
        found.append(Lora(given["path"], float(weight), name, file))
    return tuple(found)


def locate(lora: Lora) -> Path:
    """The adapter's one file, from the hub if need be. Raises RequestError."""
    path = Path(lora.path).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise RequestError(KEY, f"{lora.path!r} is no .safetensors file")
        return path
    if not path.is_dir():
        if path.is_absolute() or path.suffix or lora.path.startswith((".", "~")) or lora.path.count("/") != 1:
            raise RequestError(
                KEY, f"no file or folder {lora.path!r}; allowed: a folder, a .safetensors file, a hub name"
            )
        path = snapshot(lora.path, [lora.file or "*.safetensors"], KEY, "file")
    found = {file.name: file for file in path.glob(lora.file or "*.safetensors") if file.is_file()}
    if USUAL in found:
        return found[USUAL]
    if len(found) != 1:
        wanted = lora.file or ".safetensors file"
        have = ", ".join(sorted(found or (one.name for one in path.glob("*") if one.suffix in files.PICKLED))) or "none"
        raise RequestError(KEY, f"{lora.path!r} must hold one {wanted}, or name it by `file`; it has: {have}")
    return next(iter(found.values()))


def check(path: Path) -> None:
    """Raises RequestError for a file that is no whole safetensors file, or holds no adapter, or half of one."""
    names = set(files.check_safetensors(path, KEY))
    if not any("lora" in name.lower() for name in names):
        raise RequestError(KEY, f"{str(path)!r} holds no LoRA: none of its tensors is named as one")
    for name in sorted(names):
        for one, other in (*HALVES.items(), *((b, a) for a, b in HALVES.items())):
            if one in name and (wanted := name.replace(one, other)) not in names:
                raise RequestError(KEY, f"{str(path)!r} has {name} without {wanted}")


def put_on(pipe: Any, loras: Sequence[Lora], files: Sequence[Path]) -> None:
    """Load adapters and set their weights. Raises RequestError for one that the pipeline has no place for."""
    cls = type(pipe).__name__
    if not hasattr(pipe, "load_lora_weights"):
        raise RequestError(KEY, f"{cls} takes no LoRA adapters; allowed: []")
    for lora, file in zip(loras, files, strict=True):
        try:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=lora.name)
        except Exception as error:  # of diffusers, peft or torch, by what does not fit
            why = " ".join(str(error).split())[:200]
            raise RequestError(KEY, f"{lora.path!r} does not fit {cls}: {why}") from None
        if lora.name not in {name for names in pipe.get_list_adapters().values() for name in names}:
            raise RequestError(KEY, f"{lora.path!r} does not fit {cls}: none of its weights has a place there")
    pipe.set_adapters([lora.name for lora in loras], [lora.weight for lora in loras])
