"""Preprocessing in batches has the very values of Pillow, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from lesion.scoring import dino_similarity
from lesion.scoring._resizing import Preprocessing, every_byte, of_transforms, resized

SIZES = [(64, 64, 224, 224), (512, 512, 224, 224), (300, 200, 336, 224), (200, 333, 224, 372), (224, 224, 224, 224)]


def images(height: int, width: int, n: int = 2) -> np.ndarray:
    """Noise, and edges of black and white, which overshoot."""
    rng = np.random.default_rng(height * 1000 + width)
    noise = rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    noise[-1] = np.where(noise[-1] < 128, 0, 255)
    return noise


def by_pillow(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def test_bytes_are_those_of_pillow_whatever_the_size():
    rng = np.random.default_rng(0)
    drawn = [tuple(int(side) for side in rng.integers(1, 200, 4)) for _ in range(100)]
    for height, width, to_height, to_width in [*SIZES, *drawn]:
        pixels = images(height, width)
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        wanted = np.stack([by_pillow(image, to_height, to_width) for image in pixels])
        orders = [resized(tensor, to_height, to_width, order).permute(0, 2, 3, 1).numpy() for order in (False, True)]
        assert any(np.array_equal(made, wanted) for made in orders), (height, width, to_height, to_width)


def test_parts_of_a_batch_are_resized_alike(monkeypatch):
    pixels = torch.from_numpy(images(70, 50, 5)).permute(0, 3, 1, 2)
    whole = resized(pixels, 30, 20)
    monkeypatch.setattr("lesion.scoring._resizing.AT_ONCE", 1)
    assert torch.equal(resized(pixels, 30, 20), whole)


@pytest.mark.parametrize("shape", [(64, 64), (512, 512), (96, 64), (333, 200), (224, 224)])
@pytest.mark.parametrize("of", ["open_clip", "squash", "dinov2"])
def test_inputs_of_models_are_those_of_their_own_preprocessing(shape, of):
    if of == "dinov2":
        made = Preprocessing(
            dino_similarity.preprocess,
            dino_similarity.CROP,
            dino_similarity._box,
            dino_similarity._scaled(every_byte())[:, 0],
            torch.device("cpu"),
        )
    else:
        steps = image_transform(224, is_train=False, resize_mode="squash" if of == "squash" else "shortest").transforms
        made = of_transforms(steps, torch.device("cpu"))
        if of == "squash":  # has no crop: it stays with Pillow
            assert made is None
            return
    batch = images(*shape, n=3)
    order = made.order(batch[0].shape)
    assert order is not None
    wanted = torch.stack([made.one(image) for image in batch])
    assert torch.equal(made.batch(batch, order), wanted)
    assert torch.equal(made(list(batch)), wanted)


def test_what_is_not_equal_is_left_to_pillow(monkeypatch):
    steps = image_transform(224, is_train=False).transforms
    made = of_transforms(steps, torch.device("cpu"))
    made.in_batches = True  # as on a GPU
    asked = []
    monkeypatch.setattr(made, "one", lambda image, one=made.one: asked.append(image.shape) or one(image))
    batch = list(images(48, 48, 4))
    first = made(batch)
    assert asked == [(48, 48, 3)]  # of noise, once
    made.table = made.table + 1e-3
    made._orders.clear()
    assert torch.equal(made(batch), first)
    assert len(asked) == 6
    assert len({image.shape for image in [*batch, images(40, 48)[0]]}) == 2
    assert made([*batch, images(40, 48)[0]]).shape == (5, 3, 224, 224)
    assert len(asked) == 11
