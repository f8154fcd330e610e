"""Comparison pictures: one prompt and seed under every lesion, and layers x prompts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image, ImageDraw

from lesion.analysis.importance import LEAVE_ONE_OUT, ONLY_ONE
from lesion.analysis.settings import BASELINE, Setting, in_order, layers_in_order, only_setting, rows
from lesion.report.boxes import LEGEND, legend, marks
from lesion.report.canvas import (
    FAINT,
    GAP,
    MAX_WIDTH,
    PAPER,
    Tile,
    font,
    line_height,
    load,
    paint,
    tile_size,
    wrap,
    write,
)
from lesion.report.text import clean, number

HEADINGS = {
    LEAVE_ONE_OUT: "leave-one-out: this layer lesioned, every other intact",
    ONLY_ONE: "only-one: this layer intact, every other lesioned",
    "all": "all: every layer lesioned (text-blind control)",
}


def _setting(frame: pd.DataFrame, replacement: str | None, wanted: dict[str, Any]) -> tuple[Setting, pd.DataFrame]:
    setting = only_setting(frame, replacement=replacement, **wanted)
    return setting, rows(frame, setting)


def _selections(part: pd.DataFrame) -> list[str]:
    """Lesion selections present: leave-one-out, only-one, others, and the control last."""
    present = [name for name in in_order(part["selection"]) if name != BASELINE]
    others = [name for name in present if name not in HEADINGS]
    return [name for name in (LEAVE_ONE_OUT, ONLY_ONE, *others, "all") if name in present]


@dataclass(frozen=True)
class Scope:
    """What every comparison picture of one setting shares; made once, not once a picture."""

    setting: Setting
    layers: list[str]
    selections: list[str]

    @classmethod
    def of(cls, part: pd.DataFrame, setting: Setting) -> Scope:
        """`part` holds the rows of the setting."""
        layers = layers_in_order(part[["layer", "layer_index"]][part["selection"].isin((LEAVE_ONE_OUT, ONLY_ONE))])
        return cls(setting, layers, _selections(part))


def _tile(record: dict[Hashable, Any] | None, caption: str, run_dir: Path, metric: str) -> Tile:
    if record is None:
        return Tile(caption, "n/a", trouble="missing: not in the results")
    if record["status"] != "ok":
        return Tile(caption, "n/a", trouble=f"{record['status']}: {clean(record.get('reason') or 'no reason given')}")
    picture = load(run_dir / str(record["image"])) if record["image"] else None
    trouble = "" if picture else "missing: no readable image file"
    return Tile(caption, number(float(record.get(metric, math.nan))), picture, trouble, marks(record, picture))


def _block(records: list[dict[Hashable, Any]], selection: str, scope: Scope, run_dir: Path, metric: str) -> list[Tile]:
    here = [record for record in records if record["selection"] == selection]
    if selection in (LEAVE_ONE_OUT, ONLY_ONE):
        by_layer = {record["layer"]: record for record in here}
        return [_tile(by_layer.get(name), name, run_dir, metric) for name in scope.layers]
    return [_tile(record, _together(record) or f"{selection} layers", run_dir, metric) for record in here]


def _together(record: dict[Hashable, Any]) -> str:
    """What is lesioned where it is not one layer: of a group, `lesioned` names the members."""
    return clean(record["layer"] or "") or clean(record.get("lesioned") or "", 200).replace("+", " + ")


def comparison(
    frame: pd.DataFrame,
    run_dir: Path,
    prompt_id: str,
    seed: int,
    replacement: str | None = None,
    *,
    metric: str = "clip_similarity",
    max_width: int = MAX_WIDTH,
    **wanted: Any,
) -> Image.Image:
    """One prompt and seed under every lesion of one setting: a block of tiles a selection, each led by the baseline.

    `wanted` narrows the setting (model, window_start, window_end, branch, strength); ValueError unless one is left.
    Missing, failed and invalid images are placeholders that name the reason. The score under a tile is the raw metric.
    """
    setting, part = _setting(frame, replacement, wanted)
    here = part[(part["prompt_id"] == prompt_id) & (part["seed"] == seed)]
    return compare(here, Scope.of(part, setting), run_dir, prompt_id, seed, metric=metric, max_width=max_width)


def compare(
    here: pd.DataFrame,
    scope: Scope,
    run_dir: Path,
    prompt_id: str,
    seed: int,
    *,
    metric: str = "clip_similarity",
    max_width: int = MAX_WIDTH,
) -> Image.Image:
    """`comparison` of rows that are already those of one setting, prompt and seed."""
    records = here.to_dict("records")
    first = next((record for record in records if record["selection"] == BASELINE), None)
    baseline = _tile(first, "baseline", run_dir, metric)
    blocks = [(HEADINGS.get(name, name), _block(records, name, scope, run_dir, metric)) for name in scope.selections]
    blocks = blocks or [("baseline", [])]
    tiles = [baseline, *(tile for _, block in blocks for tile in block)]
    size = tile_size([tile.picture for tile in tiles if tile.picture])
    prompt = str(records[0]["prompt"]) if records else prompt_id
    where = f"prompt {clean(prompt_id, 60)} · seed {seed} · {scope.setting.label}"
    details = f"{where} · under each image: {metric} to the baseline"
    if records and (boxes := legend(records[0])):
        details += f" · {clean(boxes, 300)}"
    return _draw_comparison(clean(prompt), details, baseline, blocks, size, max_width)


def _draw_comparison(
    title: str,
    details: str,
    baseline: Tile,
    blocks: list[tuple[str, list[Tile]]],
    size: tuple[int, int],
    max_width: int,
) -> Image.Image:
    pitch = size[0] + GAP
    columns = max(2, (max_width - GAP) // pitch)
    longest = max(len(block) for _, block in blocks)
    columns = min(columns, longest + 1)
    width = max(columns * pitch + GAP, 640)
    head, sub, small, strong = font(20, True), font(14), font(12), font(12, True)
    titles, notes = wrap(title, head, width - 2 * GAP, 2), wrap(details, sub, width - 2 * GAP, 5)
    captions = [wrap(tile.caption, small, size[0], 4) for _, block in blocks for tile in block]
    text_height = (max(map(len, captions), default=1) + 1) * line_height(small)
    row = size[1] + 4 + text_height + GAP
    beside = max(1, columns - 1)  # the first column belongs to the baseline
    heading = line_height(sub) + 6
    top = GAP + len(titles) * line_height(head) + len(notes) * line_height(sub) + GAP
    height = top + sum(heading + max(1, math.ceil(len(block) / beside)) * row for _, block in blocks) + GAP
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    y = write(draw, (GAP, GAP), titles, head)
    y = write(draw, (GAP, y), notes, sub, FAINT) + GAP
    for name, block in blocks:
        draw.line((GAP, y, width - GAP, y), fill=(200, 200, 200))
        write(draw, (GAP, y + 3), [name], sub)
        y += heading
        for index, tile in enumerate([baseline, *block]):
            line, column = (0, 0) if index == 0 else (divmod(index - 1, beside)[0], 1 + (index - 1) % beside)
            at = (GAP + column * pitch, y + line * row)
            paint(canvas, tile, at, size)
            below = write(draw, (at[0], at[1] + size[1] + 4), [tile.score], strong, centre=size[0])
            write(draw, (at[0], below), wrap(tile.caption, small, size[0], 4), small, centre=size[0])
        y += max(1, math.ceil(len(block) / beside)) * row
    return canvas


def layers_by_prompts(
    frame: pd.DataFrame,
    run_dir: Path,
    seed: int,
    selection: str = LEAVE_ONE_OUT,
    replacement: str | None = None,
    *,
    prompt_ids: Sequence[str] | None = None,
    metric: str = "clip_similarity",
    max_width: int = MAX_WIDTH,
    **wanted: Any,
) -> Image.Image:
    """Rows: the baseline, then layers in depth order; columns: prompts (those that do not fit start a block below)."""
    setting, part = _setting(frame, replacement, wanted)
    return layer_grid(
        part, setting, run_dir, seed, selection, prompt_ids=prompt_ids, metric=metric, max_width=max_width
    )


def layer_grid(
    part: pd.DataFrame,
    setting: Setting,
    run_dir: Path,
    seed: int,
    selection: str,
    *,
    prompt_ids: Sequence[str] | None = None,
    metric: str = "clip_similarity",
    max_width: int = MAX_WIDTH,
) -> Image.Image:
    """`layers_by_prompts` of rows that are already those of one setting."""
    asked = (part["seed"] == seed) & part["selection"].isin((BASELINE, selection))
    about = part.loc[asked, ["prompt_id", "layer", "layer_index"]]
    names = ["", *layers_in_order(about)]
    ids = list(prompt_ids) if prompt_ids is not None else in_order(about["prompt_id"])
    part = part[asked & part["prompt_id"].isin(ids)]
    texts = dict(zip(part["prompt_id"], part["prompt"], strict=True))
    records = {
        (record["prompt_id"], "" if record["selection"] == BASELINE else record["layer"] or selection): record
        for record in part.to_dict("records")
    }
    table = [[_tile(records.get((one, name)), name, run_dir, metric) for one in ids] for name in names]
    size = tile_size([tile.picture for line in table for tile in line if tile.picture])
    small, strong, sub, head = font(12), font(12, True), font(14), font(20, True)
    left, pitch = 190, size[0] + GAP
    columns = max(1, min(len(ids), (max_width - left - 2 * GAP) // pitch))
    width = max(left + columns * pitch + 2 * GAP, 640)
    titles = wrap(f"{selection.replace('_', '-')}, seed {seed}", head, width - 2 * GAP, 1)
    details = f"{setting.label} · under each image: {metric} to the baseline"
    details += f" · {LEGEND}" if any(tile.marks for line in table for tile in line) else ""
    notes = wrap(details, sub, width - 2 * GAP, 3)
    labels = [wrap(f"{clean(one, 60)}: {clean(texts.get(one, ''))}", small, size[0], 5) for one in ids]
    heading = max(map(len, labels), default=1) * line_height(small) + 4
    row = size[1] + line_height(small) + GAP + 2
    top = GAP + line_height(head) * len(titles) + line_height(sub) * len(notes) + GAP
    starts = range(0, max(1, len(ids)), columns)
    canvas = Image.new("RGB", (width, top + len(starts) * (heading + len(names) * row + GAP)), PAPER)
    draw = ImageDraw.Draw(canvas)
    y = write(draw, (GAP, GAP), titles, head)
    y = write(draw, (GAP, y), notes, sub, FAINT) + GAP
    for start in starts:
        for column, label in enumerate(labels[start : start + columns]):
            lift = heading - 4 - len(label) * line_height(small)
            write(draw, (left + GAP + column * pitch, y + lift), label, small, centre=size[0])
        y += heading
        for name, line in zip(names, table, strict=True):
            lines = wrap(name or "baseline", font(13), left - GAP, 6)
            write(draw, (GAP, y + (size[1] - len(lines) * line_height(font(13))) // 2), lines, font(13))
            for column, tile in enumerate(line[start : start + columns]):
                at = (left + GAP + column * pitch, y)
                paint(canvas, tile, at, size)
                write(draw, (at[0], y + size[1] + 2), [tile.score], strong, centre=size[0])
            y += row
        y += GAP
    return canvas


def prompts_a_picture(frame: pd.DataFrame, run_dir: Path, max_width: int = MAX_WIDTH) -> int:
    """How many prompt columns fit side by side in `layers_by_prompts`."""
    shown = frame["image"][(frame["status"] == "ok") & (frame["image"].fillna("") != "")]
    picture = load(run_dir / str(shown.iloc[0])) if len(shown) else None
    return max(1, (max_width - 206) // (tile_size([picture] if picture else [])[0] + GAP))
