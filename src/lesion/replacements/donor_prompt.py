"""`donor_prompt`: the layer reads another prompt (interchange; per-layer prompting).

On the branch `cond` the donor stands in for the prompt alone; `both` gives it to the unconditional half, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from lesion.replacements._donor import donor_of
from lesion.surgery.intervention import Intervention

if TYPE_CHECKING:
    from torch import Tensor

    from lesion.replacements import Bench
    from lesion.replacements._texts import Read


class DonorPrompt(Intervention):
    """Every row reads the donor's text.

    reads: text features and mask of the donor by site path.
    """

    changes = "text"
    kinds = ("cross_attention",)
    heads = False
    of_tokens = ("text",)
    compiled = False

    def __init__(self, reads: Mapping[str, Read]):
        self.reads = reads

    @classmethod
    def identity(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return donor_of(options, "donor_prompt")

    @classmethod
    def build(cls, options: Mapping[str, Any], bench: Bench) -> Self:
        from lesion.replacements._texts import read_by_sites

        return cls(read_by_sites(bench.model, options["prompt"], bench.settings))

    def text(self, site: str, branches: Tensor, text: Tensor, mask: Tensor | None) -> Read:
        from lesion.replacements._texts import exchanged

        return exchanged(self.reads[site], text, mask)
