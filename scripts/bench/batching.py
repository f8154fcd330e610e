"""How much the batch size changes images and scores: the same cells together and one at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from bench.report import Row
from bench.setup import Options, Setup, job
from lesion.scoring import ScorerSpec, Shot, make_scorer


def batch(this: Setup, options: Options) -> tuple[str, list[Row]]:
    """The leave-one-out study of two prompts and two seeds, in batches and one at a time."""
    asked = [*this.overrides(2), "seeds=[0,1]", "selection=leave_one_out"]
    frames, runs = {}, {}
    for size in (this.batch, 1):
        runs[size] = options.scratch / f"batch-{this.model}-{size}"
        store = options.scratch / f"batch-{this.model}-{size}-store"
        _, frames[size] = job(store, runs[size], [*asked, f"generation.batch_size={size}"])
    together, alone = frames.values()
    agreeing = [
        (np.abs(_pixels(folders[0] / a) - _pixels(folders[1] / b)) <= 1).mean()
        for a, b in zip(together["image"], alone["image"], strict=True)
        for folders in [tuple(runs.values())]
    ]
    floors = _noise_floor(runs[this.batch], together)
    difference = (together["clip_similarity"] - alone["clip_similarity"]).abs()
    layers = [frame[frame["layer"] != ""].groupby("layer")["clip_similarity"].mean() for frame in (together, alone)]
    change = (layers[0] - layers[1]).abs().max()
    similarity = "change of an image's `clip_similarity`: mean, largest"
    floor = "1 - similarity of two baselines of one prompt with different seeds"
    rows = [
        Row(
            "pixels",
            "share that agrees to 1/255: mean, worst image",
            text=f"{np.mean(agreeing):.5%}, {np.min(agreeing):.4%}",
        ),
        Row("scores", similarity, text=f"{difference.mean():.1e}, {difference.max():.1e}"),
        Row("importance", "change of a layer's importance: largest", text=f"{change:.1e}"),
        Row("noise floor", floor, text=f"{1 - np.mean(floors):.4f}"),
    ]
    note = (
        f"The same cells in batches of {this.batch} and one at a time: {len(together)} images (baseline and "
        f"leave-one-out). {this.said()}."
    )
    return note, rows


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def _noise_floor(folder: Path, frame: pd.DataFrame) -> list[float]:
    scorer = make_scorer(ScorerSpec("embedded", "embedded", None, ("clip_similarity",)), "cpu")
    shots = []
    for prompt, group in frame[frame["selection"] == "none"].groupby("prompt"):
        images = [_pixels(folder / name).astype(np.uint8) for name in group["image"]]
        shots.append(Shot("a", images[0], "b", images[1], str(prompt)))
    return list(scorer.score(shots)["clip_similarity"])
