"""Measures speed as ratios within one run, memory, and how much the batch size changes the scores.

    python scripts/benchmark.py                                   every part for this device, in docs/benchmarks.md
    python scripts/benchmark.py speed overhead --repeats 5        some parts; the rest of the document stays
    python scripts/benchmark.py speed --device cuda --model sdxl  one model on a GPU

Everything is built here, offline: sd15 and sdxl have the published architectures with random weights (time does not
depend on the weights). A section is written as soon as it is measured.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from bench import attribution, batching, engine, peak, profile, scale, speed, start, steering, switches
from bench.report import Row, aimed, machine, merge, section
from bench.setup import MODELS, Options, Setup, setup

ROOT = Path(__file__).resolve().parent.parent
# Sections that `scripts/gpu_check.py` writes.
PROVED, EMBEDDED, FLUX, DECODERS = (
    "Proved on a GPU: against plain diffusers and plain hooks",
    "The embedded study end to end: GPU against CPU",
    "Denoiser calls under lesions: FLUX-size, GPU",
    "Precision of the decode: SDXL's decoder, GPU",
)
OF_NO_MODEL = ("planning", "attribution-size")  # sections that name none in their title
Part = Callable[[Setup, Options], tuple[str, list[Row]]]
PARTS: dict[str, tuple[str, str, Part]] = {
    "speed": (
        "End to end against a plain loop",
        "a whole job against one pipeline call an image, with forward hooks and no batching",
        speed.speed,
    ),
    "overhead": (
        "Overhead over bare batched diffusers",
        "un-ablated generation against the pipeline's own batched call",
        speed.overhead,
    ),
    "capture": (
        "Attention maps",
        "generation with attention maps of all layers against generation without",
        speed.capture,
    ),
    "steering": (
        "Layout guidance",
        "steered images against unsteered ones, and against a plain loop of the published kind",
        steering.steering,
    ),
    "only-one": (
        "Only-one study against un-ablated generation",
        "sites that are lesioned in every image of a batch are skipped",
        engine.only_one,
    ),
    "leave-one-out": (
        "Leave-one-out study against un-ablated generation",
        "what lesions of one layer cost, or save",
        engine.leave_one_out,
    ),
    "window": (
        "Late window against full window",
        "the steps before a late window are taken from the baseline",
        engine.window,
    ),
    "decoder": (
        "Lesions of the decoder against lesions of the denoiser",
        "the denoising of decoder lesions is that of the baseline",
        engine.decoder,
    ),
    "attribution": (
        "Memory of an attribution",
        "memory of gradients, against that of ordinary images",
        attribution.room,
    ),
    "attribution-size": (
        "What gradients keep of an image, by size of model",
        "counted on torch's meta device; measured where it is small",
        attribution.sizes,
    ),
    "attribution-time": (
        "Seconds of an attribution",
        "seconds of gradients, against those of ordinary images",
        attribution.seconds,
    ),
    "report": (
        "A job with its report against one without",
        "tables, figures, comparison pictures and the page, drawn while the last images are made",
        speed.report,
    ),
    "planning": ("Planning a large study", "time and memory to lay out and count a million cells", scale.planning),
    "reopening": ("Re-opening a finished study", "from 10,000 finished cells to their table", scale.reopening),
    "start": ("Starts", "processes that make no image, against importing torch and diffusers", start.start),
    "memory": ("Memory of small and large studies", "a job, and one four times as large", scale.memory),
    "share": ("Share of the matrix peak", "operations a second over those of bf16 matrix products", engine.share),
    "peak": (
        "Share of the machine's own peak",
        "operations a second of the denoiser over the machine's, and what could raise them",
        peak.peak,
    ),
    "switches": (
        "The switches of `performance`",
        "speed and scores under each switch against float32 without any",
        switches.switches,
    ),
    "profile": (
        "Where the time goes",
        "a job's stages, and the operators of generation",
        profile.profile,
    ),
    "batch": (
        "Batch effect on images and scores",
        "the same cells in batches and one at a time",
        batching.batch,
    ),
}


@dataclass(frozen=True)
class Case:
    """A part on a model and a kind of device (cpu, cuda): one section of the document."""

    part: str
    model: str
    kind: str

    @property
    def title(self) -> str:
        where = "CPU" if self.kind == "cpu" else "GPU"
        return f"{PARTS[self.part][0]}: {where if self.part in OF_NO_MODEL else f'{MODELS[self.model]}, {where}'}"


def cases(parts: list[str], kind: str, chosen: list[str]) -> list[Case]:
    """What to measure: without chosen models, those that each part is about on this kind of device."""
    found = []
    for part in parts:
        usual = ["embedded"] if kind == "cpu" else ["sdxl"] if part == "share" else ["sd15", "sdxl"]
        found += [Case(part, model, kind) for model in chosen or usual]
    return found


def usual_parts(kind: str) -> list[str]:
    on_gpu = ["speed", "overhead", "capture", "steering", "only-one", "leave-one-out", "window", "switches", "profile"]
    on_gpu += ["attribution", "attribution-time"]
    on_gpu.append("share")
    return on_gpu if kind == "cuda" else [part for part in PARTS if part != "share"]


def pending() -> dict[str, str]:
    """Title -> text of every section of the document before it is measured."""
    texts = {}
    for part in PARTS:
        for kind in ("cpu", "cuda"):
            for case in cases([part] if part in usual_parts(kind) else [], kind, []):
                command = f"python scripts/benchmark.py {part} --device {kind} --model {case.model}"
                row = aimed(part, case.model, part, PARTS[part][1])
                texts[case.title] = section(case.title, "", "", command, [row])
    for title, part in ((PROVED, "plain lesions"), (EMBEDDED, "embedded"), (FLUX, "flux"), (DECODERS, "decoder")):
        row = Row(part.split()[0], "see `python scripts/gpu_check.py --list`")
        texts[title] = section(title, "", "", f"python scripts/gpu_check.py --only {part}", [row])
    return texts


def write(out: Path, title: str, text: str) -> None:
    old = out.read_text(encoding="utf-8") if out.exists() else ""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f"{out.name}.{os.getpid()}.tmp")  # in one step, since a lent machine may be cut at any time
    beside.write_text(merge(old, pending(), {title: text}), encoding="utf-8")
    os.replace(beside, out)


def command(case: Case, args: argparse.Namespace) -> str:
    """The command that measures this section again."""
    words = ["python scripts/benchmark.py", case.part, "--device", args.device, "--model", case.model]
    for name in ("repeats", "steps", "subjects", "batch", "loop", "dtype"):
        value = getattr(args, name)
        usual = (1 if args.quick else 5) if name == "repeats" else None
        words += [f"--{name}", str(value)] if value != usual else []
    return " ".join([*words, *(["--quick"] if args.quick else [])])


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="parts:\n" + "\n".join(f"  {name:10} {what}" for name, (_, what, _) in PARTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="part", help="default: all for the device")
    parser.add_argument("--repeats", type=int, help="alternating repeats (default 5; 1 with --quick)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=[], help="instead of each part's own")
    parser.add_argument(
        "--out", type=Path, help="the document to write (default docs/benchmarks.md; none with --quick)"
    )
    parser.add_argument("--quick", action="store_true", help="smallest sizes, one repeat: does everything work?")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--subjects", type=int, help="pairs of prompt and seed in the study of speed and window")
    parser.add_argument("--batch", type=int, help="batch size")
    parser.add_argument("--loop", type=int, help="images of a repeat of the plain loop")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="instead of the model's own")
    parser.add_argument("--models-dir", type=Path, help="keep the built models there, for the next run")
    args = parser.parse_args(given)
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}; choose from {', '.join(PARTS)}")
    for name in ("repeats", "steps", "subjects", "batch", "loop"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    args.repeats = args.repeats or (1 if args.quick else 5)
    args.kind = args.device.split(":")[0]
    if args.kind not in ("cpu", "cuda") or (args.kind == "cuda" and not torch.cuda.is_available()):
        parser.error(f"no device {args.device!r} here")
    if args.out is None and not args.quick:
        args.out = ROOT / "docs" / "benchmarks.md"
    return args


def main(given: list[str] | None = None) -> int:
    """Exit code 1 if a part could not be measured; the others are written."""
    args = arguments(given)
    for quiet in (diffusers_logging, transformers_logging):
        quiet.set_verbosity_error()
    logging.getLogger("lesion").setLevel(logging.WARNING)
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases(args.parts or usual_parts(args.kind), args.kind, args.model):
            folder = Path(scratch) / f"{case.part}-{case.model}"
            folder.mkdir()
            options = Options(
                device=args.device,
                repeats=args.repeats,
                quick=args.quick,
                scratch=folder,
                kept=args.models_dir or Path(scratch) / "models",
                **{name: getattr(args, name) for name in ("steps", "subjects", "batch", "loop", "dtype")},
            )
            try:
                note, rows = PARTS[case.part][2](setup(case.model, options), options)
            except Exception:  # a part that fails must not cost the others
                traceback.print_exc()
                failed.append(case.title)
                continue
            text = section(case.title, note, machine(args.device), command(case, args), rows)
            print(text, flush=True)
            if args.out:
                write(args.out, case.title, text)
    for title in failed:
        print(f"benchmark: could not measure {title!r}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
