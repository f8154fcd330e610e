"""Figures of a GPU that `scripts/benchmark.py` has no part for."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any
from unittest import mock

import diffusers
import numpy as np
import pandas as pd
import torch
from scipy import stats

import benchmark
import lesion.report as lesion_report
from bench import setup as benches
from bench.architectures import TRANSFORMERS, VAE
from bench.report import Row
from gpu.common import Context, lesion
from lesion.denoising.run import Client, Denoising
from lesion.generation.decoding import decoding
from lesion.generation.generate import make_deterministic
from lesion.models.source import STOCK
from lesion.replacements.zero import Zero
from lesion.surgery.anatomy import examine
from lesion.surgery.operation import Lesions, replacement_key

if TYPE_CHECKING:
    from gpu.parts import Section

SAID = {"": "float32", STOCK: "as torch does: convolutions in TF32 (default)", "tf32": "TF32 throughout"}
SMALL = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 32}


def embedded(context: Context) -> Section:
    """The study of the embedded model on the device and on the CPU; then what torch's stock flags would change."""
    from gpu.parts import Section

    options = benches.Options(context.device, 1, context.tiny, context.scratch, context.scratch / "models")
    this = benches.setup("embedded", options)
    frames, speeds = {}, {}
    for device in dict.fromkeys((context.device, "cpu")):
        asked = [*this.overrides(2 if context.tiny else 4, "float32"), f"device={device}"]
        folder = context.fresh("embedded")
        seconds, frame = benches.job(folder / "store", folder / "run", asked)
        frames[device], speeds[device] = frame, len(frame) / seconds
    mine, cpu = frames[context.device], frames["cpu"]
    change = (mine["clip_similarity"] - cpu["clip_similarity"]).abs()
    layers = [1 - one[one["layer"] != ""].groupby("layer")["clip_similarity"].mean() for one in (mine, cpu)]
    order = stats.spearmanr(*layers).statistic if len(layers[0]) > 1 else float("nan")
    rows = [Row(f"speed, {device}", "images a second", [value], " /s") for device, value in speeds.items()]
    rows.append(
        Row(
            "scores",
            "change of an image's `clip_similarity` against the CPU's: mean, largest; rank correlation of importances",
            text=f"{change.mean():.1e}, {change.max():.1e}; {order:.3f}",
        )
    )
    rows += _noise(context, this, mine)
    rows.append(Row("stock flags", "pixels that torch's own flags change to more than 1/255", text=_stock(this)))
    note = (
        f"A whole job of {len(mine)} images on each device, then in other precisions and batches on the GPU. "
        f"{this.said().replace(this.dtype, 'float32')}."
    )
    return Section(benchmark.EMBEDDED, note, rows)


def _noise(context: Context, this: benches.Setup, base: pd.DataFrame) -> list[Row]:
    """What half precision and batches of another size do to scores and importances on the device."""
    variants = {dtype: (dtype, "") for dtype in (("float16", "bfloat16") if context.on_gpu else ("bfloat16",))}
    batch = 1 if context.tiny else 4
    variants[f"batches of {batch}"] = ("float32", f"generation.batch_size={batch}")
    rows = []
    for name, (dtype, more) in variants.items():
        folder, subjects = context.fresh("noise"), 2 if context.tiny else 4
        asked = [*this.overrides(subjects, dtype), f"device={context.device}", *filter(None, [more])]
        _, frame = benches.job(folder / "store", folder / "run", asked, report=False)
        change = (frame["clip_similarity"] - base["clip_similarity"]).abs()
        layers = [1 - one[one["layer"] != ""].groupby("layer")["clip_similarity"].mean() for one in (frame, base)]
        what = "change of an image's `clip_similarity` against these: mean, largest; of a layer's importance: largest"
        text = f"{change.mean():.1e}, {change.max():.1e}; {(layers[0] - layers[1]).abs().max():.1e}"
        rows.append(Row(f"{name}, scores", what, text=text))
    return rows


def _stock(this: benches.Setup) -> str:
    """Share of pixels that differ between torch's own flags and `make_deterministic`."""
    pipe, images = benches.plain(this, "float32"), []
    make_deterministic()
    for flags in (nullcontext, benches.stock_flags):
        noise = [torch.Generator("cpu").manual_seed(seed) for seed in range(4)]
        given = {"num_inference_steps": this.steps, "guidance_scale": this.guidance, "output_type": "np"}
        with flags():
            images.append(
                pipe(["a red circle"] * 4, generator=noise, height=this.side, width=this.side, **given).images
            )
    apart = np.abs(images[0] - images[1])
    return f"{(apart > 1 / 255).mean():.4%}, largest {apart.max():.1e}"


def decoder(context: Context) -> Section:
    """Seconds an image of SDXL's decode in each precision, and what the precision does to scores of real images."""
    from gpu.parts import Section

    precisions, images = ("", STOCK, "tf32", "bfloat16"), 2 if context.tiny else 4
    with torch.device(context.device):
        vae = diffusers.AutoencoderKL(**{**VAE, **({"block_out_channels": (32,) * 4} if context.tiny else {})}).eval()
        latents = torch.randn(images, 4, *([8, 8] if context.tiny else [128, 128]))
    rows = []
    for precision in precisions:
        times = []
        for _ in range(3):  # the first is not counted
            benches.wait(context.device)
            began = time.perf_counter()
            with torch.inference_mode(), decoding(vae, {}, precision):
                vae.decode(latents)
            benches.wait(context.device)
            times.append((time.perf_counter() - began) / images)
        rows.append(Row(SAID.get(precision, precision), "seconds an image", [min(times[1:])], " s"))
    this = benches.setup("embedded", benches.Options(context.device, 1, context.tiny, context.scratch, context.scratch))
    frames = {}
    for precision in ("float32", "tf32", "bfloat16"):
        folder = context.fresh("decoder")
        more = ["selection=leave_one_out", f"performance.decoder={precision}"]
        with mock.patch.object(lesion_report, "write_report", return_value=[]):
            frames[precision] = benches.job(folder / "store", folder / "run", [*this.overrides(4, "float32"), *more])[1]
    base = frames.pop("float32")["clip_similarity"]
    for precision, frame in frames.items():
        change = (frame["clip_similarity"] - base).abs()
        what = "change of an image's `clip_similarity` against float32: mean, largest"
        rows.append(Row(f"{precision}, scores", what, text=f"{change.mean():.1e}, {change.max():.1e}"))
    note = (
        f"{images} latents of {8 * latents.shape[-1]} px in one call of SDXL's decoder in float32, as its pipeline "
        f"calls it for a float16 model. Scores: {len(base)} images of the embedded model on this device."
    )
    return Section(benchmark.DECODERS, note, rows)


def flux(context: Context) -> Section:
    """Seconds of a denoiser call of 1024 px, bare and under lesions."""
    from gpu.parts import Section

    dtype = torch.float32 if context.tiny else torch.bfloat16
    config = {**TRANSFORMERS["flux"][1], **(SMALL if context.tiny else {})}
    images, side, text = (2, 4, 5) if context.tiny else (4, 64, 512)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(context.device):
            transformer = diffusers.FluxTransformer2DModel(**config).eval()
            given = {
                "hidden_states": torch.randn(images, side * side, config["in_channels"]),
                "encoder_hidden_states": torch.randn(images, text, config["joint_attention_dim"]),
                "pooled_projections": torch.randn(images, config["pooled_projection_dim"]),
                "timestep": torch.ones(images),
                "guidance": torch.full((images,), 3.5),
                "img_ids": torch.cat([torch.zeros(side * side, 1), torch.cartesian_prod(*[torch.arange(side)] * 2)], 1),
                "txt_ids": torch.zeros(text, 3),
            }
    finally:
        torch.set_default_dtype(default)
    rows, bare = [], 0.0
    for name, kind, others in (
        ("un-ablated", "", False),
        ("leave-one-out", "joint_attention", False),
        ("only-one", "joint_attention", True),
        ("leave-one-out", "text_to_image", False),
        ("only-one", "text_to_image", True),
        ("only-one", "block", True),
    ):
        clients: list[Client] = []
        if kind:
            anatomy = examine(transformer, kind=kind)
            layers = [path for path in anatomy.paths if (path == anatomy.paths[1]) != others]
            change = lesion(*layers, kind=kind)
            clients = [Lesions(anatomy, [change] * images, {replacement_key(change): Zero()})]
        seconds = _call(context, transformer, given, clients, images)
        bare = bare or seconds
        rows.append(Row(f"{name} {kind}".strip(), "seconds a denoiser call", [seconds], " s"))
        if kind:
            rows.append(Row("", "over the un-ablated call", [seconds / bare], "x"))
    note = (
        f"One call of a transformer of FLUX.1-dev's size ({sum(p.numel() for p in transformer.parameters()):,} random "
        f"weights, {str(dtype).removeprefix('torch.')}) on {images} images of {side * 16} px; median of three."
    )
    return Section(benchmark.FLUX, note, rows)


def _call(context: Context, transformer: Any, given: dict[str, Any], clients: list[Client], images: int) -> float:
    times = []
    for _ in range(4):  # the first is not counted

        class Pipe:
            _num_timesteps = 1

        with Denoising(Pipe(), transformer, images, clients).running():
            benches.wait(context.device)
            began = time.perf_counter()
            transformer(**given)
            benches.wait(context.device)
            times.append(time.perf_counter() - began)
    return sorted(times[1:])[1]
