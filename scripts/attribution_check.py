"""How well estimates order the lesions of the embedded model, against complete grids of real lesions.

    python scripts/attribution_check.py --store STORE        prints a table, one line a grid and estimator

Two grids of 8 steps: the 16 cross-attention layers, and the 64 heads of cross- and self-attention in 4 windows. Each is
made completely and estimated in several ways from the same baselines; both are kept in the store, estimates with what
they took. The first prompts chose what is chosen, the others test it, each as a study of its own, and all together are
one. Of each: Spearman's correlation with importance, the mean over prompts; the same over the lesions that change
similarity by 0.001 or more, with their number, if there are more than two; how many of the 10 (of layers 5) ranked
highest are among the most important; and what estimates and candidates take of the complete grid. Candidates are ranked
by `run.attribution.Screening`, as in a study; their images come from the complete grid. Seconds are CPU seconds of this
process, after a batch of 2 steps; an ordinary image's are those of the fastest of three batches, by its share of the
steps where its window begins late.

The first rows estimate nothing: real lesions on a quarter and on half of the prompts, against those on all, and real
lesions on as many other prompts, which say how far importance is of the lesions at all and not of the prompts. They are
means over random draws of prompts, but for the other prompts of each half.

Estimators: gradients at some strengths of all lesions, in some directions, of images from the study's noise or also
from other noise; and two without gradients, from images in which many lesions are together. `subsets`: each lesion is
whole in a random tenth of a prompt's images, and their dissimilarity to the baseline is regressed on which are in an
image (ridge). `small strengths`: every lesion is in every image at 0.05 or -0.05 by chance, and J is how the embedding
goes with the sign of each; half its square is debiased by what other lesions add by chance.
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
from lesion.attribution.strengths import Strengths
from lesion.config.compose import compose
from lesion.config.parsing import parse
from lesion.errors import counted
from lesion.generation.generate import call, generate, generators, make_deterministic
from lesion.generation.snapshots import first_step
from lesion.models import Model
from lesion.run.attribution import Estimates, Screening, subjects
from lesion.run.job import survey
from lesion.scoring._clip import _embedder
from lesion.scoring._clip_weights import resolve
from lesion.study.attribution import MEANS, Attribution
from lesion.study.grid import Cell, Study
from lesion.study.lesions import Lesion, digest_of
from lesion.surgery.anatomy import examine
from lesion.surgery.operation import replacement_key

EFFECT = 1e-3
WINDOWS = "window=[[0,0.25],[0.25,0.5],[0.5,0.75],[0.75,1]]"
SHARED = ("selection=leave_one_out", "prompts=demo", "seeds=[0]", "generation.steps=8", "generation.batch_size=8",
          "scorer.metrics=[clip_similarity,clip_text]", "tracker=none")  # fmt: skip
# Name, lesions counted as highest, prompts, and the overrides of each study that is part of it.
GRIDS: dict[str, tuple[int, tuple[int, int], list[list[str]]]] = {
    "16 layers": (5, (8, 8), [[]]),
    "64 heads x 4 windows": (
        10, (4, 4), [["layers.by=head", WINDOWS, f"layers.kind={kind}_attention"] for kind in ("cross", "self")],
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Estimator:
    """view; points: strengths at which gradients are taken; probes, seed: directions; noises: seeds of an image.

    without: "" for gradients, else the name of an estimator without, of so many `images` a prompt.
    """

    view: str = "clip"
    points: tuple[float, ...] = (0.0,)
    probes: int = 1
    noises: int = 1
    without: str = ""
    images: int = 0
    seed: int = 0

    def __str__(self) -> str:
        if self.without:
            return f"{self.without}, {self.images} images"
        at = " ".join(f"{one:g}" for one in self.points)
        noises = f", {self.noises} noises" if self.noises > 1 else ""
        others = f", other directions ({self.seed})" if self.seed else ""
        return f"{self.view}, at {at}, {counted(self.probes, 'direction')}{noises}{others}"

    @property
    def plain(self) -> bool:
        """Whether it is what a study does by itself, but for the number of directions."""
        return self == Estimator(probes=self.probes, seed=self.seed)


SMALL, SUBSET = 0.05, 0.1  # strength, and share of the lesions, of the estimators without gradients
ESTIMATORS = [
    *(Estimator(probes=probes, seed=seed) for seed in (0, 1, 2, 3) for probes in (1, 2)),
    Estimator(points=(0.1,), probes=1),
    Estimator(points=(0.0, 0.2), probes=1),
    Estimator(without="small strengths", images=4),
    Estimator(without="subsets", images=4),
    Estimator("latent", probes=2),
    Estimator(noises=2),
    Estimator(probes=8),
]
SIZE = 8  # of a batch
SHARES = {"a quarter": 0.25, "half": 0.5}  # of the prompts, whose real lesions are a row each
DRAWS = 400  # of prompts
CANDIDATES = {"16 layers": (8, 12), "64 heads x 4 windows": (15, 20, 30, 60)}  # of plain estimators


class Values(Strengths):
    """Lesions at their strengths, without gradients and what these would keep in memory."""

    throughout = False


@dataclass
class Part:
    """One study of a grid. ordinary: CPU seconds of an image."""

    study: Study
    model: Model
    embedder: Any
    real: NDArray[np.float64]
    ordinary: float

    def effects(self, asked: Estimator, folder: Path) -> tuple[NDArray[np.float64], float]:
        """Estimates, (lesions, prompts), and how many ordinary images take as long; kept in the folder."""
        cells = subjects(self.study)
        lesions = list(self.study.lesions())
        path = folder / f"{digest_of([[c.key for c in cells], [one.digest for one in lesions], str(asked)])[:32]}.npz"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._made(asked, lesions, [replace(c, settings=replace(c.settings, steps=2)) for c in cells[:SIZE]])
            start = time.process_time()
            found = [self._made(asked, lesions, cells[at : at + SIZE]) for at in range(0, len(cells), SIZE)]
            took = (time.process_time() - start) / self.ordinary
            np.savez(path, effects=np.concatenate(found, axis=1), took=took)
        kept = np.load(path)
        return kept["effects"], float(kept["took"])

    def _made(self, asked: Estimator, lesions: Sequence[Lesion], cells: Sequence[Cell]) -> NDArray[np.float64]:
        interventions = {replacement_key(lesions[0]): replacements.find("zero").build({}, None)}
        if asked.without:
            return self._together(asked, lesions, cells, interventions)
        seen = views.latent if asked.view == "latent" else views.embedded(self.embedder)
        noises = [[replace(cell, seed=cell.seed + more) for cell in cells] for more in range(asked.noises)]
        found = [
            estimate(
                self.model, lesions, some, interventions, seen, asked.probes, asked.seed, points=asked.points
            ).effects
            for some in noises
        ]
        return np.mean(np.sqrt(found), axis=0) ** 2

    def _together(
        self, asked: Estimator, lesions: Sequence[Lesion], cells: Sequence[Cell], interventions: Any
    ) -> NDArray[np.float64]:
        """Estimates from images in which many lesions are together."""
        drawn = np.random.default_rng([asked.images, *cells[0].prompt.text.encode()])
        small = asked.without == "small strengths"
        embedded, chosen = [], []
        for number in range(asked.images + 1):
            shape = len(lesions), len(cells)
            chosen.append(drawn.choice([-1.0, 1.0], shape) if small else drawn.random(shape) < SUBSET)
            strengths = torch.tensor(chosen[-1] * (SMALL if small else 1.0) * bool(number), dtype=torch.float32)
            client = Values(self.model.anatomy, lesions, strengths, interventions)
            with torch.no_grad():
                images = call(self.model, [c.prompt for c in cells], generators([c.noise_seed for c in cells]),
                              cells[0].settings, [client])  # fmt: skip
                embedded.append(self.embedder.tensors(images).double().numpy())
        went, there = np.array(embedded[1:]) - embedded[0], np.array(chosen[1:], dtype=float)
        if small:
            slopes = np.einsum("nlp,npd->lpd", there, went) / (SMALL * len(went))
            by_chance = (went**2).sum(axis=(0, 2)) / (SMALL * len(went)) ** 2
            return np.maximum(((slopes**2).sum(axis=2) - by_chance) / 2, 0.0)
        effects = (went**2).sum(axis=2) / 2
        found = []
        for place in range(len(cells)):
            x, y = there[:, :, place] - SUBSET, effects[:, place] - effects[:, place].mean()
            found.append(x.T @ np.linalg.solve(x @ x.T + len(lesions) * SUBSET * np.eye(len(x)), y))
        slopes = np.array(found).T
        return slopes - slopes.min(axis=0)  # none is below 0, which order does not notice


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
    generate(model, cells[:SIZE], {})
    took = []
    for _ in range(3):
        start = time.process_time()
        generate(model, cells[:SIZE], {})
        took.append((time.process_time() - start) / SIZE)
    return Part(study, model, embedder, real, min(took))


@dataclass(frozen=True)
class Some:
    """Some prompts of a grid.

    real, effects: importance and estimates, (lesions, prompts). shares: of an image's steps, for each lesion.
    """

    study: Study
    real: NDArray[np.float64]
    effects: NDArray[np.float64]
    shares: NDArray[np.float64]

    def ranked(self, candidates: int, top: int, mean: str) -> tuple[NDArray[np.float64], float]:
        """What lesions are ranked by, and what lesions of candidates cost, in ordinary images."""
        asked = Attribution(top=top, candidates=candidates, mean=mean)
        screening = Screening(Estimates(asked, self.study, self.effects, {}, {}))
        places = {one.digest: number for number, one in enumerate(self.study.lesions())}
        prompts = {prompt: number for number, prompt in enumerate(self.study.prompts)}

        def value(cell: Cell, metric: str) -> float:
            assert cell.lesion
            return 1 - float(self.real[places[cell.lesion.digest], prompts[cell.prompt]])

        while screening.look(value):
            pass
        return screening.adjusted.mean(axis=1), float(screening.prompts @ self.shares)


def agreement(scores: NDArray[np.float64], real: NDArray[np.float64], most: int) -> NDArray[np.float64]:
    """Of the scores of lesions with their importance: Spearman over all; over those with effect, NaN for fewer than
    three; how many these are; and how many of the `most` highest are among as many most important.
    """
    best = {*np.argsort(-real)[:most]} & {*np.argsort(-scores)[:most]}
    some = real >= EFFECT
    among = stats.spearmanr(scores[some], real[some]).statistic if some.sum() > 2 else np.nan
    return np.array([stats.spearmanr(scores, real).statistic, among, some.sum(), len(best)])


def said(found: NDArray[np.float64], most: int, share: float) -> str:
    """A cell of the table. found: of `agreement`, or of several, whose order among those with effect is told where most
    have one. share: of what the complete grid takes."""
    all_of_them, number, best = (found.reshape(-1, 4)[:, place].mean() for place in (0, 2, 3))
    among = found.reshape(-1, 4)[:, 1]
    with_effect = f", {np.nanmean(among):.2f} ({number:.0f})" if np.isfinite(among).mean() > 0.5 else ""
    return f"{all_of_them:.2f}{with_effect}, {round(best, 1):g}/{most}, {100 * share:.1f} %"


def lesioned(real: NDArray[np.float64], halves: Sequence[slice], most: int) -> Iterator[tuple[str, list[str]]]:
    """Rows of real lesions on some of the prompts, and on others. real: (lesions, prompts). halves: the first prompts,
    the others, and all.
    """
    drawn = np.random.default_rng(0)
    for name, share in SHARES.items():
        cells = []
        for some in halves:
            part = real[:, some]
            number = max(1, round(share * part.shape[1]))
            draws = [part[:, drawn.permutation(part.shape[1])[:number]].mean(axis=1) for _ in range(DRAWS)]
            found = np.array([agreement(one, part.mean(axis=1), most) for one in draws])
            cells.append(said(found, most, number / part.shape[1]))
        yield f"real lesions, {name} of the prompts", cells
    first, others = (real[:, some].mean(axis=1) for some in halves[:2])
    orders = [drawn.permutation(real.shape[1]) for _ in range(DRAWS)]
    half = real.shape[1] // 2
    split = [
        agreement(real[:, one[:half]].mean(axis=1), real[:, one[half : 2 * half]].mean(axis=1), most) for one in orders
    ]
    found = [agreement(others, first, most), agreement(first, others, most), np.array(split)]
    yield "real lesions, as many other prompts (of all: half and half)", [said(one, most, 1.0) for one in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="folder of images, made where it lacks some")
    parser.add_argument("--grid", choices=GRIDS, action="append", help="only this one; repeatable")
    parser.add_argument("--without", metavar="WORDS", action="append", default=[],
                        help="leave out estimators whose name has these words; repeatable")  # fmt: skip
    parser.add_argument("--prompts", type=int, nargs=2, metavar=("FIRST", "OTHERS"), help="how many, of prompts=demo")
    arguments = parser.parse_args()
    store = arguments.store.absolute()
    print("| grid | estimator | mean | candidates | first prompts | other prompts | all prompts |")
    print("| --- | --- | --- | ---: | --- | --- | --- |", flush=True)
    for name in arguments.grid or GRIDS:
        most, numbers, studies = GRIDS[name]
        first, others = arguments.prompts or numbers
        with tempfile.TemporaryDirectory() as folder:
            parts = [
                part([*one, f"prompts.limit={first + others}"], store, Path(folder) / str(place))
                for place, one in enumerate(studies)
            ]
        real, whole = np.concatenate([one.real for one in parts]), Together.of([one.study for one in parts])
        steps = whole.settings.steps
        shares = np.array([1 - first_step(one.window, steps) / steps for one in whole.lesions()])
        halves = [slice(0, first), slice(first, first + others), slice(0, first + others)]
        for lesions, cells in lesioned(real, halves, most):
            print(f"| {name} | {lesions} | | 0 | {' | '.join(cells)} |", flush=True)
        for asked in ESTIMATORS:
            if any(words in str(asked) for words in arguments.without):
                continue
            found = [one.effects(asked, store / "estimates") for one in parts]
            effects, took = np.concatenate([one for one, _ in found]), sum(took for _, took in found)
            ranked = [(mean, 0) for mean in (MEANS if not asked.seed else MEANS[:1])]
            for mean, candidates in [*ranked, *((MEANS[0], one) for one in CANDIDATES[name] if asked.plain)]:
                told = []
                for some in halves:
                    study = replace(whole, prompts=whole.prompts[some])
                    one = Some(study, real[:, some], effects[:, some], shares)
                    scores, images = one.ranked(candidates, most, mean)
                    prompts = len(study.prompts)
                    share = (took * prompts / (first + others) + images) / (prompts * (1 + shares.sum()))
                    told.append(said(agreement(scores, one.real.mean(axis=1), most), most, share))
                print(f"| {name} | {asked} | {mean} | {candidates} | {' | '.join(told)} |", flush=True)


if __name__ == "__main__":
    main()
