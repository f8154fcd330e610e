"""The toy world: captions, rendering, and the reader that judges pixels."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lesion.toy_world import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    is_held_out,
    judge,
    parse_caption,
    read_image,
    render,
    sample_scene,
)


def test_the_world_is_as_large_as_it_says():
    assert len(COLOURS) >= 8
    assert len(SHAPES) >= 6
    assert len(RELATIONS) == 4
    assert SIZES == ("small", "large")
    assert len(BACKGROUNDS) >= 4


def test_captions():
    pair = Scene((Thing("orange", "cross"), Thing("blue", "ring")), 1, "left", "white")
    assert pair.caption() == "an orange cross to the left of a blue ring on a white background"
    assert Scene((Thing("red", "cross"),), 3, "", "black").caption() == "three red crosses on a black background"
    assert Scene((Thing("red", "star", "large"),)).caption() == "a large red star"
    assert Scene((Thing("red", "star"), Thing("orange", "ring"))).caption() == "a red star and an orange ring"


def test_captions_are_read_back():
    rng = random.Random(1)
    for _ in range(500):
        scene = sample_scene(rng, held_out=rng.random() < 0.3)
        assert parse_caption(scene.caption()) == scene


@pytest.mark.parametrize(
    "text", ["", "a dog", "two red circle", "a red circles", "three red circles above a blue star", "a orange ring"]
)
def test_other_texts_are_no_captions(text):
    assert parse_caption(text) is None


def test_held_out_captions_are_apart_from_training():
    rng = random.Random(2)
    training = {sample_scene(rng).caption() for _ in range(2000)}
    held_out = {sample_scene(rng, held_out=True).caption() for _ in range(300)}
    assert not training & held_out
    assert all(map(is_held_out, held_out))
    assert not any(map(is_held_out, training))


def test_the_reader_reads_what_the_renderer_draws():
    rng = random.Random(3)
    for _ in range(150):
        scene = sample_scene(rng, held_out=True)
        assert judge(read_image(render(scene, rng)), scene).everything, scene


def test_the_reader_survives_noise_of_a_decoder():
    rng, noise = random.Random(4), np.random.default_rng(4)
    right = 0
    for _ in range(60):
        scene = sample_scene(rng)
        image = render(scene, rng).astype(float) + noise.normal(0, 10, (64, 64, 3))
        right += judge(read_image(image.clip(0, 255).astype(np.uint8)), scene).everything
    assert right >= 57


def test_each_fault_is_seen_as_what_it_is():
    rng = random.Random(5)
    asked = Scene((Thing("red", "circle"), Thing("blue", "square")), 1, "left", "white")
    drawn = {
        "background": Scene(asked.things, 1, "left", "black"),
        "colour": Scene((Thing("green", "circle"), Thing("blue", "square")), 1, "left", "white"),
        "shape": Scene((Thing("red", "star"), Thing("blue", "square")), 1, "left", "white"),
        "binding": Scene((Thing("blue", "circle"), Thing("red", "square")), 1, "left", "white"),
        "relation": Scene(asked.things, 1, "right", "white"),
        "count": Scene((Thing("red", "circle"),), 1, "", "white"),
    }
    for fault, scene in drawn.items():
        judgement = judge(read_image(render(scene, rng)), asked)
        assert getattr(judgement, fault) is False, fault
        assert not judgement.everything
    assert judge(read_image(render(drawn["binding"], rng)), asked).colour
    assert judge(read_image(render(drawn["relation"], rng)), asked).binding
    small = Scene((Thing("red", "circle", "small"),), 1, "", "white")
    large = Scene((Thing("red", "circle", "large"),), 1, "", "white")
    assert judge(read_image(render(large, rng)), small).size is False


def test_an_empty_picture_has_nothing_right_but_its_background():
    empty = np.full((64, 64, 3), 250, np.uint8)
    judgement = judge(read_image(empty), Scene((Thing("red", "circle"),), 1, "", "white"))
    assert (judgement.background, judgement.colour, judgement.shape, judgement.count) == (True, False, False, False)
