"""Attention maps of generated images: against diffusers' scores, streamed, in lesioned images, on every pipeline."""

from __future__ import annotations

import mmap
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.utils import is_xformers_available

from conftest import settings, tiny_spec
from lesion import models, replacements
from lesion.generation.capture import Capturing
from lesion.generation.generate import generate
from lesion.generation.spool import Spool
from lesion.models import loading
from lesion.models.words import words_of
from lesion.store.maps import Maps
from lesion.study.capture import REST, SPECIAL, Capture
from lesion.study.grid import Cell
from lesion.study.lesions import Lesion, Replacement
from lesion.study.prompts import Prompt
from lesion.surgery.anatomy import examine
from lesion.surgery.attention import text_attention
from lesion.surgery.operation import replacement_key

LAYER, MID = "down_blocks.0.attentions.0", "mid_block.attentions.0"
TEXTS = ("a red circle, a star", "two stars")


def cells(model, lesion=None, texts=TEXTS, **changes):
    return [Cell(model.identity, Prompt(text), seed, settings(**changes), lesion) for seed, text in enumerate(texts)]


def made(model, some, capture=None, **changes):
    """Images, and their maps where asked."""
    interventions = {
        replacement_key(one.lesion): replacements.build(
            one.lesion.replacement.name, {}, replacements.Bench(model, settings(), None, 4)
        )
        for one in some
        if one.lesion
    }
    capturing = None
    if capture:
        capturing = Capturing(model, some, capture.chosen(text_attention(model.denoiser).paths))
    images = generate(model, some, interventions, capturing=capturing)
    return images, capturing.maps if capturing else []


def scores(model, some):
    """Every conditional call's scores as diffusers' plain processor computes them: path -> [(images, heads, …), …]."""
    found = {}
    model.denoiser.set_attn_processor(AttnProcessor())
    for path in text_attention(model.denoiser).by_path:
        module = model.denoiser.get_submodule(path)

        def noting(*args, path=path, own=module.get_attention_scores, **kwargs):
            result = own(*args, **kwargs)
            found.setdefault(path, []).append(result.unflatten(0, (2 * len(some), -1))[len(some) :])
            return result

        module.get_attention_scores = noting
    made(model, some)
    for path in found:
        del model.denoiser.get_submodule(path).get_attention_scores
    model.denoiser.set_attn_processor(AttnProcessor2_0())
    return {path: torch.stack(all_steps).float().numpy() for path, all_steps in found.items()}


def test_maps_are_diffusers_scores_by_word_head_and_step(tiny_model):
    some = cells(tiny_model)
    theirs = scores(tiny_model, some)
    _, each = made(tiny_model, some, Capture(heads_apart=True, steps_apart=True))
    _, mean = made(tiny_model, some, Capture())
    _, tokens = made(tiny_model, some, Capture(tokens="all", steps=((0.5, 1.0),)))
    assert set(each[0].layers["cond"]) == set(text_attention(tiny_model.denoiser).paths)
    for path, expected in theirs.items():  # (steps, images, heads, image tokens, text tokens)
        layer = path.partition(".transformer_blocks")[0]
        side = int(expected.shape[3] ** 0.5)
        for image, text in enumerate(TEXTS):
            words = words_of(tiny_model.pipe, text)
            assert [*words.columns, SPECIAL, REST] == list(each[image].entries["cond"])
            assert np.allclose(each[image].layers["cond"][layer].sum(2), 1, atol=1e-5)
            for word, columns in words.columns.items():
                by_word = expected[:, image][..., list(columns)].sum(-1).reshape(4, -1, side, side)
                assert np.allclose(each[image].of(layer, word), by_word.mean((0, 1)), atol=1e-6)
                assert np.allclose(each[image].of(layer, word, step=2, head=1), by_word[2, 1], atol=1e-6)
                assert np.allclose(mean[image].of(layer, word), by_word.mean((0, 1)), atol=1e-6)
                assert np.allclose(tokens[image].of(layer, word), by_word[2:].mean((0, 1)), atol=1e-6)
            assert mean[image].layers["cond"][layer].shape == (1, 1, len(words.columns) + 2, side, side)
            assert tokens[image].layers["cond"][layer].shape == (1, 1, 77, side, side)


class Kernels:
    """xformers' one function that diffusers calls, through torch: xformers itself has none for CPUs."""

    @staticmethod
    def memory_efficient_attention(query, key, value, attn_bias=None, op=None, scale=None):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_bias, scale=scale)


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor])
@pytest.mark.parametrize("lesioned", [False, True])
def test_images_are_the_same_to_the_bit(tiny_model, processor, lesioned, monkeypatch):
    if processor is XFormersAttnProcessor:
        monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=Kernels), raising=False)
    if processor is SlicedAttnProcessor:
        processor = partial(processor, 1)
    tiny_model.denoiser.set_attn_processor(processor())
    lesion = Lesion("leave_one_out", LAYER, (LAYER,), Replacement("zero")) if lesioned else None
    plain, _ = made(tiny_model, cells(tiny_model, lesion))
    captured, _ = made(tiny_model, cells(tiny_model, lesion), Capture(branch="both", heads_apart=True))
    assert np.array_equal(plain, captured)


@pytest.mark.skipif(not (is_xformers_available() and torch.cuda.is_available()), reason="needs xformers and a GPU")
def test_images_are_the_same_to_the_bit_under_xformers_own_kernels(tiny_folder):
    loading.forget()
    model = models.load(models.resolve(tiny_spec(tiny_folder)), "cuda")
    model.denoiser.enable_xformers_memory_efficient_attention()
    plain, _ = made(model, cells(model))
    captured, _ = made(model, cells(model), Capture(branch="both", heads_apart=True))
    assert np.array_equal(plain, captured)


def test_a_lesioned_layer_has_no_map_where_nothing_of_it_is_used(tiny_model):
    """The others do, and look elsewhere than in the baseline."""
    _, (base, _) = made(tiny_model, cells(tiny_model), Capture(steps_apart=True))
    whole = Lesion("leave_one_out", LAYER, (LAYER,), Replacement("zero"))
    for lesion, layers in ((whole, 6), (Lesion("custom", "", (LAYER,), Replacement("zero"), strength=0.5), 7)):
        _, (maps, _) = made(tiny_model, cells(tiny_model, lesion), Capture(steps_apart=True))
        assert len(maps.layers["cond"]) == layers
        assert np.abs(maps.of(MID, "circle") - base.of(MID, "circle")).max() > 1e-4
    late = Lesion("leave_one_out", LAYER, (LAYER,), Replacement("zero"), window=(0.5, 1.0))
    some = [*cells(tiny_model, late)[:1], *cells(tiny_model)[1:]]  # in one batch with an image that has no lesion
    _, (maps, other) = made(tiny_model, some, Capture(steps_apart=True))
    assert np.isnan(maps.layers["cond"][LAYER]).all(axis=(1, 2, 3, 4)).tolist() == [False, False, True, True]
    assert np.isfinite(other.layers["cond"][LAYER]).all()
    assert np.allclose(maps.of(LAYER, "red"), base.layers["cond"][LAYER][:2][:, 0, 1].mean(0), atol=1e-6)
    before = Lesion("leave_one_out", LAYER, (LAYER,), Replacement("zero"), branch="uncond")
    _, (maps, _) = made(tiny_model, cells(tiny_model, before), Capture(branch="both"))
    assert LAYER in maps.layers["cond"] and LAYER not in maps.layers["uncond"]


def test_one_lesioned_head_leaves_the_others(tiny_model):
    from dataclasses import replace

    model = replace(tiny_model, anatomy=examine(tiny_model.denoiser, "head"))
    path = f"{LAYER}.transformer_blocks.0.attn2.heads.1"
    lesion = Lesion("leave_one_out", path, (path,), Replacement("zero"))
    _, (maps, _) = made(model, cells(model, lesion), Capture(heads_apart=True))
    assert np.isnan(maps.layers["cond"][LAYER]).all(axis=(0, 2, 3, 4)).tolist() == [False, True]
    _, (mean, _) = made(model, cells(model, lesion), Capture())
    assert np.allclose(mean.of(LAYER, "red"), maps.of(LAYER, "red", head=0), atol=1e-6)


def test_of_a_bypassed_block_nothing_is_looked_at(tiny_model):
    from dataclasses import replace

    model = replace(tiny_model, anatomy=examine(tiny_model.denoiser, kind="block"))
    lesion = Lesion("leave_one_out", LAYER, (LAYER,), Replacement("zero"), kind="block")
    _, (maps, _) = made(model, cells(model, lesion), Capture())
    assert LAYER not in maps.layers["cond"] and len(maps.layers["cond"]) == 6


class Counting(Capturing):
    """Counts the bytes of arrays that it holds after each call of the denoiser."""

    def __init__(self, *given):
        self.most = 0
        super().__init__(*given)

    def after_call(self, run, call):
        self.most = max(self.most, held(self.__dict__))
        super().after_call(run, call)
        self.most = max(self.most, held(self.__dict__))


def held(thing):
    """Bytes of all tensors and numpy arrays that are reached from this, but for those that lie in a file."""
    if isinstance(thing, torch.Tensor):
        return thing.numel() * thing.element_size()
    if isinstance(thing, np.ndarray):
        return 0 if in_file(thing) else thing.nbytes
    if isinstance(thing, dict):
        return sum(map(held, thing.values()))
    if isinstance(thing, list | tuple | set):
        return sum(map(held, thing))
    return held(vars(thing)) if type(thing).__module__.startswith("lesion.") and hasattr(thing, "__dict__") else 0


def in_file(array):
    while isinstance(array, np.ndarray):
        if isinstance(array.base, mmap.mmap):
            return True
        array = array.base
    return False


@pytest.mark.parametrize("apart", [False, True])
def test_what_is_held_does_not_grow_with_the_steps(tiny_model, tmp_path, apart):
    """Neither while the images are made nor when their maps are stored; every step is there nevertheless."""
    chosen = Capture(steps_apart=apart).chosen(text_attention(tiny_model.denoiser).paths)
    while_made, when_stored, on_disk = [], [], []
    for steps in (2, 12):
        some = cells(tiny_model, steps=steps)
        capturing = Counting(tiny_model, some, chosen, tmp_path / "maps")
        generate(tiny_model, some, {}, capturing=capturing)
        while_made.append(capturing.most)
        assert not list(tmp_path.glob("maps/*")), "what a killed process would leave behind"
        found = capturing.maps
        when_stored.append(held([one.layers for one in found]))
        store = Maps(tmp_path / f"{steps}", chosen)
        store.put(some[0], found[0])
        on_disk.append(store.path(some[0].key).stat().st_size)
        kept = store.get(some[0].key)
        for layer, values in found[0].layers["cond"].items():
            assert values.shape[0] == (steps if apart else 1)
            assert np.array_equal(kept.layers["cond"][layer], values)
    assert while_made[0] == while_made[1] > 1000
    assert when_stored[0] == when_stored[1]
    assert (when_stored[0] == 0) == apart
    assert (on_disk[1] > 5 * on_disk[0]) == apart


def test_what_is_held_without_streaming_is_counted():
    """The counting itself sees tensors in objects, and no arrays of a file."""
    spool = Spool(None, 2)
    spool.put("a", 1, np.ones((3, 4), np.float32))
    assert held({"x": [torch.zeros(5), Spool(None, 1)], "y": (np.zeros(2),), "z": spool.get("a")}) == 20 + 16
    assert spool.get("a").tolist() == [[[0] * 4] * 3, [[1] * 4] * 3]
