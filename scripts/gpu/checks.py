"""What must be right on a GPU: against plain diffusers and the same done in another way. Lesions are in `lesions`."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from scipy import stats

import lesion.report as lesion_report
from bench import setup as benches
from gpu.common import JOINT, TEXTS, Check, Context, lesion, near, same
from lesion.generation.generate import generate
from lesion.generation.snapshots import States
from lesion.models import loading, memory, precision
from lesion.run import maker


def plain_images(context: Context) -> list[Check]:
    found = []
    for dtype in context.dtypes:
        for name in context.classes:
            model = context.model(name, dtype, decoder="float32")  # both under full float32
            ours = context.ours(model, context.cells(model))
            found.append(Check.of(f"{name} {dtype}", *same(ours, context.plain(context.pipe(name, dtype), name))))
    return found


def upcast(context: Context) -> list[Check]:
    """A float16 autoencoder that is decoded in float32, against plain diffusers with torch's own precision."""
    dtype = "float16" if context.on_gpu else "float32"
    model = context.model("sdxl", dtype)
    ours = context.ours(model, context.cells(model))
    with precision.stock():
        theirs = context.plain(context.pipe("sdxl", dtype), "sdxl")
    full = context.model("sdxl", dtype, decoder="float32")
    apart = np.abs(context.ours(full, context.cells(full)) - ours).max()
    fine, said = same(ours, theirs)
    return [Check.of(f"sdxl {dtype}", fine, f"{said}; full float32 differs by at most {apart:.1e}")]


def late_window(context: Context) -> list[Check]:
    found = []
    for name in ("sd", "flux"):
        kind = "block" if name in JOINT else "cross_attention"
        for dtype in ("float32",) if context.tiny else ("float32", "float16"):
            model = context.model(name, dtype, kind)
            window = (0.4, 1.0)
            late = context.cells(model, lesion(*model.anatomy.paths, kind=kind, window=window), steps=4)
            whole, states = context.ours(model, late), States(context.fresh("states"))
            generate(model, context.cells(model, steps=4), {}, states, [window])
            found.append(Check.of(f"{name} {dtype}", *same(context.ours(model, late, None, states, [window]), whole)))
    return found


def batch_and_single(context: Context) -> list[Check]:
    found = []
    for dtype in context.dtypes:
        model = context.model("sd", dtype)
        cells = context.cells(model, seeds=range(4))
        together = context.ours(model, cells)
        alone = np.concatenate([context.ours(model, [cell]) for cell in cells])
        fine, said = near(together, alone)
        # In half precision other sizes of batches may round visibly: it is said, not judged.
        found.append(Check.of(f"sd {dtype}", fine or dtype != "float32", said))
    return found


def _study(context: Context, device: str, *more: str) -> list[str]:
    """A small study of the embedded model."""
    return [
        *("model=embedded", f"device={device}", "performance.dtype=float32", "selection=leave_one_out"),
        *("prompts=inline", f"prompts.items=[{', '.join(TEXTS)}]", "generation.height=64", "generation.width=64"),
        f"layers.include=[{'mid_block.*' if context.tiny else '*'}]",
        f"generation.steps={2 if context.tiny else 8}",
        *("scorer.metrics=[clip_similarity]", "seeds=[0,1]", *more),
    ]


BOXED = "[{text: a red circle, boxes: [{words: red circle, box: [0.1, 0.2, 0.6, 0.7]}]}]"
STUDIES: dict[str, list[str]] = {  # what the parts above do not touch
    "companions": ["replacement=[null_prompt,resample,double]", "replacement.resample.prompt=a blue star"],
    "text encoder and decoder": ["layers.component=[text_encoder,vae]", "layers.kind=block", "layers.include=null"],
    "text tokens": ["replacement=[zero,mask]", "layers.by=attention_token", "layers.tokens=[words,padding]"],
    "attention maps": ["capture=maps"],
    "layout guidance": [
        *("steering=layout", "replacement=steering_off", f"prompts.items={BOXED}"),
        *("steering.layers=[up_blocks.3.*]", "layers.include=[up_blocks.3.*]"),
        *("steering.step_size=noise_share", "steering.mask=covered"),
    ],
    "attribution": ["attribution=gradients", "attribution.top=2", "attribution.sample=2", "layers.include=null"],
}


def studies(context: Context) -> list[Check]:
    """The same studies of the embedded model on a CPU and on this device: images, scores, estimates."""
    found = []
    for name, more in STUDIES.items():
        frames, estimates = [], []
        for device in ("cpu", context.device):
            folder = context.fresh("studies")
            asked = _study(context, device, "seeds=[0]", *more)
            with mock.patch.object(lesion_report, "write_report", return_value=[]):  # seconds, on any device
                frames.append(benches.job(folder / "store", folder / "run", asked)[1])
            if "attribution" in name:
                estimates.append(pd.read_parquet(folder / "run" / "attribution.parquet")["estimate"])
        cells = ["prompt_id", "seed", "replacement", "kind", "layer"]
        both = frames[0].merge(frames[1], on=cells, suffixes=("_cpu", ""))
        apart = (both["clip_similarity"] - both["clip_similarity_cpu"]).abs()
        said = f"{len(both)} images, change of the CPU's scores: mean {apart.mean():.1e}, largest {apart.max():.1e}"
        fine = len(both) > 0 and bool((both["status"] == "ok").all()) and apart.mean() < 5e-3
        if estimates:
            order = stats.spearmanr(*estimates).statistic
            said, fine = f"{said}; rank correlation of the estimates {order:.3f}", fine and order > 0.95
        found.append(Check.of(name, fine, said))
    return found


def out_of_memory(context: Context) -> list[Check]:
    """A study in a part of the memory that its batches want; then a decode for which memory does not suffice."""
    folder, maker_cut = context.fresh("memory"), maker._cut
    maker_cut.clear()
    with ExitStack() as stack:
        if context.on_gpu:
            _cap(context)
            stack.callback(torch.cuda.set_per_process_memory_fraction, 1.0, torch.device(context.device).index or 0)
        else:
            stack.enter_context(mock.patch.object(maker, "generate", _crowded))
        _, frame = benches.job(folder / "store", folder / "run", _large(context, 64))
    halved, cut = sorted(maker_cut.values()), bool(maker_cut)
    maker_cut.clear()
    how = "under a cap on the memory" if context.on_gpu else "simulated on a CPU"
    fine = bool((frame["status"] == "ok").all()) and cut
    model = context.model("sd", "float16" if context.on_gpu else "float32")
    cells = context.cells(model, seeds=range(4))
    whole, decoder = context.ours(model, cells), model.pipe.vae.decoder
    forward, tried = decoder.forward, []

    def full(z: Any, *args: Any, **kwargs: Any) -> Any:
        tried.append(len(z))
        if len(z) > 2:
            torch.empty(1 << 50, device=z.device) if context.on_gpu else _raise()
        return forward(z, *args, **kwargs)

    with mock.patch.object(decoder, "forward", full):
        sliced = context.ours(model, cells)
    agrees, said = near(sliced, whole)
    return [
        Check.of("halving", fine, f"{how}: {len(frame)} images, all ok; batches cut to {halved}"),
        Check.of("decoding in slices", agrees and tried == [4, 2, 2], f"slices of {tried}; {said}"),
    ]


def _raise() -> None:
    raise torch.OutOfMemoryError("simulated")


def _crowded(model: Any, cells: Any, *rest: Any) -> Any:
    if len(cells) > 2:
        _raise()
    return generate(model, cells, *rest)


def _large(context: Context, batch: int) -> list[str]:
    """A study whose images take memory that counts beside what an allocator rounds up to."""
    side = 64 if context.tiny else 512
    return _study(
        context,
        context.device,
        f"generation.batch_size={batch}",
        *(f"generation.{one}={side}" for one in ("height", "width")),
        "generation.steps=2",
    )


def _cap(context: Context) -> None:
    """Leave room for a batch of about 12 of the study's images."""
    _, study, model = benches.loaded(_large(context, 8))
    cells = [cell for cell in study.cells() if cell.lesion is None]
    eight = (cells * 8)[:8]
    generate(model, eight, {})
    peak = memory._peak(lambda: generate(model, eight, {}), context.device) or 0
    index = torch.device(context.device).index or 0
    whole = torch.cuda.get_device_properties(index).total_memory
    allowed = torch.cuda.memory_reserved(index) + 1.5 * peak + (64 << 20)
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / whole), index)


def auto(context: Context) -> list[Check]:
    model = context.model("sd")
    cell = context.cells(model)[0]
    size = memory.fitting(lambda number: generate(model, [cell] * number, {}), context.device)
    images = generate(model, [cell] * size, {})
    return [Check.of("sd", len(images) == size >= 1, f"{size} images fit, and were made")]


def offload(context: Context) -> list[Check]:
    """Against plain diffusers that offloads in the same way; and, but for rounding, against no offloading."""
    if not context.on_gpu:
        return [Check("model, sequential", "skipped", "needs a GPU to load to")]
    model, found = context.model("sd"), []
    whole = context.ours(model, context.cells(model))
    for how in ("model", "sequential"):
        model = context.model("sd", offload=how)
        ours, pipe = context.ours(model, context.cells(model)), context.pipe("sd", device="cpu")
        getattr(pipe, f"enable_{how}_cpu_offload")(device=context.device)
        found.append(Check.of(how, *same(ours, context.plain(pipe, "sd"))))
        found.append(Check.of(f"{how}, and none", *near(ours, whole)))
    return found


def store(context: Context) -> list[Check]:
    """Images of a CPU are no images of a GPU: their keys differ; the CPU's stay what they are."""
    folder, counts, frames = context.fresh("store"), [], []
    for number, device in enumerate(("cpu", context.device, "cpu")):
        asked = _study(context, device, "generation.batch_size=8")
        frames.append(benches.job(folder / "store", folder / f"run{number}", asked)[1])
        counts.append(len(list((folder / "store" / "cells").rglob("*.png"))))
    more = counts[1] - counts[0]
    wanted = len(frames[0]) if context.on_gpu else 0
    again = frames[0].equals(frames[2]) and counts[2] == counts[1]
    return [
        Check.of("keys", more == wanted, f"{counts[0]} images of a CPU; {more} made on {context.device} beside them"),
        Check.of("the CPU's results", again, "opened again without making an image" if again else "not the same again"),
    ]


def compiled(context: Context) -> list[Check]:
    if not context.tiny and not shutil.which("gcc"):
        return [Check("sd", "skipped", "no C compiler is here, which torch.compile needs")]
    backend = "eager" if context.tiny else loading.BACKEND  # traced, not compiled: seconds instead of a minute
    plain = context.model("sd", kind="cross_attention")
    change = lesion(plain.anatomy.paths[1])
    eager = [context.ours(plain, context.cells(plain, one)) for one in (None, change)]
    with mock.patch.object(loading, "BACKEND", backend):
        model = context.model("sd", kind="cross_attention", compile=True)
        names = ("un-ablated", "lesioned")
        return [
            Check.of(f"{name}, {backend}", *near(context.ours(model, context.cells(model, one)), theirs))
            for name, one, theirs in zip(names, (None, change), eager, strict=True)
        ]
