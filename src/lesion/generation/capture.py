"""Attention maps as a client of a denoising run: summed up while the images are made, call by call.

What is held is one map an image, branch, layer and entry, however many steps there are: with `capture.reduce=each`
each step goes to disk before the next begins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lesion.denoising.run import COND, UNCOND, Client, DenoiserCall, Denoising
from lesion.generation.spool import Spool
from lesion.models import Model
from lesion.models.words import Words, words_of
from lesion.store.maps import ImageMaps
from lesion.study.capture import REST, SPECIAL, Capture
from lesion.study.components import DENOISER, part_of
from lesion.study.grid import Cell
from lesion.study.lesions import Lesion, covers
from lesion.study.steering import STEERING_OFF
from lesion.study.tokens import layer_and_set
from lesion.surgery.attention import SiteCall, text_attention, watched

_NUMBERS = {"cond": COND, "uncond": UNCOND}


@dataclass
class _Sums:
    """total: (images, heads, entries, image tokens). count: what it is the sum of, (images, heads)."""

    total: Tensor
    count: Tensor


class Capturing(Client):
    """Keeps the attention maps of a batch of cells while it is generated.

    capture: of `Capture.chosen`. After the run, `maps` has those of each cell.
    folder: on the disk where single steps are kept until they are stored; None for the system's temporary files.

    Raises RuntimeError within the run where the text is not as long as the tokenizers make it, and of `maps` where a
    layer was never called, so that no map is silently empty.
    """

    def __init__(self, model: Model, cells: Sequence[Cell], capture: Capture, folder: Path | None = None):
        self.cells, self.capture, self.folder = cells, capture, folder
        settings = cells[0].settings
        texts = {"cond": [cell.prompt.text for cell in cells], "uncond": [settings.negative_prompt or ""] * len(cells)}
        self.words = {
            branch: [words_of(model.pipeline(settings.task), text, model.arguments) for text in texts[branch]]
            for branch in capture.branches
        }
        self.entries = {branch: [self._entries(words) for words in self.words[branch]] for branch in self.words}
        anatomy = text_attention(model.denoiser)
        self.layer_of = {
            site.path: layer.path
            for layer in anatomy.layers
            if layer.path in (capture.layers or ())
            for site in layer.sites
        }
        self.sites = [anatomy.by_path[path] for path in self.layer_of]
        self.dead = [self._dead(model, cell.lesion) for cell in cells]
        self._start()

    def _entries(self, words: Words) -> dict[str, list[int]]:
        if self.capture.tokens == "all":
            taken = {column for columns in words.columns.values() for column in columns} | set(words.special)
            rest = [column for column in range(words.length) if column not in taken]
            return {name: list(columns) for name, columns in words.columns.items()} | {
                SPECIAL: list(words.special), REST: rest
            }  # fmt: skip
        return {name: [number] for number, name in enumerate([*words.columns, SPECIAL, REST])}

    def _dead(self, model: Model, lesion: Lesion | None) -> dict[str, set[int] | None]:
        """Sites of which a lesion leaves nothing, and which of their heads; None for all."""
        found: dict[str, set[int] | None] = {}
        lesion = part_of(lesion, DENOISER)
        if lesion is None or lesion.strength < 1 or lesion.replacement.name == STEERING_OFF:
            return found
        for path in (path for layer in lesion.layers for path in model.anatomy.sites[layer]):
            path, tokens = layer_and_set(path)
            if tokens and lesion.replacement.name == "zero":
                continue  # only values change
            attention, _, head = path.partition(".heads.")
            if head and attention in self.layer_of:
                found[attention] = {*(found.get(attention) or ()), int(head)}
            else:
                found |= dict.fromkeys(site for site in self.layer_of if f"{site}.".startswith(f"{path}."))
        return found

    def _start(self) -> None:
        self._sums: dict[tuple[str, str], _Sums] = {}
        self._spool: Spool | None = None
        self._used: set[tuple[str, str, int]] = set()  # branch, layer and image of which some step was used
        self._merging: dict[tuple[str, torch.device], Tensor] = {}
        self._living: dict[tuple[Any, ...], Tensor] = {}
        self._step: int | None = None  # number of the present call among those kept; None if it is not kept

    @contextmanager
    def attached(self, run: Denoising) -> Iterator[None]:
        """Watch the sites; what an earlier run of the same batch left is forgotten."""
        self._start()
        self._run = run
        with watched(run.denoiser, self.sites, self._see):
            yield

    def before_call(self, run: Denoising, call: DenoiserCall) -> None:
        kept = [any(covers(window, one, run.calls) for window in self.capture.steps) for one in range(run.calls)]
        self._step = sum(kept[: run.call]) if kept[run.call] else None
        if self.capture.steps_apart and self._spool is None:
            self._spool = Spool(self.folder, sum(kept))

    def after_call(self, run: Denoising, call: DenoiserCall) -> None:
        step, self._step = self._step, None
        if self._spool is None or step is None:
            return
        for (branch, layer), sums in self._sums.items():
            means = (sums.total / sums.count[:, :, None, None]).float().cpu().numpy()  # NaN where nothing was used
            for image, used in enumerate(sums.count.any(1).tolist()):
                self._spool.put((branch, layer, image), step, means[image, :, : self._many(branch, image)])
                if used:
                    self._used.add((branch, layer, image))
        self._sums.clear()

    def _many(self, branch: str, image: int) -> int:
        """How many entries an image has: of a batch, the prompt with the most words decides how many are computed."""
        return sum(map(len, self.entries[branch][image].values()))

    def _see(self, call: SiteCall) -> None:
        if self._step is None or self._run.is_aside:
            return
        of_rows = self._run.branches(len(call.args[0] if call.args else call.kwargs["hidden_states"])).tolist()
        for branch in self.capture.branches:
            if _NUMBERS[branch] not in of_rows:  # `SharedRows`: of a site that is lost in every row
                continue
            first = of_rows.index(_NUMBERS[branch])
            found = call.probabilities(slice(first, first + len(self.cells)))
            self._add(branch, call.site.path, found)

    def _add(self, branch: str, site: str, found: Tensor) -> None:
        """found: (images, heads, image tokens, text tokens)."""
        images, heads, _, length = found.shape
        words = self.words[branch]
        if length != words[0].length:
            raise RuntimeError(
                f"{site} reads {length} text tokens and the tokenizers make {words[0].length}: the words of its maps "
                "cannot be told"
            )
        alive, whole = self._alive(branch, site, heads, found.device)
        if self.capture.heads_apart:
            found, count = found * alive[:, :, None, None], alive
        else:
            found = found if whole else found * alive[:, :, None, None]
            found, count = found.sum(1, keepdim=True), alive.sum(1, keepdim=True)
        if self.capture.tokens == "prompt":
            found = found @ self._merged(branch, found.device)[:, None]
        key = branch, self.layer_of[site]
        if key not in self._sums:
            total = found.new_zeros(images, count.shape[1], found.shape[3], found.shape[2])
            self._sums[key] = _Sums(total, torch.zeros_like(count))
        sums = self._sums[key]
        sums.total += found.transpose(-1, -2)
        sums.count += count

    def _merged(self, branch: str, device: torch.device) -> Tensor:
        """What adds text tokens up to entries, (images, text tokens, entries); images with fewer have empty ones."""
        key = (branch, device)
        if key not in self._merging:
            words = self.words[branch]
            most = max(len(one.columns) for one in words) + 2
            weights = torch.zeros(len(words), words[0].length, most)
            for image, one in enumerate(words):
                weights[image, :, len(one.columns) + 1] = 1  # all that is nothing else
                for number, columns in enumerate([*one.columns.values(), one.special]):
                    weights[image, list(columns)] = 0
                    weights[image, list(columns), number] = 1
            self._merging[key] = weights.to(device)
        return self._merging[key]

    def _alive(self, branch: str, site: str, heads: int, device: torch.device) -> tuple[Tensor, bool]:
        """Which heads of each image are used in the present call, (images, heads) of 0 and 1; whether all are."""
        dead = tuple(self._dead_now(image, branch, site, heads) for image in range(len(self.cells)))
        key = (dead, heads, device)  # of many sites the same, so that it is copied once for all of them
        if key not in self._living:
            alive = torch.ones(len(self.cells), heads)
            for image, which in enumerate(dead):
                alive[image, list(which)] = 0
            self._living[key] = alive.to(device)
        return self._living[key], not any(dead)

    def _dead_now(self, image: int, branch: str, site: str, heads: int) -> tuple[int, ...]:
        """The heads of a site of which an image's lesion leaves nothing in the present call."""
        lesion = self.cells[image].lesion
        if lesion is None or site not in self.dead[image] or lesion.branch not in ("both", branch):
            return ()
        which = self.dead[image][site]
        inside = covers(lesion.window, self._run.call, self._run.calls)
        return tuple(range(heads) if which is None else sorted(which)) if inside else ()

    @property
    def maps(self) -> list[ImageMaps]:
        """Those of each cell; single steps stay on disk, and are read as they are asked for."""
        return [self._of(image) for image in range(len(self.cells))]

    def _of(self, image: int) -> ImageMaps:
        layers: dict[str, dict[str, Any]] = {branch: {} for branch in self.capture.branches}
        for branch in self.capture.branches:
            for layer in self.capture.layers or ():
                values = self._values(branch, layer, image)
                if values is not None:
                    layers[branch][layer] = self._as_picture(values)
                elif not any(self.layer_of[site] == layer for site in self.dead[image]):
                    raise RuntimeError(f"{layer} was never called, so it has no attention map")
        return ImageMaps(layers, {branch: self.entries[branch][image] for branch in self.capture.branches})

    def _values(self, branch: str, layer: str, image: int) -> NDArray[np.float32] | None:
        """(steps, heads, entries, image tokens); None where nothing of the layer was used."""
        if self._spool is not None:
            key = branch, layer, image
            return self._spool.get(key) if key in self._used else None
        sums = self._sums.get((branch, layer))
        if sums is None or not bool(sums.count[image].any()):
            return None
        mean = sums.total[image, :, : self._many(branch, image)] / sums.count[image][:, None, None]
        found: NDArray[np.float32] = mean[None].float().cpu().numpy()
        return found

    def _as_picture(self, maps: NDArray[np.float32]) -> NDArray[np.float32]:
        """(…, image tokens) -> (…, height, width): the two factors that are nearest to the image's proportions."""
        settings, tokens = self.cells[0].settings, maps.shape[-1]
        wanted = math.log(settings.height / settings.width)
        heights = [side for side in range(1, tokens + 1) if tokens % side == 0]
        height = min(heights, key=lambda side: abs(math.log(side * side / tokens) - wanted))
        return maps.reshape(*maps.shape[:-1], height, tokens // height)
