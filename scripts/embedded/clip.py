"""Stage `clip`: the small CLIP that scores the embedded model's images, in open_clip's own folder format.

A ResNet image tower and a text tower trained contrastively on rendered scenes. Every batch holds groups of one scene
and three near misses of it (another shape, another colour, and objects swapped or another count or background), so that
the embedding has to encode all of them and not just the colours.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from embedded.common import CONTEXT_LENGTH, SEED, Average, Run, backward, loop, pick
from embedded.text import load_tokenizer, tokenize
from lesion.toy_world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, Scene, is_held_out, render, sample_scene

STEPS, GROUPS, BATCH, RATE = 1500, 12288, 20, 1.5e-3
PER_GROUP = 4
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def model_config(vocabulary: int) -> dict[str, object]:
    return {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocabulary,
            "hf_tokenizer_name": "local",  # open_clip reads the tokenizer from the model's own folder
            "width": 96,
            "heads": 4,
            "layers": 3,
        },
    }


def build(vocabulary: int) -> open_clip.CLIP:
    config = model_config(vocabulary)
    return open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])


def near_misses(scene: Scene, rng: random.Random) -> list[Scene]:
    """Three scenes that differ from this one in one respect each; none has a held-out caption."""
    which = rng.randrange(len(scene.things))

    def other(names: list[str], than: str) -> str:
        return rng.choice([name for name in names if name != than])

    def with_thing(**change: str) -> Scene:
        things = list(scene.things)
        things[which] = replace(things[which], **change)
        return replace(scene, things=tuple(things))

    def elsewhere() -> Scene:
        if scene.relation and rng.random() < 0.7:
            if rng.random() < 0.5:
                return replace(scene, things=scene.things[::-1])
            return replace(scene, relation=other(list(RELATIONS), scene.relation))
        if scene.background and (len(scene.things) == 2 or rng.random() < 0.4):
            return replace(scene, background=other(list(BACKGROUNDS), scene.background))
        if len(scene.things) == 1 and not scene.things[0].size:
            return replace(scene, count=rng.choice([n for n in (1, 2, 3) if n != scene.count]))
        if scene.things[0].size:
            return with_thing(size=other(["small", "large"], scene.things[0].size))
        return with_thing(colour=other(list(COLOURS), scene.things[which].colour))

    makers = [
        lambda: with_thing(shape=other(list(SHAPES), scene.things[which].shape)),
        lambda: with_thing(colour=other(list(COLOURS), scene.things[which].colour)),
        elsewhere,
    ]
    found: list[Scene] = []
    for make in makers:
        made = make()
        for _ in range(20):
            fits = made not in [scene, *found] and len(set(made.things)) == len(made.things)
            if fits and not is_held_out(made.caption()):
                break
            made = make()
        else:  # the only near miss of this kind is held out
            made = sample_scene(rng)
        found.append(made)
    return found


def groups(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (groups, 4, 3, 64, 64) uint8 and token ids (groups, 4, 32)."""
    number = 64 if run.quick else GROUPS
    path = run.folder / f"groups-{number}.npz"
    if not path.exists():
        rng = random.Random(SEED + 1)
        images, captions = [], []
        for _ in tqdm(range(number), desc="render groups", mininterval=5):
            scene = sample_scene(rng)
            members = [scene, *near_misses(scene, rng)]
            images.append(np.stack([render(member, rng) for member in members]))
            captions.extend(member.caption() for member in members)
        np.savez(path, images=np.stack(images), captions=np.array(captions))
    with np.load(path) as data:
        ids = tokenize(load_tokenizer(run), [str(c) for c in data["captions"]])
        images = torch.from_numpy(data["images"]).permute(0, 1, 4, 2, 3).contiguous()
    return images, ids.reshape(number, PER_GROUP, -1)


def normalise(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1  # the same as MEAN and STD on values in [0, 1]


def train(run: Run) -> None:
    torch.manual_seed(4)
    images, ids = groups(run)
    tokenizer = load_tokenizer(run)
    clip = build(len(tokenizer)).to(run.device).train()
    average = Average(clip, 0.998)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.05)

    def step_fn(step: int, generator: torch.Generator) -> dict[str, float]:
        rows = pick(len(images), BATCH, generator)
        pictures, tokens = images[rows].flatten(0, 1), ids[rows].flatten(0, 1)
        seen, read, scale = clip(normalise(pictures).to(run.device), tokens.to(run.device))
        logits = scale.clamp(max=50.0) * seen @ read.T
        target = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        backward(loss, optimizer)
        return {"loss": float(loss.detach()), "top1": float((logits.argmax(1) == target).float().mean())}

    loop(run, "clip", run.steps(STEPS), {"clip": clip}, optimizer, step_fn, {"clip": average})
    save(average.module, run, len(tokenizer))


def save(clip: torch.nn.Module, run: Run, vocabulary: int) -> None:
    """open_clip's `local-dir:` layout: configuration, half-precision weights and the tokenizer's files."""
    folder = run.folder / "clip"
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": model_config(vocabulary), "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in clip.state_dict().items()
    }
    save_file(weights, folder / "open_clip_model.safetensors")
    for file in (run.folder / "tokenizer").iterdir():
        shutil.copy(file, folder / file.name)
