"""`zero`: the output becomes zeros. The residual path stays, so it equals skipping the sublayer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lesion.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from lesion.replacements import Bench


def identity(options: Mapping[str, Any]) -> dict[str, Any]:
    if options:
        raise RequestError("replacement.zero", f"unknown option {next(iter(options))!r}; allowed: none")
    return {}


class Zero:
    def fill(self, site: str, call: int, branches: Tensor, output: Tensor) -> Tensor:
        return output.new_zeros(())


def build(options: Mapping[str, Any], bench: Bench) -> Zero:
    return Zero()
