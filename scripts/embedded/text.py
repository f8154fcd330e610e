"""Stages `tokenizer` and `text`: a word-level CLIP tokenizer and a CLIPTextModel that understands captions.

The UNet learns relations only if the text features already tell "A above B" from "B above A". So the text encoder is
first taught to parse: linear read-outs at fixed padding positions (which see the whole caption, the attention being
causal) name the object on the left, right, top and bottom, the lone object, and the scene's background, count, size and
relation; read-outs at each shape word name the object it belongs to. Noise is added to what they read, so that what
they need is said loudly: said softly it reaches no attention of the UNet. The `unet` stage keeps them as a second loss,
or training would wear the softest away, who stands where; then they are thrown away.
"""

from __future__ import annotations

import copy
import json
import random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from embedded.common import CONTEXT_LENGTH, SEED, Run, backward, loop
from lesion.toy_world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Scene, sample_scene

STEPS, BATCH, RATE = 600, 192, 1e-3
NOISE = 1.0  # standard deviation of what is added to features before they are read; theirs is about 1, too
HOLD = 10.0  # of a text encoder trained further: weight of the features that are to stay as they are
WIDTH, LAYERS, HEADS = 128, 4, 4
PLACES = ("left", "right", "above", "below", "alone")  # one padding position each, from the last backwards
COLOUR, SHAPE, BACKGROUND, SIZE = (["", *names] for names in (COLOURS, SHAPES, BACKGROUNDS, SIZES))
RELATION = ["", *RELATIONS]


def train_tokenizer(run: Run) -> None:
    """Byte-pair merges learnt on captions until every word is one token; any other text falls back to bytes."""
    rng = random.Random(SEED)
    captions = [sample_scene(rng).caption() for _ in range(5000)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=5000, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(captions, trainer)
    merges = [
        tuple(merge) if not isinstance(merge, str) else tuple(merge.split(" "))
        for merge in json.loads(tokenizer.to_str())["model"]["merges"]
    ]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    made = CLIPTokenizer(vocabulary, merges, model_max_length=CONTEXT_LENGTH)
    made.save_pretrained(run.folder / "tokenizer")


def load_tokenizer(run: Run) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(run.folder / "tokenizer")


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids, (n, 32) int64, padded with the end token as Stable Diffusion does."""
    return tokenizer(
        captions, padding="max_length", max_length=CONTEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def build(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel._from_config(config, attn_implementation="eager")


class ReadOuts(nn.Module):
    """Linear classifiers on the noisy last hidden state, (b, 32, width), and their mean cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.thing = nn.ModuleList(nn.Linear(WIDTH, len(COLOUR) + len(SHAPE)) for _ in PLACES)
        self.scene = nn.Linear(WIDTH, len(BACKGROUND) + 4 + len(SIZE) + len(RELATION))
        self.word = nn.Linear(WIDTH, len(COLOUR) + len(SHAPE) + len(RELATION))

    def forward(self, hidden: torch.Tensor, scenes: list[Scene], words: list[list[int]]) -> dict[str, torch.Tensor]:
        losses, hits = [], []
        if self.training:
            hidden = hidden + NOISE * torch.randn_like(hidden)

        def score(logits: torch.Tensor, sizes: list[int], targets: list[list[int]]) -> None:
            target = torch.tensor(targets, device=logits.device)
            for part, wanted in zip(logits.split(sizes, -1), target.unbind(-1), strict=True):
                losses.append(F.cross_entropy(part, wanted))
                hits.append((part.argmax(-1) == wanted).float().mean())

        for index, place in enumerate(PLACES):
            logits = self.thing[index](hidden[:, -1 - index])
            score(logits, [len(COLOUR), len(SHAPE)], [_thing_at(scene, place) for scene in scenes])
        logits = self.scene(hidden[:, -1 - len(PLACES)])
        score(logits, [len(BACKGROUND), 4, len(SIZE), len(RELATION)], [_summary(scene) for scene in scenes])
        rows = [row for row, positions in enumerate(words) for _ in positions]
        columns = [position for positions in words for position in positions]
        targets = [target for scene in scenes for target in _word_targets(scene)]
        score(self.word(hidden[rows, columns]), [len(COLOUR), len(SHAPE), len(RELATION)], targets)
        return {"loss": torch.stack(losses).mean(), "right": torch.stack(hits).min()}


def _thing_at(scene: Scene, place: str) -> list[int]:
    thing = None
    if len(scene.things) == 1:
        thing = scene.things[0] if place == "alone" else None
    elif scene.relation:
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[scene.relation]
        thing = {scene.relation: scene.things[0], opposite: scene.things[1]}.get(place)
    return [COLOUR.index(thing.colour), SHAPE.index(thing.shape)] if thing else [0, 0]


def _summary(scene: Scene) -> list[int]:
    return [
        BACKGROUND.index(scene.background),
        scene.number_of_objects,
        SIZE.index(scene.things[0].size),
        RELATION.index(scene.relation),
    ]


def _word_targets(scene: Scene) -> list[list[int]]:
    """Of each shape word: its colour, its shape, and for the second one the relation just read."""
    return [
        [COLOUR.index(thing.colour), SHAPE.index(thing.shape), RELATION.index(scene.relation) if index else 0]
        for index, thing in enumerate(scene.things)
    ]


def shape_positions(caption: str) -> list[int]:
    """Token positions of the shape words (every word is one token, after the start token)."""
    stems = (*SHAPES, *(shape + "s" for shape in SHAPES), "crosses")
    return [1 + i for i, word in enumerate(caption.split()) if word in stems]


def trained_read_outs(run: Run) -> ReadOuts:
    """Those of the `text` stage, frozen."""
    read_outs = ReadOuts().to(run.device)
    state = torch.load(run.folder / "text.pt", map_location=run.device, weights_only=True)
    read_outs.load_state_dict(state["parts"]["read_outs"])
    return read_outs.train().requires_grad_(False)


def train(run: Run) -> None:
    torch.manual_seed(2)
    tokenizer = load_tokenizer(run)
    text, read_outs = build(tokenizer), ReadOuts().to(run.device).train()
    before = None
    start = run.folder / "text_start"  # see `train_embedded.py --start-from`
    if start.exists():
        text = CLIPTextModel.from_pretrained(start, attn_implementation="eager")
        before = copy.deepcopy(text).to(run.device).eval().requires_grad_(False)
    text = text.to(run.device).train()
    optimizer = torch.optim.AdamW([*text.parameters(), *read_outs.parameters()], lr=RATE, weight_decay=0.01)

    def step_fn(step: int, generator: torch.Generator) -> dict[str, float]:
        rng = random.Random(SEED + step)
        scenes = [sample_scene(rng) for _ in range(BATCH)]
        captions = [scene.caption() for scene in scenes]
        ids = tokenize(tokenizer, captions).to(run.device)
        hidden = text(ids).last_hidden_state
        figures = read_outs(hidden, scenes, [shape_positions(caption) for caption in captions])
        loss = figures["loss"]
        if before is not None:  # a UNet knows these features: only the read-outs' own positions may change
            kept = slice(0, -1 - len(PLACES))
            loss = loss + HOLD * F.mse_loss(hidden[:, kept], before(ids).last_hidden_state[:, kept])
        backward(loss, optimizer)
        return {key: float(value.detach()) for key, value in figures.items()}

    loop(run, "text", run.steps(STEPS), {"text": text, "read_outs": read_outs}, optimizer, step_fn)
    text.save_pretrained(run.folder / "text_encoder")
    text.eval(), read_outs.eval()
    rng = random.Random(0)
    scenes = [sample_scene(rng, held_out=True) for _ in range(512)]
    captions = [scene.caption() for scene in scenes]
    with torch.no_grad():
        hidden = text(tokenize(tokenizer, captions).to(run.device)).last_hidden_state
        figures = read_outs(hidden, scenes, [shape_positions(caption) for caption in captions])
    print(f"text: worst read-out right on {float(figures['right']):.1%} of 512 held-out captions")
