"""`resample_pairs`: as `resample`, the donor of each image being one of the captions that differ least from its own.

A donor far from the caption changes everything at once; in a minimal pair ("a red circle", "a blue circle") what the
layer puts out changes by what differs. Of the donors, those with the fewest words that differ are taken, one seed after
the other: over seeds a prompt has many donors, whose variance its mean and intervals hold.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

from lesion.errors import RequestError
from lesion.replacements.resample import Resample
from lesion.study.prompts import parse_prompts

if TYPE_CHECKING:
    from lesion.replacements import Bench


class ResamplePairs(Resample):
    """A site's output in the image of a minimal pair's other prompt.

    donors: texts to choose from.
    guided: whether each image has an unconditional row beside its conditional one in a call of the denoiser.
    """

    def __init__(self, donors: Sequence[str], guided: bool):
        super().__init__(donors[0], guided)
        self.donors = tuple(donors)

    @classmethod
    def identity(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"donors": hashlib.sha256(json.dumps(_donors(options)).encode()).hexdigest()}

    @classmethod
    def build(cls, options: Mapping[str, Any], bench: Bench) -> Self:
        plain = Resample.build({"prompt": ""}, bench)
        return cls(_donors(options), plain.guidance_branches == 2)

    def source_of(self, prompt: str, seed: int) -> str:
        pairs = nearest(prompt, self.donors)
        return pairs[seed % len(pairs)]


def _donors(options: Mapping[str, Any]) -> list[str]:
    key = "replacement.resample_pairs"
    if unknown := set(options) - {"donors"}:
        raise RequestError(key, f"unknown option {min(unknown)!r}; allowed: donors")
    texts = sorted({prompt.text for prompt in parse_prompts(options.get("donors"), f"{key}.donors").prompts})
    if len(texts) < 2:
        raise RequestError(f"{key}.donors", "needs two different texts or more, so that every prompt has another")
    return texts


@lru_cache(maxsize=4096)
def nearest(prompt: str, donors: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `donors` (in their order) from which the prompt differs in the fewest words, and in one at least."""
    words = Counter(prompt.lower().split())
    apart = {}
    for donor in donors:
        other = Counter(donor.lower().split())
        apart[donor] = max((words - other).total(), (other - words).total())
    different = {donor: number for donor, number in apart.items() if number} or apart
    return tuple(donor for donor, number in different.items() if number == min(different.values()))
