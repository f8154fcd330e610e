"""Pictures of attention maps: each word over its image, layer by layer and merged, beside the lesion's effect."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lesion.analysis.importance import LEAVE_ONE_OUT
from lesion.analysis.maps import MEASURES, layer_means
from lesion.analysis.settings import BASELINE, in_order, slug
from lesion.report.canvas import GAP, PAPER, Tile, font, line_height, load, paint, tile_size, wrap, write
from lesion.report.data import inside
from lesion.report.maps import kept, merged, resized
from lesion.report.pictures import _save, in_threads
from lesion.report.tables import Column, Table
from lesion.report.text import clean, number, short_layer
from lesion.store.maps import ImageMaps, beside_image
from lesion.study.capture import REST, SPECIAL

SUBJECTS = 16  # prompts and seeds of which a report has pictures unless all are asked for
COLUMNS = 6  # tiles in a row
_HEAT = colormaps["inferno"]


@dataclass(frozen=True)
class WordPicture:
    """One word of one prompt and seed: the picture of its maps."""

    subject: str
    word: str
    path: Path


def pictures(run_dir: Path, frame: pd.DataFrame, metric: str, most: int | None = SUBJECTS) -> list[WordPicture]:
    """Draw grids/maps--…png for every word of the first `most` baselines that have maps; none where none were kept.

    Under each layer stands what its lesion does to this image: 1 - metric, where the run has it.
    """
    there = frame[(frame["selection"] == BASELINE) & (frame["status"] == "ok")]
    with_maps = [row for row in there.to_dict("records") if kept_file(run_dir, row)]
    few = with_maps if most is None else with_maps[:most]

    def draw(row: dict[Any, Any]) -> list[WordPicture]:
        maps, picture = kept(run_dir, row), load(run_dir / str(row["image"]))
        if maps is None or picture is None or "cond" not in maps.layers:
            return []
        effects = _effects(frame, row, metric)
        made = []
        stem = f"maps--{slug(str(row['model']))}--{slug(str(row['prompt_id']))}--seed{row['seed']}"
        subject = f"{clean(row['prompt'], 200)} (seed {row['seed']})"
        for place, word in enumerate(one for one in maps.entries["cond"] if one not in (SPECIAL, REST)):
            for kind, tiles in _kinds(maps, word, picture, effects).items():
                title = f"{clean(word, 60)} in: {clean(row['prompt'], 200)}"
                path = run_dir / "grids" / f"{stem}--{place:02}-{slug(word)}{kind}.png"
                _save(_sheet(title, tiles, picture), path)
                if not kind:
                    made.append(WordPicture(subject, word, path))
        return made

    return [one for several in in_threads(draw, few) for one in several]


def files(made: list[WordPicture]) -> list[Path]:
    """Every file that belongs to these pictures, those of heads and steps too."""
    return [path for one in made for path in sorted(one.path.parent.glob(f"{one.path.stem}*.png"))]


def kept_file(run_dir: Path, row: Any) -> bool:
    """Whether there is a file of maps beside a row's image."""
    place = beside_image(inside(row["image"]))
    return bool(place) and (run_dir / place).is_file()


def _kinds(maps: ImageMaps, word: str, picture: Image.Image, effects: dict[str, float]) -> dict[str, list[Tile]]:
    """Tiles by what they show, "" for layers; heads and steps where these were kept apart, all layers merged."""
    layers = maps.layers["cond"]
    everything = merged(maps, (word,))
    tiles = [Tile("the image", "", picture), Tile("all layers", _range(everything), over(picture, everything))]
    for layer in layers:
        values = maps.of(layer, word)
        words = f"; effect {number(effects[layer])}" if math.isfinite(effects.get(layer, math.nan)) else ""
        tiles.append(Tile(short_layer(layer), _range(values) + words, over(picture, values)))
    found = {"": tiles}
    steps, heads = (min(np.asarray(one).shape[axis] for one in layers.values()) for axis in (0, 1))
    for kind, total, name in (("--steps", steps, "step"), ("--heads", heads, "head")):
        if total > 1:
            asked = [(one, None) if name == "step" else (None, one) for one in range(total)]
            each = [merged(maps, (word,), step=step, head=head) for step, head in asked]
            found[kind] = [Tile(f"{name} {one}", _range(each[one]), over(picture, each[one])) for one in range(total)]
    return found


def _range(values: NDArray[np.float32]) -> str:
    return f"{float(values.min()):.2g} to {float(values.max()):.2g}"


def over(picture: Image.Image, values: NDArray[np.float32]) -> Image.Image:
    """The picture in grey under a map, whose colours run from its least to its largest value."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    scaled = (np.nan_to_num(values, nan=low) - low) / (high - low if high > low else 1)
    heat = resized(scaled.astype(np.float32), (picture.height, picture.width))
    colours = Image.fromarray((_HEAT(heat)[..., :3] * 255).astype(np.uint8))
    return Image.blend(picture.convert("L").convert("RGB"), colours, 0.65)


def _effects(frame: pd.DataFrame, row: dict[Any, Any], metric: str) -> dict[str, float]:
    """1 - metric of the image in which each layer alone is lesioned; of the first setting, where there are several."""
    same = (frame["model"] == row["model"]) & (frame["prompt_id"] == row["prompt_id"]) & (frame["seed"] == row["seed"])
    here = frame[same & (frame["selection"] == LEAVE_ONE_OUT) & (frame["status"] == "ok")].drop_duplicates("layer")
    if metric not in here:
        return {}
    return {str(layer): 1 - float(value) for layer, value in zip(here["layer"], here[metric], strict=True)}


def _sheet(title: str, tiles: list[Tile], picture: Image.Image) -> Image.Image:
    size = tile_size([picture])
    head, small = font(16, True), font(12)
    columns = min(COLUMNS, len(tiles))
    width = max(columns * (size[0] + GAP) + GAP, 480)
    lines = wrap(title, head, width - 2 * GAP, 2)
    top = GAP + len(lines) * line_height(head) + GAP
    pitch = size[1] + 4 * line_height(small) + GAP
    canvas = Image.new("RGB", (width, top + -(-len(tiles) // columns) * pitch), PAPER)
    draw = ImageDraw.Draw(canvas)
    write(draw, (GAP, GAP), list(lines), head)
    for place, tile in enumerate(tiles):
        x, y = GAP + place % columns * (size[0] + GAP), top + place // columns * pitch
        paint(canvas, tile, (x, y), size)
        below = [*wrap(tile.caption, small, size[0], 2), *wrap(tile.score, small, size[0], 2)]
        write(draw, (x, y + size[1]), below, small, centre=size[0])
    return canvas


def by_subject(made: list[WordPicture]) -> dict[str, list[WordPicture]]:
    """The pictures of each prompt and seed."""
    return {subject: [one for one in made if one.subject == subject] for subject in in_order(x.subject for x in made)}


def table(maps: pd.DataFrame) -> Table:
    """Means of the baselines' maps by layer and aspect; columns are explained in docs/attention.md."""
    columns = [Column("map_layer", "layer", "code"), Column("aspect", "words", "text")]
    columns += [Column(name, name.replace("_", " ")) for name in MEASURES]
    columns.append(Column("n_prompts", "prompts", "count"))
    words = (
        "What the layers of the baselines look at, by the aspect that a word is about: share of the attention, spread "
        "(entropy, 0 to 1), and against the pixels that the word speaks of: mass inside, IoU at the best threshold, "
        "average precision."
    )
    return Table.of("maps", "Attention maps by layer and aspect", words, columns, layer_means(maps), lead=2)
