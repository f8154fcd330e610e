"""`optimal`: the constant under which the denoiser changes least, per site, denoising step, CFG branch and channel.

It starts at the mean over a named calibration set (as `mean`) and takes `updates` steps from there; see `_optimal`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from lesion.errors import RequestError
from lesion.replacements.mean import Mean, calibration_of

if TYPE_CHECKING:
    from lesion.replacements import Bench


class Optimal(Mean):
    """The best constants over the calibration set.

    means: for each site a tensor (calls, 2, channels): unconditional branch first.
    """

    kinds = ("cross_attention", "self_attention", "joint_attention", "feed_forward", "block")
    heads = False
    once = False
    compiled = False

    @classmethod
    def identity(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        updates = options.get("updates", 0)
        if type(updates) is not int or not 1 <= updates <= 1000:
            raise RequestError(
                "replacement.optimal.updates", f"must be a whole number from 1 to 1000; got {options.get('updates')!r}"
            )
        return {**super().identity(_without_updates(options)), "updates": updates}

    @classmethod
    def build(cls, options: Mapping[str, Any], bench: Bench) -> Self:
        from lesion.replacements._means import calibrated

        name, prompts, seeds = calibration_of(_without_updates(options), "optimal")
        return cls(calibrated(bench, name, prompts, seeds, options["updates"]))


def _without_updates(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "updates"}
