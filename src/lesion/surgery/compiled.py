"""Lesions on a compiled denoiser: a gate at every site whose weights and values are tensors, so lesions are data.

Hooks that come and go would be ignored by compiled code, or have it compiled anew. Gates stay: they are put on before
the repeated blocks are compiled, and a lesion only fills in their tensors. Open gates keep every bit of the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lesion.denoising.run import Client, DenoiserCall, Denoising
from lesion.study.lesions import Lesion
from lesion.surgery.anatomy import Anatomy
from lesion.surgery.hook_points import wide
from lesion.surgery.intervention import Intervention
from lesion.surgery.operation import Lesions, SiteLesions, replacement_key

_WEIGHT, _VALUE = "lesion_weight", "lesion_value"


def gate(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Row by row as `hook_points.blend`: weight 0 keeps the output and 1 takes the value, both bit for bit."""
    rows = output.shape[0]  # of at least as many: a buffer's own length is a constant to the compiler
    weight, value = getattr(module, _WEIGHT)[:rows], getattr(module, _VALUE)[:rows]  # (rows, 1, 1), (rows, 1, channels)
    kept = output.to(weight.dtype)
    mixture = (kept + weight * (value.to(weight.dtype) - kept)).to(output.dtype)
    return torch.where(weight == 0, output, torch.where(weight == 1, value, mixture))


class Gates:
    """The gates of one denoiser, open but for the time of a run under lesions.

    anatomy: any whose layers have all its sites between them.
    """

    def __init__(self, denoiser: nn.Module, anatomy: Anatomy):
        self.modules = {
            site.path: (denoiser.get_submodule(site.path), site.channels)
            for layer in anatomy.layers
            for site in layer.sites
        }
        for path, (module, _) in self.modules.items():
            self._set(path, _WEIGHT, torch.zeros(1, 1, 1))
            self._set(path, _VALUE, torch.zeros(1, 1, 1))
            module.register_forward_hook(gate)

    def lesions(
        self, anatomy: Anatomy, lesions: Sequence[Lesion | None], interventions: Mapping[str, Intervention]
    ) -> Client:
        """Return the client that puts these lesions on the gates; see `operation.Lesions` for the arguments.

        It is needed in a run without any lesion, too: it fits the gates to the rows and the precision of a call.
        Raises RuntimeError for a lesion whose intervention does more than put a value in, or whose site has no gate.
        """
        used = [interventions[replacement_key(lesion)] for lesion in lesions if lesion and lesion.strength]
        if any(one.changes != "output" or one.reads_output or one.source_prompt for one in used):
            raise RuntimeError("this replacement does more than put a value in: set performance.compile=false")
        client = _OnGates(self, anatomy, lesions, interventions)
        if without := client.sites.keys() - self.modules.keys():
            raise RuntimeError(f"{min(without)} has no gate: set performance.compile=false")
        return client

    def open(self) -> None:
        """Take every lesion off, should anything call the denoiser outside."""
        for module, _ in self.modules.values():
            getattr(module, _WEIGHT).zero_()

    def fill(self, path: str, lesions: SiteLesions | None, rows: int, call: int) -> None:
        """Set one gate for the present denoiser call: shapes are the same whatever the lesion."""
        module, channels = self.modules[path]
        like = next(module.parameters()).new_zeros(rows, 1, channels)
        weight, value = like[..., :1].to(wide(like)), like
        if lesions is not None and (now := lesions.rows(like)).acts:
            for key, share in now.shares.items():
                filled = lesions.interventions[key].fill(path, call, now.branches, like).to(like.dtype)
                value = torch.where(share.column > 0, filled.expand_as(like), value)
                weight = weight + share.column
        self._set(path, _WEIGHT, weight)
        self._set(path, _VALUE, value)

    def _set(self, path: str, name: str, value: Tensor) -> None:
        """In place where there is room, and never an inference tensor: to compiled code that is another kind."""
        module, rows = self.modules[path][0], len(value)
        kind = (value.shape[1:], value.device, value.dtype)
        now = getattr(module, name, None)
        if now is None or len(now) < rows or (now.shape[1:], now.device, now.dtype) != kind:
            room = 1 << (rows - 1).bit_length()  # to spare, so that other batches seldom need a new buffer
            with torch.inference_mode(False):
                now = value.new_empty(room, *value.shape[1:])
                module.register_buffer(name, now, persistent=False)
        now[:rows].copy_(value)


class _OnGates(Lesions):
    """As `Lesions`, with gates in the place of wrapped modules."""

    def __init__(
        self,
        gates: Gates,
        anatomy: Anatomy,
        lesions: Sequence[Lesion | None],
        interventions: Mapping[str, Intervention],
    ):
        super().__init__(anatomy, lesions, interventions)
        self.gates = gates

    @contextmanager
    def attached(self, run: Denoising) -> Iterator[None]:
        self.run = run
        try:
            yield
        finally:
            self.gates.open()

    def before_call(self, run: Denoising, call: DenoiserCall) -> None:
        super().before_call(run, call)
        for path in self.gates.modules:
            self.gates.fill(path, self.sites.get(path), len(call.sample), run.call)
