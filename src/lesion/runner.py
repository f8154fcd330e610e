"""Ties the flow together: request -> study -> plan -> generate -> store -> score -> results -> report, tracker."""

from __future__ import annotations

import fnmatch
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lesion import models, replacements, scoring
from lesion.anatomy import Anatomy, AnatomyError, examine
from lesion.config import Request
from lesion.errors import RequestError, StudyFailed
from lesion.generate import generate, make_deterministic, to_pixels
from lesion.plan import Tally, batches, tally
from lesion.scoring import Scorer, Shot
from lesion.store import Damaged, Store, atomically
from lesion.study import Cell, Settings, Study, row
from lesion.surgery import Filler, replacement_key
from lesion.tracking import JobInfo, Tracker, make_tracker

log = logging.getLogger(__name__)
for _chatty in ("fontTools", "matplotlib", "PIL"):  # their INFO lines would drown ours
    logging.getLogger(_chatty).setLevel(logging.WARNING)
PNG_BYTES_PER_PIXEL = 1.6  # typical of photographs; for the estimate of `dry_run`


@dataclass(frozen=True)
class JobContext:
    """Where a job runs. folder: its run folder. group: the multirun it belongs to, if any. config: for the tracker."""

    folder: Path
    name: str
    group: str | None
    config: dict[str, Any]


@lru_cache(maxsize=8)
def _anatomy(source_spec: models.ModelSpec, fingerprint: str) -> Anatomy:
    source = models.resolve(source_spec)
    try:
        return examine(source.skeleton(source.denoiser))
    except AnatomyError as error:
        raise RequestError("model.id", str(error)) from None


def survey(request: Request) -> tuple[models.Source, Study]:
    """Find the model and lay out the study, without loading a weight.

    Raises RequestError for a model that is not there, unknown layers, or a selection that makes no sense on them.
    """
    source = models.resolve(request.model)
    anatomy = _anatomy(request.model, source.fingerprint)
    study = Study(
        model=models.identity_of(source, request.device),
        settings=Settings(
            task=request.task,
            steps=request.steps,
            guidance=request.guidance,
            height=request.height,
            width=request.width,
            scheduler=source.scheduler,
            negative_prompt=request.negative_prompt,
        ),
        prompts=request.prompts,
        seeds=request.seeds,
        layers=_included(anatomy.paths, request.include),
        selections=request.selections,
        replacements=request.described_replacements(),
        windows=request.windows,
        branches=request.branches,
        strengths=request.strengths,
    )
    len(study)  # makes every selection choose, so that one that makes no sense is refused here
    scoring.check(request.scorer)
    _check_writable(request.store)
    return source, study


def _check_writable(folder: Path) -> None:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RequestError("store.dir", f"{str(folder)!r} cannot be made: {str(there)!r} is no folder one can write to")


def _included(paths: Sequence[str], globs: tuple[str, ...] | None) -> tuple[str, ...]:
    if globs is None:
        return tuple(paths)
    for glob in globs:
        if not fnmatch.filter(paths, glob):
            raise RequestError("layers.include", f"{glob!r} matches no layer; allowed: {', '.join(paths)}")
    return tuple(path for path in paths if any(fnmatch.fnmatchcase(path, glob) for glob in globs))


def run(request: Request, context: JobContext) -> None:
    """Run one study and write its run folder. Raises RequestError before, StudyFailed after all that could be made."""
    source, study = survey(request)
    store = Store(request.store)
    counts = tally(study.cells(), store.has)
    if request.dry_run:
        print("\n".join(plan_lines(study, counts, store)))
        return
    try:
        scorer = scoring.make_scorer(request.scorer, request.device)
    except scoring.ScorerError as error:
        raise RequestError("scorer", str(error).removeprefix("scorer ")) from None
    tracker = make_tracker(request.tracker["name"], request.tracker)
    tracker.start(JobInfo(context.name, context.group, "lesion-study", context.folder, context.config))
    code = 1
    try:
        failures = _generate_missing(request, source, study, store, counts, tracker)
        paths = _anatomy(request.model, source.fingerprint).paths
        frame = _score(study, paths, store, scorer, failures, context.folder)
        frame = frame.assign(
            scorer=request.scorer.name,
            scorer_identity=scorer.identity,
            protocol=frame["replacement"].map(study.protocol).fillna(""),
        )
        code = _write(frame, context.folder, tracker)
    finally:
        tracker.close(code)
    if code:
        bad = frame[frame["status"] != "ok"]
        raise StudyFailed(
            f"{len(bad)} of {len(frame)} images failed or are invalid, the first because: {bad['reason'].iloc[0]} "
            f"(all are named in {context.folder / 'results.parquet'}); the rest is complete"
        )


def plan_lines(study: Study, counts: Tally, store: Store) -> list[str]:
    """What a study would make, for `dry_run=true`."""
    size = counts.missing * study.settings.height * study.settings.width * PNG_BYTES_PER_PIXEL
    each = (counts.rows - counts.baselines) // counts.baselines
    return [
        f"study of {study.model.name}: {len(study.prompts)} prompts, {len(study.seeds)} seeds, "
        f"{len(study.layers)} layers",
        *(f"  {mode:32} {number:8} images" for mode, number in counts.by_mode.items()),
        f"  {'in all':32} {counts.rows:8} rows, {counts.unique} different images",
        f"  baselines shared: each of {counts.baselines} serves {each} lesions",
        f"  already in the store {store.folder}: {counts.stored}",
        f"  to make: {counts.missing}, about {size / 2**20:.1f} MiB on disk",
        "dry run: nothing was generated",
    ]


def _generate_missing(
    request: Request, source: models.Source, study: Study, store: Store, counts: Tally, tracker: Tracker
) -> dict[str, str]:
    """Make what the store lacks. Returns the reason for each cell that could not be made."""
    failures: dict[str, str] = {}
    if not counts.missing:
        log.info("all %d images are in the store %s", counts.unique, store.folder)
        return failures
    log.info("%d images to make, %d already in the store %s", counts.missing, counts.stored, store.folder)
    make_deterministic()
    model = models.load(source, request.device)
    if model.anatomy.paths != _anatomy(request.model, source.fingerprint).paths:
        raise RequestError("model.id", "the loaded model has other layers than its config says")
    fillers, broken = _fillers(request, model, study, store)
    began, done = time.monotonic(), 0
    with (
        logging_redirect_tqdm(),
        tqdm(total=counts.missing, unit="image", desc=study.model.name, smoothing=0.05) as bar,
    ):
        for batch in batches(study.cells(), request.batch_size, store.has):
            lesion = batch[0].lesion  # a batch has one kind of lesion
            if lesion and (why := broken.get(replacement_key(lesion))):
                failures |= {cell.key: why for cell in batch}
            else:
                failures |= _make(model, batch, fillers, store)
            done += len(batch)
            bar.update(len(batch))
            tracker.progress(done, counts.missing, done / (time.monotonic() - began))
    return failures


def _fillers(
    request: Request, model: models.Model, study: Study, store: Store
) -> tuple[dict[str, Filler], dict[str, str]]:
    """The replacements at work, by the key under which surgery asks for them; and why some could not be built."""
    bench = replacements.Bench(model, study.settings, store.means, request.batch_size)
    fillers: dict[str, Filler] = {}
    broken: dict[str, str] = {}
    for lesion in study.lesions():
        key, name = replacement_key(lesion), lesion.replacement.name
        if key not in fillers and key not in broken:
            try:
                fillers[key] = replacements.build(name, request.replacements[name], bench)
            except Exception as error:  # whatever a model can raise, the other replacements go on
                broken[key] = f"replacement {name} could not be made ready: {_brief(error)}"
                log.error(broken[key])
    return fillers, broken


def _make(model: models.Model, batch: list[Cell], fillers: dict[str, Filler], store: Store) -> dict[str, str]:
    """Generate and store a batch; if it fails, each cell alone, so that one bad cell costs only itself."""
    try:
        images = generate(model, batch, fillers)
    except Exception as error:  # whatever a model can raise, the other cells go on
        if len(batch) > 1:
            log.warning("a batch of %d failed (%s); its images are made one at a time", len(batch), _brief(error))
            return {key: why for cell in batch for key, why in _make(model, [cell], fillers, store).items()}
        log.error("%s failed: %s", _label(batch[0]), _brief(error))
        return {batch[0].key: _brief(error)}
    failures: dict[str, str] = {}
    for cell, image in zip(batch, images, strict=True):
        pixels, reason = to_pixels(image)
        if reason:
            log.warning("%s is invalid: %s", _label(cell), reason)
        try:
            store.put(cell, pixels, reason)
        except OSError as error:
            log.error("%s could not be stored: %s", _label(cell), _brief(error))
            failures[cell.key] = _brief(error)
    return failures


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _label(cell: Cell) -> str:
    lesion = f"{cell.lesion.selection} {cell.lesion.layer}".strip() if cell.lesion else "baseline"
    return f"{cell.prompt.id} seed {cell.seed} {lesion}"


def _score(
    study: Study,
    paths: Sequence[str],
    store: Store,
    scorer: Scorer,
    failures: dict[str, str],
    folder: Path,
    chunk: int = 256,
) -> pd.DataFrame:
    """The results frame: every cell's row with its status, picture and scores."""
    rows: list[dict[str, Any]] = []
    shots: list[tuple[int, Shot]] = []
    baseline_of = lru_cache(maxsize=64)(lambda key: _fetch(store, key, failures))  # a lesion follows its neighbours

    def flush() -> None:
        if shots:
            for column, values in scorer.score([shot for _, shot in shots]).items():
                for (index, _), value in zip(shots, values, strict=True):
                    rows[index][column] = float(value)
            shots.clear()

    for cell in tqdm(study.cells(), total=len(study), desc="score", unit="image"):
        record = {**row(cell, paths), "status": "ok", "reason": "", "image": ""}
        record |= {column: float("nan") for column in scorer.columns}
        rows.append(record)
        pixels, reason = _fetch(store, cell.key, failures)
        if pixels is not None:
            record["image"] = _publish(store, cell, folder)
        if reason:
            record["status"], record["reason"] = ("invalid" if pixels is not None else "failed"), reason
            continue
        key = cell.baseline.key
        baseline, why = baseline_of(key)
        if why:
            record["status"], record["reason"] = "invalid", f"its baseline cannot be compared with: {why}"
            continue
        shots.append((len(rows) - 1, Shot(cell.key, pixels, key, baseline, cell.prompt.text)))
        if len(shots) == chunk:
            flush()
    flush()
    return pd.DataFrame(rows)


def _fetch(store: Store, key: str, failures: dict[str, str]) -> tuple[Any, str]:
    """Pixels (None if there are none) and what is wrong with them ("" if nothing)."""
    if key in failures:
        return None, failures[key]
    try:
        stored = store.get(key)
    except Damaged as error:
        store.discard(key)
        return None, f"the stored image was damaged and is removed; run again to make it anew ({error})"
    return stored.pixels, stored.reason


def _publish(store: Store, cell: Cell, folder: Path) -> str:
    """The cell's picture in the run folder, as a link to the store where the disk can: its relative path."""
    parts = [cell.lesion.selection, cell.lesion.replacement.name, cell.lesion.layer] if cell.lesion else ["baseline"]
    name = "-".join([f"seed{cell.seed}", *(part for part in parts if part), cell.key[:8]]) + ".png"
    path = folder / "images" / cell.prompt.id / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as temporary:  # in its place even if an older picture of the cell is there
        try:
            os.link(store.path(cell.key), temporary)
        except OSError:
            shutil.copyfile(store.path(cell.key), temporary)
    return path.relative_to(folder).as_posix()


def _write(frame: pd.DataFrame, folder: Path, tracker: Tracker) -> int:
    """results.parquet, report and tracker; prints the ranking. The exit code: 1 if a cell is not fine."""
    from lesion.analysis.importance import layer_table
    from lesion.analysis.settings import rows, settings
    from lesion.report import ranking_lines, write_report

    with atomically(folder / "results.parquet") as temporary:
        frame.to_parquet(temporary, index=False)
    written = [folder / "results.parquet", *write_report(folder, frame)]
    summary = {}
    for setting in settings(frame):
        for line in layer_table(rows(frame, setting)).to_dict("records"):
            for measure in ("importance", "sufficiency"):
                if np.isfinite(line[measure]):  # slug without the model: a run has one
                    name = setting.slug.split("--", 1)[1]
                    summary[f"{measure}/{name}/{line['layer']}"] = float(line[measure])
    tracker.finish(frame, folder, summary)
    print("\n".join(ranking_lines(frame)))
    print(f"\nwritten to {folder}:")
    for name in dict.fromkeys(path.relative_to(folder).parts[0] for path in written):
        print(f"  {folder / name}")
    return int((frame["status"] != "ok").any())
