"""`donor_prompt`: the layer reads another prompt (interchange; per-layer prompting).

On the branch `cond` the donor stands in for the prompt alone; `both` gives it to the unconditional half, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lesion.errors import RequestError

if TYPE_CHECKING:
    from lesion.replacements import Bench
    from lesion.texts import OtherText

KINDS = ("cross_attention",)


def identity(options: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := set(options) - {"prompt"}:
        raise RequestError("replacement.donor_prompt", f"unknown option {min(unknown)!r}; allowed: prompt")
    prompt = options.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise RequestError("replacement.donor_prompt.prompt", f"must be the donor's text; got {prompt!r}")
    return {"prompt": prompt}


def build(options: Mapping[str, Any], bench: Bench) -> OtherText:
    from lesion.texts import OtherText, read_by_sites

    return OtherText(read_by_sites(bench.model, options["prompt"], bench.settings))
