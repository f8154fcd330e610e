"""Finding and loading models: a hub name, a local diffusers folder, or one .safetensors file.

Finding imports neither torch nor diffusers; `Model` and `load`, which need them, are imported when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lesion.models.loras import Lora
from lesion.models.schedulers import SCHEDULERS
from lesion.models.source import (
    DTYPES,
    EMBEDDED,
    ModelSpec,
    Source,
    check_files,
    check_offload,
    identity_of,
    pipeline_class,
    resolve,
)

if TYPE_CHECKING:
    from lesion.models.loading import Model, load

__all__ = [
    "DTYPES",
    "EMBEDDED",
    "SCHEDULERS",
    "Lora",
    "Model",
    "ModelSpec",
    "Source",
    "check_files",
    "check_offload",
    "identity_of",
    "load",
    "pipeline_class",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name not in ("Model", "load"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lesion.models import loading

    return getattr(loading, name)
