"""By what a site's contribution is replaced: one file a replacement, found by its name.

Each file has one subclass of `lesion.surgery.intervention.Intervention`, which says what the replacement suits, what of
its options can change pixels, and what it does. Nothing here imports torch before a replacement is built.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesion.errors import RequestError
from lesion.study import tokens
from lesion.study.components import DENOISER
from lesion.study.lesions import Replacement
from lesion.surgery.intervention import Intervention

if TYPE_CHECKING:
    from lesion.models import Model, ModelSpec
    from lesion.study.settings import Settings


@dataclass(frozen=True)
class Bench:
    """What a replacement may use to get ready: the loaded model, the settings of the cells, a folder to keep things.

    components: those under study.
    """

    model: Model
    settings: Settings
    folder: Path
    batch_size: int
    components: tuple[str, ...] = (DENOISER,)


def known() -> tuple[str, ...]:
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")))


def find(name: str) -> type[Intervention]:
    """Return the class of a replacement. Raises RequestError for an unknown name."""
    if name not in known():
        raise RequestError("replacement", f"unknown replacement {name!r}; allowed: {', '.join(known())}")
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Intervention) and value.__module__ == module.__name__
    )
    return found


def describe(name: str, options: Mapping[str, Any]) -> Replacement:
    """Return the replacement as plain data for the study. Raises RequestError for wrong options."""
    return Replacement(name, find(name).identity(options))


def check(
    name: str,
    kind: str,
    branches: Sequence[str],
    by: str = "attention",
    strengths: Sequence[float] = (),
    components: Sequence[str] = (DENOISER,),
) -> None:
    """Raise RequestError if the replacement makes no sense for this kind of site, these branches, strengths or
    components.
    """
    one = find(name)
    if not one.once and (others := [component for component in components if component != DENOISER]):
        once = [other for other in known() if find(other).once]
        by_token = by in tokens.BY
        allowed = ", ".join(
            other for other in once if (find(other).of_tokens if by_token else find(other).changes != "tokens")
        )
        raise RequestError("replacement", f"{name} suits the denoiser only; with {others[0]}: {allowed}")
    if one.changes == "tokens" and by not in tokens.BY:
        raise RequestError("replacement", f"{name} is of text tokens; with it: layers.by={', '.join(tokens.BY)}")
    kinds = one.kinds_of_tokens() if by in tokens.BY else one.kinds
    if by in tokens.BY and not kinds:
        suited = ", ".join(other for other in known() if kind in find(other).kinds_of_tokens())
        raise RequestError("replacement", f"{name} does not suit single tokens; allowed with layers.by={by}: {suited}")
    if kinds is not None and kind not in kinds:
        raise RequestError("replacement", f"{name} suits layers.kind={', '.join(kinds)} only; got {kind}")
    if by == "head" and not one.heads:
        raise RequestError("replacement", f"{name} changes a whole attention, not a head; not with layers.by=head")
    if unsuited := [branch for branch in branches if branch not in one.branches]:
        raise RequestError(
            "replacement", f"{name} does nothing on branch={unsuited[0]}; allowed: {', '.join(one.branches)}"
        )
    if beyond := [strength for strength in strengths if strength > one.most_strength]:
        raise RequestError(
            "strength", f"must be a number in [0, {one.most_strength:g}] with replacement={name}; got {beyond[0]:g}"
        )


def check_model(name: str, model: ModelSpec) -> None:
    """Raise RequestError if the replacement makes no sense on the model that is asked for."""
    one = find(name)
    if model.compile and not one.compiled:
        raise RequestError("performance.compile", f"does not work with replacement={name}; allowed here: false")
    one.check_model(model)


def build(name: str, options: Mapping[str, Any], bench: Bench) -> Intervention:
    """Return the replacement at work on the bench's model, for options that `describe` has checked."""
    return find(name).build(options, bench)
