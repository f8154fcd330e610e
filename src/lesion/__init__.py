"""Lesion studies of text-to-image diffusion models: which layers carry which part of the prompt.

From Python: `lesion.study(...)`, `lesion.open(...)`, `lesion.lesioned(...)`; see docs/python.md. Nothing slow is
imported before it is used.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import lesion.study as _room

if TYPE_CHECKING:
    from lesion.api import StatedStudy as StatedStudy
    from lesion.api import lesioned as lesioned
    from lesion.api import open as open
    from lesion.api import study as study
    from lesion.errors import RequestError as RequestError
    from lesion.report.results import Results as Results

__version__ = "0.1.0"
__all__ = ["RequestError", "Results", "StatedStudy", "__version__", "lesioned", "open", "study"]


class _Callable(ModuleType):
    """`lesion.study` is a package of modules, and what one calls to state a study."""

    def __call__(self, *overrides: str, **keys: Any) -> StatedStudy:
        """State a study: see `lesion.api.study`."""
        from lesion.api import study

        return study(*overrides, **keys)


sys.modules[_room.__name__].__class__ = _Callable


def __getattr__(name: str) -> Any:
    if name == "RequestError":
        from lesion.errors import RequestError

        return RequestError
    if name == "Results":
        from lesion.report.results import Results

        return Results
    if name in __all__:
        from lesion import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
