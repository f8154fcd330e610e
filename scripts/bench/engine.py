"""Work that need not be done (sites lesioned in every image, steps before a window), and how busy a GPU is."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.report import Row, aimed, alternate, ratios
from bench.setup import Options, Setup, fillers, generating, job, loaded, planned, spaced, wait
from lesion.generation.generate import generate
from lesion.models import resolve


def only_one(this: Setup, options: Options, kept: int = 4) -> tuple[str, list[Row]]:
    """As many un-ablated images as only-one images; those of one kept layer fill a batch."""
    asked, study, model = loaded([*this.overrides(this.batch), "selection=only_one"])
    kept_layers = spaced(study.layers, kept)
    cells = list(study.cells())
    plain_cells = [cell for cell in cells if cell.lesion is None][: this.batch]
    lesioned = [
        cell
        for layer in kept_layers
        for cell in [cell for cell in cells if cell.lesion and cell.lesion.layer == layer][: this.batch]
    ]
    baselines = plain_cells * len(kept_layers)
    using = fillers(study, model, asked)
    # As a study has them: with few prompts and seeds, several kept layers share a batch, and less can be skipped.
    _, own, _ = loaded([*this.overrides(this.subjects), "selection=only_one"])
    lesions = [batch for batch in planned(own, this.batch) if batch[0].lesion]
    mixed = [batch for batch in lesions if len(batch) == this.batch] or lesions
    mixed = spaced(mixed, kept)
    mixed_cells = [cell for batch in mixed for cell in batch]
    generate(model, baselines[: this.batch], {})
    generate(model, lesioned[: this.batch], using)
    sides = {"only-one": (model, lesioned), "only-one, own subjects": (model, mixed_cells)}
    if resolve(asked.model).shares_rows:
        sharing = replace(model, shared_rows=True)
        sides |= {f"{name}, shared rows": (sharing, images) for name, (_, images) in sides.items()}
        generate(sharing, lesioned[: this.batch], using)
    found = alternate(
        options.repeats,
        {
            **{name: lambda side=side: generating(*side, this.batch, using) for name, side in sides.items()},  # type: ignore[misc]
            "un-ablated": lambda: generating(model, baselines, this.batch, {}),
        },
    )
    counts = {name: len(images) for name, (_, images) in sides.items()} | {"un-ablated": len(baselines)}
    rows = [Row(name, f"seconds for {counts[name]} images", values, " s") for name, values in found.items()]
    values = ratios(found["only-one"], found["un-ablated"])
    rows.append(aimed("only-one", this.model, "skipped work", "only-one / un-ablated generation, seconds", values))
    kept_together = len({cell.lesion.layer for cell in mixed[0] if cell.lesion})
    mixing = f"a study of {this.subjects} subjects ({kept_together} kept layers a batch), seconds an image"
    switched = "with `performance.shared_rows`"
    for name, row, what in (
        ("only-one, own subjects", "skipped work, own subjects", f"the same for {mixing}"),
        ("only-one, shared rows", "shared rows", f"only-one {switched} / un-ablated generation, seconds"),
        (
            "only-one, own subjects, shared rows",
            "shared rows, own subjects",
            f"the same for {mixing}",
        ),
    ):
        if name in found:
            share = len(baselines) / counts[name]
            rows.append(Row(row, what, [share * ratio for ratio in ratios(found[name], found["un-ablated"])], "x"))
    note = (
        f"Zero lesions of all layers but one, in order of the kept layer ({len(kept_layers)} of them), against as many "
        "un-ablated images: the best case, a batch of one kept layer. Beside it batches as the plan of a smaller study "
        f"fills them. Images are thrown away. {this.said()}."
    )
    return note, rows


def leave_one_out(this: Setup, options: Options, lesioned: int = 4) -> tuple[str, list[Row]]:
    """Batches of leave-one-out images as the plan of a study fills them, against as many un-ablated images."""
    asked, study, model = loaded([*this.overrides(this.batch), "selection=leave_one_out"])
    every = planned(study, this.batch)
    baselines = next(batch for batch in every if not batch[0].lesion)
    some = spaced([batch for batch in every if batch[0].lesion and len(batch) == len(baselines)], lesioned)
    cells = [cell for batch in some for cell in batch]
    using = fillers(study, model, asked)
    generate(model, baselines, {})
    generate(model, some[0], using)
    found = alternate(
        options.repeats,
        {
            "leave-one-out": lambda: generating(model, cells, len(baselines), using),
            "un-ablated": lambda: generating(model, baselines * len(some), len(baselines), {}),
        },
    )
    rows = [Row(name, f"seconds for {len(cells)} images", values, " s") for name, values in found.items()]
    values = ratios(found["leave-one-out"], found["un-ablated"])
    rows.append(
        aimed("leave-one-out", this.model, "one layer", "leave-one-out / un-ablated generation, seconds", values)
    )
    note = (
        f"Zero lesions of one layer each ({len(some)} batches, as the plan fills them), against as many un-ablated "
        f"images. Images are thrown away. {this.said()}."
    )
    return note, rows


def window(this: Setup, options: Options) -> tuple[str, list[Row]]:
    """Whole jobs of leave-one-out over the late half and over all steps, their baselines made before or in them."""
    windows = {"late": "window=[0.5,1.0]", "full": "window=[0.0,1.0]"}
    common = this.overrides(this.subjects)
    images = 0

    def prepare(name: str) -> Path:
        # The baselines are told of the window, so that they keep what a study of it starts from.
        store = options.scratch / f"window-{this.model}-{name}"
        run = store.with_name(store.name + "-run")
        job(store, run, [*common, "selection=none", windows[name]])
        return store

    stores = {name: prepare(name) for name in windows}

    def timed(name: str, baselines: bool) -> float:
        nonlocal images
        with tempfile.TemporaryDirectory(dir=options.scratch) as fresh:
            store = Path(fresh) / "store"
            if not baselines:
                shutil.copytree(stores[name], store)
            seconds, frame = job(store, Path(fresh) / "run", [*common, "selection=leave_one_out", windows[name]])
        images = int((frame["selection"] != "none").sum())
        return seconds

    found: dict[str, list[float]] = {}
    for more, too, repeats in (("", False, options.repeats), (", baselines too", True, 1)):
        sides = {f"{name} window{more}": lambda name=name, too=too: timed(name, too) for name in windows}
        found |= alternate(repeats, sides)  # type: ignore[arg-type]
    rows = [Row(name, f"seconds for {images} lesioned images", values, " s") for name, values in found.items()]
    values = ratios(found["late window"], found["full window"])
    what = "study of [0.5, 1) / of [0, 1), seconds"
    rows.append(aimed("window", this.model, "late window", what, values))
    values = ratios(found["late window, baselines too"], found["full window, baselines too"])
    rows.append(Row("late window, baselines too", f"{what}, from an empty store", values, "x"))
    note = (
        "Whole jobs of leave-one-out lesions (generate, store, score, results, report) in a store that has their "
        f"baselines, and once with making those in an empty store. {this.said()}."
    )
    return note, rows


def decoder(this: Setup, options: Options) -> tuple[str, list[Row]]:
    """Whole leave-one-out jobs over the layers of the decoder and of the denoiser, from an empty store."""
    made: dict[str, int] = {}

    def seconds_an_image(component: str) -> float:
        given = [*this.overrides(this.subjects), "selection=leave_one_out", "layers.kind=block", "layers.include=null"]
        with tempfile.TemporaryDirectory(dir=options.scratch) as fresh:
            asked = [*given, f"layers.component={component}"]
            seconds, frame = job(Path(fresh) / "store", Path(fresh) / "run", asked)
        made[component] = int((frame["selection"] != "none").sum())
        return seconds / made[component]

    found = alternate(options.repeats, {name: lambda name=name: seconds_an_image(name) for name in ("vae", "denoiser")})  # type: ignore[misc]
    rows = [
        Row(name, f"seconds a lesioned image ({made[name]} of them)", values, " s") for name, values in found.items()
    ]
    what = "lesions of the decoder / of the denoiser, seconds a lesioned image"
    rows.append(Row("decoder", what, ratios(found["vae"], found["denoiser"]), "x"))
    note = (
        "Whole jobs of leave-one-out lesions of blocks (generate, store, score, results, report), their baselines made "
        f"in them. {this.said()}."
    )
    return note, rows


def matrix_peak(device: str, sizes: tuple[int, ...], seconds: float = 1.0) -> float:
    """The most bf16 operations a second that square matrix products reach, over some sizes."""
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        a @ b
        times = []
        while sum(times) < seconds:
            wait(device)
            began = time.perf_counter()
            for _ in range(8):  # long enough that the launch and the wait do not count
                a @ b
            wait(device)
            times.append(time.perf_counter() - began)
        best = max(best, 8 * 2 * size**3 / sorted(times)[len(times) // 2])
    return best


def share(this: Setup, options: Options) -> tuple[str, list[Row]]:
    """Operations a second of whole batches (text, denoising, decoding) over those of plain matrix products."""
    asked, study, model = loaded([*this.overrides(this.batch, "bfloat16"), "selection=leave_one_out"])
    every = planned(study, this.batch)
    using = fillers(study, model, asked)
    kinds = {"un-ablated": every[0], "leave-one-out": next(batch for batch in every if batch[0].lesion)}
    operations = {}
    for name, batch in kinds.items():
        generate(model, batch, using)
        with FlopCounterMode(display=False) as counter:
            generate(model, batch, using)  # counted as they run: skipped and remembered work does not count
        operations[name] = counter.get_total_flops()
    sizes, seconds = ((256,), 0.01) if options.quick else ((4096, 8192, 16384), 1.0)
    sides = {name: lambda batch=batch: generating(model, batch, this.batch, using) for name, batch in kinds.items()}
    sides["peak"] = lambda: matrix_peak(this.device, sizes, seconds)  # type: ignore[misc]
    found = alternate(options.repeats, sides)
    rows = [Row("peak", "bf16 matrix products", [value / 1e12 for value in found["peak"]], " TFLOP/s")]
    for name in kinds:
        rows.append(Row(name, f"{operations[name] / 1e12:.4g} TFLOP a batch, seconds", found[name], " s"))
        shares = [100 * operations[name] / spent / peak for spent, peak in zip(found[name], found["peak"])]
        rows.append(aimed("share", this.model, f"share, {name}", "operations a second / peak", shares))
    note = (
        "Operations of whole batches, counted by torch's flop counter, against the fastest of square bf16 matrix "
        f"products. {this.said().replace(this.dtype, 'bfloat16')}."
    )
    return note, rows
