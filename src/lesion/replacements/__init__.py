"""By what a site's output can be replaced: one module a replacement, found by its name.

A module has two functions (and imports torch only inside the second, since the first is used when planning):

    identity(options) -> dict       what of the options can change pixels, as JSON data; raises RequestError
    build(options, bench) -> Filler the replacement at work on the bench's model (see `lesion.surgery.Filler`)

and, where it does not suit everything, KINDS (of `layers.kind`) and BRANCHES that it suits, HEADS = False if it cannot
be had for one attention head, COMPILED = False if its Filler does more than `fill` or reads the output, and

    check_model(model) -> None      raises RequestError if it makes no sense on this ModelSpec
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lesion.errors import RequestError
from lesion.study.lesions import Replacement

if TYPE_CHECKING:
    from lesion.models import Model, ModelSpec
    from lesion.study.settings import Settings
    from lesion.surgery.operation import Filler


@dataclass(frozen=True)
class Bench:
    """What a replacement may use to get ready: the loaded model, the settings of the cells, a folder to keep things."""

    model: Model
    settings: Settings
    folder: Path
    batch_size: int


def known() -> tuple[str, ...]:
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")))


def _module(name: str) -> ModuleType:
    if name not in known():
        raise RequestError("replacement", f"unknown replacement {name!r}; allowed: {', '.join(known())}")
    return importlib.import_module(f"{__name__}.{name}")


def describe(name: str, options: Mapping[str, Any]) -> Replacement:
    """The replacement as plain data for the study."""
    return Replacement(name, _module(name).identity(options))


def check(name: str, kind: str, branches: Sequence[str], by: str = "attention") -> None:
    """Raises RequestError if the replacement makes no sense for this kind of site or one of these branches."""
    module = _module(name)
    suited = getattr(module, "KINDS", (kind,))
    if kind not in suited:
        raise RequestError("replacement", f"{name} suits layers.kind={', '.join(suited)} only; got {kind}")
    if by == "head" and not getattr(module, "HEADS", True):
        raise RequestError("replacement", f"{name} changes a whole attention, not a head; not with layers.by=head")
    suited = getattr(module, "BRANCHES", tuple(branches))
    if unsuited := [branch for branch in branches if branch not in suited]:
        raise RequestError("replacement", f"{name} does nothing on branch={unsuited[0]}; allowed: {', '.join(suited)}")


def check_model(name: str, model: ModelSpec) -> None:
    """Raises RequestError if the replacement makes no sense on the model that is asked for."""
    module = _module(name)
    if model.compile and not getattr(module, "COMPILED", True):
        raise RequestError("performance.compile", f"does not work with replacement={name}; allowed here: false")
    check_one = getattr(module, "check_model", None)
    if check_one is not None:
        check_one(model)


def build(name: str, options: Mapping[str, Any], bench: Bench) -> Filler:
    filler: Filler = _module(name).build(options, bench)
    return filler
