"""The grid as data: settings and lesions make cells, cells make a study. Imports nothing of torch."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lesion.lesions import Lesion, Replacement, choices
from lesion.prompts import Prompt

FORMAT = 1  # raise it when the same cell would give other pixels


@dataclass(frozen=True)
class ModelIdentity:
    """name labels the model in tables; the rest can change pixels.

    fingerprint: hash of configs and weights. device: cpu or cuda, which round differently.
    """

    name: str
    fingerprint: str
    dtype: str
    device: str = "cpu"


@dataclass(frozen=True)
class Settings:
    """Of one pipeline call. guidance: classifier-free guidance scale, off at <= 1. height, width: pixels."""

    task: str
    steps: int
    guidance: float
    height: int
    width: int
    scheduler: str
    negative_prompt: str | None = None

    @property
    def guided(self) -> bool:
        return self.guidance > 1


@dataclass(frozen=True)
class Cell:
    """One image to make; `lesion` is None for the baseline."""

    model: ModelIdentity
    prompt: Prompt
    seed: int
    settings: Settings
    lesion: Lesion | None

    def identity(self) -> dict[str, Any]:
        """Everything that can change its pixels, and nothing that can't, as JSON data.

        An axis added later must be left out at its default value, so that old hashes stay.
        """
        model = {"fingerprint": self.model.fingerprint, "dtype": self.model.dtype}
        if self.model.device != "cpu":
            model["device"] = self.model.device
        settings = {name: value for name, value in vars(self.settings).items() if value is not None}
        return {
            "format": FORMAT,
            "model": model,
            "prompt": self.prompt.text,
            "seed": self.seed,
            "settings": settings,
            "lesion": None if self.lesion is None or self.lesion.strength == 0 else self.lesion.identity(),
        }

    @cached_property
    def key(self) -> str:
        """The cell's hash, 32 hex digits."""
        text = json.dumps(self.identity(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def baseline(self) -> Cell:
        return self if self.lesion is None else Cell(self.model, self.prompt, self.seed, self.settings, None)


@dataclass(frozen=True)
class Study:
    """What is asked of one model: every prompt and seed, un-ablated and under every lesion.

    layers: the layers under study, in forward order; those outside are never lesioned. selections: name -> options.
    """

    model: ModelIdentity
    settings: Settings
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    layers: tuple[str, ...]
    selections: Mapping[str, Mapping[str, Any]]
    replacements: tuple[Replacement, ...]
    windows: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    branches: tuple[str, ...] = ("both",)
    strengths: tuple[float, ...] = (1.0,)

    def lesions(self) -> Iterator[Lesion]:
        """Every lesion of the grid, those of one kind (same selection, replacement, …) next to each other."""
        for name, options in self.selections.items():
            picked = choices(name, options, self.layers)
            for kind in itertools.product(self.replacements, self.windows, self.branches, self.strengths):
                for choice in picked:
                    yield Lesion(name, choice.layer, choice.lesioned, *kind)

    def cells(self) -> Iterator[Cell]:
        """Baselines first, then kind by kind, and within a kind by prompt and seed."""
        for prompt, seed in self.subjects():
            yield Cell(self.model, prompt, seed, self.settings, None)
        for _, lesions in itertools.groupby(self.lesions(), kind_of):
            group = list(lesions)
            for prompt, seed in self.subjects():
                for lesion in group:
                    yield Cell(self.model, prompt, seed, self.settings, lesion)

    def subjects(self) -> Iterator[tuple[Prompt, int]]:
        return itertools.product(self.prompts, self.seeds)

    @property
    def protocol(self) -> Mapping[str, str]:
        """For each replacement 8 hex digits: the layers under study and its calibration. Only equals compare."""
        return {
            replacement.name: hashlib.sha256(
                json.dumps([dict(replacement.identity), self.layers], sort_keys=True).encode()
            ).hexdigest()[:8]
            for replacement in self.replacements
        }

    def __len__(self) -> int:
        return len(self.prompts) * len(self.seeds) * (1 + sum(1 for _ in self.lesions()))


def kind_of(lesion: Lesion | None) -> tuple[Any, ...]:
    """What cells that share a batch have in common: everything of the lesion but its layers."""
    if lesion is None:
        return ()
    identity = json.dumps(dict(lesion.replacement.identity), sort_keys=True)
    return (
        lesion.selection,
        lesion.replacement.name,
        identity,
        lesion.window,
        lesion.branch,
        lesion.strength,
    )


def row(cell: Cell, layers: Sequence[str]) -> dict[str, Any]:
    """The cell's own columns of the results: what was asked, not what came of it.

    layers: every layer of the model in forward order.
    """
    lesion, settings = cell.lesion, cell.settings
    layer = lesion.layer if lesion else ""
    window = lesion.window if lesion else (0.0, 1.0)
    return {
        "model": cell.model.name,
        "prompt_id": cell.prompt.id,
        "prompt": cell.prompt.text,
        "aspects": ",".join(cell.prompt.aspects),
        "seed": cell.seed,
        "selection": lesion.selection if lesion else "none",
        "replacement": lesion.replacement.name if lesion else "",
        "layer": layer,
        "layer_index": layers.index(layer) if layer else -1,
        "window_start": window[0],
        "window_end": window[1],
        "branch": lesion.branch if lesion else "both",
        "strength": lesion.strength if lesion else 0.0,
        "task": settings.task,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "height": settings.height,
        "width": settings.width,
        "scheduler": settings.scheduler,
        "negative_prompt": settings.negative_prompt or "",
        "dtype": cell.model.dtype,
        "device": cell.model.device,
        "fingerprint": cell.model.fingerprint,
        "cell": cell.key,
    }
