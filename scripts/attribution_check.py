"""How well estimates order the lesions of the embedded model, against complete grids of real lesions.

    python scripts/attribution_check.py --store STORE        prints a table, one line a grid and estimator

Two grids of 8 steps: the 16 cross-attention layers, and the 64 heads of cross- and self-attention in 4 windows. Each is
made completely (again from the store), and estimated in several ways from the same baselines. The prompts are halved:
the second half tests what the first one chose, each as a study of its own. Correlations are Spearman's with
importance, the mean over prompts; `with effect` is over the lesions that change similarity by 0.001 or more; precision
is how many of the 10 (of layers 5) ranked highest are among the most important. Candidates are ranked by
`run.attribution.Screening`, as in a study; their images come from the complete grid. Seconds are CPU seconds of this
process; an image's are those of an ordinary batch, by its share of the steps where its window begins late.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import open_dict
from scipy import stats

import lesion
from lesion import models, replacements
from lesion.attribution import views
from lesion.attribution.estimate import estimate
from lesion.config.compose import compose
from lesion.config.parsing import parse
from lesion.errors import counted
from lesion.generation.generate import generate, make_deterministic
from lesion.generation.snapshots import first_step
from lesion.models import Model
from lesion.run.attribution import Estimates, Screening, subjects
from lesion.run.job import survey
from lesion.scoring._clip import _embedder
from lesion.scoring._clip_weights import resolve
from lesion.study.attribution import Attribution
from lesion.study.grid import Cell, Study
from lesion.study.lesions import Lesion
from lesion.surgery.anatomy import examine
from lesion.surgery.operation import replacement_key

EFFECT = 1e-3
WINDOWS = "window=[[0,0.25],[0.25,0.5],[0.5,0.75],[0.75,1]]"
SHARED = ("selection=leave_one_out", "prompts=demo", "seeds=[0]", "generation.steps=8", "generation.batch_size=8",
          "scorer.metrics=[clip_similarity,clip_text]", "tracker=none")  # fmt: skip
# Name, lesions counted as highest, prompts, and the overrides of each study that is part of it.
GRIDS: dict[str, tuple[int, int, list[list[str]]]] = {
    "16 layers": (5, 16, [[]]),
    "64 heads x 4 windows": (
        10, 8, [["layers.by=head", WINDOWS, f"layers.kind={kind}_attention"] for kind in ("cross", "self")],
    ),
}  # fmt: skip
# View, strengths at which gradients are taken, directions.
ESTIMATORS: list[tuple[str, tuple[float, ...], int]] = [
    ("clip", (0.0,), 1),
    ("clip", (0.0,), 2),
    ("clip", (0.0,), 8),
    ("latent", (0.0,), 2),
    ("clip", (0.0, 0.1, 0.2), 2),
]
CANDIDATES = {"16 layers": (0, 8, 12), "64 heads x 4 windows": (0, 15, 30, 60)}


@dataclass
class Part:
    """One study of a grid. ordinary: CPU seconds of an image."""

    study: Study
    model: Model
    embedder: Any
    real: NDArray[np.float64]
    ordinary: float

    def effects(self, view: str, points: Sequence[float], probes: int) -> tuple[NDArray[np.float64], float]:
        """Estimates, (lesions, images), and the CPU seconds that they took."""
        lesions, cells = list(self.study.lesions()), subjects(self.study)
        seen = views.latent if view == "latent" else views.embedded(self.embedder)
        interventions = {replacement_key(lesions[0]): replacements.find("zero").build({}, None)}
        size, start = 8, time.process_time()
        found = [
            estimate(self.model, lesions, cells[at : at + size], interventions, seen, probes, points=points).effects
            for at in range(0, len(cells), size)
        ]
        return np.concatenate(found, axis=1), time.process_time() - start


@dataclass(frozen=True)
class Together(Study):
    """Several studies that differ in their lesions alone, as one. parts: which."""

    parts: tuple[Study, ...] = field(default=(), kw_only=True)

    @classmethod
    def of(cls, parts: Sequence[Study]) -> Together:
        return cls(**{one.name: getattr(parts[0], one.name) for one in fields(Study)}, parts=tuple(parts))

    def lesions(self) -> Iterator[Lesion]:
        return itertools.chain.from_iterable(part.lesions() for part in self.parts)


def part(overrides: Sequence[str], store: Path, folder: Path) -> Part:
    asked = [*SHARED, *overrides, f"store.dir={store}"]
    frame = lesion.study(*asked).run(folder).frame
    config = compose(asked)
    with open_dict(config):
        del config["hydra"]
    source, study = survey(parse(config))
    cells = subjects(study)
    values = frame.set_index("cell")["clip_similarity"]
    real = 1 - np.array([[values[study.cell(c.prompt, c.seed, one).key] for c in cells] for one in study.lesions()])
    make_deterministic()
    model = models.load(source, "cpu")
    model = replace(model, anatomy=examine(model.denoiser, "head" if "layers.by=head" in overrides else "attention",
                                           study.kind))  # fmt: skip
    embedder = _embedder(*resolve("embedded", None), torch.device("cpu"))
    generate(model, cells[:8], {})
    start = time.process_time()
    generate(model, cells[:8], {})
    return Part(study, model, embedder, real, (time.process_time() - start) / 8)


@dataclass(frozen=True)
class Half:
    """Some prompts of a grid.

    real, effects: importance and estimates, (lesions, prompts). shares: of an image's steps, for each lesion.
    """

    study: Study
    real: NDArray[np.float64]
    effects: NDArray[np.float64]
    shares: NDArray[np.float64]

    def ranked(self, candidates: int, top: int) -> tuple[NDArray[np.float64], float]:
        """What lesions are ranked by, and what lesions of candidates cost, in ordinary images."""
        screening = Screening(Estimates(Attribution(top=top, candidates=candidates), self.study, self.effects, {}, {}))
        places = {one.digest: number for number, one in enumerate(self.study.lesions())}
        prompts = {prompt: number for number, prompt in enumerate(self.study.prompts)}

        def value(cell: Cell, metric: str) -> float:
            assert cell.lesion
            return 1 - float(self.real[places[cell.lesion.digest], prompts[cell.prompt]])

        while screening.look(value):
            pass
        return screening.adjusted.mean(axis=1), float(screening.prompts @ self.shares)

    def agreement(self, scores: NDArray[np.float64], most: int) -> str:
        real = self.real.mean(axis=1)
        best = {*np.argsort(-real)[:most]} & {*np.argsort(-scores)[:most]}
        some = real >= EFFECT
        order = [stats.spearmanr(scores[kept], real[kept]).statistic for kept in (real > -1, some)]
        some_order = f"{order[1]:.2f}" if some.sum() > 2 else "n/a"
        return f"{order[0]:.2f} | {some_order} ({some.sum()}) | {len(best)}/{most}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="folder of images, made where it lacks some")
    parser.add_argument("--grid", choices=GRIDS, action="append", help="only this one; repeatable")
    parser.add_argument("--prompts", type=int, help="the first so many of prompts=demo, an even number")
    arguments = parser.parse_args()
    print("| grid | estimator | candidates | Spearman | with effect | precision | Spearman, test | with effect, test "
          "| precision, test | share of the grid |")  # fmt: skip
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for name in arguments.grid or GRIDS:
        most, number, studies = GRIDS[name]
        number = arguments.prompts or number
        with tempfile.TemporaryDirectory() as folder:
            parts = [
                part([*one, f"prompts.limit={number}"], arguments.store.absolute(), Path(folder) / str(place))
                for place, one in enumerate(studies)
            ]
        real, whole = np.concatenate([one.real for one in parts]), Together.of([one.study for one in parts])
        steps = whole.settings.steps
        shares = np.array([1 - first_step(one.window, steps) / steps for one in whole.lesions()])
        each = float(np.mean([one.ordinary for one in parts]))
        grid = each * number * (1 + shares.sum())
        for view, points, probes in ESTIMATORS:
            found = [one.effects(view, points, probes) for one in parts]
            effects, seconds = np.concatenate([one for one, _ in found]), sum(took for _, took in found)
            title = f"{view}, at {' '.join(f'{one:g}' for one in points)}, {counted(probes, 'direction')}"
            for candidates in CANDIDATES[name]:
                told, cost = [], 0.0
                for half in (slice(0, number // 2), slice(number // 2, number)):
                    study = replace(whole, prompts=whole.prompts[half])
                    one = Half(study, real[:, half], effects[:, half], shares)
                    scores, images = one.ranked(candidates, most)
                    told.append(one.agreement(scores, most))
                    cost += images * each
                print(
                    f"| {name} | {title} | {candidates} | {' | '.join(told)} | {100 * (seconds + cost) / grid:.1f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
