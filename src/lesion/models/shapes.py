"""Whether weights have the shapes that a model's configs say, told by the headers of their files: no weight is read.

The components are built without weights, which takes torch and the libraries: so it is asked when loading begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lesion.errors import RequestError, counted
from lesion.models import files, loras
from lesion.models.source import EMBEDDED, Source

Shape = tuple[int, ...]
# Prefixes of an adapter's names for the denoiser, in the formats of diffusers and PEFT, and of kohya.
_OF_DENOISER = re.compile(
    r"(?:unet|transformer|lora_unet|lora_transformer)[._](.+?)\.(?:lora[._](A|B|down|up))(?:\.\w+)?\.weight"
)


def check(source: Source) -> None:
    """Raises RequestError for weights and adapters of other shapes than the configs of a local folder say.

    Names that only one side has are left to the loader, and so is a component that cannot be built without weights.
    """
    if source.folder != EMBEDDED or source.adapters:
        _check(source, source.fingerprint)


@lru_cache(maxsize=64)
def _check(source: Source, fingerprint: str) -> None:
    """fingerprint: so that a folder that has changed is looked at again."""
    local = source.commit is None and source.file is None
    for name, (library, _) in source.components.items():
        weighed = local and not (source.vae and name == "vae")
        adapted = source.adapters if name == source.denoiser else ()
        network = _built(source, name) if weighed or adapted else None
        if network is None:
            continue
        if weighed:
            _check_component(source, name, library, network)
        for path in adapted:
            _check_adapter(path, network, source.pipeline)


def _built(source: Source, name: str) -> Any:
    """None for a tokenizer and the like, and for what only the loader can tell."""
    try:
        return source.skeleton(name)
    except RequestError:
        return None


def _check_component(source: Source, name: str, library: str, network: Any) -> None:
    if source.config(name).get("quantization_config"):  # whose weights are packed
        return
    wanted = {one: tuple(weight.shape) for one, weight in network.state_dict().items()}
    above = f"{getattr(network, 'base_model_prefix', '')}."
    odd = []
    for path in files.weights(source.folder / name, library, source.spec.variant, "model.id")[0]:
        for one, shape in shapes(path):
            known = next((n for n in (one, one.removeprefix(above), above + one) if n in wanted), None)
            if known and wanted[known] != shape:
                odd.append(f"{name}: {one} is {_shown(shape)}, by its config {_shown(wanted[known])}")
    if odd:
        raise RequestError(
            "model.id", f"{source.spec.id!r} has weights of another shape than its configs say: {_first(odd)}"
        )


def _check_adapter(path: Path, network: Any, pipeline: str) -> None:
    modules = {name.replace(".", "_"): module for name, module in network.named_modules() if hasattr(module, "weight")}
    odd = []
    for one, shape in shapes(path):
        found = _OF_DENOISER.fullmatch(one)
        module = modules.get(found[1].replace(".", "_")) if found else None
        if found is None or module is None:
            continue
        place = 1 if found[2] in ("A", "down") else 0  # what it reads, or what it adds to
        if len(shape) < 2 or shape[place] != module.weight.shape[place]:
            odd.append(f"{one} is {_shown(shape)}, for a weight of {_shown(module.weight.shape)}")
    if odd:
        raise RequestError(loras.KEY, f"{str(path)!r} does not fit {pipeline}: {_first(odd)}")


def shapes(path: Path) -> Iterator[tuple[str, Shape]]:
    """Name and shape of each tensor of a safetensors file; none of one that `files.check_safetensors` would refuse."""
    with suppress(OSError, SafetensorError), safe_open(str(path), "np") as weights:
        for name in weights.keys():  # noqa: SIM118 - it is no mapping
            yield name, tuple(weights.get_slice(name).get_shape())


def _shown(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _first(odd: Sequence[str]) -> str:
    return odd[0] + (f"; so {counted(len(odd) - 1, 'other')}" if odd[1:] else "")
