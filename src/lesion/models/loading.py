"""Loading a found model with its weights. The only place that makes a pipeline."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import diffusers
import torch

from lesion.anatomy import Anatomy, examine, kinds_of, text_sites
from lesion.gates import Gates
from lesion.models.source import SCHEDULERS, ModelSpec, Source, resolve
from lesion.reuse import TextMemory
from lesion.study import ModelIdentity

log = logging.getLogger(__name__)
BACKEND = "inductor"  # of performance.compile
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Model:
    """A pipeline ready to generate, its denoiser, and what can be lesioned in it.

    text_sites: paths of the modules that read the text, whatever the layers under study are.
    """

    pipe: Any
    denoiser: torch.nn.Module
    anatomy: Anatomy
    identity: ModelIdentity
    text_sites: tuple[str, ...] = ()
    texts: TextMemory = field(default_factory=TextMemory)
    gates: Gates | None = None  # of a compiled denoiser
    others: dict[str, Any] = field(default_factory=dict)

    def pipeline(self, task: str) -> Any:
        """The pipeline for a task, made of the same parts. Raises ValueError if diffusers has none for this model."""
        if task == "txt2img":
            return self.pipe
        if task not in self.others:
            other = diffusers.AutoPipelineForImage2Image.from_pipe(self.pipe)
            other.set_progress_bar_config(disable=True)
            self.others[task] = other
        return self.others[task]


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto` is float32 on a CPU and float16 on a GPU."""
    return dtype if dtype != "auto" else ("float32" if device == "cpu" else "float16")


def identity_of(source: Source, device: str) -> ModelIdentity:
    """What of the model can change pixels, known before a weight is loaded."""
    dtype = resolve_dtype(source.spec.dtype, device)
    return ModelIdentity(source.spec.name, source.fingerprint, dtype, device.split(":")[0], source.spec.switches)


def load(source: Source, device: str) -> Model:
    """The model with its weights on the device; loaded once per process while jobs ask for the same one."""
    return _load(source.spec, source.fingerprint, device)


@lru_cache(maxsize=1)
def _load(spec: ModelSpec, fingerprint: str, device: str) -> Model:
    source = resolve(spec)
    dtype = resolve_dtype(spec.dtype, device)
    kwargs: dict[str, Any] = {"torch_dtype": DTYPES[dtype]}
    diffusers.utils.logging.disable_progress_bar()
    if source.file:
        cls = getattr(diffusers, spec.pipeline or "")
        pipe = cls.from_single_file(str(source.file), config=str(source.folder), **kwargs)
    elif source.commit:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            spec.id, revision=source.commit, variant=spec.variant, **kwargs
        )
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(source.folder), variant=spec.variant, **kwargs)
    if getattr(pipe, "safety_checker", None) is not None:
        log.info("safety checker taken off: it would blank images, and a blank image has no similarity")
        pipe.safety_checker = None
    if spec.scheduler:
        # Without Runge-Kutta steps, as in Stable Diffusion's own PNDM configs; other schedulers have no such option.
        options = {"skip_prk_steps": True} if spec.scheduler == "pndm" else {}
        pipe.scheduler = getattr(diffusers, SCHEDULERS[spec.scheduler]).from_config(pipe.scheduler.config, **options)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    denoiser = getattr(pipe, source.denoiser)
    if spec.channels_last:
        for part in (denoiser, pipe.vae):
            part.to(memory_format=torch.channels_last)
    anatomy = examine(denoiser, kind=next(iter(kinds_of(denoiser)), "cross_attention"))
    gates = None
    if spec.compile:
        gates = Gates(denoiser, anatomy)
        denoiser.compile_repeated_blocks(backend=BACKEND)
    return Model(pipe, denoiser, anatomy, identity_of(source, device), text_sites(denoiser), gates=gates)
