"""Which parts there are, in which order, and running them within the time that there is."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

import benchmark
from bench.report import Row, machine, section
from bench.setup import Options, setup
from gpu import checks, figures, lesions
from gpu.common import Check, Context
from lesion.generation.generate import make_deterministic
from lesion.models import loading, memory

VERSIONS = ("torch", "diffusers", "transformers", "accelerate", "open-clip-torch", "torchmetrics", "numpy")

SLOWER = {"sd15": 1.0, "sdxl": 1.5}  # by how much a part takes longer with it


@dataclass(frozen=True)
class Part:
    """One part. do: returns its checks, which are all that it does, or a section for the document.

    seconds: that it takes on an H100, estimated; it is not begun where less is left. most: after which it is cut.
    """

    what: str
    do: Callable[[Context], list[Check] | Section]
    seconds: float
    most: float = 60.0


@dataclass(frozen=True)
class Section:
    """A section of docs/benchmarks.md."""

    title: str
    note: str
    rows: list[Row]


def _measured(part: str, model: str) -> Callable[[Context], Section]:
    """A part of `scripts/benchmark.py` on a model, with few repeats."""

    def do(context: Context) -> Section:
        options = Options(
            device=context.device,
            repeats=1 if context.tiny or part in ("speed", "window", "switches", "profile", "steering") else 2,
            quick=context.tiny,
            scratch=context.fresh(f"{part}-{model}"),
            kept=context.scratch / "models",
            subjects=2,
        )
        note, rows = benchmark.PARTS[part][2](setup(model, options), options)
        kind = "cpu" if context.device == "cpu" else "cuda"
        return Section(benchmark.Case(part, model, kind).title, note, rows)

    return do


def _parts() -> dict[str, Part]:
    parts = {
        "plain": Part("un-ablated images against plain diffusers, three precisions", checks.plain_images, 25, 150),
        "upcast": Part("a float16 autoencoder decoded in float32, against plain diffusers", checks.upcast, 5),
        "lesions": Part("lesions of every kind against plain hooks", lesions.lesions, 35, 150),
        "window": Part("a late window against the same from noise", checks.late_window, 5),
        "batch": Part("images of a batch against single ones", checks.batch_and_single, 5),
        "memory": Part("out of memory: halving under a cap, decoding in slices", checks.out_of_memory, 15),
        "auto": Part("generation.batch_size=auto", checks.auto, 10),
        "offload": Part("model.offload against none", checks.offload, 10),
        "store": Part("the store of a CPU, used on this device", checks.store, 15),
        "compile": Part("performance.compile against eager", checks.compiled, 30, 90),
    }
    # Whole jobs draw a report, which takes some six seconds however fast the card is.
    timed = [("overhead", 15, 60), ("speed", 40, 120), ("only-one", 25, 90), ("leave-one-out", 25, 90)]
    timed += [("share", 15, 60), ("window", 60, 120)]

    def measured(models: Sequence[str], timed: Sequence[tuple[str, float, float]]) -> None:
        for model in models:
            slower = SLOWER[model]
            for name, seconds, most in timed:
                what = f"{benchmark.PARTS[name][1]}: {model}"
                parts[f"{model}-{name}"] = Part(what, _measured(name, model), slower * seconds, slower * most)

    measured(("sd15", "sdxl"), timed[:2])
    parts["embedded"] = Part("the embedded study end to end, scores against the CPU's", figures.embedded, 60, 150)
    parts["studies"] = Part("other lesions, maps, layout, attribution: as on a CPU", checks.studies, 60, 180)
    measured(("sdxl", "sd15"), timed[2:])
    measured(("sd15", "sdxl"), [("profile", 40, 120)])
    measured(("sd15",), [("capture", 10, 120), ("steering", 60, 120)])
    parts["decoder"] = Part("SDXL's decode in each precision", figures.decoder, 30, 60)
    parts["sd15-switches"] = Part("the switches of `performance`", _measured("switches", "sd15"), 90, 180)
    parts["flux"] = Part("denoiser calls of a FLUX-size transformer under lesions", figures.flux, 40, 90)
    return parts


PARTS = _parts()


class OutOfTime(Exception):
    """A part took longer than it may."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in this block after so many seconds."""

    def ring(*_: object) -> None:
        raise OutOfTime(f"not finished after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Result:
    """What came of a part. status: passed, failed, skipped, cut, measured or not run."""

    name: str
    status: str = "not run"
    seconds: float = 0.0
    said: str = ""
    title: str = ""
    note: str = ""
    checks: list[Check] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, said: dict[str, Any]) -> Result:
        return cls(**{**said, "checks": [Check(**one) for one in said["checks"]]})

    def section(self, where: str) -> str:
        rows = [Row(**{key: value for key, value in row.items() if key != "verdict"}) for row in self.rows]
        return section(self.title, self.note, where, command(self.name), rows)


def run(args: argparse.Namespace, scratch: Path, began: float) -> dict[str, Any]:
    """Run the parts in their order, and write what is known after each."""
    for quiet in (diffusers_logging, transformers_logging):
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
    context = Context(args.device, args.tiny, scratch)
    results = [Result(name) for name in args.only or PARTS]
    record = {
        "machine": machine(args.device),
        "versions": {name: metadata.version(name) for name in VERSIONS},
        "device": args.device,
        "tiny": args.tiny,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": args.seconds,
        "parts": [],
    }
    lost = ""
    for result in results:
        left = args.seconds - (time.monotonic() - began)
        part = PARTS[result.name]
        if lost:
            result.status, result.said = "skipped", f"the card was lost in {lost}"
        elif left < (1 if args.tiny else part.seconds):
            result.status, result.said = "skipped", f"{left:.0f} s are left, it takes about {part.seconds:.0f}"
        elif _one(part, result, context, min(left, part.most), args.out):
            lost = result.name
        print(f"{result.name}: {result.status} in {result.seconds:.1f} s {result.said}", flush=True)
        for check in result.checks:
            print(f"  {check.status:8} {check.name}: {check.said}", flush=True)
        record["parts"] = [asdict(one) for one in results]
        record["took"] = round(time.monotonic() - began, 1)
        _write(args.json, json.dumps(record, indent=1))
        if args.out:
            _prove(args.out, results, record["machine"])
    return record


def write(records: Sequence[Path], out: Path) -> None:
    """Write the sections of the document from records of runs on other machines."""
    for path in records:
        record = json.loads(path.read_text(encoding="utf-8"))
        results = [Result.read(said) for said in record["parts"]]
        for result in results:
            if result.title:
                benchmark.write(out, result.title, result.section(record["machine"]))
        _prove(out, results, record["machine"])


def _one(part: Part, result: Result, context: Context, most: float, out: Path | None) -> bool:
    """Run one part. Whether the card's context is lost, so that nothing else can run."""
    started, lost = time.monotonic(), False
    try:
        make_deterministic()
        with within(most):
            found = part.do(context)
    except OutOfTime as error:
        result.status, result.said = "cut", str(error)
    except Exception as error:  # a part that fails must not cost the others
        result.status, result.said = "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        traceback.print_exc()
        lost = memory.lost(error)
    else:
        if isinstance(found, Section):
            result.status, result.title, result.note = "measured", found.title, found.note
            result.rows = [{**asdict(row), "verdict": row.verdict} for row in found.rows]
            text = result.section(machine(context.device))
            print(text, flush=True)
            if out:
                benchmark.write(out, found.title, text)
        else:
            result.checks = found
            states = {check.status for check in found}
            result.status = next((one for one in ("failed", "passed") if one in states), "skipped")
    result.seconds = round(time.monotonic() - started, 1)
    if not lost:
        loading.forget()
        memory.release(context.device)
    return lost


def command(part: str) -> str:
    return f"python scripts/gpu_check.py --only {part}"


def _write(path: Path, text: str) -> None:
    """In one step, so that a cut leaves the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _prove(out: Path, results: Sequence[Result], where: str) -> None:
    """The section of what was proved. Lines of parts that are not run now stay."""
    new = [
        Row(f"{result.name}: {check.name}", check.said, text=check.status)
        for result in results
        for check in result.checks
    ]
    if not new:
        return
    old = out.read_text(encoding="utf-8") if out.exists() else ""
    _, _, there = old.partition(f"## {benchmark.PROVED}\n")
    kept = [line for line in there.partition("\n## ")[0].splitlines() if line.startswith("| ") and ": " in line]
    ran = tuple(f"| {result.name}: " for result in results if result.checks)
    text = section(benchmark.PROVED, "", where, "make gpu-check", new)
    text += "".join(f"{line}\n" for line in kept if not line.startswith(ran))
    benchmark.write(out, benchmark.PROVED, text)
