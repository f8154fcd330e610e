"""Ties the flow together: request -> study -> plan -> generate -> store -> score -> results -> report, tracker."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import std
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lesion import models, processes, scoring, tasks
from lesion.config.parsing import Request
from lesion.errors import RequestError, StudyFailed, counted, place_of, visible
from lesion.models import allocator, components, layers, requirements, shapes
from lesion.models.calling import call_arguments, can
from lesion.models.defaults import check_size
from lesion.processes import Processes
from lesion.run import attribution, environment
from lesion.run.capture import attention_layers, bound, captured, in_store, maps_of, measured
from lesion.run.folder import SEALED, asked, planned, prune, reserved
from lesion.run.sweep import Sweep
from lesion.store.images import Picture, Store
from lesion.store.maps import Maps, beside_image
from lesion.store.tables import noted
from lesion.study.budget import Budget
from lesion.study.components import DENOISER
from lesion.study.grid import Cell, Study
from lesion.study.layers import Layers
from lesion.study.lesions import Lesion, digest_of
from lesion.study.plan import Tally
from lesion.study.settings import Settings
from lesion.tracking import JobInfo, Tracker, make_tracker

if TYPE_CHECKING:
    import pandas as pd

    from lesion.report.findings import Findings
    from lesion.rounds import Rounds
    from lesion.run.maker import Made
    from lesion.run.publish import Publisher
    from lesion.run.score_queue import ScoreQueue

log = logging.getLogger(__name__)
for _chatty in ("fontTools", "matplotlib", "PIL"):  # their INFO lines would drown ours
    logging.getLogger(_chatty).setLevel(logging.WARNING)
# Every bar's own lock starts a process, which complains when this one is killed.
std.tqdm.set_lock(threading.RLock())
sweep = Sweep()  # how far the multirun of this process is
AHEAD = 60.0  # seconds before the last image, roughly, in which these import what they need
UNFINISHED = "unfinished"  # folder of the store with what trackers keep of studies that have not finished
PNG_BYTES_PER_PIXEL = 1.6  # typical of photographs; for the estimate of `dry_run`


@dataclass(frozen=True)
class JobContext:
    """Where a job runs. folder: its run folder. group: the multirun it belongs to, if any. config: for the tracker."""

    folder: Path
    name: str
    group: str | None
    config: dict[str, Any]


def survey(request: Request) -> tuple[models.Source, Study]:
    """Find the model and lay out the study, without loading a weight.

    Raises RequestError for a model that is not there, unknown layers, or a selection that makes no sense on them.
    """
    source = models.resolve(request.model)
    settings = replace(request.settings, scheduler=source.scheduler, embedded_guidance=source.embedded_guidance or None)
    _check_pipeline(settings, request.axes.branches, source)
    models.check_files(source)
    if settings.steering:
        settings = replace(settings, steering=settings.steering.on(attention_layers(source, "steering")))
    scoring.check(request.scorer)  # before a denoiser that is not known is built to list its layers
    paths = components.asked_paths(source, request.layers)
    _check_switches(source)
    study = Study(
        model=models.identity_of(source, request.device),
        settings=settings,
        prompts=request.prompts,
        seeds=request.seeds,
        layers=request.layers.chosen(paths),
        replacements=request.described_replacements(),
        kind=request.layers.kind,
        shard=request.shard,
        **vars(request.axes),
    )
    len(study)  # makes every selection choose, so that one that makes no sense is refused here
    if request.attribution:
        request.attribution.check(study)
    rounds = _rounds(study, request.budget)
    captured(request, source)
    _check_store(request, source, rounds.part if rounds else study)
    return source, study


def _check_pipeline(settings: Settings, branches: Sequence[str], source: models.Source) -> None:
    """Refuse what the model's pipeline cannot do."""
    name, task = source.pipeline, settings.task
    if not can(name, task):
        others = ", ".join(other for other in tasks.known() if can(name, other))
        raise RequestError("generation.task", f"diffusers has no {task} for {name}; allowed: {others}")
    settings.check_taken(name, lambda: call_arguments(name, tasks.of(task)))
    check_size(source, settings.height, settings.width)
    requirements.check(source, settings)
    if not source.embedded_guidance:
        return
    why = f"{name} takes guidance as an input and has one branch"
    if any(branch != Lesion.branch for branch in branches):
        raise RequestError("branch", f"{why}; allowed: {Lesion.branch}")
    if settings.negative_prompt is not None:
        raise RequestError("generation.negative_prompt", f"{why}, which reads none; allowed: null")


def _check_switches(source: models.Source) -> None:
    """Refuse switches of `performance` that do not suit the denoiser."""
    _, name = source.components[source.denoiser]
    if source.spec.compile and not source.compiles:
        raise RequestError(
            "performance.compile", f"it is not known of which blocks {name} is built; allowed here: false"
        )
    if source.spec.shared_rows and not source.shares_rows:
        why = f"this {name} reads the text elsewhere than in its cross-attention"
        raise RequestError("performance.shared_rows", f"{why}; allowed here: false")


def _rounds(study: Study, budget: Budget | None) -> Rounds | None:
    """The rounds of a study with a budget. Raises RequestError for a budget that cannot be kept."""
    if budget is None:
        return None
    from lesion.rounds import Rounds

    return Rounds(study, budget)


def _check_store(request: Request, source: models.Source, study: Study) -> None:
    """Refuse a store that cannot be written to where something must be: not for a dry run or a complete study."""
    folder = request.store.absolute()
    try:
        os.lstat(folder)
    except FileNotFoundError:
        pass
    except OSError as error:  # a name too long, links in a circle, a file on the way
        raise RequestError("store.dir", f"{str(request.store)!r} cannot be made: {error.strerror}") from None
    there = next(path for path in (folder / "cells", folder, *folder.parents) if os.path.lexists(path))
    if there.is_dir():
        if request.dry_run or _can_be_written(there):
            return
        if there.name == "cells" and not in_store(study, Store(folder), maps_of(request, source)).missing:
            return
    raise RequestError(
        "store.dir", f"{str(request.store)!r} cannot be made: {str(there)!r} is no folder one can write to"
    )


def _can_be_written(folder: Path) -> bool:
    """Whether files can be made there: permissions alone do not say it, as of /proc."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".lesion-", dir=folder))
    except OSError:
        return False
    return True


def run(request: Request, context: JobContext, surveyed: tuple[models.Source, Study]) -> None:
    """Run one study as the command line does: `complete`, with a report and the ranking on standard output.

    surveyed: what `survey` said of the request. Raises RequestError before, StudyFailed after all that could be made.
    """
    source, study = surveyed
    if request.dry_run:
        store = Store(request.store)
        counts = in_store(attribution.part_of(request, study, store), store, maps_of(request, source))
        print("\n".join(map(visible, plan_lines(source, study, counts, store, request))))
        return
    outcome = complete(request, context, surveyed, report=study.shard.count == 1)
    if outcome.said is not None:
        from lesion.report import ranking_lines

        print("\n".join(ranking_lines(outcome.said)))
    if outcome.certificate:
        from lesion.report.attribution import certificate_lines

        print("\n".join(["", *certificate_lines(outcome.certificate)]))
    if study.shard.count > 1:
        folders = visible(context.group or "FOLDERS-OF-ALL-SHARDS")
        print(f"shard {study.shard.index} of {study.shard.count} is done; a report over all: lesion-report {folders}")
    print(f"\nwritten to {visible(str(context.folder))}:")
    for name in dict.fromkeys(path.relative_to(context.folder).parts[0] for path in outcome.written):
        print(visible(f"  {context.folder / name}"))
    if outcome.trouble:
        raise StudyFailed(outcome.trouble) from outcome.stopped


@dataclass(frozen=True)
class Outcome:
    """What came of a study.

    frame: results, one row per image; failed ones are among them.
    written: paths of the run folder.
    said: what the report says of it; None where there is no report.
    trouble: in one line why it is not all well; "" if it is.
    stopped: the error that stopped it, if one did.
    certificate: of an attribution, as certificate.json has it.
    """

    frame: pd.DataFrame
    written: list[Path]
    said: Findings | None = None
    trouble: str = ""
    stopped: Exception | None = None
    certificate: dict[str, Any] | None = None


@dataclass
class Work:
    """A study between its request and its tables.

    study: of a study in rounds the part of this round, of an attribution the lesions that are made, else all of it.
    screening: of an attribution, once its estimates are there.
    making: what was made so far.
    drawers: take part in making the report, where they are started.
    """

    request: Request
    source: models.Source
    study: Study
    rounds: Rounds | None
    store: Store
    maps: Maps | None
    scores: ScoreQueue
    publisher: Publisher
    screening: attribution.Screening | None = None
    making: environment.Making = field(default_factory=environment.Making)
    drawers: Processes = field(default_factory=lambda: Processes(0))

    @classmethod
    def of(cls, request: Request, surveyed: tuple[models.Source, Study], folder: Path | None) -> Work:
        """surveyed: what `survey` said of the request. folder: of the run, whose pictures are named."""
        from lesion.run.publish import Publisher
        from lesion.run.score_queue import ScoreQueue

        source, study = surveyed
        store, rounds = Store(request.store), _rounds(study, request.budget)
        study = rounds.part if rounds else study
        scores = ScoreQueue(study.context, store, request.scorer, request.device, request.check_store, request.prompts)
        maps = maps_of(request, source)
        publisher = Publisher(store, folder, study.settings.steering is not None, maps)
        estimates = attribution.kept(request, study, store) if request.attribution else None
        screening = attribution.Screening(estimates) if estimates else None
        study = screening.part if screening else attribution.part_of(request, study, store)
        return cls(request, source, study, rounds, store, maps, scores, publisher, screening)

    def attribute(self, study: Study) -> None:
        """Estimate the lesions of a study, and go on with those that are made.

        Raises StudyFailed where gradients cannot be had.
        """
        if self.screening or not self.request.attribution:
            return
        from lesion.models import loading

        try:
            found = attribution.estimated(self.request, study, self.store, self.scores, lambda: loaded(self))
        except RequestError:
            raise
        except Exception as error:  # whatever a model can raise
            raise StudyFailed(f"the lesions could not be estimated: {place_of(error)}") from error
        finally:
            if len(self.request.devices) > 1:  # each worker loads a model of its own
                loading.forget()
        self.screening = attribution.Screening(found)
        self.study = self.screening.part

    @property
    def whole(self) -> Study:
        """Of all rounds."""
        return self.rounds.whole if self.rounds else self.study

    @property
    def number(self) -> int:
        """Of the round."""
        return self.rounds.number if self.rounds else self.screening.number if self.screening else 1

    def tally(self) -> Tally:
        """What of this round is in the store."""
        return in_store(self.study, self.store, self.maps)

    def next_round(self) -> bool:
        """Go on to what the scores of the rounds so far leave unsure. False where there is no more to do."""
        if self.screening and self.screening.look(self.value):
            self.study = self.screening.part
            return True
        if not self.rounds or not self.rounds.look(self.scores.value, self.scores.spec.importance):
            return False
        self.study = self.rounds.part
        return True

    def tables(self, failures: Mapping[str, str], lenient: bool = False) -> dict[str, pd.DataFrame]:
        """The tables of the run folder, by name, of all rounds.

        failures: why images are not there, by key. lenient: leave out what cannot be had but the results themselves.
        """
        from lesion.analysis.maps import with_measures
        from lesion.run import table

        study = self.whole
        paths = components.asked_paths(self.source, self.request.layers)
        frame = table.results(study, self.scores, paths, failures, self.publisher)
        tables = {}
        with suppress(Exception) if lenient else nullcontext():
            tables["floor"] = table.floor(study, self.scores)
        if self.maps:
            with suppress(Exception) if lenient else nullcontext():
                tables["maps"] = measured(study, self.store, self.maps, failures)
                frame = with_measures(frame, tables["maps"])
        if self.rounds:
            frame, tables["budget"] = self.rounds.marked(frame), self.rounds.table()
        return {"results": frame, **tables}

    def value(self, cell: Cell, metric: str) -> float:
        """What a metric says of an image; NaN where it has none, or is not valid."""
        return self.scores.values(cell).get(metric, float("nan"))

    def pictured(self, frame: pd.DataFrame) -> list[Cell]:
        """The cells whose images a run folder shows. frame: the table of results."""
        study = self.whole
        cells = [cell for cell, image in zip(study.cells(), frame["image"], strict=True) if image]
        if study.unsteered:
            cells += [cell for cell in study.unsteered.cells() if self.store.has(cell.key)]
        return cells


def complete(
    request: Request, context: JobContext, surveyed: tuple[models.Source, Study], report: bool = True
) -> Outcome:
    """Make and score what the store lacks of a study, and write its run folder.

    surveyed: what `survey` said of the request.
    report: with tables, figures and the page.

    Raises RequestError before anything is made, StudyFailed where the results themselves cannot be written.
    """
    from lesion.run import table  # with pandas and pyarrow, which a dry run does without

    source, whole = surveyed
    for note in (*request.notes, *source.notes):
        log.info(visible(note))
    work = Work.of(request, surveyed, context.folder)
    work.attribute(whole)
    counts = work.tally()
    if counts.missing:
        shapes.check(source)  # what does not fit together is refused before anything is written
    if request.confirm:
        planned(context.folder, request.confirm.written([prompt.id for prompt in request.prompts]))
        log.info("confirmatory study: confirmation.json, plan %s", request.confirm.sha256)
    log.info("study of %s: %d images, %d of them to make", work.study.model.name, counts.unique, counts.missing)
    if counts.missing:
        if request.device == "cpu":
            allocator.keep_freed()  # before torch is imported, which asks once for the pages that it is to use
        log.info("loading: the scorer %s", request.scorer.name)
        _ = work.scores.scorer  # a scorer that cannot be loaded is refused before anything is made
    room = reserved(context.folder, counts.rows)
    tracker = make_tracker(request.tracker["name"], request.tracker)
    unfinished = request.store / UNFINISHED / digest_of(asked(context.config, work.study))
    tracker.start(JobInfo(context.name, context.group, "lesion-study", context.folder, context.config, unfinished))
    code = 1
    stopped: Exception | None = None
    failures: dict[str, str] = {}
    work.drawers = processes.drawers(counts.rows if report else 0)
    try:
        try:
            failures |= _complete(work, counts, tracker)
            while _some_made(work.study, failures) and work.next_round():
                log.info("round %d: %d images more", work.number, len(work.study))
                failures |= _complete(work, work.tally(), tracker)
        except RequestError:
            raise
        except Exception as error:  # whatever it is, the results of what is there are written
            stopped = error
            with suppress(Exception):
                work.scores.complete(work.study, failures)
        beside = work.tables(failures, lenient=stopped is not None)
        frame = beside.pop("results")
        certificate = None
        if work.screening and (judged := attribution.certified(work.screening, work.value)):
            beside["attribution"], certificate = judged
        elif work.screening:
            log.error("the estimates have no certificate, since lesions have no valid image; they are not shown")
        if several := table.mixed(frame):
            log.warning(
                "the images of this study were made by several cards or versions, which may round differently; compare "
                "effects with the noise floor: %s",
                several,
            )
        pictured = work.pictured(frame)
        publish = partial(_publish, work.publisher, pictured)
        places = [work.publisher.place(cell) for cell in pictured]
        room.close()
        written, said, unwritten = _write(
            frame, beside, publish, places, context.folder, tracker, report, work.drawers, certificate
        )
        if certificate:
            written += attribution.write(context.folder, beside["attribution"], certificate)
        with suppress(OSError):  # what is not recorded cannot be audited, but the results are there
            written.append(environment.record(context.folder, context.config, request.device, work.making))
            noted(context.folder, SEALED)
        bad, where = frame[frame["status"] != "ok"], context.folder / "results.parquet"
        trouble = ""
        if stopped:
            trouble = (
                f"stopped by an unforeseen {place_of(stopped)}; results of what is there are in {where}, "
                "run the same command again to resume"
            )
        elif unwritten:
            trouble = f"{'; '.join(unwritten)}; the results are in {where}, run the same command again to resume"
        elif len(bad):
            trouble = (
                f"{len(bad)} of {len(frame)} images failed or are invalid, the first because: {bad['reason'].iloc[0]} "
                f"(all are named in {where}); the rest is complete"
            )
        code = int(bool(trouble))
    finally:
        room.close()
        work.drawers.close()
        tracker.close(code)
    return Outcome(frame, written, said, trouble, stopped, certificate)


def results(request: Request) -> pd.DataFrame:
    """The table of a study as the store has it: loads no model and makes no image; scores what has no score yet."""
    return remembered(request, survey(request))["results"]


def remembered(
    request: Request, surveyed: tuple[models.Source, Study], folder: Path | None = None
) -> dict[str, pd.DataFrame]:
    """The tables of a study as the store has it, by name: `results`, `floor`, `maps` where it captures them, `budget`
    where it has one.

    Loads no model and makes no image; scores what has no score yet. folder: of the run, whose pictures are named.
    """
    work = Work.of(request, surveyed, folder)
    absent = work.scores.complete(work.study, {})
    while not absent and work.next_round():
        absent |= work.scores.complete(work.study, {})
    return work.tables(dict.fromkeys(absent, "not made yet"))


def plan_lines(source: models.Source, study: Study, counts: Tally, store: Store, request: Request) -> list[str]:
    """What a study would make, for `dry_run=true`."""
    settings = study.settings
    each = (counts.rows - counts.baselines) // counts.baselines
    return [
        f"study of {study.model.name}: {counted(len(study.prompts), 'prompt')}, {counted(len(study.seeds), 'seed')}, "
        f"{counted(len(study.layers), 'layer')}{study.shard}",
        f"  each of {settings.height} x {settings.width} pixels (height x width), {settings.steps} steps, guidance "
        f"{settings.guidance:g}, {settings.scheduler}",
        *([f"  not given: {request.derived}"] if request.derived else []),
        *(f"  {note}" for note in (*request.notes, *source.notes)),
        *(f"  {mode:32} {number:8} images" for mode, number in counts.by_mode.items()),
        f"  {'in all':32} {counts.rows:8} rows, {counts.unique} different images",
        f"  baselines shared: each of {counts.baselines} serves {each} lesions",
        f"  already in the store {_shown(store.folder)}: {counts.stored}",
        f"  to make: {counts.missing}, about {mebibytes(study, counts.missing):.1f} MiB on disk",
        *_capture_lines(source, study, counts, request),
        *attribution.plan_lines(request, study),
        *_budget_lines(study, request.budget),
        "dry run: nothing was generated",
    ]


def mebibytes(study: Study, images: int) -> float:
    """What so many images of the study take on disk, roughly."""
    return images * study.settings.height * study.settings.width * PNG_BYTES_PER_PIXEL / 2**20


def _capture_lines(source: models.Source, study: Study, counts: Tally, request: Request) -> list[str]:
    capture = captured(request, source)
    if capture is None:
        return []
    each, how = bound(study, source, capture)
    return [
        f"  attention maps: at most {counts.missing * each / 2**20:.1f} MiB more on disk; an image's, in bytes: {how}"
    ]


def _shown(folder: Path) -> str:
    """A folder below the one in which the process is by its path from there."""
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def _budget_lines(study: Study, budget: Budget | None) -> list[str]:
    rounds = _rounds(study, budget)
    if budget is None or rounds is None:
        return []
    most = "" if budget.max_images is None else f", or {budget.max_images} images are there"
    return [
        "  with its budget at most that: the first round takes "
        f"{len(rounds.part)} images, then {budget.round} prompts and seeds a round for each layer until "
        f"its interval is within +-{budget.ci_halfwidth:g}{most}"
    ]


def _complete(work: Work, counts: Tally, tracker: Tracker) -> dict[str, str]:
    """Make and score all that is missing; what turns out damaged is made again. Returns the reasons for failures."""
    folder = _shown(work.store.folder)
    failures: dict[str, str] = {}
    damaged: set[str] = set()
    remade: set[str] = set()
    while True:
        if counts.missing or damaged:
            missing = len(damaged) or counts.missing
            log.info("%d images to make, %d already in the store %s", missing, counts.unique - missing, folder)
            failures |= _generate(work, missing, failures, tracker)
        else:
            log.info("all %d images are in the store %s", counts.unique, folder)
        log.info("scoring: what has no score yet")
        damaged = work.scores.complete(work.study, failures)
        if work.maps:
            damaged |= _without_maps(work.study, work.maps, failures)
        failures |= dict.fromkeys(damaged & remade, "what is stored of it is damaged, also after it was made anew")
        damaged -= remade  # those of a subject may show only once its baseline is whole again
        if not damaged:
            return failures
        remade |= damaged


def _without_maps(study: Study, maps: Maps, failures: Mapping[str, str]) -> set[str]:
    """Keys of images whose attention maps are not there, or were damaged and are now removed."""
    return {key for key in study.keys() if key not in failures and maps.get(key) is None}  # noqa: SIM118


def _some_made(study: Study, failures: Mapping[str, str]) -> bool:
    """Whether any image of a round could be made: without one, a further round would show nothing."""
    return any(cell.key not in failures for cell in study.cells())


def _generate(work: Work, missing: int, failures: Mapping[str, str], tracker: Tracker) -> dict[str, str]:
    """Make what the store lacks, but for earlier failures; near the end, start the processes that draw.

    Returns the reason for each cell that could not be made.
    """
    began, done = time.monotonic(), 0
    # On a CPU all cores make images: whatever runs beside that, however little, holds up each operation.
    ahead = 0.0 if work.request.device == "cpu" else AHEAD
    with (
        logging_redirect_tqdm(),
        tqdm(total=missing, unit="image", desc=f"{sweep}{work.study.model.name}", smoothing=0.05, leave=False) as bar,
    ):

        def progress(more: int) -> None:
            nonlocal done
            done += more
            bar.leave = True  # one that ends before its first image is wiped
            bar.update(more)
            rate = done / (time.monotonic() - began)
            tracker.progress(done, missing, rate)
            if missing - done <= ahead * rate:
                work.drawers.start()

        model = None if len(work.request.devices) > 1 else loaded(work)  # else each worker loads it
        shown = _shown(work.publisher.folder or work.store.folder)
        log.info("generating: %d images; they appear in %s as they are made", missing, shown)
        if model:
            found = make(work, model, failures, progress)
        else:
            from lesion.run import workers

            found = workers.generate(work, failures, progress)
    work.scores.refresh()
    return found


def loaded(work: Work) -> models.Model:
    """The model of a study on the request's device, with its layers as the study names them."""
    from lesion.generation.generate import make_deterministic

    request, source = work.request, work.source
    log.info("loading: the model %s on %s", work.study.model.name, request.device)
    make_deterministic(tf32=source.spec.tf32)
    model = models.load(source, request.device)
    return examined(model, source, request.layers)


def examined(model: models.Model, source: models.Source, asked: Layers) -> models.Model:
    """A loaded model with the layers that a study asks for. Raises RequestError where its config says others."""
    from lesion.surgery.anatomy import examine
    from lesion.surgery.components import encoder_tokens, examine_component
    from lesion.surgery.tokens import with_tokens

    if DENOISER in asked.components:
        anatomy = examine(model.denoiser, asked.grouping, asked.kind)
        layers.check(anatomy.paths, source, asked.grouping, asked.kind)
        if asked.tokens:
            anatomy = with_tokens(anatomy, asked.tokens, whole=asked.whole(DENOISER))
        model = replace(model, anatomy=anatomy)
    others = [one for one in asked.components if one != DENOISER]
    kind = "self_attention" if asked.tokens else asked.kind
    found = {one: examine_component(one, getattr(model.pipe, one), asked.grouping, kind) for one in others}
    if any(found[one].paths != components.layer_paths(source, (one,), asked.grouping, kind) for one in others):
        raise RequestError("model.id", "the loaded model has other layers than its configs say")
    if asked.tokens:
        found = {one: encoder_tokens(anatomy, asked.tokens, asked.whole(one)) for one, anatomy in found.items()}
    return replace(model, components=found)


def make(
    work: Work,
    model: models.Model,
    failures: Mapping[str, str],
    progress: Callable[[int], None],
    each: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Make in this process what the store lacks and no other process makes, but for earlier failures.

    model: from `loaded`.
    progress: `Maker.run` has it.
    each: called after each image that is made here.

    Returns the reason for each cell that could not be made.
    """
    from lesion.run.maker import Maker

    maker = Maker(work.request, model, work.study, work.store, _when_made(work, each), work.maps)
    maker.failures.update(failures)
    try:
        maker.run(progress)
        work.scores.flush()
    finally:
        work.scores.close()
    work.making.used(maker.sizes)
    return maker.failures


def _when_made(work: Work, each: Callable[[], None] = lambda: None) -> Made:
    """What is done with each image as it is stored: it gets its place in the run folder, and what has a row is scored.

    Under tf32 on a GPU it is noted, and scored only after: a scorer sets full float32 for the whole process, so pixels
    made meanwhile would depend on when it does. With a decoder's precision of its own it takes turns.
    """
    model, study, scores = work.request.model, work.study, work.scores
    later = model.tf32 and work.request.device.startswith("cuda")

    def made(cell: Cell, pixels: NDArray[np.uint8], picture: Picture) -> None:
        work.making.images += 1
        with suppress(OSError):  # at the end all are put in place, and what cannot be is said
            work.publisher.publish(cell)
        if later or cell.settings != study.settings:
            scores.note(cell.key, picture)
        else:
            scores.made(cell, pixels, picture)
        each()

    return made


def _publish(publisher: Publisher, cells: Sequence[Cell]) -> None:
    """Give each picture its place. Raises OSError after trying all, the first one's."""
    first: OSError | None = None
    for cell in cells:
        try:
            publisher.publish(cell)
        except OSError as error:
            first = first or error
    if first:
        raise first


def _write(
    frame: pd.DataFrame,
    beside: Mapping[str, pd.DataFrame],
    publish: Callable[[], None],
    places: Sequence[str],
    folder: Path,
    tracker: Tracker,
    report: bool,
    drawers: Processes,
    certificate: Mapping[str, Any] | None,
) -> tuple[list[Path], Findings | None, list[str]]:
    """Write results.parquet and the tables beside it, then pictures and report; tell the tracker.

    beside: by name.
    publish: puts the pictures in place.
    places: of the pictures, relative to the folder.
    drawers: take part in drawing, where they are started.
    certificate: of an attribution, which the page says.

    Returns the paths written, what the report says, and what could not be written with the reason. Raises StudyFailed
    where that is results.parquet.
    """
    from lesion.store import tables

    try:
        written = tables.write(folder, {"results": frame, **beside})
    except OSError as error:
        name = Path(error.filename or "results.parquet").name
        raise StudyFailed(
            f"{name} could not be written to {folder}: {_why(error)}; images are kept in the store, run the same "
            "command again to resume"
        ) from error
    unwritten = []
    said = None
    try:
        publish()
    except OSError as error:
        unwritten.append(f"not all pictures could be put into {folder / 'images'}: {_why(error)}")
    try:
        if report:
            from lesion.report import findings, write_report
            from lesion.report.attribution import notes

            log.info("report: tables, figures and the page")
            said = findings(frame, beside.get("floor"), processes=drawers)
            told = notes(certificate) if certificate else ()
            written += write_report(folder, frame, beside.get("floor"), notes=told, known=said, processes=drawers)
    except OSError as error:
        unwritten.append(f"the report could not be written: {_why(error)}; `lesion-report {folder}` tries again")
    except Exception as error:  # the results are there
        raise StudyFailed(
            f"the report could not be made: {place_of(error)}; the results are in {written[0]}, "
            f"`lesion-report {folder}` tries again"
        ) from error
    if not unwritten:
        prune(folder, [*written, *(folder / place for image in places for place in (image, beside_image(image)))])
    tracker.finish(frame, folder, lambda: summary(frame))
    return written, said, unwritten


def summary(frame: pd.DataFrame) -> dict[str, float]:
    """Importance and sufficiency of each layer under each setting: the keys are MEASURE/SETTING/LAYER."""
    from lesion.analysis.importance import layer_table
    from lesion.analysis.settings import rows, settings

    found = {}
    for setting in settings(frame):
        name = setting.slug if frame["model"].nunique() > 1 else setting.slug.split("--", 1)[1]
        for line in layer_table(rows(frame, setting)).to_dict("records"):
            for measure in ("importance", "sufficiency"):
                if np.isfinite(line[measure]):
                    found[f"{measure}/{name}/{line['layer']}"] = float(line[measure])
    return found


def track_report(
    frame: pd.DataFrame, runs: Sequence[Path], folder: Path, overrides: Sequence[str], tracker: Mapping[str, Any]
) -> None:
    """Tell a tracker of the report over the jobs of a multirun, as a run of its own in the group of the jobs.

    overrides: of the command line. tracker: `name` and options of conf/tracker.
    """
    lesioned = frame[frame["selection"] != "none"]
    names: dict[str, object] = {
        key: {str(name): {} for name in lesioned[key].unique()} for key in ("selection", "replacement")
    }
    config: dict[str, object] = {
        "jobs": len(runs),
        "overrides": list(overrides),
        "model": {"name": "+".join(frame["model"].unique())},
        **names,
    }
    follower = make_tracker(tracker["name"], dict(tracker))
    follower.start(JobInfo(f"report over {len(runs)} jobs", folder.as_posix(), "lesion-report", folder, config))
    follower.finish(frame, folder, lambda: summary(frame))
    follower.close(0)


def _why(error: OSError) -> str:
    return " ".join((error.strerror or str(error)).split())
