"""`donor_prompt`: the layer reads another prompt (interchange; per-layer prompting).

On the branch `cond` the donor stands in for the prompt alone; `both` gives it to the unconditional half, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lesion.replacements._donor import donor_of

if TYPE_CHECKING:
    from lesion.replacements import Bench
    from lesion.replacements._texts import OtherText

KINDS = ("cross_attention",)
HEADS = False
COMPILED = False


def identity(options: Mapping[str, Any]) -> dict[str, Any]:
    return donor_of(options, "donor_prompt")


def build(options: Mapping[str, Any], bench: Bench) -> OtherText:
    from lesion.replacements._texts import OtherText, read_by_sites

    return OtherText(read_by_sites(bench.model, options["prompt"], bench.settings))
