"""What an attribution asks for, and the part of a study whose lesions are made to certify it. Imports no torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lesion.errors import RequestError
from lesion.study.checks import one_of, shown
from lesion.study.grid import Study
from lesion.study.lesions import Lesion, digest_of

FORMAT = 3  # raise it when the same request would give other estimates
NAMES = ("none", "gradients")
VIEWS = ("clip", "latent")
MEANS = ("root", "geometric")
# Least and most of whole numbers: more than that no one can wait for.
BOUNDS = {
    "top": (2, 10**6),
    "sample": (2, 10**6),
    "candidates": (0, 10**6),
    "probes": (1, 10**4),
    "seed": (0, 2**63 - 1),
}
MOST_POINTS = 100
SELECTION = "leave_one_out"  # whose lesions are estimated


@dataclass(frozen=True)
class Attribution:
    """All lesions of a grid are estimated, some of them made.

    top: how many of those ranked highest are made. sample: how many of the rest.
    candidates: how many of the highest estimates are lesioned on few prompts first, to rank them; 0 for none.
    threshold: importance from which a lesion counts as important; None for the median of the top.
    view: what effects are measured in, the scorer's CLIP embedding or the final latents.
    signed: metrics whose change is estimated, too, to first order and with its sign; None for all that have gradients.
    probes: random directions an image. points: strengths of all lesions whose gradients are averaged, ascending.
    mean: of estimates over prompts (`analysis.candidates.steadied`).
    seed: of directions and sample. checkpointing: keep less of each denoiser call, and run it again.
    """

    name: str = field(default=NAMES[1], init=False)
    top: int = 10
    sample: int = 10
    candidates: int = 0
    threshold: float | None = None
    view: str = "clip"
    probes: int = 4
    points: tuple[float, ...] = (0.0,)
    seed: int = 0
    checkpointing: bool = False
    signed: tuple[str, ...] | None = None
    mean: str = MEANS[0]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Attribution | None:
        """From the `attribution` group of a request; None for none. Raises RequestError naming the key."""
        if one_of("attribution", config["name"], NAMES) == "none":
            return None
        for name, (low, high) in BOUNDS.items():
            number = config[name]
            if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
                told = f"must be a whole number from {low} to {high}; got {shown(number)}"
                raise RequestError(f"attribution.{name}", told)
        if 0 < config["candidates"] <= config["top"]:
            raise RequestError(
                "attribution.candidates",
                f"must be 0, or more than attribution.top ({config['top']}); got {config['candidates']}",
            )
        limit = config["threshold"]
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < 2):
            raise RequestError("attribution.threshold", f"must be null or a number in (0, 2); got {shown(limit)}")
        given = config["points"]
        points = given if isinstance(given, list) else [given]
        if not points or any(isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1 for p in points):
            raise RequestError(
                "attribution.points", f"must be a number in [0, 1], or a list of such; got {shown(given)}"
            )
        if len(points) > MOST_POINTS:
            raise RequestError("attribution.points", f"has {len(points)} numbers; allowed: up to {MOST_POINTS}")
        signed = config["signed"]
        if signed is not None:
            signed = signed if isinstance(signed, list) else [signed]
            if any(not isinstance(name, str) for name in signed):
                raise RequestError("attribution.signed", f"must be null or names of metrics; got {shown(signed)}")
        return cls(
            config["top"],
            config["sample"],
            config["candidates"],
            None if limit is None else float(limit),
            one_of("attribution.view", config["view"], VIEWS),
            config["probes"],
            tuple(sorted(map(float, points))),
            config["seed"],
            bool(config["checkpointing"]),
            None if signed is None else tuple(dict.fromkeys(signed)),
            one_of("attribution.mean", config["mean"], MEANS),
        )

    @property
    def estimator(self) -> dict[str, Any]:
        """What of it can change estimates, as JSON data; checkpointing only rounds."""
        others = ("top", "sample", "candidates", "threshold", "checkpointing", "mean")
        return {"format": FORMAT, **{name: value for name, value in asdict(self).items() if name not in others}}

    def check(self, study: Study) -> None:
        """Raise RequestError where the lesions of this study cannot be estimated."""
        if set(study.selections) != {SELECTION}:
            others = ", ".join(name for name in study.selections if name != SELECTION)
            raise RequestError("selection", f"attribution is for {SELECTION} alone; got {others or 'none'} besides")
        if len(study.replacements) != 1:
            raise RequestError("replacement", "attribution is of one replacement; a sweep (-m) takes several")
        if study.strengths != (1.0,):
            raise RequestError("strength", "attribution is of whole lesions; allowed with it: 1")
        number = sum(1 for _ in study.lesions())
        if number <= self.top:
            raise RequestError(
                "attribution.top",
                f"the study has {number} lesions, so all would be made; allowed: fewer, or attribution=none",
            )
        if self.candidates > number:
            raise RequestError("attribution.candidates", f"the study has {number} lesions; allowed: up to as many")
        if self.candidates and not self.rungs(len(study.prompts)):
            raise RequestError(
                "attribution.candidates",
                f"are lesioned on some prompts, and there is {len(study.prompts)}; allowed here: 0",
            )

    def rungs(self, prompts: int) -> list[tuple[int, int]]:
        """How many candidates go on, and on how many prompts in all they are lesioned, rung by rung.

        Sequential halving (Karnin, Koren and Somekh 2013): half as many go on, to twice as many further prompts, until
        no more are left than are made anyway.
        """
        found, number, seen = [], self.candidates, 1
        while number > self.top and seen < prompts:
            found.append((number, seen))
            number, seen = -(-number // 2), 2 * seen + 1
        return found

    def chosen(self, lesions: Sequence[Lesion], ranking: Sequence[float]) -> tuple[list[int], list[int]]:
        """Places of the lesions to make: those ranked highest, and a random sample of the rest, sorted.

        ranking: the estimate of each lesion; of equal ones the first come first.
        """
        order = sorted(range(len(lesions)), key=lambda place: -ranking[place])
        top, rest = order[: self.top], sorted(order[self.top :])
        digest = digest_of([self.seed, [lesion.digest for lesion in lesions]])
        return top, sorted(random.Random(digest).sample(rest, min(self.sample, len(rest))))


@dataclass(frozen=True)
class Some(Study):
    """A study with some of its lesions. kept: their digests."""

    kept: frozenset[str] = field(default=frozenset(), kw_only=True)

    @classmethod
    def of(cls, study: Study, lesions: Sequence[Lesion]) -> Some:
        values = {one.name: getattr(study, one.name) for one in fields(Study)}
        return cls(**values, kept=frozenset(lesion.digest for lesion in lesions))

    def lesions(self) -> Iterator[Lesion]:
        return (lesion for lesion in super().lesions() if lesion.digest in self.kept)

    def __len__(self) -> int:
        return self._subjects * (1 + sum(1 for _ in self.lesions()))
