"""Large studies: planning a million cells, opening a finished study again, and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.child import TASKS
from bench.report import Row, aimed, alternate
from bench.setup import Options, Setup, request
from lesion.run import job as runner
from lesion.store.images import Store
from lesion.study.grid import Study

MIB = 2**20


def child(what: str, here: bool = False, **given: Any) -> dict[str, Any]:
    """The answer of `bench.child` in a fresh process; `whole`: seconds of the process from start to end.

    here: in this process instead, which spares the imports but says nothing about memory.
    """
    if here:
        began = time.perf_counter()
        found: dict[str, Any] = TASKS[what](**given)
        return {**found, "whole": time.perf_counter() - began}
    scripts = Path(__file__).parents[1]
    paths = [str(scripts), str(scripts.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "bench.child", what, json.dumps(given)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"bench.child {what} failed: {done.stderr.strip()[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**answer, "whole": time.perf_counter() - began}


def planning(this: Setup, options: Options) -> tuple[str, list[Row]]:
    """12 layers make 25 cells a subject: 40,000 subjects are a million cells."""
    prompts, seeds = (4, 10) if options.quick else (200, 200)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        runs = [child("plan", prompts=prompts, seeds=seeds, layers=12, folder=folder) for _ in range(options.repeats)]
    cells = f"{runs[0]['rows']:,} cells"
    if any(run["batched"] != run["rows"] for run in runs):
        raise RuntimeError(f"{runs[0]['batched']} of {cells} are in batches, for an empty store")
    rows = [
        aimed(
            "planning",
            "",
            "planning, time",
            f"{cells} laid out, counted and put in batches",
            [run["seconds"] for run in runs],
        ),
        Row("planning, memory", "peak of the whole process", [run["peak"] / MIB for run in runs], " MiB", at_most=1024),
    ]
    note = "Leave-one-out and only-one lesions over an empty store (`lesion.study.plan.tally` and `batches`)."
    return note, rows


def fill(study: Study, store: Store) -> None:
    """Made-up images, all different, in the place of every image of the study."""
    dice = np.random.default_rng(0)
    side = study.settings.height // 8
    for cell in study.cells():
        if not store.has(cell.key):
            coarse = dice.integers(0, 256, (side, side, 3), dtype=np.uint8)
            store.put(cell, coarse.repeat(8, axis=0).repeat(8, axis=1))


def reopening(this: Setup, options: Options) -> tuple[str, list[Row]]:
    """12 of the layers make 25 cells a subject: 400 subjects are 10,000 cells."""
    subjects, layers = (2, 3) if options.quick else (400, 12)
    store = options.scratch / "finished"
    include = f"layers.include=[{','.join(this.paths()[:layers])}]"
    asked = [*this.overrides(subjects), include, f"store.dir={store}"]
    _, study = runner.survey(request(asked))
    note = (
        f"A finished study of {len(study):,} cells with made-up images, scored by an earlier job; then its table once "
        "more in fresh processes, with no model loaded (files are in the system's cache). The first row leaves out the "
        "interpreter's start and imports, and what a job does besides: the run folder's pictures, grids, figures, "
        "tables and report, and the noise floor. `the job again` is that whole job."
    )
    what, whole = f"{len(study):,} cells to their table", "the same with interpreter start and imports"
    fill(study, Store(store))
    runner.results(request(asked))  # scores every image
    runs = [child("reopen", here=options.quick, overrides=asked) for _ in range(options.repeats)]
    jobs = [
        child("rerun", here=options.quick, overrides=asked, run=str(options.scratch / f"rerun-{number}"))
        for number in range(options.repeats)
    ]
    if any(job["rows"] != len(study) for job in jobs):
        raise RuntimeError(f"{jobs[0]['rows']} of {len(study)} cells are in the results of the job that is run again")
    if any(run["scored"] != len(study) for run in runs):
        raise RuntimeError(f"{runs[0]['scored']} of {len(study)} cells of the re-opened table have a score")
    return note, [
        aimed("reopening", this.model, "re-opening", what, [run["seconds"] for run in runs]),
        Row("whole process", whole, [run["whole"] for run in runs], " s"),
        Row(
            "the job again",
            "the finished job started once more, report and all",
            [job["seconds"] for job in jobs],
            " s",
        ),
        Row("the job again, whole process", whole, [job["whole"] for job in jobs], " s"),
        Row("re-opening, memory", "peak of the whole process", [run["peak"] / MIB for run in runs], " MiB"),
    ]


def _scoring_peak(this: Setup, options: Options, subjects: int, layers: int) -> tuple[int, int]:
    """Of a process that scores made-up images none of which has a score: how many there are, and its peak, bytes."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as fresh:
        include = f"layers.include=[{','.join(this.paths()[:layers])}]"
        asked = [*this.overrides(subjects), include, f"store.dir={fresh}/store"]
        _, study = runner.survey(request(asked))
        fill(study, Store(Path(fresh) / "store"))
        answer = child("reopen", here=options.quick, overrides=asked)
    if answer["scored"] != len(study):
        raise RuntimeError(f"{answer['scored']} of {len(study)} made-up images were scored")
    return len(study), int(answer["peak"])


def memory(this: Setup, options: Options) -> tuple[str, list[Row]]:
    """Whole jobs of a study and of one four times as large, each in a process of its own."""
    images = {}

    def measured(name: str, subjects: int) -> float:
        with tempfile.TemporaryDirectory(dir=options.scratch) as fresh:
            few = ["selection=leave_one_out", "generation.steps=2", "generation.batch_size=8"]
            asked = [*this.overrides(subjects), *few]
            answer = child("job", here=options.quick, overrides=asked, store=f"{fresh}/store", run=f"{fresh}/run")
        images[name] = answer["images"]
        return float(answer["peak"] / MIB)

    sizes = {"small": 1, "large": 4} if options.quick else {"small": 16, "large": 64}
    found = alternate(
        options.repeats,
        {name: lambda name=name, n=n: measured(name, n) for name, n in sizes.items()},  # type: ignore[misc]
    )
    rows = [Row(f"{name} study", f"peak of a job of {images[name]} images", found[name], " MiB") for name in sizes]
    growth = [large - small for small, large in zip(found["small"], found["large"], strict=True)]
    relative = [large / small for small, large in zip(found["small"], found["large"], strict=True)]
    rows += [
        Row("difference", "large - small", growth, " MiB"),
        aimed("memory", this.model, "growth", "large / small", relative),
    ]
    # Some hundreds of images say little of what each leaves behind, beside the hundreds of MiB of a model.
    # Both have more images than the scorer keeps embeddings of: what is bounded is full in both.
    few, many, layers = (1, 2, 3) if options.quick else (180, 440, 12)
    peaks = [
        [_scoring_peak(this, options, subjects, layers) for subjects in (few, many)] for _ in range(options.repeats)
    ]
    (less, _), (more, _) = peaks[0]
    left = [(large - small) / (more - less) / 1024 for (_, small), (_, large) in peaks]
    what = f"peak of scoring {more:,} made-up images and making their table, less that of {less:,}, an image"
    rows.append(Row("growth an image", what, left, " KB"))
    where = "one after the other in this process (--quick)" if options.quick else "each in a process of its own"
    note = (
        f"Peak resident memory of whole jobs (generate, store, score, results, report), {where}; the large study is "
        "four times the small one. The embedded model at 2 steps in batches of 8."
    )
    return note, rows
