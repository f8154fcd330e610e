"""Which attention maps a study keeps. Imports nothing of torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lesion.errors import RequestError
from lesion.study import layer_patterns
from lesion.study.checks import distinct, one_of
from lesion.study.lesions import digest_of, parse_windows

FORMAT = 1  # raise it when the same request would give other maps
NAMES = ("none", "maps")
BRANCHES = ("cond", "uncond", "both")
SPECIAL, REST = "<special>", "<rest>"  # entries beside the words: start, end and padding; punctuation
BYTES = 4  # a number of a map


@dataclass(frozen=True)
class Capture:
    """What of the attention is kept of every image.

    layers: patterns of paths as in `layers.include`, None for all; or, of `chosen`, the paths themselves.
    steps: windows of denoising steps. branch: cond, uncond or both.
    heads, steps_apart: whether heads, and steps, are kept apart or averaged.
    tokens: prompt (a map a word) or all (a map a text token).
    """

    layers: tuple[str, ...] | None = None
    steps: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    branch: str = "cond"
    heads_apart: bool = False
    steps_apart: bool = False
    tokens: str = "prompt"

    @classmethod
    def of(cls, config: Mapping[str, Any], steps: int, guided: bool) -> Capture | None:
        """From the `capture` group of a request; None for no maps. Raises RequestError naming the key.

        steps: denoising steps of an image. guided: whether there are two branches.
        """
        if one_of("capture", config["name"], NAMES) == "none":
            return None
        layers = config["layers"]
        if layers is not None:
            layers = tuple(distinct("capture.layers", layers))
            for pattern in layers:
                if not isinstance(pattern, str):
                    raise RequestError("capture.layers", f"must be null or layer paths with * and ?; got {pattern!r}")
                layer_patterns.check(pattern, "capture.layers")
        branch = one_of("capture.branch", config["branch"], BRANCHES)
        if branch != "cond" and not guided:
            raise RequestError("capture.branch", "without guidance there is one branch; allowed: cond")
        return cls(
            layers,
            parse_windows("capture.steps", config["steps"], steps),
            branch,
            one_of("capture.heads", config["heads"], ("mean", "each")) == "each",
            one_of("capture.reduce", config["reduce"], ("mean", "each")) == "each",
            one_of("capture.tokens", config["tokens"], ("prompt", "all")),
        )

    def chosen(self, paths: Sequence[str]) -> Capture:
        """With the layers that its patterns choose of all. Raises RequestError for a pattern that matches none."""
        found = tuple(paths)
        if self.layers is not None:
            hits = {
                pattern: [path for path in paths if layer_patterns.matches(path, pattern, "capture.layers")]
                for pattern in self.layers
            }
            for pattern, matched in hits.items():
                if not matched:
                    raise RequestError("capture.layers", f"{pattern!r} matches none; allowed: {', '.join(paths)}")
            found = tuple(path for path in paths if any(path in matched for matched in hits.values()))
        return Capture(found, self.steps, self.branch, self.heads_apart, self.steps_apart, self.tokens)

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches kept."""
        return ("cond", "uncond") if self.branch == "both" else (self.branch,)

    def identity(self) -> dict[str, Any]:
        """All that decides what a cell's maps are, as JSON data; of `chosen`."""
        return {
            "format": FORMAT,
            "layers": list(self.layers or ()),
            "steps": [list(window) for window in self.steps],
            "branch": self.branch,
            "heads": "each" if self.heads_apart else "mean",
            "reduce": "each" if self.steps_apart else "mean",
            "tokens": self.tokens,
        }

    @property
    def digest(self) -> str:
        """16 hex digits of the identity."""
        return digest_of(self.identity())[:16]


def pixels(path: str, height: int, width: int, levels: int) -> int:
    """Return how many image tokens a layer has, of a UNet with so many levels (0: a transformer).

    height, width: of what the denoiser's first layer sees.
    """
    place = re.match(r"(down|mid|up)_blocks?(?:\.(\d+))?", path)
    if not levels or place is None:
        return height * width
    number = int(place[2] or 0)
    halved = {"down": number, "mid": levels - 1, "up": levels - 1 - number}[place[1]]
    for _ in range(halved):
        height, width = -(-height // 2), -(-width // 2)
    return height * width
