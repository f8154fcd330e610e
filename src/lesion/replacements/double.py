"""`double`: what a site adds counts twice; with `layers.kind=text_stream` the text that a block reads.

At strength s the quantity x becomes (1 + s) x: 1 doubles it, 2 triples it, 0.5 gives one and a half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lesion.study.lesions import MOST
from lesion.surgery.intervention import Intervention

if TYPE_CHECKING:
    from torch import Tensor


class Double(Intervention):
    """Twice a site's own contribution."""

    of_tokens = ("values",)
    once = True
    compiled = False
    most_strength = MOST
    reads_output = True

    def fill(self, site: str, call: int, branches: Tensor, output: Tensor) -> Tensor:
        return 2 * output
