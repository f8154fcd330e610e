"""`zero`: the output becomes zeros. The residual path stays, so it equals skipping the sublayer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lesion.surgery.intervention import Intervention

if TYPE_CHECKING:
    from torch import Tensor


class Zero(Intervention):
    """Nothing in the place of a site's contribution."""

    of_tokens = ("values",)
    once = True
    tells_branches = False

    def __init__(self) -> None:
        self.nothing: Tensor | None = None

    def fill(self, site: str, call: int, branches: Tensor, output: Tensor) -> Tensor:
        import torch

        now = (output.device, output.dtype, torch.is_inference_mode_enabled())
        if self.nothing is None or (self.nothing.device, self.nothing.dtype, self.nothing.is_inference()) != now:
            self.nothing = output.new_zeros(())  # one for all sites: making it is a call of the device
        return self.nothing
