"""What the switches of `performance` give, and what they do to the scores."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pandas as pd
from scipy import stats

from bench.report import Row, alternate, ratios
from bench.setup import Options, Setup, job


def switches(this: Setup, options: Options) -> tuple[str, list[Row]]:
    """A leave-one-out study under each switch, against the same study in float32 without any."""
    plain = ["performance.dtype=float32"]
    asked = {
        "float32": plain,
        "bfloat16": ["performance.dtype=bfloat16"],
        "channels_last": [*plain, "performance.channels_last=true"],
        "decoder bfloat16": [*plain, "performance.decoder=bfloat16"],
    }
    if options.device.startswith("cuda"):
        asked |= {
            "float16": ["performance.dtype=float16"],
            "tf32": [*plain, "performance.tf32=true"],
            "decoder tf32": [*plain, "performance.decoder=tf32"],
        }
    if shutil.which("g++") and not options.quick:  # the inductor backend compiles C++ on a CPU, and helpers on a GPU
        asked["compile"] = [*plain, "performance.compile=true"]
    frames: dict[str, pd.DataFrame] = {}

    def measured(name: str) -> float:
        common = [*this.overrides(max(2, this.subjects // 2)), "selection=leave_one_out"]
        with tempfile.TemporaryDirectory(dir=options.scratch) as fresh:
            if name == "compile":  # not timed: compiling, which is done anew for every model that is loaded
                job(Path(fresh) / "first-store", Path(fresh) / "first", [*common, *asked[name]])
            seconds, frames[name] = job(Path(fresh) / "store", Path(fresh) / "run", [*common, *asked[name]])
        return len(frames[name]) / seconds

    found = alternate(options.repeats, {name: lambda name=name: measured(name) for name in asked})  # type: ignore[misc]
    base = frames["float32"]
    importance = 1 - base[base["layer"] != ""].groupby("layer")["clip_similarity"].mean()
    rows = []
    for name in [name for name in asked if name != "float32"]:
        frame = frames[name]
        change = (frame["clip_similarity"] - base["clip_similarity"]).abs()
        other = 1 - frame[frame["layer"] != ""].groupby("layer")["clip_similarity"].mean()
        order = stats.spearmanr(importance, other.reindex(importance.index)).statistic
        rows += [
            Row(name, "images a second / those of float32", ratios(found[name], found["float32"]), "x"),
            Row(
                f"{name}, scores",
                "change of an image's `clip_similarity`: mean, largest; of a layer's importance: largest; rank "
                "correlation of the importances",
                text=f"{change.mean():.1e}, {change.max():.1e}; {(importance - other).abs().max():.1e}; {order:.3f}",
            ),
        ]
    note = (
        f"Whole jobs of leave-one-out lesions, {len(base)} images each; each image is scored against the baseline made "
        f"under the same switch. Importances reach {importance.max():.2f}. {this.said()}, but for the switch named."
    )
    return note, rows
