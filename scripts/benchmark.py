"""Measures speed as ratios within one run, and how much the batch size changes the scores.

    python scripts/benchmark.py                    all parts, written to docs/benchmarks.md
    python scripts/benchmark.py speed --repeats 5

speed: images a second of a whole `lesion` job (generate, store, score, results, report) against a plain loop: one
pipeline call an image with forward hooks that put out zeros, nothing scored or written. Both have their models loaded
before the clock starts; repeats alternate.

batch: the same cells made in batches and one at a time; what that does to pixels and to scores, beside the noise floor
(the similarity of two baselines of one prompt with different seeds).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from hydra import compose, initialize_config_dir

from lesion import runner
from lesion.cli import conf_dir
from lesion.config import parse, register
from lesion.models import EMBEDDED
from lesion.scoring import _clip

ROOT = Path(__file__).resolve().parent.parent


def job(folder: Path, name: str, *overrides: str) -> tuple[float, pd.DataFrame]:
    """Seconds and results of one job of the demo study, in a store of its own."""
    register(conf_dir())
    common = ["experiment=demo", "tracker=none", f"store.dir={folder / 'store'}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        request = parse(compose("lesion", [*common, *overrides]))
    _clip._embedder.cache_clear()  # or scores of a repeat would come from memory
    runner.scoring.make_scorer(request.scorer, request.device)
    run_folder = folder / name
    run_folder.mkdir(parents=True)
    began = time.perf_counter()
    runner.run(request, runner.JobContext(run_folder, name, None, {}))
    return time.perf_counter() - began, pd.read_parquet(run_folder / "results.parquet")


def silence(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output)


def plain_loop(pipe: Any, prompts: list[str], layers: dict[str, list[str]], device: str) -> float:
    """Images a second of the hand-written loop: a baseline and every only-one image, one call each."""
    began, made = time.perf_counter(), 0
    for prompt in prompts:
        for kept in [None, *layers]:
            handles = [
                pipe.unet.get_submodule(site).register_forward_hook(silence)
                for layer, sites in layers.items()
                if kept and layer != kept
                for site in sites
            ]
            generator = torch.Generator("cpu").manual_seed(0)
            pipe(prompt, generator=generator, num_inference_steps=20, guidance_scale=3.0, height=64, width=64)
            for handle in handles:
                handle.remove()
            made += 1
    return made / (time.perf_counter() - began)


def speed(repeats: int, device: str) -> list[str]:
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED, torch_dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    layers: dict[str, list[str]] = {}
    for path, _ in pipe.unet.named_modules():
        if path.endswith("attn2"):
            layers.setdefault(path.split(".transformer_blocks")[0], []).append(path)
    prompt = ["a red circle on a white background"]
    with tempfile.TemporaryDirectory() as scratch:
        job(Path(scratch), "warm-up", f"device={device}", "selection=none", "generation.steps=1")
        plain_loop(pipe, prompt, dict(list(layers.items())[:1]), device)
        ours, theirs = [], []
        for repeat in range(repeats):
            with tempfile.TemporaryDirectory() as fresh:
                seconds, frame = job(Path(fresh), f"repeat{repeat}", f"device={device}")
                ours.append(len(frame) / seconds)
            theirs.append(plain_loop(pipe, prompt, layers, device))
    ratios = [a / b for a, b in zip(ours, theirs)]
    return [
        "## Speed: a whole job against a plain loop",
        "",
        f"Demo study: 264 images, 64x64, 20 steps, guidance 3, float32, batches of 32; {repeats} alternating repeats.",
        "",
        "| | images a second, median (range) |",
        "| --- | --- |",
        f"| `lesion experiment=demo`: generate, store, score, results, report | {_spread(ours)} |",
        f"| plain loop: one call an image, hooks, nothing scored or written | {_spread(theirs)} |",
        f"| ratio, pair by pair | **{_spread(ratios)}** |",
    ]


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def batch_effect(device: str) -> list[str]:
    """The leave-one-out demo of two prompts, in batches of 32 and one at a time."""
    small = [f"device={device}", "selection=leave_one_out", "prompts=inline", "seeds=[0,1]"]
    small.append("prompts.items=[a large red circle on a white background, two blue squares on a black background]")
    with tempfile.TemporaryDirectory() as scratch:
        together, alone = Path(scratch) / "a", Path(scratch) / "b"
        _, batched = job(together, "run", *small, "generation.batch_size=32")
        _, single = job(alone, "run", *small, "generation.batch_size=1")
        pixels = []
        for a, b in zip(batched.image, single.image):
            one, two = (_pixels(folder / "run" / name) for folder, name in ((together, a), (alone, b)))
            pixels.append((np.abs(one - two) <= 1).mean())
        floors = _noise_floor(together / "run", batched)
    difference = (batched.clip_similarity - single.clip_similarity).abs()
    importance = [frame[frame.layer != ""].groupby("layer").clip_similarity.mean() for frame in (batched, single)]
    return [
        "## Batch effect: the same cells in batches of 32 and one at a time",
        "",
        f"{len(batched)} images (2 prompts, 2 seeds, baseline and 16 leave-one-out lesions), float32.",
        "",
        "| | |",
        "| --- | --- |",
        f"| pixels that agree to 1/255: mean, worst image | {np.mean(pixels):.5%}, {np.min(pixels):.4%} |",
        f"| change of an image's `clip_similarity`: mean, largest | {difference.mean():.1e}, {difference.max():.1e} |",
        f"| change of a layer's importance: largest | {(importance[0] - importance[1]).abs().max():.1e} |",
        f"| noise floor: 1 - similarity of baselines of one prompt, other seed | {1 - np.mean(floors):.4f} |",
    ]


def _pixels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path)).astype(int)


def _noise_floor(folder: Path, frame: pd.DataFrame) -> list[float]:
    from lesion.scoring import ScorerSpec, Shot, make_scorer

    scorer = make_scorer(ScorerSpec("embedded", "embedded", None, ("clip_similarity",)), "cpu")
    shots = []
    for _, group in frame[frame.selection == "none"].groupby("prompt"):
        images = [_pixels(folder / name).astype(np.uint8) for name in group.image]
        shots.append(Shot("a", images[0], "b", images[1], group.prompt.iloc[0]))
    return list(scorer.score(shots)["clip_similarity"])


def machine(device: str) -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    what = torch.cuda.get_device_name() if device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    return f"{what}, {cpu}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="speed, batch (default: both)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    args = parser.parse_args()
    parts = args.parts or ["speed", "batch"]
    if unknown := set(parts) - {"speed", "batch"}:
        parser.error(f"unknown part {min(unknown)!r}; choose from speed, batch")
    lines = [
        "# Benchmarks",
        "",
        f"Written by `make bench` (`python scripts/benchmark.py`) on {machine(args.device)}.",
        "Machines are noisy: compare ratios within one run, not seconds between runs.",
    ]
    if "speed" in parts:
        lines += ["", *speed(args.repeats, args.device)]
    if "batch" in parts:
        lines += ["", *batch_effect(args.device)]
    text = "\n".join(lines) + "\n"
    print(text)
    if len(parts) == 2:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)


if __name__ == "__main__":
    main()
