"""`zero`: the output becomes zeros. The residual path stays, so it equals skipping the sublayer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lesion.surgery.intervention import Intervention

if TYPE_CHECKING:
    from torch import Tensor


class Zero(Intervention):
    """Nothing in the place of a site's contribution."""

    def fill(self, site: str, call: int, branches: Tensor, output: Tensor) -> Tensor:
        return output.new_zeros(())
