"""`null_prompt`: the layer reads what the unconditional branch reads: the negative prompt, empty by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lesion.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from lesion.replacements import Bench
    from lesion.surgery.operation import TextFiller

KINDS = ("cross_attention",)
HEADS = False
COMPILED = False
BRANCHES = ("both", "cond")  # the unconditional branch reads it anyway


def identity(options: Mapping[str, Any]) -> dict[str, Any]:
    if options:
        raise RequestError("replacement.null_prompt", f"unknown option {next(iter(options))!r}; allowed: none")
    return {}


class Unconditional:
    """Every row reads what its own image's unconditional row reads, the first half of the batch."""

    def retell(self, site: str, branches: Tensor, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        half = len(text) // 2
        return text[:half].repeat(2, 1, 1), None if mask is None else mask[:half].repeat(2, *[1] * (mask.dim() - 1))


def build(options: Mapping[str, Any], bench: Bench) -> TextFiller:
    from lesion.replacements._texts import OtherText, read_by_sites

    if bench.settings.guided:
        return Unconditional()
    settings = replace(bench.settings, negative_prompt=None)
    return OtherText(read_by_sites(bench.model, bench.settings.negative_prompt or "", settings))
