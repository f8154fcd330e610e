"""What every measurement needs: the model under test, studies of it, whole jobs and plain diffusers."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from bench import architectures
from lesion import models, replacements
from lesion.config.parsing import Request, parse
from lesion.config.schema import conf_dir, register
from lesion.errors import StudyFailed
from lesion.generation.generate import generate, make_deterministic
from lesion.models import EMBEDDED, Model, precision
from lesion.models.source import resolve_dtype
from lesion.run import job as runner
from lesion.scoring import _clip
from lesion.study.grid import Cell, Study
from lesion.study.plan import batches
from lesion.surgery.anatomy import examine
from lesion.surgery.intervention import Intervention
from lesion.surgery.operation import replacement_key

MODELS = {"embedded": "the embedded model", "sd15": "SD 1.5-size", "sdxl": "SDXL-size"}


@dataclass(frozen=True)
class Options:
    """What the command line asks. steps, subjects, batch, loop, dtype: None for the model's own values.

    scratch: a folder that goes away; kept: where models of random weights are built, and found again.
    """

    device: str
    repeats: int
    quick: bool
    scratch: Path
    kept: Path
    steps: int | None = None
    subjects: int | None = None
    batch: int | None = None
    loop: int | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Setup:
    """A model under test. folder: in diffusers layout. subjects: pairs of prompt and seed in a study of it.

    loop: images that one repeat of the plain loop makes. layers: how many of the layers are under study (0: all).
    """

    model: str
    folder: Path
    device: str
    dtype: str
    steps: int
    guidance: float
    side: int
    batch: int
    subjects: int
    loop: int
    layers: int = 0

    def overrides(self, subjects: int, dtype: str = "") -> list[str]:
        """The config of a study of at least that many subjects.

        Of large images without the metrics that read the toy world's scenes: the reader is made for 64x64 pixels and
        takes minutes an image of 1024.
        """
        items = [item["text"] for item in OmegaConf.load(conf_dir() / "prompts" / "demo.yaml")["items"]]
        prompts = items[: min(subjects, len(items))]
        which = ["model=embedded"] if self.model == "embedded" else ["model=local", f"model.id={self.folder}"]
        return [
            *which,
            f"model.name={self.model}",
            f"model.dtype={dtype or self.dtype}",
            f"device={self.device}",
            "prompts=inline",
            f"prompts.items=[{', '.join(prompts)}]",
            f"seeds={list(range(math.ceil(subjects / len(prompts))))}".replace(" ", ""),
            f"generation.steps={self.steps}",
            f"generation.guidance={self.guidance}",
            f"generation.height={self.side}",
            f"generation.width={self.side}",
            f"generation.batch_size={self.batch}",
            *(["scorer.metrics=[clip_similarity,clip_text,ssim,psnr]"] if self.side > 64 else []),
            *([f"layers.include=[{','.join(self.paths()[: self.layers])}]"] if self.layers else []),
        ]

    def paths(self) -> tuple[str, ...]:
        """Every layer of the model, in forward order."""
        spec = models.ModelSpec(self.model, "embedded" if self.model == "embedded" else str(self.folder))
        source = models.resolve(spec)
        return examine(source.skeleton(source.denoiser)).paths

    def said(self) -> str:
        """Its settings in words."""
        return (
            f"Settings: {MODELS[self.model]}, {self.side}x{self.side} px, {self.steps} steps, "
            f"guidance {self.guidance:g}, {self.dtype}, batches of {self.batch}"
        )


def setup(model: str, options: Options) -> Setup:
    """The model with its settings from conf/model, made smaller by `quick` and as the command line says."""
    values = OmegaConf.merge(*(OmegaConf.load(conf_dir() / "model" / f"{name}.yaml") for name in ("_base", model)))
    folder = EMBEDDED
    if model != "embedded":
        folder = options.kept / (f"{model}-small" if options.quick else model)
        architectures.build(model, folder, options.device, small=options.quick)
    # A GPU is lent for minutes: the big models take 20 steps, on fewer subjects. It changes no ratio by much.
    steps = values.steps if model == "embedded" else 20
    subjects, loop, batch = {"embedded": (8, 17, 32), "sd15": (4, 17, 32), "sdxl": (2, 8, 16)}[model]
    side, layers = values.height, 0  # a batch of known size, not `auto`, so that runs compare
    if options.quick:
        steps, subjects, loop, side, batch, layers = 2, 2, 2, 64, 4, 3
    return Setup(
        model=model,
        folder=folder,
        device=options.device,
        dtype=resolve_dtype(options.dtype or values.dtype, options.device),
        steps=options.steps or steps,
        guidance=values.guidance,
        side=side,
        batch=options.batch or batch,
        subjects=options.subjects or subjects,
        loop=options.loop or loop,
        layers=layers,
    )


def request(overrides: Sequence[str]) -> Request:
    """The checked request of the demo study with these overrides, without a tracker."""
    register(conf_dir())
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return parse(compose("lesion", ["experiment=demo", "tracker=none", *overrides]))


def job(store: Path, folder: Path, overrides: Sequence[str], report: bool = True) -> tuple[float, pd.DataFrame]:
    """Seconds and results of one whole job: generate, store, score, results, report. Its models are loaded before.

    Raises StudyFailed where not all images are well.
    """
    asked = request([*overrides, f"store.dir={store}"])
    source, _ = runner.survey(asked)
    models.load(source, asked.device)
    _clip._embedder.cache_clear()  # or scores of a repeat would come from memory
    runner.scoring.make_scorer(asked.scorer, asked.device)
    folder.mkdir(parents=True)
    began = time.perf_counter()
    with redirect_stdout(io.StringIO()):
        context = runner.JobContext(folder, folder.name, None, {})
        outcome = runner.complete(asked, context, runner.survey(asked), report=report)
    if outcome.trouble:
        raise StudyFailed(outcome.trouble) from outcome.stopped
    return time.perf_counter() - began, pd.read_parquet(folder / "results.parquet")


def loaded(overrides: Sequence[str]) -> tuple[Request, Study, Model]:
    asked = request(overrides)
    source, study = runner.survey(asked)
    make_deterministic()
    return asked, study, models.load(source, asked.device)


def fillers(study: Study, model: Model, asked: Request) -> dict[str, Intervention]:
    """The replacements that the study's lesions use."""
    bench = replacements.Bench(model, study.settings, asked.store / "means", study.settings.batch_size)
    keys = {replacement_key(lesion): lesion.replacement.name for lesion in study.lesions()}
    return {key: replacements.build(name, asked.replacements[name], bench) for key, name in keys.items()}


def generating(model: Model, cells: Sequence[Cell], batch: int, using: dict[str, Intervention]) -> float:
    """Seconds to make the images of these cells, in batches as they come; the images are thrown away."""
    began = time.perf_counter()
    for start in range(0, len(cells), batch):
        generate(model, cells[start : start + batch], using)
    return time.perf_counter() - began


def plain(this: Setup, dtype: str = "") -> Any:
    """Diffusers' own pipeline of the model, as anyone would load it, without a safety checker."""
    diffusers.utils.logging.disable_progress_bar()
    pipe = diffusers.DiffusionPipeline.from_pretrained(this.folder, torch_dtype=getattr(torch, dtype or this.dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(this.device)


@contextmanager
def stock_flags() -> Iterator[None]:
    """Torch's own choice of kernels, under which anyone's script runs; afterwards those of a study."""
    cudnn, deterministic = torch.backends.cudnn, torch.backends.cudnn.deterministic
    try:
        cudnn.deterministic = False
        with precision.stock():
            yield
    finally:
        cudnn.deterministic = deterministic


def planned(study: Study, size: int) -> list[list[Cell]]:
    """Every batch of the study, as a job over an empty store makes them."""
    return list(batches(study, size, lambda key: False))


def spaced(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced."""
    if count >= len(items):
        return list(items)
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, count).round()]


def wait(device: str) -> None:
    """Until the device has done what it was given; nothing to wait for on a CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
