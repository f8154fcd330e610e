"""Boxes judged by a detector: a random OWLv2 of a few thousand weights, against transformers by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    CLIPTokenizer,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
)

from lesion.errors import RequestError
from lesion.scoring import ScorerSpec, Shot, _owlv2, check
from lesion.scoring._boxes import detected
from lesion.scoring._owlv2 import apart, iou
from lesion.scoring.box_iou import BoxIou
from lesion.scoring.box_success import BoxSuccess
from lesion.study.boxes import Box

WORDS = ("red circle", "star")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("owlv2")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (place / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(vocabulary)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(place / "vocab.json"), str(place / "merges.txt"), pad_token="a", model_max_length=32)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 32, "eos_token_id": len(vocabulary) - 1}
    model = Owlv2ForObjectDetection(
        Owlv2Config(
            text_config={**size, **text}, vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=16
        )
    )
    with torch.no_grad():  # fresh weights are so small that all patches would look alike
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "box_head" not in name:
                parameter.mul_(5)
    model.save_pretrained(place)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(place)
    return place


def shot(boxes: tuple[Box, ...] = (Box("red circle", (0.0, 0.0, 1.0, 1.0)), Box("star", (0.0, 0.0, 1.0, 0.9)))) -> Shot:
    image = np.random.default_rng(0).integers(0, 256, (36, 40, 3)).astype(np.uint8)
    return Shot("a", image, "b", image, "a red circle and a star", boxes)


def test_the_best_detection_of_each_box_is_transformers_own(folder):
    metric = BoxIou.of({"detector": str(folder)}, "scorer.metrics.box_iou")
    metric.load("cpu", 2)
    (value,) = metric([one := shot()])
    processor, model = Owlv2Processor.from_pretrained(folder), Owlv2ForObjectDetection.from_pretrained(folder).eval()
    queries = [[f"a photo of a {words}" for words in WORDS]]
    with torch.no_grad():
        outputs = model(**processor(text=queries, images=[one.image], return_tensors="pt"))
    scores, labels = outputs.logits[0].sigmoid().max(dim=1)
    expected = []
    for number, box in enumerate(one.boxes):
        best = 0.0
        for patch in scores.argsort(descending=True).tolist():
            x, y, width, height = outputs.pred_boxes[0, patch].tolist()
            # The image is padded to a square of 40 pixels below.
            place = [x - width / 2, (y - height / 2) * 40 / 36, x + width / 2, (y + height / 2) * 40 / 36]
            x_min, y_min, x_max, y_max = np.clip(place, 0, 1)
            if labels[patch] == number and scores[patch] > 0.1 and x_max > x_min and y_max > y_min:
                best = iou(box.box, (x_min, y_min, x_max, y_max))
                break
        expected.append(best)
    assert max(expected) > 0 and value == pytest.approx(np.mean(expected), abs=1e-5)
    success = BoxSuccess(str(folder))
    success.load("cpu", 2)
    assert success.loaded is metric.loaded and success([one]).tolist() == [np.mean([each >= 0.5 for each in expected])]
    assert np.isnan(metric([shot(())])).all()
    assert metric.identity().startswith(f"box_iou/1, owlv2 ({folder.name} ") != BoxIou().identity()


def test_boxes_of_the_same_words_share_the_best_detections():
    left, right, poor = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.25, 0.0, 0.75, 1.0)
    boxes = (Box("star", left), Box("star#2", right), Box("ball", left))

    def detector(image, words):
        assert list(words) == ["star", "ball"]
        return [[right, left, poor], []]

    assert detected(boxes, shot().image, detector) == [left, right, None]
    best = [[right, left]]  # and not the nearest
    assert detected(boxes[:1], shot().image, lambda image, words: best) == [right]
    assert apart([left, (0.0, 0.0, 0.6, 1.0), right]) == [left, right]


def test_a_detector_that_is_not_there_is_refused_in_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(_owlv2._hub_models, "hub_answers", lambda: False)
    for name, told in (
        (tmp_path / "none", "no such folder, and no name on the hub"),
        ("google/owlv2-none", "not in the hub's cache, and the hub does not answer"),
        (tmp_path, "the folder needs config.json and model.safetensors"),
    ):
        options = {"box_iou": {"detector": str(name)}}
        with pytest.raises(RequestError, match=f"box_iou.detector: .*{told}") as error:
            check(ScorerSpec("embedded", "embedded", None, ("clip_similarity", "box_iou"), options=options))
        assert "\n" not in str(error.value)
    with pytest.raises(RequestError, match="unknown option"):
        BoxIou.of({"network": "x"}, "scorer.metrics.box_iou")
    config = json.loads((folder / "config.json").read_text())
    for file in _owlv2.FILES:
        (tmp_path / file).write_text(json.dumps({**config, "model_type": "dinov2"}))
    with pytest.raises(ValueError, match="is of dinov2; allowed: owlv2"):
        _owlv2.resolve(str(tmp_path))
