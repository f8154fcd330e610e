"""`null_prompt`: the layer reads what the unconditional branch reads: the negative prompt, empty by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from lesion.surgery.intervention import Intervention

if TYPE_CHECKING:
    from torch import Tensor

    from lesion.replacements import Bench
    from lesion.replacements._texts import Read


class NullPrompt(Intervention):
    """Every row reads the unconditional text.

    reads: text features and mask of the unconditional prompt by site path, where there is no guidance; None where there
    is: each image's unconditional row, in the first half of the batch, is then what its rows read.
    """

    changes = "text"
    kinds = ("cross_attention",)
    branches = ("both", "cond")  # the unconditional branch reads it anyway
    heads = False
    of_tokens = ("text",)
    compiled = False

    def __init__(self, reads: Mapping[str, Read] | None = None):
        self.reads = reads

    @classmethod
    def build(cls, options: Mapping[str, Any], bench: Bench) -> Self:
        from lesion.replacements._texts import read_by_sites

        if bench.settings.guided:
            return cls()
        settings = replace(bench.settings, negative_prompt=None)
        return cls(read_by_sites(bench.model, bench.settings.negative_prompt or "", settings))

    def text(self, site: str, branches: Tensor, text: Tensor, mask: Tensor | None) -> Read:
        from lesion.replacements._texts import exchanged

        if self.reads is not None:
            return exchanged(self.reads[site], text, mask)
        half = len(text) // 2
        return text[:half].repeat(2, 1, 1), None if mask is None else mask[:half].repeat(2, *[1] * (mask.dim() - 1))
