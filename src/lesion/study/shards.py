"""A study in disjoint shards, for as many processes. Imports nothing of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lesion.errors import RequestError


@dataclass(frozen=True)
class Shard:
    """Shard number `index`, from 0, of `count`; one of one is the whole study."""

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, config: Mapping[str, Any], budget: bool) -> Shard:
        """From the `shard` group of a request. Raises RequestError naming the key.

        budget: whether the study has one. Its rounds look at results of all subjects, which no shard has.
        """
        count, index = config["count"], config["index"]
        if count < 1:
            raise RequestError("shard.count", f"must be a whole number >= 1; got {count}")
        if not 0 <= index < count:
            raise RequestError(
                "shard.index", f"must be a whole number from 0 to shard.count - 1 = {count - 1}; got {index}"
            )
        if count > 1 and budget:
            raise RequestError(
                "shard.count",
                "does not work with budget.ci_halfwidth, whose rounds look at all images; allowed here: 1",
            )
        return cls(index, count)

    def __str__(self) -> str:
        return f"; shard {self.index} of {self.count}" if self.count > 1 else ""

    def has(self, number: int, total: int) -> bool:
        """Whether subject `number` of `total` is in it. A shard has a run of them; lengths differ by at most one."""
        return number * self.count // total == self.index


WHOLE = Shard()  # of a study in one piece
