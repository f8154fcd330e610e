"""Calibration means: what a site puts out on average, per denoising step, CFG branch and channel.

One streaming pass over a calibration set; sums are kept in float64, no activation is kept.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lesion.generation.generate import call, generators, under
from lesion.store import tensors as tensorfiles
from lesion.study.prompts import Prompt
from lesion.surgery.anatomy import Site
from lesion.surgery.hook_points import Call
from lesion.surgery.operation import Steps, TextLength, branches_of

if TYPE_CHECKING:
    from lesion.replacements import Bench

log = logging.getLogger(__name__)
FORMAT = 1


def calibrated(bench: Bench, name: str, prompts: Sequence[Prompt], seeds: Sequence[int]) -> dict[str, Tensor]:
    """Means of every site, (calls, 2, channels) float32, unconditional branch first (NaN there without guidance).

    By `Site.part`: a block with a text stream has means of each stream; a head's last channel is the 1 of its bias.
    Kept as safetensors with their provenance in the bench's folder, and read back if they are there. The provenance
    is compared with what is asked, so means of another calibration under this name are noticed, also of version 0.1.
    """
    identity = bench.model.identity
    provenance = {
        "format": FORMAT,
        "model": identity.name,
        "fingerprint": identity.fingerprint,
        "dtype": identity.dtype,
        "settings": bench.settings.provenance(),
        "calibration": name,
        "prompts": [prompt.text for prompt in prompts],
        "seeds": list(seeds),
        "statistic": "mean over calibration images and feature-map positions, accumulated in float64",
    }
    if any(prompt.digest for prompt in prompts):
        provenance["inits"] = [prompt.digest for prompt in prompts]
    if identity.device != "cpu":  # as in a cell's key: left out at their defaults
        provenance["device"] = identity.device
    if identity.switches:
        provenance["switches"] = list(identity.switches)
    anatomy = bench.model.anatomy
    if anatomy.kind != "cross_attention":
        provenance["kind"] = anatomy.kind
    if anatomy.by == "head" or anatomy.kind == "block":  # then sites depend on how they are grouped
        provenance["by"] = anatomy.by
    key = _key(provenance)
    path = bench.folder / f"{key}.safetensors"
    kept = tensorfiles.read(path, lambda carried: _key(json.loads(carried["provenance"])) == key)
    if kept is not None:
        return kept[0]
    log.info("calibrating means on %r: %d prompts x %d seeds", name, len(prompts), len(seeds))
    found = measure(bench, list(itertools.product(prompts, seeds)))
    try:
        tensorfiles.write(path, found, {"provenance": json.dumps(provenance)})
    except OSError as error:
        log.warning("calibration means cannot be kept, so the next run measures them again (%s)", error)
    return found


def _key(provenance: Mapping[str, Any]) -> str:
    """Digest of all that decides the means: model, sites and calibration; 32 hex digits, the name of their file."""
    labels = ("model", "calibration")  # names only: they change no value
    text = json.dumps({field: value for field, value in provenance.items() if field not in labels}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def measure(bench: Bench, subjects: Sequence[tuple[Prompt, int]]) -> dict[str, Tensor]:
    """One pass over the (prompt, seed) pairs in batches."""
    model = bench.model
    found: dict[str, _Sums] = {}
    for start in range(0, len(subjects), bench.batch_size):
        batch = subjects[start : start + bench.batch_size]
        pipe = model.pipeline(bench.settings.task)
        steps = Steps(pipe)
        with torch.inference_mode(), ExitStack() as stack:
            if model.gates:  # compiled code would not run the hooks
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(under(model, pipe, [None] * len(batch), {}))
            stack.enter_context(steps.counting(model.denoiser))
            for site in model.anatomy.by_path.values():
                watch = TextLength()
                if site.port.block:
                    block = model.denoiser.get_submodule(site.port.block)
                    stack.callback(block.register_forward_pre_hook(watch.note, with_kwargs=True).remove)
                hook = _hook(site, steps, len(batch), watch, found)
                module = model.denoiser.get_submodule(site.port.module)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            call(model, [prompt for prompt, _ in batch], generators([seed for _, seed in batch]), bench.settings)
    return {name: sums.means() for name, sums in found.items()}


class _Sums:
    """Of one quantity, float64: totals (2, channels) and counts (2,) by denoiser call; unconditional branch first."""

    def __init__(self) -> None:
        self.totals: list[Tensor] = []
        self.counts: list[Tensor] = []

    def add(self, step: int, branches: Tensor, quantity: Tensor) -> None:
        """quantity: (rows, tokens, channels) or (rows, channels, height, width)."""
        positions = (2, 3) if quantity.dim() == 4 else (1,)
        totals = quantity.double().sum(dim=positions).cpu()  # (rows, channels)
        if step == len(self.totals):
            self.totals.append(torch.zeros(2, totals.shape[1], dtype=torch.float64))
            self.counts.append(torch.zeros(2, dtype=torch.float64))
        number = float(quantity[0].numel() // totals.shape[1])
        self.totals[step].index_add_(0, branches, totals)
        self.counts[step].index_add_(0, branches, torch.full((len(quantity),), number, dtype=torch.float64))

    def means(self) -> Tensor:
        return (torch.stack(self.totals) / torch.stack(self.counts)[..., None]).float().contiguous()


def _hook(site: Site, steps: Steps, samples: int, watch: TextLength, found: dict[str, _Sums]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen = Call(module, module.forward, args, kwargs, watch.tokens)
        for part in range(site.port.parts(output)):
            quantity = site.port.read(seen, output, part)
            sums = found.setdefault(site.part(part), _Sums())
            sums.add(steps.call, branches_of(len(quantity), samples), quantity)

    return hook
