"""Windows of denoising steps: disjoint ones put together are their union, and the whole one is none at all."""

from __future__ import annotations

import itertools

import pytest
import torch

from denoisers import STEPS, build, hooked, inputs, lesion, under
from lesion.study.lesions import covers
from lesion.surgery.anatomy import examine


@pytest.mark.parametrize("steps", [1, 3, 10, 20, 50])
def test_windows_that_share_an_edge_cover_every_step_once(steps):
    edges = [0.0, 0.1, 0.3, 0.35, 0.7, 0.9, 1.0]
    windows = list(itertools.pairwise(edges))
    for step in range(steps):
        assert sum(covers(window, step, steps) for window in windows) == 1
        assert covers((0.0, 1.0), step, steps)


@pytest.mark.parametrize(("name", "kind"), [("unet", "cross_attention"), ("unet", "block"), ("flux", "text_to_image")])
def test_disjoint_windows_together_are_their_union(name, kind):
    """Every call of the denoiser has inputs of its own here, so what happens in one window cannot reach another."""
    rows = 2
    denoiser, calls = build(name), inputs(name, rows)
    anatomy = examine(denoiser, kind=kind)
    layer = anatomy.paths[-1]

    def outputs(*window):
        return under(denoiser, anatomy, [lesion(layer, kind=kind, window=window)] * rows, calls)

    baseline, whole = hooked(denoiser, {}, calls), outputs(0.0, 1.0)
    parts = [outputs(0.0, 0.25), outputs(0.25, 0.75), outputs(0.75, 1.0)]
    inside = [[covers(window, step, STEPS) for step in range(STEPS)] for window in ((0, 0.25), (0.25, 0.75), (0.75, 1))]
    assert [sum(column) for column in zip(*inside, strict=True)] == [1] * STEPS
    for part, here in zip(parts, inside, strict=True):
        for step in range(STEPS):
            assert torch.equal(part[step], whole[step] if here[step] else baseline[step])
            assert not torch.equal(whole[step], baseline[step])
