"""How latents are steered to the boxes of a prompt, as a request says it. Imports nothing of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lesion.errors import RequestError
from lesion.study import layer_patterns
from lesion.study.checks import distinct, one_of
from lesion.study.lesions import digest_of

NAMES = ("none", "layout")
STEP_SIZES = ("sigma_squared", "noise_share")
MASKS = ("whole", "covered")
MOST, LARGEST = 1000, 10**6  # iterations and steps; scale and threshold
STEERING_OFF = "steering_off"  # the replacement that takes a layer's maps out of the loss


def within(path: str, other: str) -> bool:
    """Whether one module path is another's, or lies below or above it."""
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


@dataclass(frozen=True)
class Layout:
    """Layout guidance, arXiv 2304.03373: before a denoising step, latents move against the gradient of a loss.

    layers: whose attention maps are in the loss: patterns as a request says them, module paths in a study.
    scale: by which the loss is multiplied.
    threshold: below this unscaled loss an image does not move any further in this step; 0 and more.
    iterations: moves a step, at most. steps: denoising steps that are steered, the first ones.
    step_size: by what the gradient is multiplied: `sigma_squared`, or `noise_share`, which is sigma^2 / (1 + sigma^2)
        in units of the denoiser's input.
    mask: which cells of a map lie in a box: `whole` cells, or each by the share of it that the box covers.
    checkpointing: compute activations again for the gradient instead of keeping them; changes no value.
    """

    layers: tuple[str, ...]
    scale: float
    threshold: float
    iterations: int
    steps: int
    step_size: str
    mask: str
    checkpointing: bool = False

    name = "layout"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Layout | None:
        """From the `steering` group of a request; None for `none`. Raises RequestError naming the key."""
        name = one_of("steering", config.get("name"), NAMES)
        if name == "none":
            return None
        patterns = distinct("steering.layers", config["layers"])
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise RequestError("steering.layers", f"must be layer paths with * and ?, or re:REGEX; got {pattern!r}")
            layer_patterns.check(pattern, "steering.layers")
        for key in ("iterations", "steps"):
            if type(config[key]) is not int or not 0 <= config[key] <= MOST:
                raise RequestError(f"steering.{key}", f"must be a whole number from 0 to {MOST}; got {config[key]!r}")
        if type(config["checkpointing"]) is not bool:
            raise RequestError("steering.checkpointing", f"must be true or false; got {config['checkpointing']!r}")
        return cls(
            layers=tuple(patterns),
            scale=_number("scale", config["scale"]),
            threshold=_number("threshold", config["threshold"]),
            iterations=config["iterations"],
            steps=config["steps"],
            step_size=one_of("steering.step_size", config["step_size"], STEP_SIZES),
            mask=one_of("steering.mask", config["mask"], MASKS),
            checkpointing=config["checkpointing"],
        )

    def on(self, paths: Sequence[str]) -> Layout:
        """Return it with those of a model's layers that its patterns match, in the order given.

        Raises RequestError for a pattern that matches none.
        """
        key, found = "steering.layers", set()
        for pattern in self.layers:
            matched = [path for path in paths if layer_patterns.matches(path, pattern, key)]
            if not matched:
                raise RequestError(key, f"{pattern!r} matches no layer; allowed: {', '.join(paths)}")
            found.update(matched)
        return replace(self, layers=tuple(path for path in paths if path in found))

    def identity(self) -> dict[str, Any]:
        """What of it can change pixels, as JSON data."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "checkpointing"}
        return {"name": self.name, **own, "layers": list(self.layers)}

    @property
    def digest(self) -> str:
        """8 hex digits of its identity: two studies that differ in it are not averaged together."""
        return digest_of(self.identity())[:8]


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST:
        raise RequestError(f"steering.{key}", f"must be a number from 0 to {LARGEST}; got {value!r}")
    return float(value)
