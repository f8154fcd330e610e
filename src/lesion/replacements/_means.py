"""Calibration means: what a site puts out on average, per denoising step, CFG branch and channel.

One streaming pass over a calibration set; sums are kept in float64, no activation is kept.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lesion.denoising.run import COND, UNCOND, Client, DenoiserCall, Denoising, Enough
from lesion.generation.generate import call, generators, under_lesions
from lesion.models.text_cache import Forgetful
from lesion.store import tensors as tensorfiles
from lesion.study.components import DENOISER, VAE
from lesion.study.prompts import Prompt
from lesion.surgery.anatomy import Anatomy, Site
from lesion.surgery.hook_points import Call, TextLength

if TYPE_CHECKING:
    from lesion.replacements import Bench

log = logging.getLogger(__name__)
FORMAT = 1


def calibrated(
    bench: Bench, name: str, prompts: Sequence[Prompt], seeds: Sequence[int], updates: int = 0
) -> dict[str, Tensor]:
    """Means of every site, (calls, 2, channels) float32, unconditional branch first (NaN there without guidance).

    updates: steps from the means towards the constants that change the denoiser least, see `_optimal`; 0: the means.
    By `Site.part`: a block with a text stream has means of each stream; a head's last channel is the 1 of its bias.
    Kept as safetensors with their provenance in the bench's folder, and read back if they are there. The provenance
    is compared with what is asked, so means of another calibration under this name are noticed, also of version 0.1.
    """
    found: dict[str, Tensor] = {}
    for component in bench.components:
        anatomy = bench.model.anatomy if component == DENOISER else bench.model.components[component]
        found |= _calibrated(bench, component, anatomy, name, prompts, seeds, updates)
    return found


def _calibrated(
    bench: Bench,
    component: str,
    anatomy: Anatomy,
    name: str,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    updates: int,
) -> dict[str, Tensor]:
    """Those of the sites of one component. Of text encoders and the decoder there is one call; what is encoded for the
    unconditional branch counts as that."""
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
    if updates:
        provenance["statistic"] = f"constants that change the denoiser least, {updates} updates from the mean"
    if any(prompt.digest for prompt in prompts):
        provenance["inits"] = [prompt.digest for prompt in prompts]
    if identity.device != "cpu":  # as in a cell's key: left out at their defaults
        provenance["device"] = identity.device
    if identity.switches:
        provenance["switches"] = list(identity.switches)
    if component != DENOISER:
        provenance["component"] = component
    if anatomy.kind != "cross_attention":
        provenance["kind"] = anatomy.kind
    if component == DENOISER and (anatomy.by == "head" or anatomy.kind == "block"):  # sites depend on the grouping
        provenance["by"] = anatomy.by
    key = _key(provenance)
    path = bench.folder / f"{key}.safetensors"
    kept = tensorfiles.read(path, lambda carried: _key(json.loads(carried["provenance"])) == key)
    if kept is not None:
        return kept[0]
    if updates:
        from lesion.replacements._optimal import optimised

        means = _calibrated(bench, component, anatomy, name, prompts, seeds, 0)
        log.info("optimising constants on %r: %d updates of every layer", name, updates)
        found = optimised(bench, list(itertools.product(prompts, seeds)), means, updates)
    else:
        log.info("calibrating means on %r: %d prompts x %d seeds", name, len(prompts), len(seeds))
        subjects = list(itertools.product(prompts, seeds))
        found = measure(bench, subjects) if component == DENOISER else _once(bench, subjects, component, anatomy)
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
    calibration = Calibration(bench.model.anatomy)
    watched(bench, subjects, calibration)
    return calibration.means()


def _once(bench: Bench, subjects: Sequence[tuple[Prompt, int]], component: str, anatomy: Anatomy) -> dict[str, Tensor]:
    """The same of a component that runs once an image."""
    if component != VAE:  # every prompt is encoded, whether it has been before or not
        bench = replace(bench, model=replace(bench.model, texts=Forgetful()))
    calibration = CalibrationOnce(component, anatomy)
    watched(bench, subjects, calibration)
    return calibration.means()


def watched(bench: Bench, subjects: Sequence[tuple[Prompt, int]], client: Client) -> None:
    """Make the images of (prompt, seed) pairs in batches, un-lesioned, with this client looking on."""
    model = bench.model
    for start in range(0, len(subjects), bench.batch_size):
        batch = subjects[start : start + bench.batch_size]
        clients = [*under_lesions(model, [None] * len(batch), {}), client]
        # Compiled code would not run the hooks.
        with suppress(Enough), torch.compiler.set_stance("force_eager") if model.gates else nullcontext():
            noise = generators([seed for _, seed in batch])
            call(model, [prompt for prompt, _ in batch], noise, bench.settings, clients)


class Calibration(Client):
    """Sums up what every site puts out, over any number of runs.

    anatomy: of the denoiser.
    """

    def __init__(self, anatomy: Anatomy):
        self.anatomy = anatomy
        self._sums: dict[str, _Sums] = defaultdict(_Sums)

    def means(self) -> dict[str, Tensor]:
        """Return the mean of every part of every site, (calls, 2, channels), unconditional branch first."""
        return {name: sums.means() for name, sums in self._sums.items()}

    @contextmanager
    def attached(self, run: Denoising) -> Iterator[None]:
        with ExitStack() as stack:
            for site in self.anatomy.by_path.values():
                text = TextLength()
                stack.enter_context(text.watching(run.denoiser, site.hook.block))
                module = run.denoiser.get_submodule(site.hook.module)
                hook = self._adding(site, lambda rows: (run.call, run.branches(rows)), text)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _adding(self, site: Site, when: Callable[[int], tuple[int, Tensor]], text: TextLength) -> Callable[..., None]:
        """when: the present call, and the branches of so many rows."""

        def add(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen = Call(module, module.forward, args, kwargs, text.image)
            for part, name in site.parts(output):
                quantity = site.hook.read(seen, output, part)
                self._sums[name].add(*when(len(quantity)), quantity)

        return add


class CalibrationOnce(Calibration):
    """Sums up what the sites of a text encoder or of the decoder put out: one call, of which both branches are
    encoded one after the other.
    """

    def __init__(self, component: str, anatomy: Anatomy):
        super().__init__(anatomy)
        self.component = component

    @contextmanager
    def attached(self, run: Denoising) -> Iterator[None]:
        part = getattr(run.pipe, self.component)
        with ExitStack() as stack:
            for site in self.anatomy.by_path.values():
                branches: Iterator[int] = itertools.repeat(COND)
                if self.component != VAE:
                    branches = itertools.chain([COND], itertools.repeat(UNCOND))
                hook = self._adding(site, functools.partial(_only_call, branches), TextLength())
                module = part.get_submodule(site.hook.module)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def before_call(self, run: Denoising, call: DenoiserCall) -> None:
        if self.component != VAE:  # all text is encoded
            raise Enough


def _only_call(branches: Iterator[int], rows: int) -> tuple[int, Tensor]:
    """The only call of a component that runs once an image, with the branch that it is of."""
    return 0, torch.full((rows,), next(branches))


class _Sums:
    """Of one quantity, float64: totals (2, channels) and counts (2,) by denoiser call; unconditional branch first.

    Totals stay where the quantity is: a copy would wait for the device at every site and step.
    """

    def __init__(self) -> None:
        self.totals: list[Tensor] = []
        self.counts: list[list[int]] = []

    def add(self, step: int, branches: Tensor, quantity: Tensor) -> None:
        """quantity: (rows, tokens, channels) or (rows, channels, height, width)."""
        positions = (2, 3) if quantity.dim() == 4 else (1,)
        totals = quantity.sum(dim=positions, dtype=torch.float64)  # (rows, channels), accumulated in float64
        if step == len(self.totals):
            self.totals.append(totals.new_zeros(2, totals.shape[1]))
            self.counts.append([0, 0])
        number = quantity[0].numel() // totals.shape[1]
        for branch in (0, 1):  # `index_add_` has no fixed order on a GPU
            rows = (branches == branch).nonzero().flatten().tolist()
            if rows:  # rows of one branch lie together
                self.totals[step][branch] += totals[rows[0] : rows[-1] + 1].sum(dim=0)
                self.counts[step][branch] += number * len(rows)

    def means(self) -> Tensor:
        counts = torch.tensor(self.counts, dtype=torch.float64)
        return (torch.stack(self.totals).cpu() / counts[..., None]).float().contiguous()
