"""The settings of generation, each declared once. Imports nothing of torch.

From a declaration follow its key in the schema of requests, the check of its value, its part in a cell's identity and
in the provenance of calibration, its column in the results and in results of earlier versions, whether runs must agree
in it to be compared, the argument of the pipeline's call, and the refusal where a pipeline does not take that argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, get_args, get_type_hints

from lesion.errors import RequestError
from lesion.study.steering import Layout


@dataclass(frozen=True)
class Allowed:
    """What values a setting may have. words: as it goes on after "must be"."""

    fits: Callable[[Any], bool]
    words: str


def number(low: float, high: float = math.inf, *, open_below: bool = False) -> Allowed:
    """A finite number from `low` (open_below: above it) to `high`."""
    words = f">= {low}" if high == math.inf else f"in {'(' if open_below else '['}{low}, {high}]"
    return Allowed(
        lambda value: low <= value <= high and value not in (math.inf, low if open_below else None), f"a number {words}"
    )


# Bounds beyond which no model works, so that a slip of the keyboard is refused before it takes memory or days.
MOST_STEPS, MOST_GUIDANCE, LONGEST_SIDE, LARGEST_BATCH = 10_000, 10_000, 16_384, 10_000
NOISES = ("shared", "own")
SIDE = Allowed(lambda side: 8 <= side <= LONGEST_SIDE and side % 8 == 0, f"a multiple of 8 from 8 to {LONGEST_SIDE}")


@dataclass(frozen=True)
class Declaration:
    """What there is to know about one setting.

    name, type, default: of its field in `Settings`; `...` for no default.
    key: its name under `generation` in a request; "" for `name`, None where the model says it and not the request.
    asked: type of the key in the schema; None for that of the field.
    spelled: words that a request may use for values, such as `auto`.
    allowed: what values it may have, its default beside; None for any of its type.
    unit: of the value, "" for none.
    always: stands in every identity and in results of every version. Any other setting is left out of the identity at
        its default, so that keys of cells from before it was declared stay, and results without it get its default.
    identity: whether it can change pixels, and so is part of a cell's identity.
    compared: whether two runs must agree in it for their images to be averaged together.
    column: of the results; "" for `name`, None for no column.
    blank: what stands in the column for None.
    argument: of the pipeline's call that takes the value as it is; None where there is no such argument.
    each: whether the call takes a list with one value an image.
    of_task: whether it exists only in tasks that name it (`Task.settings`); elsewhere it has its default.
    """

    name: str = ""
    type: Any = None
    default: Any = ...
    key: str | None = ""
    asked: Any = None
    spelled: Mapping[str, Any] = field(default_factory=dict)
    allowed: Allowed | None = None
    unit: str = ""
    always: bool = False
    identity: bool = True
    compared: bool = True
    column: str | None = ""
    blank: Any = None
    argument: str | None = None
    each: bool = False
    of_task: bool = False

    def parse(self, value: Any) -> Any:
        """The setting that a request asks for. Raises RequestError naming the key and what is allowed."""
        value = self.spelled.get(value, value) if isinstance(value, str) else value
        if value is None and self.default is None and not self.of_task:
            return None
        if self.allowed and not self.allowed.fits(value):
            words = f"{self.allowed.words}, in {self.unit}" if self.unit else self.allowed.words
            raise RequestError(self.path, f"must be {words}; got {value!r}")
        return float(value) if float in (self.type, *get_args(self.type)) else value

    @property
    def path(self) -> str:
        """The key in a request."""
        return f"generation.{self.key}"

    def shown(self, value: Any) -> Any:
        """As it stands in its column."""
        return self.blank if value is None else value


def setting(default: Any = ..., **declared: Any) -> Any:
    """Declare a field of `Settings`: keywords as in `Declaration`."""
    one = Declaration(default=default, **declared)
    return field(default=MISSING if default is ... else default, compare=one.identity, metadata={"declared": one})


@dataclass(frozen=True)
class Settings:
    """How images are generated: the settings of one pipeline call.

    noising: of img2img, the strength to which the init image is noised; `generation.strength` in a request.
    scheduler: name of its class and variant, as the model has it.
    noise: `shared`, if a seed is the same noise for every prompt, that of `torch.Generator().manual_seed(seed)`; `own`,
        if it is another for each prompt (`Cell.noise_seed`). Shared is the default, so that an image is the one that
        the pipeline gives for that seed without this package, and studies go on from the images that they have. Then
        seeds are crossed with prompts, which intervals have to pay for (`analysis.crossed`).
    steering: None where nothing steers.
    embedded_guidance: True where guidance is an input of the model (FLUX.1), which then has no CFG branches; else None.
    batch_size: images made at once; None for as many as memory allows.
    """

    task: str = setting(always=True)
    steps: int = setting(always=True, asked=int | None, allowed=number(1, MOST_STEPS), argument="num_inference_steps")
    guidance: float = setting(
        always=True, asked=float | None, allowed=number(0, MOST_GUIDANCE), argument="guidance_scale"
    )
    height: int = setting(always=True, asked=int | None, allowed=SIDE, unit="pixels", argument="height")
    width: int = setting(always=True, asked=int | None, allowed=SIDE, unit="pixels", argument="width")
    scheduler: str = setting("", key=None, always=True)
    negative_prompt: str | None = setting(None, blank="", argument="negative_prompt", each=True)
    noising: float | None = setting(
        None,
        key="strength",
        asked=float,
        allowed=number(0, 1, open_below=True),
        blank=0.0,
        argument="strength",
        of_task=True,
    )
    noise: str = setting("shared", allowed=Allowed(lambda noise: noise in NOISES, " or ".join(NOISES)))
    embedded_guidance: bool | None = setting(None, key=None, column=None)
    steering: Layout | None = setting(None, key=None, column=None)  # noqa: RUF009 - as the others, a field
    batch_size: int | None = setting(
        None,
        asked=Any,
        spelled={"auto": None},
        allowed=Allowed(
            lambda size: type(size) is int and 1 <= size <= LARGEST_BATCH,
            f"auto or a whole number in [1, {LARGEST_BATCH}]",
        ),
        unit="images",
        identity=False,
        compared=False,
        column=None,
    )

    @classmethod
    def of(cls, config: Mapping[str, Any], of_task: Collection[str] = ()) -> Settings:
        """From the `generation` group of a request. Raises RequestError naming the key and what is allowed.

        of_task: settings of the task that others do not have. What the model says is still at its default.
        """
        return cls(
            **{
                one.name: one.parse(config[one.key])
                for one in DECLARED
                if one.key is not None and (not one.of_task or one.name in of_task)
            }
        )

    @property
    def guided(self) -> bool:
        """Whether each image has an unconditional row beside its conditional one."""
        return self.guidance > 1 and not self.embedded_guidance

    def identity(self) -> dict[str, Any]:
        """Their part in a cell's identity, as JSON data."""
        return {
            one.name: value.identity() if isinstance(value, Layout) else value
            for one, value in self._declared()
            if one.identity
        }

    def provenance(self) -> dict[str, Any]:
        """Their part in the provenance of calibration means: as in a cell's, with null for no negative prompt.

        Calibration never steers, and its noise is that of its own seeds.
        """
        return {"negative_prompt": None, **replace(self, steering=None, noise="shared").identity()}

    def arguments(self, images: int) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call that take a setting as it is; one at its default is not passed."""
        return {
            one.argument: [value] * images if one.each else value for one, value in self._declared() if one.argument
        }

    def check_taken(self, name: str, takes: Callable[[], Collection[str]]) -> None:
        """Refuse what a pipeline of this name does not take. takes: tells its call's arguments; asked only if needed.

        Raises RequestError naming the key.
        """
        for one, _ in self._declared():
            if one.argument and not one.always and not one.of_task and one.argument not in takes():
                allowed = "null" if one.default is None else one.default
                raise RequestError(one.path, f"{name} takes none; allowed: {allowed}")

    def _declared(self) -> list[tuple[Declaration, Any]]:
        """Each that counts always, or is not at its default, with its value."""
        values = ((one, getattr(self, one.name)) for one in DECLARED)
        return [(one, value) for one, value in values if one.always or value != one.default]


def _declarations() -> Iterator[Declaration]:
    types = get_type_hints(Settings)
    for one in fields(Settings):
        declared: Declaration = one.metadata["declared"]
        key, column = (one.name if name == "" else name for name in (declared.key, declared.column))
        yield replace(declared, name=one.name, type=types[one.name], key=key, column=column)


DECLARED: tuple[Declaration, ...] = tuple(_declarations())


def without_task() -> dict[str, Any]:
    """The settings that only some tasks have, at their defaults."""
    return {one.name: one.default for one in DECLARED if one.of_task}
