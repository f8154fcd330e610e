"""An attribution within a study: estimates of all lesions, kept in the store, and the certificate of those made.

Format: STORE/attribution/<digest of everything that can change estimates>.safetensors with `effects` and, where prompts
have text to compare with, `towards`, each (lesions, images), images prompt by prompt and seed by seed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from lesion import replacements
from lesion.store import tensors
from lesion.store.files import atomically
from lesion.study.attribution import Attribution, Some
from lesion.study.grid import Cell, Study
from lesion.study.lesions import Lesion, digest_of

if TYPE_CHECKING:
    import pandas as pd

    from lesion.config.parsing import Request
    from lesion.models import Model
    from lesion.run.score_queue import ScoreQueue
    from lesion.store.images import Store

log = logging.getLogger(__name__)
AT_ONCE = 8  # images whose gradients are computed together, where the request does not say how many
TEXT = "clip_text"  # the metric that the signed estimates are of


@dataclass(frozen=True)
class Estimates:
    """Of a study's lesions.

    study: with all of them. effects: estimated importance, (lesions, images). towards: estimated change of `clip_text`.
    facts: of the estimation, texts: `seconds` it took, `seconds_per_image` of an ordinary image of the same size of
    batch, `images`, `identical` (whether images at strength 0 were the baselines, bit for bit: yes or no; unknown where
    none are made).
    """

    asked: Attribution
    study: Study
    effects: NDArray[np.float64]
    towards: NDArray[np.float64]
    facts: Mapping[str, str]

    @cached_property
    def lesions(self) -> list[Lesion]:
        return list(self.study.lesions())

    @cached_property
    def chosen(self) -> tuple[list[int], list[int]]:
        """Places of the lesions that are made: those ranked highest, and the sample."""
        return self.asked.chosen(self.lesions, self.effects.mean(axis=1).tolist())

    @property
    def part(self) -> Study:
        """The study with the lesions that are made."""
        return Some.of(self.study, [self.lesions[place] for both in self.chosen for place in both])

    def by_prompt(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Means over the seeds of each prompt of values (…, images), NaN left out: (…, prompts)."""
        each = values.reshape(*values.shape[:-1], len(self.study.prompts), len(self.study.seeds))
        valid = np.isfinite(each)
        with np.errstate(invalid="ignore"):
            means: NDArray[np.float64] = np.where(valid, each, 0).sum(-1) / valid.sum(-1)
        return means


def subjects(study: Study) -> list[Cell]:
    """The baselines, prompt by prompt and seed by seed."""
    return [study.cell(prompt, seed, None) for prompt in study.prompts for seed in study.seeds]


def part_of(request: Request, study: Study, store: Store) -> Study:
    """The part of a study that an attribution makes; without one all of it.

    Where nothing is estimated yet, its first lesions, as many as will be made.
    """
    if request.attribution is None:
        return study
    if found := kept(request, study, store):
        return found.part
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
    return Estimates(asked, study, arrays["effects"], arrays["towards"], facts)


def estimated(request: Request, study: Study, store: Store, scores: ScoreQueue, load: Callable[[], Model]) -> Estimates:
    """Make the estimates that are asked for, and keep them in the store.

    scores: whose CLIP effects are measured in. load: the model.
    """
    arrays, facts = _estimate(request, study, store, scores, load())
    tensors.write(_path(store, name := _name(request, study)), arrays, {**facts, "name": name})
    assert request.attribution
    return Estimates(request.attribution, study, arrays["effects"], arrays["towards"], facts)


def _path(store: Store, name: str) -> Path:
    return store.folder / "attribution" / f"{name}.safetensors"


def _name(request: Request, study: Study) -> str:
    assert request.attribution
    metrics = {metric.name: metric.identity() for metric in request.scorer.described}
    clip = [metrics.get(name) for name in ("clip_similarity", TEXT)]
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
    has_text = asked.view == "clip" and TEXT in metrics
    view = views.latent if asked.view == "latent" else views.embedded(embedder)
    log.info("attribution: gradients of %d images for %d lesions", len(cells), len(lesions))
    effects, towards = np.zeros((2, len(lesions), len(cells)))
    identical, ordinary, made = "unknown", 0.0, 0
    start = time.perf_counter()
    with tqdm(total=len(cells), desc="attribution", unit="image", disable=None) as bar:
        done = 0
        while done < len(cells):
            batch = cells[done : done + size]
            text = views.texts(embedder, [cell.prompt.text for cell in batch]) if has_text else None
            try:
                found = estimate(
                    model, lesions, batch, interventions, view, asked.probes, asked.seed, text, asked.checkpointing,
                    asked.points,
                )  # fmt: skip
                effects[:, done : done + len(batch)] = found.effects
                if found.towards is not None:
                    towards[:, done : done + len(batch)] = found.towards
            except Exception as error:
                if not memory.ran_out(error) or size == 1:
                    raise
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
    if not (has_text and np.isfinite(towards).all()):
        towards[:] = np.nan
    return {"effects": effects, "towards": towards}, facts


def torch_name(model: Model) -> str:
    """The precision of the denoiser, as `performance.dtype` says it."""
    return str(next(model.denoiser.parameters()).dtype).removeprefix("torch.")


def certified(
    found: Estimates, value: Callable[[Cell, str], float], replicates: int = 999
) -> tuple[pd.DataFrame, dict[str, Any]] | None:
    """The table of all lesions and the certificate as JSON data; None where no lesion's image can be compared.

    value: of a metric for an image, NaN where it has none.
    """
    import pandas as pd

    from lesion.analysis import certificate as judging

    top, sample = found.chosen
    places = [*top, *sample]
    study, baselines = found.study, subjects(found.study)
    cells = [[study.cell(c.prompt, c.seed, found.lesions[p]) for c in baselines] for p in places]
    real = found.by_prompt(np.array([[1 - value(cell, "clip_similarity") for cell in row] for row in cells]))
    if not np.isfinite(real).any(axis=1).all():
        return None
    estimates = found.by_prompt(found.effects)
    is_top = np.arange(len(places)) < len(top)
    judged = judging.certify(
        estimates[places], real, is_top, len(found.lesions), found.asked.threshold, replicates, found.asked.seed
    )
    table = pd.DataFrame([_named(lesion) for lesion in found.lesions])
    table["estimate"] = estimates.mean(axis=1)
    table["low"], table["high"] = judging.spread(estimates, replicates, found.asked.seed)
    table["rank"] = table["estimate"].rank(ascending=False, method="first").astype(int)
    table["lesioned"] = np.isin(np.arange(len(table)), places)
    chosen = pd.Series("", index=table.index)
    chosen[top], chosen[sample] = "top", "sample"
    table["chosen"] = chosen
    table["real"] = np.nan
    table.loc[places, "real"] = np.nanmean(real, axis=1)
    signed = None
    if np.isfinite(found.towards).all():
        towards = found.by_prompt(found.towards).mean(axis=1)
        was = np.array([value(cell, TEXT) for cell in baselines])
        now = np.array([[value(cell, TEXT) for cell in row] for row in cells])
        change = np.nanmean(now - was, axis=1)
        table["text_estimate"], table["text_real"] = towards, np.nan
        table.loc[places, "text_real"] = change
        weights = np.where(is_top, 1.0, (len(table) - len(top)) / max(len(sample), 1))
        signed = judging.spearman(towards[places], change, weights)
    return table, {**judged.as_data(), **_costs(found, len(places)), "text_spearman": signed,
                   "identical_at_zero": {"yes": True, "no": False}.get(found.facts["identical"]),
                   "estimator": found.asked.estimator}  # fmt: skip


def _named(lesion: Lesion) -> dict[str, Any]:
    return {
        "layer": lesion.layer,
        "kind": lesion.kind,
        "replacement": lesion.replacement.name,
        "window_start": lesion.window[0],
        "window_end": lesion.window[1],
        "branch": lesion.branch,
    }


def _costs(found: Estimates, made: int) -> dict[str, Any]:
    """Images and seconds of the estimates, of the lesions made, and of the complete grid.

    Seconds of ordinary images are those that one takes, in a batch as large as that of the gradients, times their
    number.
    """
    images, each = len(subjects(found.study)), float(found.facts["seconds_per_image"])

    def of(number: int) -> dict[str, Any]:
        return {"images": number, "seconds": round(number * each, 3)}

    grid = (1 + len(found.lesions)) * images
    seconds = float(found.facts["seconds"])
    return {
        "estimates": {"images": images, "seconds": round(seconds, 3)},
        "made": of((1 + made) * images),
        "grid": of(grid),
        "share_of_grid": {
            "estimates": round(seconds / (grid * each), 5),
            "in_all": round((seconds + (1 + made) * images * each) / (grid * each), 5),
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
        f"  memory for gradients: of all {study.settings.steps} steps {kept_of_call}"
        f"{'' if asked.checkpointing else ' (attribution.checkpointing=true keeps less)'}",
    ]


def write(folder: Path, table: pd.DataFrame, data: Mapping[str, Any]) -> list[Path]:
    """Write certificate.json, the table for people and the figure into a run folder; the paths. Raises OSError."""
    from lesion.report.attribution import drawn

    path = folder / "certificate.json"
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return [path, *drawn(folder, table, data)]
