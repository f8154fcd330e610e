"""Lesions on a compiled denoiser: a gate at every site whose weights and values are tensors, so lesions are data.

Hooks that come and go would be ignored by compiled code, or have it compiled anew. Gates stay: they are put on before
the repeated blocks are compiled, and a lesion only fills in their tensors. Open gates keep every bit of the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lesion.study.lesions import Lesion
from lesion.surgery.anatomy import Anatomy
from lesion.surgery.operation import Filler, Fitting, Steps, fittings, replacement_key, sample_of

_WEIGHT, _VALUE = "lesion_weight", "lesion_value"
_MORE = ("reads_output", "retell", "rerun", "companion")  # what a filler may do besides putting a value in


def gate(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Row by row as `surgery.blend`: weight 0 keeps the output and 1 takes the value, both to the bit."""
    rows = output.shape[0]  # of at least as many: a buffer's own length is a constant to the compiler
    weight, value = getattr(module, _WEIGHT)[:rows], getattr(module, _VALUE)[:rows]  # (rows, 1, 1), (rows, 1, channels)
    mixed = torch.where(weight == 1, value, output + weight * (value - output))
    return torch.where(weight == 0, output, mixed)


class Gates:
    """The gates of one denoiser, open but for the time of a call under lesions.

    anatomy: any whose layers have all its sites between them.
    """

    def __init__(self, denoiser: nn.Module, anatomy: Anatomy):
        self.denoiser = denoiser
        self.modules = {
            site.path: (denoiser.get_submodule(site.path), site.channels)
            for layer in anatomy.layers
            for site in layer.sites
        }
        for path, (module, _) in self.modules.items():
            self._set(path, _WEIGHT, torch.zeros(1, 1, 1))
            self._set(path, _VALUE, torch.zeros(1, 1, 1))
            module.register_forward_hook(gate)

    @contextmanager
    def lesioned(
        self, pipe: Any, anatomy: Anatomy, lesions: Sequence[Lesion | None], fillers: Mapping[str, Filler]
    ) -> Iterator[None]:
        """As `surgery.lesioned`, but entered without any lesion, too: it fits the gates to a call's rows and precision.

        The gates are open again behind it.
        Raises RuntimeError for a lesion whose filler reads the output, which a gate cannot show it, or whose site has
        no gate.
        """
        used = [fillers[replacement_key(lesion)] for lesion in lesions if lesion and lesion.strength]
        if any(hasattr(filler, name) for filler in used for name in _MORE):
            raise RuntimeError("this replacement does more than put a value in: set performance.compile=false")
        steps = Steps(pipe)
        fitted = fittings(anatomy, lesions, fillers, steps)
        if without := fitted.keys() - self.modules.keys():
            raise RuntimeError(f"{min(without)} has no gate: set performance.compile=false")

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            for path in self.modules:
                self._fill(path, fitted.get(path), len(sample_of(args, kwargs)))

        with ExitStack() as stack:
            stack.callback(self._open)
            stack.enter_context(steps.counting(self.denoiser))
            stack.callback(self.denoiser.register_forward_pre_hook(before, with_kwargs=True).remove)
            yield

    def _open(self) -> None:
        """No lesion stays, should anything call the denoiser outside."""
        for module, _ in self.modules.values():
            getattr(module, _WEIGHT).zero_()

    def _fill(self, path: str, fitting: Fitting | None, rows: int) -> None:
        """Set one gate for the present call: shapes are the same whatever the lesion."""
        module, channels = self.modules[path]
        like = next(module.parameters()).new_zeros(rows, 1, channels)
        weight, value = like[..., :1], like
        if fitting is not None and fitting.weights(rows)[1]:
            branches, shares = fitting.shares(like)
            for name, share in shares.items():
                filled = fitting.fillers[name].fill(path, fitting.steps.call, branches, like).to(like.dtype)
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
