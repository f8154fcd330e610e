"""What every metric is: a class that states its facts, checks its options and scores images."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from lesion.errors import RequestError
from lesion.study.boxes import Box

if TYPE_CHECKING:
    from torch import Tensor

Direction = Literal["similarity", "distance", "prompt", "property"]


class ScorerError(Exception):
    """A scorer cannot be made as asked: one line that says why and what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class OptionError(Exception):
    """An option of a metric cannot be used: its name, and one line that says why."""

    def __init__(self, option: str, message: str):
        super().__init__(" ".join(message.split()))
        self.option = option


@dataclass(frozen=True)
class Shot:
    """One image to score, with the baseline of the same prompt, seed and settings."""

    key: str  # the cell's hash
    image: NDArray[np.uint8]  # (height, width, 3), 0-255
    baseline_key: str
    baseline: NDArray[np.uint8]  # the same shape
    prompt: str
    boxes: tuple[Box, ...] = ()  # of the prompt
    box_mass: float = math.nan  # of steered images: the share of attention in the boxes

    def __post_init__(self) -> None:
        for name, pixels in (("image", self.image), ("baseline", self.baseline)):
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
                raise ValueError(f"{name} of {self.key} is {pixels.dtype} {pixels.shape}, not uint8 (height, width, 3)")
        if self.image.shape != self.baseline.shape:
            raise ValueError(f"{self.key} is {self.image.shape}, its baseline {self.baseline.shape}")

    @cached_property
    def unchanged(self) -> bool:
        """Whether the image is its baseline, pixel for pixel: then its value is `Metric.identical`, not rounded."""
        return self.key == self.baseline_key or np.array_equal(self.image, self.baseline)


class Metric(ABC):
    """One metric: a subclass in a file of its own, `scoring/NAME.py`; NAME is the metric's name and its column.

    The arguments of `__init__` are its options in `scorer.metrics`; their annotations (`str`, `int`, `Literal[...]`...)
    say what is allowed. The file's docstring gives the formula and its source. The file is imported when a study is
    laid out and when a report is made, so it imports torch, and what brings it, only in `load` and `__call__`.

    direction: `similarity` to the baseline, higher is more alike; `distance` from it, higher is less alike; `prompt`,
        how far an image shows what its prompt asks for; `property` of the image alone.
    range: the lowest and the highest value.
    identical: the value of an image that is its baseline, pixel for pixel; None where it depends on the image.
    models: the networks it needs, in words; "" for none.
    boxed: whether it has values only for prompts with boxes. steered: whether only for steered images.
    beside: what stands in its shots as `baseline`: the baseline; the `unsteered` image, with `steered` alone; or that
        of the prompt `donor` with the same seed.
    signed: whether a lesion may raise it as well as lower it, and `of_tensors` has its gradients.
    earlier_error: by how much values of earlier versions, which stores keep, may be off; computed in float32 then.
    shared: options that are taken from these keys of the scorer where `scorer.metrics` gives none of them.
    """

    name: ClassVar[str]
    direction: ClassVar[Direction]
    range: ClassVar[tuple[float, float]]
    identical: ClassVar[float | None] = None
    models: ClassVar[str] = ""
    boxed: ClassVar[bool] = False
    steered: ClassVar[bool] = False
    beside: ClassVar[Literal["baseline", "unsteered", "donor"]] = "baseline"
    signed: ClassVar[bool] = False
    earlier_error: ClassVar[float] = 0.0
    shared: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = cls.__module__.rpartition(".")[2]

    @classmethod
    def why_unsuited(cls) -> str:
        """Why `scorer.importance` cannot be this metric; "" for a similarity that is 1 for identical images."""
        if cls.direction == "distance":
            return f"it is a distance, {cls.identical:g} for identical images"
        if cls.direction == "prompt":
            return "it compares an image with its prompt, not with the baseline"
        if cls.direction == "property" or cls.identical is None:
            return "it is no similarity to the baseline"
        if not np.isfinite(cls.identical):
            return "it has no finite value for identical images"
        return "" if cls.identical == 1 else f"it is {cls.identical:g} for identical images, not 1"

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The options there are, each with the type it must have."""
        if cls.__init__ is object.__init__:
            return {}
        types = get_type_hints(cls.__init__)
        return {name: types[name] for name in list(inspect.signature(cls.__init__).parameters)[1:]}

    @classmethod
    def of(cls, options: Mapping[str, Any], key: str) -> Self:
        """The metric with these options. Raises RequestError, which names the option under `key`."""
        allowed = cls.options()
        if unknown := [name for name in options if name not in allowed]:
            raise RequestError(key, f"unknown option {unknown[0]!r}; allowed: {', '.join(allowed) or 'none'}")
        for name, value in options.items():
            if get_origin(allowed[name]) is Literal:
                if value not in get_args(allowed[name]):
                    choices = ", ".join(map(str, get_args(allowed[name])))
                    raise RequestError(f"{key}.{name}", f"got {value!r}; allowed: {choices}")
            elif not _is(value, allowed[name]):
                wanted = getattr(allowed[name], "__name__", allowed[name])
                raise RequestError(f"{key}.{name}", f"got {value!r}; allowed: a value of type {wanted}")
        return cls(**options)

    @abstractmethod
    def identity(self) -> str:
        """All that can change its values: the formula's version, the model with a digest of its weights.

        Loads nothing. Raises ValueError or OSError where a model is not there.
        """

    @property
    def donor(self) -> str | None:
        """The prompt of the study beside whose images its own are, with `beside` donor."""
        return None

    def asks(self, prompt: str) -> bool:
        """Whether it has a value for images of this prompt."""
        return True

    def check(self) -> None:
        """Raise OptionError if an option names a model that cannot be; loads nothing."""
        return

    def load(self, device: str, batch_size: int) -> None:
        """Get ready to score on `device`, `batch_size` images a forward pass. Raises ScorerError."""
        self.device, self.batch_size = device, batch_size

    @abstractmethod
    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        """One value a shot, (n,), for at least one shot; after `load`.

        Values depend on the shots alone, not on their order or batch, except for rounding: batches of other sizes may
        add up in another order (about 1e-6 in float32). Unchanged images get `identical` from the scorer.
        """

    def of_tensors(self, images: Tensor, prompts: Sequence[str], beside: Sequence[NDArray[np.uint8]]) -> Tensor:
        """The same of images through which gradients flow, (n,); of prompts that it does not ask for anything finite.

        images: (n, 3, height, width) in [0, 1], unrounded. beside: what `beside` says, of each; after `load`.
        """
        raise NotImplementedError


def _is(value: Any, kind: type) -> bool:
    """Whether an option's value is of its type: a whole number is a number too, true and false are none."""
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
