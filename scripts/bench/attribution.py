"""What the gradients of an attribution cost: memory beyond the loaded model's, and seconds, against ordinary images."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench import kept
from bench.report import Row, alternate, ratios
from bench.setup import MODELS, Options, Setup, fillers, loaded, wait
from lesion.attribution import views
from lesion.attribution.estimate import estimate
from lesion.errors import counted
from lesion.generation.generate import generate
from lesion.models import memory
from lesion.scoring._clip import _embedder
from lesion.scoring._clip_weights import resolve
from lesion.study.grid import Cell

STEPS = (2, 4)  # besides the model's own number: what a step keeps is told from few
TIMED = 4  # steps at which seconds are compared; memory allows them where it allows few others


def most_memory(device: str, work: Callable[[], object]) -> float | None:
    """MiB that work takes at its peak beyond what is there before it; None where there is not enough."""
    memory.release(device)
    try:
        taken = memory._peak(work, device)
    except Exception as error:
        if not memory.ran_out(error):
            raise
        return None
    return None if taken is None else taken / 2**20


@dataclass(frozen=True)
class _Batch:
    """The images of one batch. note: of the section."""

    estimated: Callable[[int, int, bool], object]  # steps, directions, checkpointing
    ordinary: Callable[[int], object]  # steps
    note: str


def _batch(this: Setup, options: Options) -> _Batch:
    asked, study, model = loaded([*this.overrides(this.batch), "selection=leave_one_out"])
    using, lesions = fillers(study, model, asked), list(study.lesions())
    cells = [study.cell(prompt, seed, None) for prompt in study.prompts for seed in study.seeds]
    cells = cells[: options.batch or (8 if this.model == "embedded" else 1)]
    embedder = _embedder(*resolve(asked.scorer.clip_model, asked.scorer.clip_pretrained), torch.device(this.device))
    view = views.embedded(embedder)

    def of(steps: int) -> list[Cell]:
        return [replace(cell, settings=replace(cell.settings, steps=steps)) for cell in cells]

    found = _Batch(
        lambda steps, probes, checkpointing: estimate(
            model, lesions, of(steps), using, view, probes, checkpointing=checkpointing
        ),
        lambda steps: generate(model, of(steps), {}),
        f"A batch of {len(cells)} with the gradients of {len(lesions)} lesions (`attribution=gradients`, directions of "
        f"the CLIP embedding). {this.said().rpartition(', batches')[0]}.",
    )
    found.ordinary(2)
    found.estimated(2, 1, True)
    return found


def room(this: Setup, options: Options) -> tuple[str, list[Row]]:
    """Memory of one batch with all its gradients, with and without checkpointing, at several numbers of steps."""
    batch = _batch(this, options)
    sides: dict[str, Callable[[int], object]] = {
        "ordinary images": batch.ordinary,
        "gradients, checkpointing": lambda steps: batch.estimated(steps, 1, True),
        "gradients": lambda steps: batch.estimated(steps, 1, False),
    }
    rows = []
    for name, work in sides.items():
        for steps in sorted({*STEPS, this.steps}):
            found = most_memory(this.device, functools.partial(work, steps))
            what = f"memory beyond the model's, {steps} steps"
            rows.append(
                Row(name, what, [] if found is None else [found], " MiB", text="does not fit" if found is None else "")
            )
    return batch.note, rows


def seconds(this: Setup, options: Options) -> tuple[str, list[Row]]:
    """Seconds of the same at few steps, which fit where others do not."""
    batch, few = _batch(this, options), min(TIMED, this.steps)

    def timed(work: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            wait(this.device)
            began = time.perf_counter()
            work()
            wait(this.device)
            return time.perf_counter() - began

        return run

    sides = {"ordinary images": timed(lambda: batch.ordinary(few))}
    for checkpointing in (False, True):
        for probes in (1, 2):
            name = f"{counted(probes, 'direction')}{', checkpointing' if checkpointing else ''}"
            work = functools.partial(batch.estimated, few, probes, checkpointing)
            if checkpointing or most_memory(this.device, work) is not None:
                sides[name] = timed(work)
    spent = alternate(options.repeats, sides)
    ordinary = spent.pop("ordinary images")
    what = f"seconds / those of the images without gradients, {few} steps"
    return batch.note, [Row(name, what, ratios(values, ordinary), "x") for name, values in spent.items()]


NAMES = {**MODELS, "sd3": "SD 3-size", "flux": "FLUX.1-size"}


def sizes(this: Setup, options: Options) -> tuple[str, list[Row]]:
    """What gradients keep of an image, counted for models that need not be built, and measured where they are small."""
    small, rows = options.quick, []
    run = [kept.Size("embedded", 64), kept.Size("sd15", 64 if small else 128, small)]
    run += [kept.Size(model, 64 if small else 512, small=True) for model in ("sd3", "flux")]
    larger = [] if small else [("sd15", 512), ("sdxl", 1024), ("sd3", 1024), ("flux", 1024)]
    for size in [*run, *(kept.Size(*one) for one in larger)]:
        name = f"{NAMES[size.model]}{', shrunk' if size.small else ''}, {size.side} px"
        for what, found in zip(("a denoiser call", "the decoder"), kept.counted(size), strict=True):
            rows.append(Row(name, f"counted: kept of {what}", [found / 2**20], " MiB"))
        if size in run:
            rows += _run(name, kept.Call(size, size.denoiser(this.device)), this.device)
    note = (
        "What is kept for gradients of one image with guidance, in float32 (half in half precision): every tensor "
        "that an operator saves, counted once, without running it (`scripts/bench/kept.py`), and the peak of one such "
        "call that was run, which holds what is under way, too. Seconds are CPU seconds of the process, the least of "
        f"{TIMES}: a call with the gradient of its output in one direction, and each further direction, against a call "
        "without. Shrunk models have few and narrow layers."
    )
    return note, rows


TIMES = 3


def _run(name: str, call: kept.Call, device: str) -> list[Row]:
    """Memory and seconds of a denoiser call with gradients, on a CPU."""

    def graph() -> None:
        with torch.enable_grad():
            call()

    graph()
    peak = most_memory(device, graph)
    plain, first, further = [], [], []
    for _ in range(TIMES):
        start = time.process_time()
        with torch.inference_mode():
            call.plain()
        plain.append(time.process_time() - start)
        start = time.process_time()
        with torch.enable_grad():
            output = call()
        direction = torch.ones_like(output)
        for spent in (first, further):
            torch.autograd.grad(output, call.strengths, direction, retain_graph=True)
            spent.append(time.process_time() - start)
            start = time.process_time()
        del output
    return [
        Row(name, "measured: of a denoiser call", [] if peak is None else [peak], " MiB",
            text="does not fit" if peak is None else ""),
        Row(name, "seconds, gradient in one direction / call", [min(first) / min(plain)], "x"),
        Row(name, "seconds, each further direction / call", [min(further) / min(plain)], "x"),
    ]  # fmt: skip
