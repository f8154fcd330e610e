"""Lesions on a compiled denoiser: a gate at every site whose weights and values are tensors, so lesions are data.

Hooks that come and go would be ignored by compiled code, or have it compiled anew. Gates stay: they are put on before
the repeated blocks are compiled, and a lesion only fills in their tensors. Open gates keep every bit of the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lesion.denoising.run import Client, DenoiserCall, Denoising
from lesion.study.lesions import Lesion
from lesion.surgery.anatomy import Anatomy, Site
from lesion.surgery.hook_points import Call, FromText, HookPoint, Share, has_text_stream, wide
from lesion.surgery.intervention import Intervention
from lesion.surgery.operation import Lesions, SiteLesions, replacement_key

_WEIGHT, _VALUE, _ON = "lesion_weight", "lesion_value", "lesion_on"
_FIRST, _END = "lesion_first", "lesion_end"  # of the image's tokens, where text and image are in one sequence


@cache
def gate(hook: HookPoint) -> Any:
    """A forward hook that writes a module's buffers row by row in the place of what the hook point reads.

    Weight 0 keeps the output and 1 takes the value, both bit for bit, as `hook_points.blend` does. One function for all
    modules that are read alike: another one would have their code compiled anew.
    """

    def gated(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not getattr(module, _ON):  # a second pass, which is left out where nothing is lesioned
            return output
        call = Call(module, module.forward, args, kwargs, slice(getattr(module, _FIRST), getattr(module, _END)))
        changes = []
        for part in range(hook.parts(output)):
            stream = hook.like(call, output, part)
            rows = stream.shape[0]  # of at least as many: a buffer's own length is a constant to the compiler
            weight, value = getattr(module, _WEIGHT)[:rows], getattr(module, f"{_VALUE}{part}")[:rows]
            if stream.dim() == 4:
                weight, value = weight[..., None], value.transpose(1, 2)[..., None]
            changes.append((part, value, Share(weight, False, True, None)))
        return hook.write(call, output, changes)

    return gated


class Gates:
    """The gates of one denoiser, open but for the time of a run under lesions.

    anatomy: any whose layers have all its sites between them. For lesions of another kind the gates are put elsewhere,
    and the blocks are compiled anew.
    """

    def __init__(self, denoiser: nn.Module, anatomy: Anatomy):
        self.denoiser = denoiser
        self.modules: dict[str, tuple[nn.Module, int]] = {}
        self._hooks: list[Any] = []
        self._put(anatomy)

    def _put(self, anatomy: Anatomy) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._hooks:  # what is compiled goes by the hooks of its time
            torch.compiler.reset()
        self.sites: dict[str, Site] = {site.path: site for layer in anatomy.layers for site in layer.sites}
        self.modules = {
            path: (self.denoiser.get_submodule(site.hook.module), site.channels) for path, site in self.sites.items()
        }
        self._hooks = []
        for path, (module, _) in self.modules.items():
            hook = self.sites[path].hook
            setattr(module, _FIRST, 0)
            setattr(module, _END, None)
            setattr(module, _ON, not isinstance(hook, FromText))
            for name in (_WEIGHT, *self._values(path)):
                self._set(path, name, torch.zeros(1, 1, 1))
            alike = replace(hook, module="", block="")
            self._hooks.append(module.register_forward_hook(gate(alike), with_kwargs=True))

    def _values(self, path: str) -> dict[str, str]:
        """The buffers of a site's values, each with the name of its part of the quantity."""
        names = {f"{_VALUE}0": path}
        if has_text_stream(self.sites[path].hook, self.modules[path][0]):
            names[f"{_VALUE}1"] = f"{path}:text"
        return names

    def lesions(
        self, anatomy: Anatomy, lesions: Sequence[Lesion | None], interventions: Mapping[str, Intervention]
    ) -> Client:
        """Return the client that puts these lesions on the gates; see `operation.Lesions` for the arguments.

        It is needed in a run without any lesion, too: it fits the gates to the rows and the precision of a call.
        Raises RuntimeError for a lesion whose intervention does more than put a value in, or of a single head.
        """
        used = [interventions[replacement_key(lesion)] for lesion in lesions if lesion and lesion.strength]
        if any(one.changes != "output" or one.reads_output or one.source_prompt for one in used):
            raise RuntimeError("this replacement does more than put a value in: set performance.compile=false")
        if any(site.head is not None for site in anatomy.by_path.values()):
            raise RuntimeError("single heads have no gates: set performance.compile=false")
        if any(self.sites.get(path) != site for path, site in anatomy.by_path.items()):
            self._put(anatomy)
        return _OnGates(self, anatomy, lesions, interventions)

    def open(self) -> None:
        """Take every lesion off, should anything call the denoiser outside."""
        for module, _ in self.modules.values():
            getattr(module, _WEIGHT).zero_()

    def fill(self, path: str, lesions: SiteLesions | None, rows: int, call: int, image: slice) -> None:
        """Set one gate for the present denoiser call: shapes are the same whatever the lesion.

        image: where its tokens are, for modules that see them and the text's in one sequence.
        """
        module, channels = self.modules[path]
        hook, values = self.sites[path].hook, self._values(path)
        like = next(module.parameters(), next(self.denoiser.parameters())).new_zeros(rows, 1, channels)
        precise = like.to(wide(like))  # a mean is no number of half precision
        weight, filled = precise[..., :1], dict.fromkeys(values, precise)
        now = None if lesions is None else lesions.rows(like)
        if lesions is not None and now is not None and now.acts:
            for key, share in now.shares.items():
                weight = weight + share.column
                for buffer, name in values.items():
                    value = lesions.interventions[key].fill(name, call, now.branches, like).to(precise.dtype)
                    filled[buffer] = torch.where(share.column > 0, value.expand_as(like), filled[buffer])
        setattr(module, _FIRST, image.start if hook.block else 0)
        setattr(module, _END, image.stop if hook.block else None)
        if isinstance(hook, FromText):
            setattr(module, _ON, now is not None and now.acts)
        for name, tensor in {_WEIGHT: weight, **filled}.items():
            self._set(path, name, tensor)

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
        image = _image(run.denoiser, call)
        for path in self.gates.modules:
            self.gates.fill(path, self.sites.get(path), len(call.sample), run.call, image)


def _image(denoiser: nn.Module, call: DenoiserCall) -> slice:
    """Where the image's tokens are in a sequence with the text's: behind them, of Z-Image in front, padded."""
    text = call.kwargs.get("encoder_hidden_states")
    if not isinstance(call.sample, list):
        return slice(text.shape[1] if isinstance(text, Tensor) else 0, None)
    from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF

    config: Any = denoiser.config
    frames, height, width = call.sample[0].shape[-3:]
    patch = config.all_patch_size[0]
    tokens = frames // config.all_f_patch_size[0] * (height // patch) * (width // patch)
    return slice(None, -(-tokens // SEQ_MULTI_OF) * SEQ_MULTI_OF)
