"""An attribution within a study: estimates of all lesions, kept in the store, and the certificate of those made.

Format: STORE/attribution/<digest of everything that can change estimates>.safetensors with `effects` and the estimated
change of each signed metric by its name, each (lesions, images), images prompt by prompt and seed by seed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from lesion import replacements
from lesion.analysis import candidates
from lesion.errors import counted
from lesion.store import tensors
from lesion.store.files import atomically
from lesion.study.attribution import Attribution, Some
from lesion.study.grid import Cell, Study
from lesion.study.lesions import Lesion, digest_of
from lesion.study.pairs import scattered

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from lesion.config.parsing import Request
    from lesion.models import Model
    from lesion.run.score_queue import ScoreQueue
    from lesion.scoring import Metric
    from lesion.store.images import Store
    from lesion.study.prompts import Prompt

log = logging.getLogger(__name__)
AT_ONCE = 8  # images whose gradients are computed together, where the request does not say how many


@dataclass(frozen=True)
class Estimates:
    """Of a study's lesions.

    study: with all of them. effects: estimated importance, (lesions, images). signed: estimated change of metrics, NaN
    for images whose prompts they do not ask for.
    facts: of the estimation, texts: `seconds` it took, `seconds_per_image` of an ordinary image of the same size of
    batch, `images`, `identical` (whether images at strength 0 were the baselines, bit for bit: yes or no; unknown where
    none are made).
    """

    asked: Attribution
    study: Study
    effects: NDArray[np.float64]
    signed: Mapping[str, NDArray[np.float64]]
    facts: Mapping[str, str]

    @cached_property
    def lesions(self) -> list[Lesion]:
        return list(self.study.lesions())

    def by_prompt(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Means over the seeds of each prompt of values (…, images), NaN left out: (…, prompts)."""
        each = values.reshape(*values.shape[:-1], len(self.study.prompts), len(self.study.seeds))
        valid = np.isfinite(each)
        with np.errstate(invalid="ignore"):
            means: NDArray[np.float64] = np.where(valid, each, 0).sum(-1) / valid.sum(-1)
        return means


class Screening:
    """Which lesions of an attribution are made: candidates on few prompts, rung by rung, then the top and a sample.

    Candidates are the lesions of the highest estimates. Those that go on to a rung are lesioned on more prompts, and
    ranked anew by what is known of them (`analysis.candidates`).

    estimates: of each lesion and prompt, (lesions, prompts).
    real: importance of candidates where they were lesioned to rank them, (lesions, prompts), else NaN.
    number: of the round that `part` is, from 1.
    """

    def __init__(self, found: Estimates):
        self.found = found
        self.estimates = candidates.steadied(found.by_prompt(found.effects), found.asked.mean)
        self.real = np.full(self.estimates.shape, np.nan)
        self.number = 1
        self._looked = np.zeros(self.estimates.shape, bool)
        prompts = found.study.prompts
        self._rungs = found.asked.rungs(len(prompts))
        self._order = [prompts.index(prompt) for prompt in scattered(prompts)]
        self._going = list(range(len(self.real)))
        self._choose()

    @property
    def ended(self) -> bool:
        """Whether nothing is left to make but the top and the sample."""
        return self.number > len(self._rungs)

    @property
    def held_out(self) -> list[int]:
        """Places of the prompts on which no candidate is lesioned to rank it."""
        seen = {*self._order[: self._rungs[-1][1]]} if self._rungs else set()
        return [place for place in range(len(self._order)) if place not in seen]

    @property
    def prompts(self) -> NDArray[np.int64]:
        """On how many prompts each lesion was made to rank it."""
        found: NDArray[np.int64] = self._looked.sum(axis=1)
        return found

    @property
    def adjusted(self) -> NDArray[np.float64]:
        """Importance of each lesion on each prompt by what the rungs showed, (lesions, prompts)."""
        return candidates.adjusted(self.estimates, self.real)

    @property
    def chosen(self) -> tuple[list[int], list[int]]:
        """Places of the lesions that are made on all prompts: those ranked highest, and the sample."""
        return self.found.asked.chosen(self.found.lesions, self._ranking.tolist())

    @property
    def part(self) -> Study:
        """What is made now."""
        study, lesions = self.found.study, self.found.lesions
        if self.ended:
            return Some.of(study, [lesions[place] for both in self.chosen for place in both])
        few = replace(study, prompts=tuple(study.prompts[place] for place in self._prompts))
        return Some.of(few, [lesions[place] for place in self._going])

    def look(self, value: Callable[[Cell, str], float]) -> bool:
        """Go on with what the rung that was made shows: False where all is made.

        value: of a metric for an image, NaN where it has none.
        """
        if self.ended:
            return False
        study = self.found.study
        for place in self._going:
            for number in (one for one in self._prompts if not self._looked[place, one]):
                cells = [study.cell(study.prompts[number], seed, self.found.lesions[place]) for seed in study.seeds]
                effects = np.array([1 - value(cell, "clip_similarity") for cell in cells])
                self._looked[place, number] = True
                if np.isfinite(effects).any():
                    self.real[place, number] = np.nanmean(effects)
        self.number += 1
        self._choose()
        return True

    @property
    def _ranking(self) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self.adjusted.mean(axis=1)
        return found

    @property
    def _prompts(self) -> list[int]:
        """Places of the prompts of this rung."""
        return self._order[: self._rungs[self.number - 1][1]]

    def _choose(self) -> None:
        """Keep those that go on to the next rung."""
        if not self.ended:
            ranking, (number, _) = self._ranking, self._rungs[self.number - 1]
            self._going = sorted(self._going, key=lambda place: -ranking[place])[:number]


def subjects(study: Study) -> list[Cell]:
    """The baselines, prompt by prompt and seed by seed."""
    return [study.cell(prompt, seed, None) for prompt in study.prompts for seed in study.seeds]


def part_of(request: Request, study: Study, store: Store) -> Study:
    """The part of a study that an attribution makes on all prompts; without one all of it.

    Where it is not known yet which lesions these are, its first ones, as many as will be made.
    """
    if request.attribution is None:
        return study
    if (found := kept(request, study, store)) and (screening := Screening(found)).ended:
        return screening.part
    return Some.of(study, list(study.lesions())[: request.attribution.top + request.attribution.sample])


def kept(request: Request, study: Study, store: Store) -> Estimates | None:
    """What the store has of the estimates that are asked for. Loads no model."""
    asked = request.attribution
    assert asked
    name, shape = _name(request, study), (sum(1 for _ in study.lesions()), len(subjects(study)))
    found = tensors.read_arrays(_path(store, name), lambda metadata: metadata["name"] == name)
    if not found or found[0]["effects"].shape != shape:
        return None
    arrays, facts = found
    return _of_arrays(asked, study, arrays, facts)


def estimated(request: Request, study: Study, store: Store, scores: ScoreQueue, load: Callable[[], Model]) -> Estimates:
    """Make the estimates that are asked for, and keep them in the store.

    scores: whose CLIP effects are measured in. load: the model.
    """
    arrays, facts = _estimate(request, study, store, scores, load())
    tensors.write(_path(store, name := _name(request, study)), arrays, {**facts, "name": name})
    assert request.attribution
    return _of_arrays(request.attribution, study, arrays, facts)


def _of_arrays(
    asked: Attribution, study: Study, arrays: Mapping[str, NDArray[np.float64]], facts: Mapping[str, str]
) -> Estimates:
    signed = {name: arrays[name] for name in asked.signed or ()}
    return Estimates(asked, study, arrays["effects"], signed, facts)


def _path(store: Store, name: str) -> Path:
    return store.folder / "attribution" / f"{name}.safetensors"


def _name(request: Request, study: Study) -> str:
    assert request.attribution
    metrics = {metric.name: metric.identity() for metric in request.scorer.described}
    clip = [metrics[name] for name in ("clip_similarity", *(request.attribution.signed or ()))]
    keys = [cell.key for cell in subjects(study)]
    return digest_of([keys, [lesion.digest for lesion in study.lesions()], request.attribution.estimator, clip])[:32]


def _estimate(
    request: Request, study: Study, store: Store, scores: ScoreQueue, model: Model
) -> tuple[dict[str, NDArray[np.float64]], dict[str, str]]:
    from lesion.attribution import views
    from lesion.attribution.estimate import estimate
    from lesion.generation.generate import generate
    from lesion.models import memory
    from lesion.surgery.operation import replacement_key

    asked = request.attribution
    assert asked
    lesions, cells = list(study.lesions()), subjects(study)
    size = min(study.settings.batch_size or AT_ONCE, len(cells))
    name = lesions[0].replacement.name
    bench = replacements.Bench(model, study.settings, store.means, size)
    interventions = {replacement_key(lesions[0]): replacements.build(name, request.replacements[name], bench)}
    metrics = {metric.name: metric for metric in scores.scorer.metrics}
    embedder: Any = getattr(metrics["clip_similarity"], "embedder", None)
    view = views.latent if asked.view == "latent" else views.embedded(embedder)
    log.info("attribution: gradients of %d images for %d lesions", len(cells), len(lesions))
    effects = np.zeros((len(lesions), len(cells)))
    signed = {name: np.full(effects.shape, np.nan) for name in asked.signed or ()}
    identical, ordinary, made = "unknown", 0.0, 0
    start = time.perf_counter()
    with tqdm(total=len(cells), desc="attribution", unit="image", disable=None) as bar:
        done = 0
        while done < len(cells):
            batch, crowded = cells[done : done + size], False
            try:
                measured = {name: _on_tensors(metrics[name], batch, study.prompts, model) for name in signed}
                found = estimate(
                    model, lesions, batch, interventions, view, asked.probes, asked.seed, measured, asked.checkpointing,
                    asked.points,
                )  # fmt: skip
                effects[:, done : done + len(batch)] = found.effects
                for name, values in found.signed.items():
                    asks = [metrics[name].asks(cell.prompt.text) for cell in batch]
                    signed[name][:, done : done + len(batch)] = np.where(asks, values, np.nan)
            except Exception as error:
                if not memory.ran_out(error) or size == 1:
                    raise
                crowded = True
            if crowded:  # after the `except`: its error holds what the failed call took
                size //= 2
                log.warning("out of memory with the gradients of %d images; continuing with %d", 2 * size, size)
                memory.release(request.device)
                continue
            if not made:  # what ordinary images take, and whether these are the same
                before = time.perf_counter()
                plain = generate(model, batch, {})
                ordinary, made = time.perf_counter() - before, len(batch)
                start += ordinary
                if asked.points[0] == 0:
                    images = found.images.permute(0, 2, 3, 1).float().cpu().numpy()
                    identical = "yes" if np.array_equal(images, plain) else "no"
            done += len(batch)
            bar.update(len(batch))
    if not np.isfinite(effects).all():
        bad = int((~np.isfinite(effects)).any(axis=0).sum())
        raise RuntimeError(f"the gradients of {bad} of {len(cells)} images are not finite in {torch_name(model)}")
    facts = {
        "seconds": repr(time.perf_counter() - start),
        "seconds_per_image": repr(ordinary / made),
        "images": str(len(cells)),
        "identical": identical,
    }
    return {"effects": effects, **signed}, facts


def _on_tensors(
    metric: Metric, batch: Sequence[Cell], prompts: Sequence[Prompt], model: Model
) -> Callable[[Tensor], Tensor]:
    """A metric's values for a batch, from images through which gradients flow. prompts: of the study."""
    from lesion.generation.generate import generate

    texts, beside = [cell.prompt.text for cell in batch], []
    if metric.donor is not None:
        donor = next(prompt for prompt in prompts if prompt.text == metric.donor)
        beside = list(generate(model, [replace(cell, prompt=donor) for cell in batch], {}, rounded=True))
    return lambda images: metric.of_tensors(images, texts, beside)


def torch_name(model: Model) -> str:
    """The precision of the denoiser, as `performance.dtype` says it."""
    return str(next(model.denoiser.parameters()).dtype).removeprefix("torch.")


def certified(
    screening: Screening, value: Callable[[Cell, str], float], replicates: int = 999
) -> tuple[pd.DataFrame, dict[str, Any]] | None:
    """The table of all lesions and the certificate as JSON data; None where no lesion's image can be compared.

    screening: at its end, else there is none either. value: of a metric for an image, NaN where it has none.
    """
    if not screening.ended:
        return None
    import pandas as pd

    from lesion.analysis import certificate as judging

    found, (top, sample) = screening.found, screening.chosen
    places = [*top, *sample]
    study, baselines = found.study, subjects(found.study)
    cells = [[study.cell(c.prompt, c.seed, found.lesions[p]) for c in baselines] for p in places]
    real = found.by_prompt(np.array([[1 - value(cell, "clip_similarity") for cell in row] for row in cells]))
    if not np.isfinite(real).any(axis=1).all():
        return None
    estimates, adjusted = screening.estimates, screening.adjusted
    is_top = np.arange(len(places)) < len(top)
    judged = judging.certify(
        adjusted[places], real, is_top, len(found.lesions), found.asked.threshold, replicates, found.asked.seed,
        screening.held_out if found.asked.candidates else (),
    )  # fmt: skip
    table = pd.DataFrame([_named(lesion) for lesion in found.lesions])
    table["estimate"] = estimates.mean(axis=1)
    table["low"], table["high"] = judging.spread(estimates, replicates, found.asked.seed)
    table["screened"] = screening.prompts
    table["adjusted"] = adjusted.mean(axis=1)
    table["rank"] = table["adjusted"].rank(ascending=False, method="first").astype(int)
    table["lesioned"] = np.isin(np.arange(len(table)), places)
    chosen = pd.Series("", index=table.index)
    chosen[top], chosen[sample] = "top", "sample"
    table["chosen"] = chosen
    table["real"] = np.nan
    table.loc[places, "real"] = np.nanmean(real, axis=1)
    signed = {}
    for name, values in found.signed.items():
        guessed = found.by_prompt(values)
        was = np.array([value(cell, name) for cell in baselines])
        now = np.array([[value(cell, name) for cell in row] for row in cells])
        change = found.by_prompt(now - was)
        asked = np.isfinite(guessed).all(axis=0) & np.isfinite(change).any(axis=0)
        if not np.isfinite(change[:, asked]).any(axis=1).all() or not asked.any():
            continue
        guessed, change = guessed[:, asked], change[:, asked]
        table[f"{name}_estimate"], table[f"{name}_real"] = guessed.mean(axis=1), np.nan
        table.loc[places, f"{name}_real"] = np.nanmean(change, axis=1)
        signed[name] = judging.signed(
            guessed[places], change, is_top, len(found.lesions), replicates, found.asked.seed
        ).as_data()
    return table, {**judged.as_data(), **_costs(screening), "signed": signed,
                   "identical_at_zero": {"yes": True, "no": False}.get(found.facts["identical"]),
                   "estimator": {**found.asked.estimator, "mean": found.asked.mean}}  # fmt: skip


def _named(lesion: Lesion) -> dict[str, Any]:
    return {
        "layer": lesion.layer,
        "kind": lesion.kind,
        "replacement": lesion.replacement.name,
        "window_start": lesion.window[0],
        "window_end": lesion.window[1],
        "branch": lesion.branch,
    }


def _costs(screening: Screening) -> dict[str, Any]:
    """Images and seconds of the estimates, of ranking candidates, of the lesions made, and of the complete grid.

    Seconds of ordinary images are those that one takes, in a batch as large as that of the gradients, times their
    number; a lesion in a late window goes on from a snapshot and takes its share of the steps.
    """
    from lesion.generation.snapshots import first_step

    found, steps = screening.found, screening.found.study.settings.steps
    images, each = len(subjects(found.study)), float(found.facts["seconds_per_image"])
    shares = np.array([1 - first_step(lesion.window, steps) / steps for lesion in found.lesions])
    ranking = screening.prompts * len(found.study.seeds)
    last = np.zeros(len(shares), int)
    last[[place for both in screening.chosen for place in both]] = images
    seconds = float(found.facts["seconds"])
    grid = (images + (shares * images).sum()) * each

    def of(of_each: NDArray[np.int64], baselines: int = 0) -> dict[str, Any]:
        """of_each: images of each lesion."""
        cost = (baselines + (shares * of_each).sum()) * each
        return {"images": baselines + int(of_each.sum()), "seconds": round(float(cost), 3)}

    told = {
        "candidates": of(ranking),
        "made": of(last, images),
        "grid": of(np.full(len(shares), images), images),
    }
    whole = of(np.maximum(ranking, last), images)["seconds"]
    return {
        "estimates": {"images": images, "seconds": round(seconds, 3)},
        **told,
        "share_of_grid": {
            "estimates": round(seconds / grid, 5),
            "order": round((seconds + told["candidates"]["seconds"]) / grid, 5),
            "in_all": round((seconds + whole) / grid, 5),
        },
    }


def plan_lines(request: Request, study: Study) -> Sequence[str]:
    """What `dry_run` says of it."""
    asked = request.attribution
    if asked is None:
        return []
    number, images = sum(1 for _ in study.lesions()), len(subjects(study))
    kept_of_call = "the input of each denoiser call" if asked.checkpointing else "everything between its operators"
    return [
        f"  attribution: {number} lesions estimated from gradients of {images} images "
        f"({asked.probes} backward passes each{f' at {len(asked.points)} points' if len(asked.points) > 1 else ''}), "
        f"{asked.top} + {asked.sample} of them made; the complete grid is {(1 + number) * images} images",
        *_candidate_lines(asked, study),
        f"  memory for gradients: of all {study.settings.steps} steps {kept_of_call}"
        f"{'' if asked.checkpointing else ' (attribution.checkpointing=true keeps less)'}",
    ]


def _candidate_lines(asked: Attribution, study: Study) -> list[str]:
    rungs = asked.rungs(len(study.prompts))
    if not rungs:
        return []
    steps = ", ".join(f"{number} on {counted(prompts, 'prompt')}" for number, prompts in rungs)
    before = [0, *(prompts for _, prompts in rungs)]
    most = sum(number * (now - then) for (number, now), then in zip(rungs, before, strict=False)) * len(study.seeds)
    return [f"  candidates lesioned to rank them: {steps}; at most {most} images more"]


def write(folder: Path, table: pd.DataFrame, data: Mapping[str, Any]) -> list[Path]:
    """Write certificate.json, the table for people and the figure into a run folder; the paths. Raises OSError."""
    from lesion.report.attribution import CERTIFICATE, drawn

    path = folder / CERTIFICATE
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return [path, *drawn(folder, table, data)]
