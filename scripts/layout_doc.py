"""Prints the figures of docs/layout.md: boxes of the embedded model unsteered, steered, and steered by single layers.

python scripts/layout_doc.py                                          72 scenes, and each of all layers alone
python scripts/layout_doc.py --alone 0                                without the layers alone, in a fifth of the time
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import pandas as pd
from PIL import Image

import lesion

OTHERS = ("read_colour", "read_shape", "read_count", "read_size", "read_background", "read_binding")


def interval(values: pd.Series, times: int = 10_000) -> str:
    """Mean and 95 % percentile interval over scenes."""
    found = values.to_numpy(float)
    means = np.random.default_rng(0).choice(found, (times, len(found))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{found.mean():.3f} [{low:.3f}, {high:.3f}]"


def heading() -> None:
    print("| steering | mean IoU | success at 0.5 | area under the curve | other aspects right | distance |")
    print("| --- | --- | --- | --- | --- | --- |")


def area(values: pd.Series) -> pd.Series:
    """Return of each image the mean over thresholds of IoU from 0 to 1 of whether it reaches them."""
    thresholds = np.linspace(0, 1, 101)
    return values.map(lambda value: float((value >= thresholds).mean()))


def distance(frame: pd.DataFrame, other: pd.DataFrame) -> pd.Series:
    """Return the mean absolute difference of pixels, in [0, 1]."""

    def pixels(path: str) -> np.ndarray:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"), dtype=float) / 255

    pairs = zip(frame["file"], other.loc[frame.index, "file"], strict=True)
    return pd.Series([np.abs(pixels(a) - pixels(b)).mean() for a, b in pairs])


def line(name: str, frame: pd.DataFrame, unsteered: pd.DataFrame) -> None:
    """Print means over scenes, and in brackets the 95 % interval of the difference from the unsteered images."""

    def both(of: Callable[[pd.DataFrame], pd.Series]) -> str:
        gain = interval(of(frame) - of(unsteered)).partition(" ")[2] if frame is not unsteered else ""
        return f"{of(frame).mean():.3f} {gain}".strip()

    cells = [
        both(lambda one: one["box_iou"]),
        both(lambda one: one["box_success"]),
        both(lambda one: area(one["box_iou"])),
        both(lambda one: one[list(OTHERS)].fillna(1).min(axis=1)),
        interval(distance(frame, unsteered)) if frame is not unsteered else "0",
    ]
    print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=72)
    parser.add_argument("--alone", type=int, default=72, help="scenes over which each layer steers alone; 0: none")
    parser.add_argument("--layers", default="*", help="those that steer alone, a pattern")
    parser.add_argument("--store", default="store")
    args = parser.parse_args()
    common = {"tracker": "none", "store.dir": args.store}

    def made(scenes: int, **keys: object) -> pd.DataFrame:
        results = lesion.study("experiment=layout", **{**common, "prompts.sample": scenes, **keys}).run()
        frame = results.frame
        assert (frame["status"] == "ok").all()
        return frame.assign(file=[str(results.folder / name) for name in frame["image"]]).set_index("prompt_id")

    unsteered = made(args.scenes, steering="none", selection="none", replacement="zero")
    steered = made(args.scenes, selection="none")
    coarse = {"steering.layers": ["mid_block.*", "up_blocks.*"], "steering.mask": "whole"}
    heading()
    line("unsteered", unsteered, unsteered)
    line("mid and up, `whole`", made(args.scenes, selection="none", **coarse), unsteered)
    line("experiment=layout", steered, unsteered)
    print()
    if args.alone:
        keys = {"layers.include": [args.layers], "steering.layers": [args.layers]}
        alone = made(args.alone, selection="only_one", **keys)
        heading()
        few = unsteered.loc[alone.index.unique()]
        line("unsteered", few, few)
        line("all of them", alone[alone["layer"] == ""], few)
        single = dict(list(alone[alone["layer"] != ""].groupby("layer", sort=False)))
        for layer, rows in single.items():
            line(f"`{layer}` alone", rows, few)
        best = max(single, key=lambda layer: float(single[layer]["box_iou"].mean()))
        line(f"`{best}` alone, against experiment=layout", single[best], steered.loc[few.index])
        chosen = max(single, key=lambda layer: float(single[layer]["box_iou"].iloc[::2].mean()))
        line(f"best of every other scene, `{chosen}`, over the others", single[chosen].iloc[1::2], few.iloc[1::2])
        print()
    print("| boxes | unsteered | experiment=layout |")
    print("| --- | --- | --- |")
    for kind, rows in unsteered.groupby("aspects"):
        print(f"| {kind} | {rows['box_iou'].mean():.3f} | {steered.loc[rows.index, 'box_iou'].mean():.3f} |")


if __name__ == "__main__":
    main()
