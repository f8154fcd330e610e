"""What every check needs: pipelines, ours and plain ones, on the device under test."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

import pipelines
from lesion import models, replacements
from lesion.generation.generate import generate
from lesion.models import Model, ModelSpec, loading
from lesion.study.grid import Cell
from lesion.study.lesions import Lesion, Replacement
from lesion.study.prompts import Prompt
from lesion.study.settings import Settings
from lesion.surgery.anatomy import examine
from lesion.surgery.operation import replacement_key

TEXTS, SEEDS = ("a red circle", "two stars"), (0, 7)
PLAINLY = {"use_resolution_binning": False, "clean_caption": False, "complex_human_instruction": None}
JOINT = ("sd3", "sd35", "flux", "flux_schnell", "qwen_image", "flux2", "flux2_klein")
ONE_SEQUENCE = ("z_image",)  # of image and text, in every block
EMBEDDED_GUIDANCE = ("flux", "flux_schnell", "lcm", "flux2")
Hook = tuple[str, Callable[..., Any]]  # path of a module, forward hook with kwargs


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. status: passed, failed or skipped; said: what was found, in words."""

    name: str
    status: str
    said: str

    @classmethod
    def of(cls, name: str, fine: bool, said: str) -> Check:
        return cls(name, "passed" if fine else "failed", said)


@dataclass(frozen=True)
class Context:
    """device: under test. tiny: few classes and steps. scratch: a folder that goes away."""

    device: str
    tiny: bool
    scratch: Path
    folders: dict[str, Path] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of tiny pipelines, one of every class that is supported."""
        return ("sd", "flux") if self.tiny else tuple(pipelines.BUILDERS)

    @property
    def dtypes(self) -> tuple[str, ...]:
        return ("float32", "bfloat16") if self.tiny else ("float32", "float16", "bfloat16")

    def fresh(self, name: str) -> Path:
        """A new folder."""
        number = sum(1 for path in self.scratch.glob(f"{name}-*"))
        (folder := self.scratch / f"{name}-{number}").mkdir(parents=True)
        return folder

    def folder(self, name: str) -> Path:
        """Of a tiny pipeline, built at its first use."""
        if name not in self.folders:
            self.folders[name] = pipelines.build(name, self.scratch / "pipelines" / name)
        return self.folders[name]

    def model(self, name: str, dtype: str = "float32", kind: str = "", by: str = "attention", **spec: Any) -> Model:
        """Ours. kind, by: of its layers; "": as it is loaded."""
        loading.forget()
        asked = ModelSpec(name=name, id=str(self.folder(name)), dtype=dtype, **spec)
        model = models.load(models.resolve(asked), self.device)
        return replace(model, anatomy=examine(model.denoiser, by, kind)) if kind else model

    def cells(
        self, model: Model, lesion: Lesion | None = None, seeds: Sequence[int] = SEEDS, **given: Any
    ) -> list[Cell]:
        name = model.identity.name
        side = pipelines.side(name)
        scheduler = type(model.pipe.scheduler).__name__
        base: dict[str, Any] = {"task": "txt2img", "steps": 3, "guidance": 3.0, "height": side, "width": side}
        settings = Settings(
            **{**base, "scheduler": scheduler, **given},
            embedded_guidance=name in EMBEDDED_GUIDANCE or None,
        )
        return [
            Cell(model.identity, Prompt(TEXTS[number % 2]), seed, settings, lesion) for number, seed in enumerate(seeds)
        ]

    def ours(self, model: Model, cells: Sequence[Cell], options: Any = None, *rest: Any) -> NDArray[np.float32]:
        """Images of these cells. options: of their replacement."""
        using = {}
        for lesion in {cell.lesion for cell in cells if cell.lesion}:
            bench = replacements.Bench(model, cells[0].settings, self.scratch / "means", len(cells))
            using[replacement_key(lesion)] = replacements.build(lesion.replacement.name, options or {}, bench)
        return generate(model, cells, using, *rest)

    def pipe(self, name: str, dtype: str = "float32", device: str = "") -> Any:
        """Plain diffusers, on the device under test if none is named."""
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            self.folder(name), torch_dtype=getattr(torch, dtype), use_safetensors=True
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device or self.device)

    def plain(self, pipe: Any, name: str, hooks: Sequence[Hook] = (), texts: Sequence[str] = TEXTS) -> Any:
        """Images of plain diffusers, with plain hooks on modules of its denoiser."""
        side = pipelines.side(name)
        known = inspect.signature(type(pipe).__call__).parameters
        asked = {"height": side, "width": side, "num_inference_steps": 3, "guidance_scale": 3.0, **PLAINLY}
        noise = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS[: len(texts)]]
        taken = [
            denoiser(pipe).get_submodule(path).register_forward_hook(hook, with_kwargs=True) for path, hook in hooks
        ]
        try:
            with torch.inference_mode():
                if type(pipe).__name__.startswith("QwenImage"):  # as its model card calls it
                    asked |= {"true_cfg_scale": asked.pop("guidance_scale"), "negative_prompt": [" "] * len(texts)}
                return pipe(
                    prompt=list(texts),
                    generator=noise,
                    output_type="np",
                    **{key: value for key, value in asked.items() if key in known},
                ).images
        finally:
            for hook in taken:
                hook.remove()


def denoiser(pipe: Any) -> torch.nn.Module:
    found: torch.nn.Module = pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
    return found


def lesion(*layers: str, replacement: str = "zero", options: Any = None, **changes: Any) -> Lesion:
    return Lesion("leave_one_out", layers[0], layers, Replacement(replacement, options or {}), **changes)


def same(ours: Any, theirs: Any) -> tuple[bool, str]:
    """Whether images are exactly equal, and how far they differ."""
    fine = np.array_equal(ours, theirs, equal_nan=True)
    finite = bool(np.isfinite(ours).all())
    apart = float(np.nanmax(np.abs(np.asarray(ours, float) - theirs))) if finite else float("nan")
    said = "exactly equal" if fine else f"largest difference {apart:.2e}"
    return fine and finite, said if finite else f"{said}; not finite"


def near(ours: Any, theirs: Any, share: float = 0.999) -> tuple[bool, str]:
    """Whether that share of pixels agrees to 1/255."""
    apart = np.abs(np.asarray(ours, float) - theirs)
    agreeing = float((apart <= 1 / 255).mean())
    return agreeing >= share, f"{agreeing:.4%} of pixels agree to 1/255, largest difference {float(apart.max()):.2e}"
