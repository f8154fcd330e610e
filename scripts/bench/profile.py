"""Where the time of a job goes: its stages, and the operators of generation."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity

import lesion.report
from bench.report import Row
from bench.setup import Options, Setup, fillers, job, loaded, planned, wait
from lesion.generation.generate import generate
from lesion.run.score_queue import ScoreQueue

TOP = 6  # operators that are named


def profile(this: Setup, options: Options) -> tuple[str, list[Row]]:
    """Shares of a whole job's time by stage; then the operators that take most of a batch, by precision."""
    dtypes = [this.dtype]
    if this.device == "cpu" and not options.dtype and this.dtype == "float32":
        dtypes.append("bfloat16")
    rows, images = [], 0
    for dtype in dtypes:
        shares: defaultdict[str, list[float]] = defaultdict(list)
        for _ in range(options.repeats):
            spent, seconds, images = _stages(this, options, dtype)
            for name in ("text encoder", "denoiser", "decoder", "scores", "report"):
                shares[name].append(100 * spent[name] / seconds)
            shares["all else"].append(100 * (1 - sum(spent.values()) / seconds))
        rows += [Row(f"{name}, {dtype}", "share of a job's time", values, "%") for name, values in shares.items()]
    rows += [
        Row(f"operators, {dtype}", "of a batch of leave-one-out", text=_operators(this, dtype)) for dtype in dtypes
    ]
    note = (
        f"A whole job of {images} images (generate, store, score, results, report), and torch's profiler over one "
        f"batch of it; operators by their own time. {this.said()}, but for the precision named."
    )
    return note, rows


def _stages(this: Setup, options: Options, dtype: str) -> tuple[dict[str, float], float, int]:
    """Seconds of each stage, of the whole job, and its images."""
    overrides = this.overrides(this.subjects, dtype)
    _, _, model = loaded(overrides)  # the job finds this model loaded
    spent: defaultdict[str, float] = defaultdict(float)

    def timed(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def outer(*args: Any, **kwargs: Any) -> Any:
            wait(this.device)
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                wait(this.device)
                spent[name] += time.perf_counter() - began

        return outer

    places = [
        ("text encoder", model.pipe.text_encoder, "forward"),
        ("denoiser", model.denoiser, "forward"),
        ("decoder", model.pipe.vae, "decode"),
        ("scores", ScoreQueue, "complete"),
        ("report", lesion.report, "write_report"),
    ]
    with ExitStack() as stack, tempfile.TemporaryDirectory(dir=options.scratch) as fresh:
        for name, owner, attribute in places:
            stack.enter_context(mock.patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        seconds, frame = job(Path(fresh) / "store", Path(fresh) / "run", overrides)
    return spent, seconds, len(frame)


def _operators(this: Setup, dtype: str) -> str:
    asked, study, model = loaded([*this.overrides(this.batch, dtype), "selection=leave_one_out"])
    cells = next(batch for batch in planned(study, this.batch) if batch[0].lesion)
    using = fillers(study, model, asked)
    generate(model, cells, using)
    on_gpu = this.device.startswith("cuda")
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        generate(model, cells, using)
    times = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in found.key_averages()
    }
    whole = sum(times.values()) or 1
    top = sorted(times, key=lambda key: -times[key])[:TOP]
    named = [f"`{key.removeprefix('aten::')[:40]}` {100 * times[key] / whole:.0f}%" for key in top]
    return f"{', '.join(named)}; of {whole / 1e6:.2f} s"
