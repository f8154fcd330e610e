"""Makes the pictures of docs/wandb.md from the files of an offline run: what W&B is given, shown without its web app.

    lesion prompts=colour prompts.limit=3 seeds=0 selection=leave_one_out hydra.run.dir=shown
    python scripts/wandb_pictures.py shown/wandb/offline-run-* docs/images

Needs Chromium on the path. The web app lays the same data out in its own way.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from page_picture import shoot

COLUMNS = ("baseline", "picture", "prompt", "seed", "selection", "replacement", "layer", "clip_similarity", "ssim")
ROWS = 5  # of the table: those that changed most
STYLE = """<style>body { font: 13px sans-serif; margin: 14px } table { border-collapse: collapse }
td, th { border: 1px solid #ccc; padding: 3px 7px; text-align: left } img { width: 56px; display: block }
.bar { background: #0072b2; height: 12px } .name { font-family: monospace }</style>"""


def logged(run: Path, pattern: str) -> tuple[str, list[str], list[list[Any]]]:
    """The name of the first table of a run's files that fits, its columns and rows."""
    paths = sorted((run / "files" / "media" / "table").glob(f"{pattern}.table.json"))
    if not paths:
        raise SystemExit(f"{run} has no table {pattern}")
    table = json.loads(paths[0].read_text(encoding="utf-8"))
    return paths[0].name, table["columns"], table["data"]


def picture(path: Path) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def results(run: Path) -> str:
    """The logged table of images, the columns and rows that fit a page; its pictures are those of the run folder."""
    _, columns, rows = logged(run, "results_*")
    frame = pd.DataFrame(rows, columns=columns)
    bare = frame[frame["selection"] == "none"].set_index(["prompt_id", "seed"])["image"]
    lines = []
    for row in frame[frame["selection"] != "none"].nsmallest(ROWS, "clip_similarity").to_dict("records"):
        row["baseline"] = picture(run.parents[1] / bare[row["prompt_id"], row["seed"]])
        row["picture"] = picture(run.parents[1] / row["image"])
        shown = (
            f"{row[name]:.3f}" if isinstance(row[name], float) else html.escape(str(row[name])) for name in COLUMNS[2:]
        )
        lines.append("".join(f"<td>{value}</td>" for value in (row["baseline"], row["picture"], *shown)))
    heads = "".join(f"<th>{name}</th>" for name in COLUMNS)
    return f"{STYLE}<table><tr>{heads}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def bars(run: Path) -> str:
    """The logged data of the first bar chart of layers."""
    file, _, rows = logged(run, "layers/*")
    top = max(abs(value) for _, value in rows) or 1.0
    lines = [
        f'<tr><td class="name">{html.escape(layer)}</td><td style="width:360px"><div class="bar" '
        f'style="width:{max(0.0, value) / top * 100:.1f}%"></div></td><td>{value:.4f}</td></tr>'
        for layer, value in rows
    ]
    name = file.split("_table_")[0]
    return f"{STYLE}<b>layers/{html.escape(name)}</b><table>{''.join(lines)}</table>"


def main(run: Path, folder: Path) -> None:
    for name, page, size in (("wandb-results", results(run), (1010, 400)), ("wandb-layers", bars(run), (680, 430))):
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "page.html"
            path.write_text(f'<!doctype html><meta charset="utf-8">{page}', encoding="utf-8")
            shoot(path, folder / f"{name}.png", size)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    main(arguments.run, arguments.folder)
