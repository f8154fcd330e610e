"""Pictures of attention maps: each word over its image, layer by layer and merged, with and without lesions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lesion.analysis.importance import LEAVE_ONE_OUT
from lesion.analysis.maps import MEASURES, layer_means, word_means
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


# What a picture shows, by the end of its file's name.
CAPTIONS = {
    "": "The baseline: all layers merged, then each",
    "--lesioned": "With one layer lesioned: what all others look at, merged",
    "--steps": "The baseline step by step, all layers merged",
    "--heads": "The baseline head by head",
}


@dataclass(frozen=True)
class WordPicture:
    """One word of one prompt and seed. paths: pictures of its maps, by what they show (`CAPTIONS`)."""

    subject: str
    word: str
    paths: dict[str, Path]


@dataclass(frozen=True)
class _Lesioned:
    """The image under one lesion. effect: 1 - metric."""

    layer: str
    effect: float
    picture: Image.Image
    maps: ImageMaps


def pictures(run_dir: Path, frame: pd.DataFrame, metric: str, most: int | None = SUBJECTS) -> list[WordPicture]:
    """Draw grids/maps--…png for every word of the first `most` baselines that have maps; none where none were kept.

    Under each layer stands what its lesion does to this image: 1 - metric, where the run has it. Images of
    leave_one_out that have maps are drawn too: of the first setting, where there are several.
    """
    images = frame["image"][(frame["selection"] == BASELINE) & (frame["status"] == "ok")]
    with_maps = [place for place, image in images.items() if kept_file(run_dir, {"image": image})]
    few = frame.loc[with_maps[:most]].to_dict("records")

    def draw(row: dict[Any, Any]) -> list[WordPicture]:
        maps, picture = kept(run_dir, row), load(run_dir / str(row["image"]))
        if maps is None or picture is None or "cond" not in maps.layers:
            return []
        rows = _lesions(frame, row)
        effects = {str(one["layer"]): 1 - float(one[metric]) for one in rows if metric in one}
        lesioned = [found for one in rows if (found := _lesioned(run_dir, one, effects)) is not None]
        made = []
        stem = f"maps--{slug(str(row['model']))}--{slug(str(row['prompt_id']))}--seed{row['seed']}"
        subject = f"{clean(row['prompt'], 200)} (seed {row['seed']})"
        for place, word in enumerate(one for one in maps.entries["cond"] if one not in (SPECIAL, REST)):
            paths = {}
            for kind, tiles in _kinds(maps, word, picture, effects, lesioned).items():
                title = f"{clean(word, 60)} in: {clean(row['prompt'], 200)}"
                paths[kind] = run_dir / "grids" / f"{stem}--{place:02}-{slug(word)}{kind}.png"
                _save(_sheet(title, CAPTIONS[kind], tiles, picture), paths[kind])
            made.append(WordPicture(subject, word, paths))
        return made

    return [one for several in in_threads(draw, few) for one in several]


def files(made: list[WordPicture]) -> list[Path]:
    """Every file of these pictures."""
    return [path for one in made for path in one.paths.values()]


def kept_file(run_dir: Path, row: Any) -> bool:
    """Whether there is a file of maps beside a row's image."""
    place = beside_image(inside(row["image"]))
    return bool(place) and (run_dir / place).is_file()


def _kinds(
    maps: ImageMaps, word: str, picture: Image.Image, effects: dict[str, float], lesioned: list[_Lesioned]
) -> dict[str, list[Tile]]:
    """Tiles by what they show (`CAPTIONS`): of steps and heads where these were kept apart."""
    layers = maps.layers["cond"]
    whole = _tile("all layers", picture, merged(maps, (word,)))
    found = {"": [Tile("the image", "", picture), whole]}
    found[""] += [
        _tile(short_layer(layer), picture, maps.of(layer, word), _effect(effects.get(layer, math.nan)))
        for layer in layers
    ]
    under = [
        _tile(f"without {short_layer(one.layer)}", one.picture, merged(one.maps, (word,)), _effect(one.effect))
        for one in lesioned
        if word in one.maps.entries["cond"]
    ]
    if under:
        found["--lesioned"] = [replace(whole, caption="baseline"), *under]
    steps = min(one.shape[0] for one in layers.values())
    if steps > 1:
        found["--steps"] = [_tile(f"step {step}", picture, merged(maps, (word,), step=step)) for step in range(steps)]
    if max(one.shape[1] for one in layers.values()) > 1:
        found["--heads"] = [
            _tile(f"{short_layer(layer)} head {head}", picture, maps.of(layer, word, head=head))
            for layer, values in layers.items()
            for head in range(values.shape[1])
        ]
    return found


def _tile(caption: str, picture: Image.Image, values: NDArray[np.float32], more: str = "") -> Tile:
    return Tile(caption, "; ".join(filter(None, (_range(values), more))), over(picture, values))


def _effect(value: float) -> str:
    return f"effect {number(value)}" if math.isfinite(value) else ""


def _range(values: NDArray[np.float32]) -> str:
    return f"{float(values.min()):.2g} to {float(values.max()):.2g}"


def over(picture: Image.Image, values: NDArray[np.float32]) -> Image.Image:
    """The picture in grey, as large as its tile, under a map whose colours run from its least to its largest value."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    scaled = (np.nan_to_num(values, nan=low) - low) / (high - low if high > low else 1)
    grey = picture.convert("L").convert("RGB")
    width, height = tile_size([picture])
    if width > picture.width:  # small ones grow before the map is laid over them, so that it stays smooth
        grey = grey.resize((width, height), Image.Resampling.NEAREST)
    heat = resized(scaled.astype(np.float32), (grey.height, grey.width))
    colours = Image.fromarray((_HEAT(heat)[..., :3] * 255).astype(np.uint8))
    return Image.blend(grey, colours, 0.65)


def _lesions(frame: pd.DataFrame, row: dict[Any, Any]) -> list[dict[Any, Any]]:
    """The rows with one layer lesioned each, in forward order; of the first setting, where there are several."""
    same = (frame["model"] == row["model"]) & (frame["prompt_id"] == row["prompt_id"]) & (frame["seed"] == row["seed"])
    here = frame[same & (frame["selection"] == LEAVE_ONE_OUT) & (frame["status"] == "ok")].drop_duplicates("layer")
    found: list[dict[Any, Any]] = here.sort_values("layer_index", kind="stable").to_dict("records")
    return found


def _lesioned(run_dir: Path, row: dict[Any, Any], effects: dict[str, float]) -> _Lesioned | None:
    """The image of a lesion with its maps; None where it has none."""
    maps, picture = kept(run_dir, row), load(run_dir / str(row["image"]))
    if maps is None or picture is None or not maps.layers.get("cond"):
        return None
    return _Lesioned(str(row["layer"]), effects.get(str(row["layer"]), math.nan), picture, maps)


def _sheet(title: str, caption: str, tiles: list[Tile], picture: Image.Image) -> Image.Image:
    size = tile_size([picture])
    head, small = font(16, True), font(12)
    columns = min(COLUMNS, len(tiles))
    width = max(columns * (size[0] + GAP) + GAP, 480)
    lines = wrap(title, head, width - 2 * GAP, 2)
    below_title = GAP + len(lines) * line_height(head)
    top = below_title + line_height(small) + GAP
    pitch = size[1] + 4 * line_height(small) + GAP
    canvas = Image.new("RGB", (width, top + -(-len(tiles) // columns) * pitch), PAPER)
    draw = ImageDraw.Draw(canvas)
    write(draw, (GAP, GAP), list(lines), head)
    write(draw, (GAP, below_title), [caption], small)
    for place, tile in enumerate(tiles):
        x, y = GAP + place % columns * (size[0] + GAP), top + place // columns * pitch
        paint(canvas, tile, (x, y), size)
        below = [line for part in (tile.caption, *tile.score.split("; ")) for line in wrap(part, small, size[0], 2)]
        write(draw, (x, y + size[1]), below, small, centre=size[0])
    return canvas


def by_subject(made: list[WordPicture]) -> dict[str, list[WordPicture]]:
    """The pictures of each prompt and seed."""
    return {subject: [one for one in made if one.subject == subject] for subject in in_order(x.subject for x in made)}


def tables(maps: pd.DataFrame) -> list[Table]:
    """Means of the baselines' maps by layer and aspect, and by word; columns are explained in docs/attention.md."""
    measures = [Column(name, name.replace("_", " ").replace("iou", "IoU")) for name in MEASURES]
    measures.append(Column("n_prompts", "prompts", "count"))
    words = (
        "What the layers of the baselines look at, by the aspect that a word is about: share of the attention, spread "
        "(entropy, 0 to 1), and against the pixels that the word speaks of: mass inside, IoU at the best threshold, "
        "average precision."
    )
    by_layer = [Column("map_layer", "layer", "code"), Column("aspect", "words", "text"), *measures]
    by_word = [Column("word", "word", "text"), Column("aspect", "aspect", "text"), *measures]
    said = "The same by word, mean over all layers: which words are looked at where they are drawn."
    return [
        Table.of("maps", "Attention maps by layer and aspect", words, by_layer, layer_means(maps), lead=2),
        Table.of("maps-words", "Attention maps by word", said, by_word, word_means(maps), lead=2),
    ]
