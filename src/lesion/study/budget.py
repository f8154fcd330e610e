"""What a budget asks for; `lesion.rounds` follows it. Imports nothing of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lesion.errors import RequestError

FEWEST = 5  # prompts; of fewer, the bootstrap has too few different outcomes, and Student's t is used


@dataclass(frozen=True)
class Budget:
    """ci_halfwidth: of a 95 % interval, in units of similarity. max_images: of the whole study, None for no limit.

    start: subjects of the first round. round: subjects that each later round adds.
    """

    ci_halfwidth: float
    max_images: int | None = None
    start: int = 20
    round: int = 6

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Budget | None:
        """From the `budget` group of a request; None for the whole grid. Raises RequestError naming the key."""
        most, width = config["max_images"], config["ci_halfwidth"]
        for name, low in (("start", FEWEST), ("round", 1), ("max_images", 1)):
            number = config[name]
            if name == "max_images" and number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int) or number < low:
                raise RequestError(f"budget.{name}", f"must be a whole number >= {low}; got {number!r}")
        if width is None:
            if most is not None:
                raise RequestError("budget.max_images", "needs budget.ci_halfwidth; allowed without it: null")
            return None
        if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width < 1:
            raise RequestError("budget.ci_halfwidth", f"must be null or a number in (0, 1); got {width!r}")
        return cls(float(width), most, config["start"], config["round"])
