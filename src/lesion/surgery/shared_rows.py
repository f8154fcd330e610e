"""What both guidance branches of an image have in common, computed once: everything before the first text that is read.

Both branches have the same latents, and differ only by the text that cross-attention reads. Where every row of a batch
has lost the first layers that read it, their rows stay equal until the first layer that is left, and half of them
suffice. The result is the same but for rounding, as with another batch size. It suits UNets into which text comes by
cross-attention alone: `Source.shares_rows`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lesion.denoising.run import Client, DenoiserCall, Denoising
from lesion.denoising.wrapping import forward_replaced
from lesion.surgery.anatomy import text_sites
from lesion.surgery.operation import Lesions, SiteLesions

# Children of a UNet that read nothing else that differs.
_BODY = ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out")
# Arguments of their calls: text, which may differ by branch; all else must be nothing or plain.
_TEXT = ("encoder_hidden_states", "encoder_attention_mask")


@dataclass(frozen=True)
class _Station:
    """A module that runs on half of the rows where it can tell no branch from the other.

    texts: sites within it that read the text. sites: lesions within it. leaf: whether no station is within it.
    """

    texts: tuple[str, ...]
    sites: tuple[SiteLesions, ...]
    leaf: bool


class SharedRows(Client):
    """Runs the modules before the first text on one row an image, and doubles what they put out.

    Only in denoiser calls in which every image is under its lesion, so that images without one stay as they are to the
    bit. To be attached after the lesions.
    """

    def __init__(self, lesions: Lesions):
        self.lesions = lesions
        self.halved = 0  # modules that ran on half of the rows, in all calls
        self._together = self._within = False
        self._same: bool | None = None  # whether the pipeline gives both branches the same latents
        self._known: dict[tuple[bool, ...], dict[str, bool]] = {}

    @contextmanager
    def attached(self, run: Denoising) -> Iterator[None]:
        self._run = run
        self._stations = _stations(run.denoiser, self.lesions)
        with ExitStack() as stack:
            for path, station in self._stations.items():
                module = run.denoiser.get_submodule(path)
                stack.enter_context(forward_replaced(module, functools.partial(self._halving, path, station)))
            yield

    def before_call(self, run: Denoising, call: DenoiserCall) -> None:
        self._together = self._within = False
        rows = len(call.sample)
        if not self._stations or rows != 2 * run.samples or run.half is not None or not all(self.lesions.inside):
            return
        if run.samples == 1:  # a single row takes other kernels, which round differently
            return
        self._rows = rows
        others = [value for name, value in call.kwargs.items() if name not in (*_TEXT, "sample", "timestep")]
        if len(call.args) > 3 or any(isinstance(value, Tensor | dict) for value in others):
            return
        timestep = call.args[1] if len(call.args) > 1 else call.kwargs.get("timestep")
        if isinstance(timestep, Tensor) and timestep.numel() > 1:
            return
        if not self._first_lost():
            return
        if self._same is None or call.sample.device.type == "cpu":  # elsewhere one look a run: it waits for the device
            self._same = torch.equal(call.sample[: rows // 2], call.sample[rows // 2 :])
        self._together = self._same

    def after_call(self, run: Denoising, call: DenoiserCall) -> None:
        self._together = False

    def _first_lost(self) -> bool:
        """Whether the first layer that reads the text is lost in every row: before it there is little to save."""
        first = next((path for path, station in self._stations.items() if station.texts == (path,)), "")
        return bool(first) and self._shared(first)

    def _shared(self, path: str) -> bool:
        """Whether nothing in this station tells the branches apart in the present denoiser call."""
        known = self._known.setdefault(self.lesions.inside, {})
        if path not in known:
            station = self._stations[path]
            known[path] = all(map(_alike, station.sites)) and all(map(self._unread, station.texts))
        return known[path]

    def _unread(self, text: str) -> bool:
        """Whether what a site reads of the text is replaced in every row, by itself or with a module around it."""
        around = (site for site in self.lesions.sites.values() if _in(text, site.site.hook.module))
        return any(
            site.site.head is None and site.site.hook.everything and _alike(site) and _whole(site) for site in around
        )

    def _halving(self, path: str, station: _Station, forward: Callable[..., Any]) -> Callable[..., Any]:
        def halving(*args: Any, **kwargs: Any) -> Any:
            if not self._together or self._within or self._run.is_aside:
                return forward(*args, **kwargs)
            if not self._shared(path):
                output = forward(*args, **kwargs)
                self._together = self._together and not station.leaf and all(map(_alike, station.sites))
                return output
            half = self._rows // 2

            def conditional(tensor: Tensor) -> Tensor:
                return tensor[half:] if tensor.dim() and len(tensor) == self._rows else tensor

            self._within = True
            try:
                output = forward(*_mapped(args, conditional), **_mapped(kwargs, conditional))
            finally:
                self._within = False
            self.halved += 1
            return _mapped(output, lambda tensor: torch.cat([tensor, tensor]) if len(tensor) == half else tensor)

        return halving


def _stations(denoiser: nn.Module, lesions: Lesions) -> dict[str, _Station]:
    """The stations of a denoiser by their paths: its children, and those of children that read text."""
    texts, found = text_sites(denoiser), {}

    def look(path: str, module: nn.Module) -> None:
        mine = tuple(text for text in texts if _in(text, path))
        inner = bool(mine) and mine != (path,)
        if not isinstance(module, nn.ModuleList):
            sites = tuple(site for site in lesions.sites.values() if _in(site.site.hook.module, path))
            found[path] = _Station(mine, sites, not inner)
        if inner or isinstance(module, nn.ModuleList):
            for name, child in module.named_children():
                look(f"{path}.{name}", child)

    for name in _BODY:
        if isinstance(child := getattr(denoiser, name, None), nn.Module):
            look(name, child)
    return found


def _in(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.")


def _alike(site: SiteLesions) -> bool:
    """Whether a site's lesions do the same to both branches of an image in the present denoiser call."""
    acting = [lesion for lesion, inside in zip(site.lesions, site.client.inside, strict=True) if lesion and inside]
    if not acting:
        return True
    return all(lesion.branch == "both" for lesion in acting) and not any(
        one.tells_branches for one in site.interventions.values()
    )


def _whole(site: SiteLesions) -> bool:
    inside = zip(site.lesions, site.client.inside, strict=True)
    return not site.output_needed and all(lesion and now and lesion.strength == 1 for lesion, now in inside)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_mapped(one, change) for one in value)
    if isinstance(value, dict):  # diffusers' output classes are such, too
        return type(value)(**{name: _mapped(one, change) for name, one in value.items()})
    return value
