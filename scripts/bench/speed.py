"""Whole jobs against a plain loop, and bare generation against bare diffusers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench.report import Row, aimed, alternate, ratios
from bench.setup import Options, Setup, generating, job, loaded, plain, request, spaced, stock_flags
from lesion.generation.capture import Capturing
from lesion.generation.generate import generate
from lesion.run import job as runner
from lesion.study.capture import Capture
from lesion.surgery.anatomy import examine
from lesion.surgery.attention import text_attention

BFLOAT16_TARGET = 5.5


def silence(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output)


def plain_loop(pipe: Any, this: Setup, subjects: Sequence[tuple[str, int]], images: int, steps: int) -> float:
    """Images a second of the hand-written loop: one pipeline call an image, forward hooks that put out zeros.

    It makes a baseline, then leave-one-out and only-one images, evenly spaced over the layers. subjects: prompts and
    seeds, which take turns.
    """
    layers = examine(pipe.unet).sites
    paths = list(layers)
    lesions = [[path] for path in paths] + [[other for other in paths if other != path] for path in paths]
    chosen = [[], *spaced(lesions, images - 1)]
    began = time.perf_counter()
    for number, lesioned in enumerate(chosen):
        prompt, seed = subjects[number % len(subjects)]
        with ExitStack() as hooks:
            hooks.enter_context(stock_flags())
            for site in (site for layer in lesioned for site in layers[layer]):
                hooks.callback(pipe.unet.get_submodule(site).register_forward_hook(silence).remove)
            pipe(
                prompt,
                generator=torch.Generator("cpu").manual_seed(seed),
                num_inference_steps=steps,
                guidance_scale=this.guidance,
                height=this.side,
                width=this.side,
            )
    return len(chosen) / (time.perf_counter() - began)


def speed(this: Setup, options: Options) -> tuple[str, list[Row]]:
    """On a CPU the job runs in bfloat16 too, against the loop in both precisions, unless one precision is asked for."""
    _, study = runner.survey(request(this.overrides(this.subjects)))
    subjects = [(prompt.text, seed) for seed in study.seeds for prompt in study.prompts]
    dtypes = [this.dtype]
    if this.device == "cpu" and not options.dtype and this.dtype == "float32":
        dtypes.append("bfloat16")
    sides: dict[str, Callable[[], float]] = {}
    made: list[int] = []

    def whole_job(dtype: str) -> float:
        with tempfile.TemporaryDirectory(dir=options.scratch) as fresh:
            asked = this.overrides(this.subjects, dtype)
            seconds, frame = job(Path(fresh) / "store", Path(fresh) / "run", asked)
        made.append(len(frame))
        return len(frame) / seconds

    for dtype in dtypes:
        pipe = plain(this, dtype)
        with tempfile.TemporaryDirectory(dir=options.scratch) as fresh:
            few = [*this.overrides(1, dtype), "selection=none", "generation.steps=1"]
            job(Path(fresh) / "store", Path(fresh) / "run", few)
        plain_loop(pipe, this, subjects, 1, 1)
        sides[f"lesion {dtype}"] = lambda dtype=dtype: whole_job(dtype)  # type: ignore[misc]
        sides[f"loop {dtype}"] = lambda pipe=pipe: plain_loop(pipe, this, subjects, this.loop, this.steps)  # type: ignore[misc]
    found = alternate(options.repeats, sides)
    rows = [Row(name, "images a second", values, " /s") for name, values in found.items()]
    for dtype in dtypes:
        what = f"lesion / loop, both in {dtype}, images a second"
        values = ratios(found[f"lesion {dtype}"], found[f"loop {dtype}"])
        row = aimed("speed", this.model, "end to end", what, values)
        rows.append(row if dtype == this.dtype else Row("end to end", what, values, "x"))
    if len(dtypes) > 1:
        values = ratios(found["lesion bfloat16"], found["loop float32"])
        what = "lesion in bfloat16 / loop in float32, images a second"
        rows.append(Row("end to end", what, values, "x", at_least=BFLOAT16_TARGET))
    note = (
        f"A whole job (generate, store, score, results, report; {made[-1]} images: baselines, leave-one-out, only-one) "
        f"against a plain loop (one pipeline call an image, forward hooks, nothing scored or written; {this.loop} "
        "images over the study's own prompts and seeds). Models are loaded before the clock starts. The job runs under "
        "the repeatable kernels of every study, the loop under torch's own choice. "
        f"{this.said()}."
    )
    return note, rows


def capture(this: Setup, options: Options) -> tuple[str, list[Row]]:
    """The same batch of un-ablated images with and without attention maps."""
    _, study, model = loaded([*this.overrides(this.batch), "selection=none"])
    cells = list(study.cells())[: this.batch]
    asked = Capture().chosen(text_attention(model.denoiser).paths)

    def captured() -> float:
        began = time.perf_counter()
        capturing = Capturing(model, cells, asked)
        generate(model, cells, {}, capturing=capturing)
        _ = capturing.maps  # on the CPU, as they are stored
        return time.perf_counter() - began

    captured()
    found = alternate(
        options.repeats, {"with maps": captured, "without": lambda: generating(model, cells, this.batch, {})}
    )
    rows = [Row(name, "seconds a batch", values, " s") for name, values in found.items()]
    values = ratios(found["with maps"], found["without"])
    rows.append(aimed("capture", this.model, "capture", "generate() with / without attention maps, seconds", values))
    note = (
        f"The same {len(cells)} un-ablated images, with the maps of all {len(asked.layers or ())} layers, mean over "
        f"heads and steps, a map a word; neither images nor maps are written. {this.said()}."
    )
    return note, rows


def report(this: Setup, options: Options) -> tuple[str, list[Row]]:
    """What a job's report adds to the time in which its images are made, stored and scored."""
    made: list[int] = []

    def whole_job(reported: bool) -> float:
        with tempfile.TemporaryDirectory(dir=options.scratch) as fresh:
            seconds, frame = job(Path(fresh) / "store", Path(fresh) / "run", this.overrides(this.subjects), reported)
        made.append(len(frame))
        return seconds

    found = alternate(options.repeats, {"with": lambda: whole_job(True), "without": lambda: whole_job(False)})
    rows = [Row(f"job {name}", "seconds", values, " s") for name, values in found.items()]
    what = "job with its report / job without, seconds"
    rows.append(aimed("report", this.model, "report", what, ratios(found["with"], found["without"])))
    note = f"A whole job of {made[0]} images (generate, store, score, results) with and without report. {this.said()}."
    return note, rows


def overhead(this: Setup, options: Options) -> tuple[str, list[Row]]:
    """The same batch of un-ablated images through `generate` and through the pipeline alone."""
    _, study, model = loaded([*this.overrides(this.batch), "selection=none"])
    cells = list(study.cells())[: this.batch]
    pipe = plain(this)

    def bare(steps: int) -> float:
        began = time.perf_counter()
        pipe(
            [cell.prompt.text for cell in cells],
            generator=[torch.Generator("cpu").manual_seed(cell.seed) for cell in cells],
            num_inference_steps=steps,
            guidance_scale=this.guidance,
            height=this.side,
            width=this.side,
            output_type="np",
        )
        return time.perf_counter() - began

    def ours() -> float:
        model.texts.clear()  # the pipeline encodes the prompts at every call, so we do, too
        return generating(model, cells, this.batch, {})

    bare(1)
    generate(model, cells, {})
    found = alternate(
        options.repeats,
        {"lesion": ours, "diffusers": lambda: bare(this.steps)},
    )
    rows = [Row(name, "seconds a batch", values, " s") for name, values in found.items()]
    what = "generate() with no lesion / bare batched pipeline call, seconds"
    rows.append(aimed("overhead", this.model, "overhead", what, ratios(found["lesion"], found["diffusers"])))
    note = (
        f"The same {len(cells)} un-ablated images, which are thrown away; both sides encode the prompts. {this.said()}."
    )
    return note, rows
