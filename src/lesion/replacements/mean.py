"""`mean`: the output becomes its dataset mean, per site, denoising step, CFG branch and channel.

The mean runs over the images of a named calibration set and over the positions of the feature map; see `_means`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lesion.errors import RequestError
from lesion.study.inits import with_inits
from lesion.study.prompts import Prompt, parse_prompts, parse_seeds
from lesion.surgery.intervention import Intervention

if TYPE_CHECKING:
    from torch import Tensor

    from lesion.replacements import Bench


def calibration_of(
    options: Mapping[str, Any], replacement: str = "mean"
) -> tuple[str, tuple[Prompt, ...], tuple[int, ...]]:
    """Name, prompts and seeds of the calibration set. Raises RequestError for options that are none."""
    key = "calibration"
    if unknown := set(options) - {"calibration", "init"}:
        raise RequestError(f"replacement.{replacement}", f"unknown option {min(unknown)!r}; allowed: calibration")
    given = options.get("calibration")
    if not isinstance(given, Mapping) or not {"prompts", "seeds"} >= set(given):
        raise RequestError(key, "needs `prompts` and `seeds`, and nothing else")
    name, prompts, _ = parse_prompts(given.get("prompts"), f"{key}.prompts")
    if "init" in options:  # the study is one of img2img
        prompts = with_inits(prompts, options["init"], f"{key}.prompts")
    seeds = given.get("seeds")
    if not isinstance(seeds, list):
        raise RequestError(f"{key}.seeds", f"needs a list of whole numbers; got {seeds!r}")
    return name, prompts, parse_seeds(seeds, f"{key}.seeds")


class Mean(Intervention):
    """The mean of a site's output over the calibration set.

    means: for each site a tensor (calls, 2, channels): unconditional branch first.
    """

    once = True
    kinds: ClassVar[tuple[str, ...] | None] = (
        "cross_attention",
        "self_attention",
        "joint_attention",
        "feed_forward",
        "block",
        "text_stream",
    )

    def __init__(self, means: Mapping[str, Tensor]):
        self.means = dict(means)

    @classmethod
    def identity(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        _, prompts, seeds = calibration_of(options)
        texts = json.dumps([prompt.text for prompt in prompts] + [prompt.digest for prompt in prompts if prompt.digest])
        return {"calibration": {"prompts": hashlib.sha256(texts.encode()).hexdigest(), "seeds": list(seeds)}}

    @classmethod
    def build(cls, options: Mapping[str, Any], bench: Bench) -> Self:
        from lesion.replacements._means import calibrated

        name, prompts, seeds = calibration_of(options)
        return cls(calibrated(bench, name, prompts, seeds))

    def fill(self, site: str, call: int, branches: Tensor, output: Tensor) -> Tensor:
        mean = self.means[site] = self.means[site].to(output.device)
        rows = mean[call][branches]  # (rows, channels)
        return rows[:, :, None, None] if output.dim() == 4 else rows[:, None, :]
