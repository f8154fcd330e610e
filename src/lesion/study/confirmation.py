"""A confirmatory study's plan: what will be tested is said before anything is made. Imports nothing of torch.

Prompts are divided in two halves by the plan's own hash. Layers are chosen on the exploring half and tested on the
confirming one (`lesion.analysis.confirm`), so that choosing the largest of many costs no test its meaning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lesion.errors import RequestError

HYPOTHESES = ("changes", "breaks", "loses")
EXPLORING, CONFIRMING = "exploring", "confirming"


@dataclass(frozen=True)
class Confirmation:
    """A plan.

    metric: of importance. hypotheses: some of HYPOTHESES: a layer's absence `changes` images more than another seed
    does, `breaks` an aspect that is read from pixels, `loses` adherence to the prompt. layers: how many are chosen for
    each. alpha: chance of any false claim. paraphrases: what stands in a prompt's id between a cluster and its
    paraphrase, "." for `dog.1` and `dog.2`; "" where every prompt is for itself.
    """

    metric: str
    hypotheses: tuple[str, ...]
    layers: int = 1
    alpha: float = 0.05
    paraphrases: str = ""

    @classmethod
    def of(cls, config: Mapping[str, Any], metric: str, budget: bool = False) -> Confirmation | None:
        """From the `confirm` group of a request; None without hypotheses. Raises RequestError naming the key."""
        given, layers, alpha, between = (config[name] for name in ("hypotheses", "layers", "alpha", "paraphrases"))
        named = [given] if isinstance(given, str) else [] if given is None else given
        if not isinstance(named, list | tuple) or any(one not in HYPOTHESES or named.count(one) > 1 for one in named):
            raise RequestError(
                "confirm.hypotheses", f"must be different ones of {', '.join(HYPOTHESES)}; got {given!r}"
            )
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
            raise RequestError("confirm.layers", f"must be a whole number >= 1; got {layers!r}")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1:
            raise RequestError("confirm.alpha", f"must be a number in (0, 1); got {alpha!r}")
        if between is not None and (not isinstance(between, str) or not between):
            raise RequestError("confirm.paraphrases", f"must be text, or null; got {between!r}")
        if not named:
            return None
        if budget:
            raise RequestError(
                "confirm.hypotheses",
                "do not go with budget.ci_halfwidth, whose rounds look at all prompts; allowed: []",
            )
        return cls(metric, tuple(named), layers, float(alpha), between or "")

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Confirmation:
        """From `written`."""
        plan = dict(data["plan"])
        return cls(**{**plan, "hypotheses": tuple(plan["hypotheses"])})

    @property
    def sha256(self) -> str:
        """Of the plan as JSON with sorted keys."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def cluster(self, prompt: str) -> str:
        """Whose paraphrase a prompt is, by its id."""
        return prompt.rpartition(self.paraphrases)[0] or prompt if self.paraphrases else prompt

    def halves(self, prompts: Iterable[str]) -> dict[str, str]:
        """EXPLORING or CONFIRMING by prompt id; paraphrases stay together. The second has one more where odd."""
        clusters = sorted({self.cluster(one) for one in prompts}, key=self._scatter)
        half = {one: EXPLORING if place < len(clusters) // 2 else CONFIRMING for place, one in enumerate(clusters)}
        return {one: half[self.cluster(one)] for one in prompts}

    def _scatter(self, cluster: str) -> bytes:
        return hashlib.sha256(f"{self.sha256}\n{cluster}".encode("utf-8", "surrogatepass")).digest()

    def written(self, prompts: Iterable[str]) -> dict[str, Any]:
        """What a run folder keeps: the plan, its hash, and which prompts are in which half."""
        return {"plan": asdict(self), "sha256": self.sha256, "halves": self.halves(list(prompts))}
