"""`resample`: the layer's output is taken from the donor prompt's own run with the same noise, at the same step.

The donor's image is made beside each lesioned one, in the same batch, so nothing has to be kept; it costs one more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from lesion.replacements._donor import donor_of
from lesion.surgery.intervention import Intervention

if TYPE_CHECKING:
    from torch import Tensor

    from lesion.replacements import Bench


class Resample(Intervention):
    """A site's output in the image of the source prompt.

    source_prompt: the donor.
    guided: whether each image has an unconditional row beside its conditional one in a call of the denoiser.
    """

    kinds = ("cross_attention", "self_attention", "joint_attention", "feed_forward", "block", "text_stream")
    of_tokens = ("keys", "values")
    compiled = False
    donor_images = True
    reads_output = True

    def __init__(self, source_prompt: str, guided: bool):
        self.source_prompt, self.guidance_branches = source_prompt, 2 if guided else 1

    @classmethod
    def identity(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return donor_of(options, "resample")

    @classmethod
    def build(cls, options: Mapping[str, Any], bench: Bench) -> Self:
        from lesion.models.source import APART

        both_at_once = not type(bench.model.pipe).__name__.startswith(APART)
        return cls(options["prompt"], bench.settings.guided and both_at_once)

    def fill(self, site: str, call: int, branches: Tensor, output: Tensor) -> Tensor:
        rows = output.unflatten(0, (self.guidance_branches, 2, -1))  # (branches, image or its source, images, …)
        sources: Tensor = rows[:, 1:].expand_as(rows).flatten(0, 2)
        return sources
