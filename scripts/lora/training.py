"""Training of a low-rank adapter: frozen base, resumable, the same weights however often it was interrupted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lesion import models
from lesion.models import ModelSpec
from lora.data import Example
from lora.denoising import Denoising, check
from lora.recipe import PRECISIONS, Recipe, Refused

WEIGHTS = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Watch:
    """What is saved and shown on the way; changes nothing of the weights.

    save_every, show_every: steps (show_every 0: no pictures). prompts: one picture each, image i with seed `seed` + i.
    steps, guidance: of these pictures. until: time.monotonic() at which the run saves and stops.
    """

    save_every: int = 500
    show_every: int = 0
    prompts: tuple[str, ...] = ()
    seed: int = 0
    steps: int = 20
    guidance: float = 5.0
    until: float = float("inf")
    checkpointing: bool = False


@dataclass
class State:
    """How far a run has come. losses: one a step."""

    step: int = 0
    losses: list[float] = field(default_factory=list)


class Paused(Exception):
    """The time given to this call is used up; the next call goes on from the checkpoint."""


def train(recipe: Recipe, examples: Sequence[Example], out: Path, watch: Watch, cpu: bool = False) -> list[float]:
    """Train, or go on training, and write `out`/pytorch_lora_weights.safetensors. The loss of every step.

    Raises Refused where the recipe does not fit the model or the folder, RequestError where there is no such model, and
    Paused when the time is up.
    """
    accelerator = Accelerator(mixed_precision=recipe.precision, gradient_accumulation_steps=recipe.accumulate, cpu=cpu)
    out.mkdir(parents=True, exist_ok=True)
    spec = ModelSpec(
        name="base",
        id=recipe.model,
        pipeline=recipe.pipeline,
        config=recipe.config,
        revision=recipe.revision,
        variant=recipe.variant,
        dtype=PRECISIONS[recipe.precision],
    )
    model = models.load(models.resolve(spec), str(accelerator.device))
    check(model.pipe)
    recipe.agree(out / "recipe.json")
    try:
        with model.texts.attached(model.pipe):
            return _Training(accelerator, model.pipe, recipe, examples, out, watch).run()
    finally:
        model.pipe.unet.unload_lora()  # the loaded model may serve others
        model.pipe.unet.eval()


def add_adapter(unet: Any, recipe: Recipe) -> list[torch.nn.Parameter]:
    """Freeze the UNet and give it low-rank matrices in float32: the first Gaussian, the second zero. The matrices."""
    torch.manual_seed(recipe.seed)
    unet.requires_grad_(False)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        init_lora_weights="gaussian",
        target_modules=list(recipe.targets),
    )
    try:
        unet.add_adapter(config)
    except ValueError as error:  # no module has such a name
        raise Refused(f"targets: {' '.join(str(error).split())[:200]}") from None
    cast_training_params(unet, torch.float32)
    matrices = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    layers = [module for module in unet.modules() if isinstance(module, LoraLayer)]
    assert len(matrices) == 2 * len(layers), "something besides the low-rank matrices would be trained"
    assert sum(matrix.numel() for matrix in matrices) == sum(
        recipe.rank * (layer.in_features + layer.out_features) for layer in layers
    )
    return matrices


class _Training:
    def __init__(
        self,
        accelerator: Accelerator,
        pipe: Any,
        recipe: Recipe,
        examples: Sequence[Example],
        out: Path,
        watch: Watch,
    ):
        self.accelerator, self.pipe, self.recipe, self.out, self.watch = accelerator, pipe, recipe, out, watch
        for name, part in pipe.components.items():
            if name.startswith("text_encoder") and part is not None:
                part.requires_grad_(False)
        pipe.vae.requires_grad_(False)
        self.task = Denoising(pipe, self._encode, recipe, examples)
        self.matrices = add_adapter(pipe.unet, recipe)
        if watch.checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(self.matrices, lr=recipe.rate, weight_decay=recipe.decay)
        self.unet, self.optimizer = accelerator.prepare(pipe.unet, optimizer)
        self.state = self._resumed()

    def _encode(self, texts: list[str]) -> Any:
        return self.pipe.encode_prompt(
            prompt=texts,
            device=self.pipe.unet.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )

    def run(self) -> list[float]:
        recipe, watch, state, main = self.recipe, self.watch, self.state, self.accelerator.is_main_process
        if state.step < recipe.steps:
            self.task.prepare(show=main)
        smooth = state.losses[-1] if state.losses else None
        with tqdm(initial=state.step, total=recipe.steps, desc="train", disable=not main, mininterval=2) as bar:
            while state.step < recipe.steps:
                loss = self._step(state.step)
                state.losses.append(loss)
                state.step += 1
                smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
                bar.set_postfix(loss=f"{smooth:.4f}", rate=f"{recipe.rate_at(state.step - 1):.1e}", refresh=False)
                bar.update()
                if watch.show_every and watch.prompts and state.step % watch.show_every == 0:
                    self._show()
                if state.step % watch.save_every == 0 and state.step < recipe.steps:
                    self._save()
                if time.monotonic() > watch.until and state.step < recipe.steps:
                    self._save()
                    raise Paused(f"paused after step {state.step} of {recipe.steps}")
        self._save()
        return state.losses

    def _step(self, step: int) -> float:
        accelerator, recipe = self.accelerator, self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        self.unet.train()
        total = 0.0
        for part in range(recipe.accumulate):
            index = (step * recipe.accumulate + part) * accelerator.num_processes + accelerator.process_index
            with accelerator.accumulate(self.unet):
                loss = self.task.loss(self.unet, self.task.batch(index))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.matrices, recipe.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += float(loss.detach())
        return total / recipe.accumulate

    @property
    def _checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def _resumed(self) -> State:
        if not self._checkpoint.exists():
            return State()
        held = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        if held["step"] > self.recipe.steps:
            raise Refused(f"{str(self.out)!r} has {held['step']} steps already, more than --steps {self.recipe.steps}")
        set_peft_model_state_dict(self.pipe.unet, held["matrices"])
        self.optimizer.load_state_dict(held["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(held["scaler"])
        return State(held["step"], held["losses"])

    def _save(self) -> None:
        """The checkpoint and the adapter so far, in diffusers' format."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        matrices = self._matrices()
        held = {
            "step": self.state.step,
            "losses": self.state.losses,
            "matrices": matrices,
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
        }
        temporary = self._checkpoint.with_suffix(".tmp")
        torch.save(held, temporary)
        temporary.replace(self._checkpoint)
        self.pipe.save_lora_weights(
            str(self.out),
            unet_lora_layers=convert_state_dict_to_diffusers(matrices),
            weight_name=WEIGHTS,
            **_collate_lora_metadata({"unet": self.pipe.unet}),
        )
        lines = [f"{step},{loss:.6g}" for step, loss in enumerate(self.state.losses, 1)]
        (self.out / "losses.csv").write_text("\n".join(["step,loss", *lines]) + "\n", encoding="utf-8")

    def _matrices(self) -> dict[str, Tensor]:
        return {name: matrix.cpu() for name, matrix in get_peft_model_state_dict(self.pipe.unet).items()}

    def _show(self) -> None:
        """Pictures of the prompts side by side, always from the same noise."""
        if not self.accelerator.is_main_process:
            return
        self.unet.eval()
        with self.accelerator.autocast():
            images = draw(self.pipe, self.watch.prompts, self.watch, self.task.side)
        folder = self.out / "validation"
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.concatenate(images, axis=1)).save(folder / f"step-{self.state.step:06d}.png")


def draw(pipe: Any, prompts: Sequence[str], watch: Watch, side: int, batch: int = 16) -> list[np.ndarray[Any, Any]]:
    """One image a prompt by the plain pipeline, (side, side, 3) uint8; image i has seed `watch.seed` + i."""
    images: list[np.ndarray[Any, Any]] = []
    for start in range(0, len(prompts), batch):
        texts = list(prompts[start : start + batch])
        made = pipe(
            texts,
            generator=[torch.Generator("cpu").manual_seed(watch.seed + start + i) for i in range(len(texts))],
            num_inference_steps=watch.steps,
            guidance_scale=watch.guidance,
            height=side,
            width=side,
            output_type="pil",
        ).images
        images += [np.asarray(image) for image in made]
    return images
