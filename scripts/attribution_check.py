"""How well estimates order the lesions of the embedded model, against complete grids of real lesions.

    python scripts/attribution_check.py --store STORE        prints a table, one line a grid and estimator

Two grids of 8 steps: the 16 cross-attention layers, and the 64 heads of cross- and self-attention in 4 windows. Each is
made completely (again from the store), and estimated in several ways from the same baselines. Correlations are
Spearman's between estimates and importance, means over prompts; `with effect` is over the lesions that change
similarity by 0.001 or more; precision is how many of the 10 (of layers 5) ranked highest are among the most important.
Seconds are CPU seconds of this process, those of the grid an ordinary batch's times its number of images.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from lesion.generation.generate import generate, make_deterministic
from lesion.run.attribution import subjects
from lesion.run.job import survey
from lesion.scoring._clip import _embedder
from lesion.scoring._clip_weights import resolve
from lesion.surgery.anatomy import examine
from lesion.surgery.operation import replacement_key

EFFECT = 1e-3
WINDOWS = "window=[[0,0.25],[0.25,0.5],[0.5,0.75],[0.75,1]]"
SHARED = ("selection=leave_one_out", "prompts=demo", "seeds=[0]", "generation.steps=8", "generation.batch_size=8",
          "scorer.metrics=[clip_similarity,clip_text]", "tracker=none")  # fmt: skip
# Name, lesions counted as highest, how many of ESTIMATORS, and the overrides of each study that is part of it.
GRIDS: dict[str, tuple[int, int, list[list[str]]]] = {
    "16 layers": (5, 4, [["prompts.limit=4"]]),
    "64 heads x 4 windows": (
        10,
        3,
        [["prompts.limit=2", "layers.by=head", WINDOWS, f"layers.kind={k}_attention"] for k in ("cross", "self")],
    ),
}  # fmt: skip
# Name, view, strengths at which gradients are taken, directions.
ESTIMATORS: list[tuple[str, str, Sequence[float], int]] = [
    ("at 0, 2 directions", "clip", (0.0,), 2),
    ("at 0, 8 directions", "clip", (0.0,), 8),
    ("at 0, final latents, 8 directions", "latent", (0.0,), 8),
    ("at 0, 0.1 and 0.2, 4 directions each", "clip", (0.0, 0.1, 0.2), 4),
]


@dataclass
class Part:
    """One study of a grid. real: importance, (lesions, images). ordinary: CPU seconds of an image."""

    real: NDArray[np.float64]
    effects: Callable[[str, Sequence[float], int], tuple[NDArray[np.float64], float]]
    ordinary: float


def part(overrides: Sequence[str], store: Path, folder: Path) -> Part:
    asked = [*SHARED, *overrides, f"store.dir={store}"]
    frame = lesion.study(*asked).run(folder).frame
    config = compose(asked)
    with open_dict(config):
        del config["hydra"]
    source, study = survey(parse(config))
    lesions, cells = list(study.lesions()), subjects(study)
    values = frame.set_index("cell")["clip_similarity"]
    real = 1 - np.array([[values[study.cell(c.prompt, c.seed, one).key] for c in cells] for one in lesions])
    make_deterministic()
    model = models.load(source, "cpu")
    model = replace(model, anatomy=examine(model.denoiser, "head" if "layers.by=head" in overrides else "attention",
                                           study.kind))  # fmt: skip
    embedder = _embedder(*resolve("embedded", None), torch.device("cpu"))
    interventions = {replacement_key(lesions[0]): replacements.find("zero").build({}, None)}
    generate(model, cells, {})
    start = time.process_time()
    generate(model, cells, {})
    ordinary = (time.process_time() - start) / len(cells)

    def effects(view: str, points: Sequence[float], probes: int) -> tuple[NDArray[np.float64], float]:
        seen = views.latent if view == "latent" else views.embedded(embedder)
        start = time.process_time()
        found = [
            estimate(model, lesions, cells, interventions, seen, probes, seed, base=point).effects
            for seed, point in enumerate(points)
        ]
        return np.mean(found, axis=0), time.process_time() - start

    return Part(real, effects, ordinary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="folder of images, made where it lacks some")
    parser.add_argument("--grid", choices=GRIDS, action="append", help="only this one; repeatable")
    arguments = parser.parse_args()
    print("| grid | estimator | Spearman | with effect | precision | CPU s | share of the grid |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for name in arguments.grid or GRIDS:
        most, ways, studies = GRIDS[name]
        with tempfile.TemporaryDirectory() as folder:
            parts = [part(one, arguments.store.absolute(), Path(folder) / str(n)) for n, one in enumerate(studies)]
        real = np.concatenate([one.real.mean(axis=1) for one in parts])
        images = sum(one.real.size + one.real.shape[1] for one in parts)
        grid = sum((one.real.size + one.real.shape[1]) * one.ordinary for one in parts)
        print(f"| {name} | all {images} images made | 1 | 1 | 1 | {grid:.0f} | 100 % |", flush=True)
        for title, *how in ESTIMATORS[:ways]:
            found = [one.effects(*how) for one in parts]
            effects, seconds = np.concatenate([one.mean(axis=1) for one, _ in found]), sum(took for _, took in found)
            best = {*np.argsort(-real)[:most]} & {*np.argsort(-effects)[:most]}
            some = real >= EFFECT
            order = [stats.spearmanr(effects[kept], real[kept]).statistic for kept in (real > -1, some)]
            print(
                f"| {name} | {title} | {order[0]:.2f} | {order[1]:.2f} ({some.sum()}) | {len(best)}/{most} "
                f"| {seconds:.0f} | {100 * seconds / grid:.1f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
