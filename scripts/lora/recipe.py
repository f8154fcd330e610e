"""What a training run is asked to do: everything that changes the weights it ends with."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
PRECISIONS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
SCHEDULES = ("constant", "cosine")


class Refused(ValueError):
    """The run cannot be made as asked; one line says why."""


@dataclass(frozen=True)
class Recipe:
    """One training run.

    model: as `model.id` of a study (embedded, a folder, a hub name, a .safetensors file with `pipeline` and `config`).
    rank, alpha: of the adapter; its matrices' product counts alpha / rank. targets: ends of module paths. batch: images
    at once; accumulate: batches a step. rate: peak learning rate; warmup: steps up to it. decay: AdamW's weight decay.
    clip: largest norm of the gradient. side: pixels. flip: half of the images mirrored. dropout: share of captions
    replaced by the empty one. precision: a key of PRECISIONS. data: digest of the images and captions.
    """

    model: str
    data: str
    pipeline: str | None = None
    config: str | None = None
    revision: str | None = None
    variant: str | None = None
    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = TARGETS
    steps: int = 1000
    batch: int = 4
    accumulate: int = 1
    rate: float = 1e-4
    warmup: int = 0
    schedule: str = "constant"
    decay: float = 1e-2
    clip: float = 1.0
    seed: int = 0
    side: int | None = None
    flip: bool = False
    dropout: float = 0.0
    precision: str = "no"

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, from 0: linear warm-up, then constant or a cosine to zero."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.rate
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * 0.5 * (1 + math.cos(math.pi * done))

    def agree(self, file: Path) -> None:
        """Note the recipe in `file`, or compare it with the one noted there. Raises Refused where they differ.

        A run with a constant rate may be made longer.
        """
        ours = json.loads(json.dumps(asdict(self)))
        if not file.exists():
            file.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
            return
        theirs = json.loads(file.read_text(encoding="utf-8"))
        free = {"steps"} if self.schedule == "constant" else set()
        for name, value in ours.items():
            if name not in free and theirs.get(name) != value:
                raise Refused(
                    f"{str(file.parent)!r} holds a run with {name}={theirs.get(name)}, not {value}; give another --out"
                )
        file.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
