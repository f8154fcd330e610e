"""The donor prompt that some replacements ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lesion.errors import RequestError


def donor_of(options: Mapping[str, Any], replacement: str) -> dict[str, Any]:
    """The identity of a replacement whose one option is `prompt`, the donor's text; "" is the null prompt.

    Raises RequestError.
    """
    key = f"replacement.{replacement}"
    if unknown := set(options) - {"prompt"}:
        raise RequestError(key, f"unknown option {min(unknown)!r}; allowed: prompt")
    prompt = options.get("prompt")
    if not isinstance(prompt, str) or (prompt and not prompt.strip()):
        raise RequestError(f"{key}.prompt", f"must be the donor's text, '' for the null prompt; got {prompt!r}")
    return {"prompt": prompt}
