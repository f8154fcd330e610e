"""`resample`: the layer's output is taken from the donor prompt's own run with the same noise, at the same step.

The donor's image is made beside each lesioned one, in the same batch, so nothing has to be kept; it costs one more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lesion.replacements._donor import donor_of

if TYPE_CHECKING:
    from torch import Tensor

    from lesion.replacements import Bench

KINDS = ("cross_attention", "self_attention", "joint_attention", "feed_forward", "block")
COMPILED = False


def identity(options: Mapping[str, Any]) -> dict[str, Any]:
    return donor_of(options, "resample")


class FromCompanion:
    """companion: the donor prompt. Each branch holds the images first and their companions after, in the same order."""

    reads_output = True

    def __init__(self, companion: str, guided: bool):
        self.companion, self.branches = companion, 2 if guided else 1

    def fill(self, site: str, call: int, branches: Tensor, output: Tensor) -> Tensor:
        rows = output.unflatten(0, (self.branches, 2, -1))  # (branches, image or companion, images, …)
        donors: Tensor = rows[:, 1:].expand_as(rows).flatten(0, 2)
        return donors


def build(options: Mapping[str, Any], bench: Bench) -> FromCompanion:
    return FromCompanion(options["prompt"], bench.settings.guided)
