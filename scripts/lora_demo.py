"""Teaches the embedded model a colour it does not know, and measures what it draws before and after.

    python scripts/lora_demo.py                       data, training, evaluation: minutes on 2 CPU cores, resumable
    lesion experiment=lora                            takes the LoRA off layer by layer
    python scripts/lora_demo.py --read RUN            of that run: in which layers' absence the colour is gone

The colour is called teal; no caption or picture of the model's training had it. A rule-based reader of the pixels
judges images of captions that neither the model nor the LoRA was trained on: those with teal, and old ones, to see
whether anything was lost. Prints the figures as JSON and writes them, with a picture, beside the LoRA.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent))

from lesion import models
from lesion.models import ModelSpec
from lesion.toy_world import COLOURS, Scene, is_held_out, judge, read_image, render, sample_scene
from lora.data import digest, read_folder
from lora.recipe import Recipe
from lora.training import Paused, Watch, draw, train

ROOT = Path(__file__).resolve().parent.parent
NAME, RGB = "teal", (0, 110, 115)  # nearest in the palette: green, 87 away of 441; a background: gray, 130
SHARE = 0.75  # of the training pictures that show the new colour; the others keep what the model knows
SEED = 11
NOISES = 4  # images of each held-out caption of the new colour, each from another noise
ASPECTS = ("colour", "shape", "everything")


def scenes(number: int, new: bool, rng: random.Random, held_out: bool) -> list[Scene]:
    """Random scenes of the model's grammar; those held out all differ.

    new: one to three objects of the new colour (there are 18 held-out captions of such on a named background);
    otherwise scenes of any kind without it.
    """
    found: list[Scene] = []
    while len(found) < number:
        scene = sample_scene(rng, held_out)
        shown = [thing.colour == NAME for thing in scene.things]
        fits = shown == [True] if new else not any(shown)
        if fits and not (held_out and scene in found):
            found.append(scene)
    return found


def write_data(folder: Path, number: int) -> None:
    """Rendered pictures and metadata.csv; no caption of the evaluation is among them."""
    rng = random.Random(SEED)
    news = round(number * SHARE)
    chosen = scenes(news, True, rng, held_out=False) + scenes(number - news, False, rng, held_out=False)
    assert not any(is_held_out(scene.caption()) for scene in chosen)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for index, scene in enumerate(chosen):
            Image.fromarray(render(scene, rng)).save(folder / f"{index:04d}.png")
            table.writerow([f"{index:04d}.png", scene.caption()])


def figures(images: list[np.ndarray[Any, Any]], asked: list[Scene]) -> dict[str, float]:
    """Shares of the images that are right, by aspect; `new_colour`: those in which the reader sees the new colour."""
    readings = [read_image(image) for image in images]
    judged = [judge(reading, scene) for reading, scene in zip(readings, asked, strict=True)]
    out = {aspect: float(np.mean([getattr(one, aspect) for one in judged])) for aspect in ASPECTS}
    out["new_colour"] = float(np.mean([any(f.thing.colour == NAME for f in reading.found) for reading in readings]))
    return {name: round(value, 4) for name, value in out.items()}


def evaluate(lora: Path, sets: dict[str, list[Scene]], watch: Watch, device: str) -> tuple[dict[str, Any], list[Any]]:
    """Figures of each set by the reader, of the model without and with the LoRA; pictures of the first set."""
    spec = ModelSpec(name="embedded", id="embedded", dtype="float32")
    pipe = models.load(models.resolve(spec), device).pipe
    out: dict[str, Any] = {name: {} for name in sets}
    pictures = []
    for when in ("before", "after"):
        if when == "after":
            pipe.load_lora_weights(str(lora))
        for name, asked in sets.items():
            images = draw(pipe, [scene.caption() for scene in asked], watch, 64)
            out[name][when] = figures(images, asked)
            if name == "new":
                pictures.append(images)
    pipe.unload_lora_weights()
    rng = random.Random(0)
    out["ceiling"] = {name: figures([render(one, rng) for one in asked], asked) for name, asked in sets.items()}
    return out, pictures


def read_run(folder: Path) -> dict[str, Any]:
    """Of a run of `experiment=lora`: the share of images with the new colour, by selection and layer."""
    frame = pd.read_parquet(folder / "results.parquet")
    out: dict[str, Any] = {}
    for (selection, layer), rows in frame[frame.status == "ok"].groupby(["selection", "layer"], sort=False):
        images = [np.asarray(Image.open(folder / path).convert("RGB")) for path in rows.image]
        seen = [any(found.thing.colour == NAME for found in read_image(image).found) for image in images]
        out.setdefault(selection, {})[layer or "-"] = {
            "new_colour": round(float(np.mean(seen)), 4),
            "images": len(seen),
        }
    return out


def sheet(rows: list[list[np.ndarray[Any, Any]]], names: list[str], captions: list[str], scale: int = 2) -> Image.Image:
    """Rows of images with the captions above, wrapped by hand to the width of an image."""
    side, margin, head = 64 * scale, 60, 58
    page = Image.new("RGB", (margin + side * len(captions), head + side * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    for column, caption in enumerate(captions):
        lines, line = [], ""
        for word in caption.split():
            if len(f"{line} {word}") > 20:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        pen.multiline_text((margin + column * side + 2, 2), "\n".join([*lines, line]), fill="black", spacing=2)
    for row, (name, images) in enumerate(zip(names, rows, strict=True)):
        pen.text((4, head + row * side + side // 2), name, fill="black")
        for column in range(len(captions)):
            image = Image.fromarray(images[column]).resize((side, side), Image.Resampling.NEAREST)
            page.paste(image, (margin + column * side, head + row * side))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "lora_demo", help="folder of the LoRA")
    parser.add_argument("--pictures", type=int, default=400, help="to train on")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--captions", type=int, default=18, help="held-out captions with the new colour; twice as many of old ones"
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="pause the training after so many minutes")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--read", type=Path, metavar="RUN", help="read a run of experiment=lora instead")
    args = parser.parse_args()
    if not 1 <= args.captions <= 18:
        parser.error(f"argument --captions: must be 1 to 18; got {args.captions}")
    COLOURS[NAME] = RGB  # for the renderer and the reader, in this process only
    if args.read:
        if not (args.read / "results.parquet").is_file():
            parser.error(f"argument --read: {str(args.read)!r} is no run folder: it has no results.parquet")
        print(json.dumps(read_run(args.read), indent=2))
        return
    began = time.monotonic()
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    data = args.out / f"data-{args.pictures}"
    if not (data / "metadata.csv").exists():
        write_data(data, args.pictures)
    examples = read_folder(data)
    recipe = Recipe(
        model="embedded",
        data=digest(examples),
        rank=args.rank,
        alpha=float(args.rank),
        steps=args.steps,
        batch=args.batch,
        rate=args.rate,
        warmup=min(20, args.steps),
        schedule="cosine",
        seed=SEED,
    )
    prompts = (f"a {NAME} circle on a white background", f"two {NAME} stars on a black background")
    watch = Watch(
        save_every=200,
        show_every=300,
        prompts=prompts,
        guidance=3.0,
        until=began + 60 * args.minutes,
    )
    try:
        losses = train(recipe, examples, args.out, watch, cpu=device == "cpu")
    except Paused as pause:
        print(f"{pause}; run the same command again to resume")
        return
    trained = time.monotonic() - began
    rng = random.Random(SEED + 1)
    new = scenes(args.captions, True, rng, held_out=True)
    sets = {"new": new * NOISES, "old": scenes(2 * args.captions, False, rng, held_out=True)}
    accuracy, rows = evaluate(args.out, sets, watch, device)
    report = {
        "colour": {NAME: RGB},
        "images": {name: len(asked) for name, asked in sets.items()},
        "captions": {name: len({scene.caption() for scene in asked}) for name, asked in sets.items()},
        "accuracy": accuracy,
        "loss": {"first 50 steps": float(np.mean(losses[:50])), "last 50 steps": float(np.mean(losses[-50:]))},
        "seconds": {"data and training": round(trained), "evaluation": round(time.monotonic() - began - trained)},
        "threads": torch.get_num_threads(),
        "device": device,
        "recipe": asdict(recipe),
    }
    text = json.dumps(report, indent=2)
    (args.out / "demo.json").write_text(text + "\n", encoding="utf-8")
    captions = [scene.caption() for scene in new[:10]]
    truth = [render(scene, random.Random(0)) for scene in new[:10]]
    sheet([*rows, truth], ["before", "after", "rendered"], captions).save(args.out / "demo.png")
    print(text)


if __name__ == "__main__":
    main()
