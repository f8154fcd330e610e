"""Prints the figures of docs/layout.md: boxes of the embedded model unsteered, steered, and steered by single layers.

python scripts/layout_doc.py --scenes 24 --layers 'up_blocks.3.*' --store store
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd

import lesion

OTHERS = ("read_colour", "read_shape", "read_count", "read_size", "read_background", "read_binding")


def interval(values: pd.Series, times: int = 10_000) -> str:
    """Mean and 95 % percentile interval over scenes."""
    found = values.to_numpy(float)
    means = np.random.default_rng(0).choice(found, (times, len(found))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{found.mean():.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=72)
    parser.add_argument("--layers", default="up_blocks.3.*", help="those that steer alone, a pattern")
    parser.add_argument("--store", default="store")
    args = parser.parse_args()
    common = {"prompts.sample": args.scenes, "tracker": "none", "store.dir": args.store}

    def made(**keys: object) -> pd.DataFrame:
        found = lesion.study("experiment=layout", **{**common, **keys}).run().frame
        assert (found["status"] == "ok").all()
        return found.set_index("prompt_id")

    runs = {
        "unsteered": made(steering="none", selection="none", replacement="zero"),
        "mid and up, `whole`": made(
            selection="none", **{"steering.layers": ["mid_block.*", "up_blocks.*"], "steering.mask": "whole"}
        ),
        "experiment=layout": made(selection="none"),
    }
    alone = made(selection="only_one", **{"layers.include": [args.layers], "steering.layers": [args.layers]})
    for layer, rows in alone[alone["layer"] != ""].groupby("layer"):
        runs[f"`{layer}` alone"] = rows
    unsteered = runs["unsteered"]
    print("| steering | mean IoU | against unsteered | success at 0.5 | other aspects right | attention in the boxes |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, frame in runs.items():
        gain = frame["box_iou"] - unsteered["box_iou"]
        right = frame[list(OTHERS)].fillna(1).min(axis=1)
        mass = "" if frame["box_mass"].isna().all() else f"{frame['box_mass'].mean():.3f}"
        print(
            f"| {name} | {interval(frame['box_iou'])} | {interval(gain)} | {frame['box_success'].mean():.3f} "
            f"| {right.mean():.3f} | {mass} |"
        )
    print()
    print("| boxes | unsteered | experiment=layout |")
    print("| --- | --- | --- |")
    steered = runs["experiment=layout"]
    for kind, rows in unsteered.groupby("aspects"):
        print(f"| {kind} | {rows['box_iou'].mean():.3f} | {steered.loc[rows.index, 'box_iou'].mean():.3f} |")


if __name__ == "__main__":
    main()
