"""Measures the embedded model on captions it never saw: what is asked for, and what is drawn.

    python scripts/evaluate_embedded.py --captions 256

Two judges: a rule-based reader of the pixels, and the small CLIP (which picks, among captions that differ in one
respect, the one nearest to the image). Each also judges rendered ground truth, which is the ceiling of the judge.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from lesion.models import EMBEDDED
from lesion.toy_world import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    judge,
    parse_caption,
    read_image,
    render,
    sample_scene,
)

ASPECTS = ("background", "colour", "shape", "count", "size", "binding", "relation", "everything")


def held_out_scenes(number: int, seed: int) -> list[Scene]:
    """Scenes with different held-out captions, in the training proportions."""
    rng, found = random.Random(seed), dict[str, Scene]()
    while len(found) < number:
        scene = sample_scene(rng, held_out=True)
        found.setdefault(scene.caption(), scene)
    return list(found.values())


def draw(folder: Path, captions: list[str], device: str, steps: int, guidance: float, batch: int) -> list[np.ndarray]:
    """One image a caption by plain diffusers, seed = index of the caption."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    images: list[np.ndarray] = []
    for start in range(0, len(captions), batch):
        texts = captions[start : start + batch]
        generators = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(texts))]
        made = pipe(
            texts, generator=generators, num_inference_steps=steps, guidance_scale=guidance, output_type="pil"
        ).images
        images += [np.asarray(image) for image in made]
    return images


def by_pixels(images: list[np.ndarray], scenes: list[Scene]) -> dict[str, tuple[int, int]]:
    """Right and asked, for each aspect."""
    judgements = [judge(read_image(image), scene) for image, scene in zip(images, scenes, strict=True)]
    out = {}
    for aspect in ASPECTS:
        values = [value for value in (getattr(judgement, aspect) for judgement in judgements) if value is not None]
        out[aspect] = (sum(values), len(values))
    return out


def alternatives(scene: Scene, aspect: str) -> list[Scene]:
    """The scene and those that differ from it in this aspect alone; only itself where the scene does not ask for it."""

    def with_first(**change: str) -> Scene:
        return replace(scene, things=(replace(scene.things[0], **change), *scene.things[1:]))

    pair = len(scene.things) == 2
    makers: dict[str, Callable[[], Iterator[Scene]]] = {
        "background": lambda: (replace(scene, background=b) for b in BACKGROUNDS if scene.background),
        "colour": lambda: (with_first(colour=c) for c in COLOURS),
        "shape": lambda: (with_first(shape=s) for s in SHAPES),
        "count": lambda: (replace(scene, count=n) for n in (1, 2, 3) if not pair and not scene.things[0].size),
        "size": lambda: (with_first(size=s) for s in SIZES if scene.things[0].size),
        "binding": lambda: iter([_colours_swapped(scene)] if pair else []),
        "relation": lambda: (replace(scene, relation=r) for r in RELATIONS if scene.relation),
    }
    found = list(makers[aspect]())
    return [scene, *(other for other in found if other != scene and len(set(other.things)) == len(other.things))]


def _colours_swapped(scene: Scene) -> Scene:
    a, b = scene.things
    return replace(scene, things=(replace(a, colour=b.colour), replace(b, colour=a.colour)))


def by_clip(images: list[np.ndarray], scenes: list[Scene], folder: Path) -> dict[str, tuple[int, int]]:
    """How often the small CLIP finds the right caption among those that differ in one aspect; right and asked."""
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    clip.eval()
    out = {}
    with torch.inference_mode():
        seen = clip.encode_image(torch.stack([preprocess(Image.fromarray(image)) for image in images]), normalize=True)
        for aspect in ASPECTS[:-1]:
            right = asked = 0
            for embedding, scene in zip(seen, scenes, strict=True):
                captions = [other.caption() for other in alternatives(scene, aspect)]
                if len(captions) > 1:
                    scores = clip.encode_text(tokenizer(captions), normalize=True) @ embedding
                    right, asked = right + int(scores.argmax() == 0), asked + 1
            out[aspect] = (right, asked)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=EMBEDDED)
    parser.add_argument("--captions", type=int, default=256, help="how many; quote figures of 200 or more")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of captions")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--pictures", type=Path, help="also write a sheet of the images here")
    args = parser.parse_args()
    scenes = held_out_scenes(args.captions, args.seed)
    captions = [scene.caption() for scene in scenes]
    assert [parse_caption(caption) for caption in captions] == scenes
    images = draw(args.folder, captions, args.device, args.steps, args.guidance, args.batch)
    rng = random.Random(args.seed)
    truth = [render(scene, rng) for scene in scenes]
    columns = {"generated, pixels": by_pixels(images, scenes), "ceiling, pixels": by_pixels(truth, scenes)}
    if (args.folder / "clip").is_dir():
        columns["generated, CLIP"] = by_clip(images, scenes, args.folder / "clip")
        columns["ceiling, CLIP"] = by_clip(truth, scenes, args.folder / "clip")
    print(f"{len(scenes)} held-out captions, {args.steps} steps, guidance {args.guidance}; right / asked")
    print(f"{'':12}" + "".join(f"{name:>24}" for name in columns))
    for aspect in ASPECTS:
        cells = [values.get(aspect, (0, 0)) for values in columns.values()]
        shown = [f"{right / asked:.1%} ({right}/{asked})" if asked else "" for right, asked in cells]
        print(f"{aspect:12}" + "".join(f"{text:>24}" for text in shown))
    if args.json:
        args.json.write_text(json.dumps(columns, indent=2) + "\n", encoding="utf-8")
    if args.pictures:
        rows = [np.concatenate(images[i : i + 16], axis=1) for i in range(0, len(images) // 16 * 16, 16)]
        Image.fromarray(np.concatenate(rows)).save(args.pictures)


if __name__ == "__main__":
    main()
