"""Replacements that run a site again under another condition, against plain diffusers in which the condition holds."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from lesion.generation.generate import generate
from lesion.study.lesions import Lesion, Replacement
from lesion.surgery.intervention import Intervention
from lesion.surgery.operation import replacement_key
from test_surgery import SUBJECTS, cell, drawn, plain, run


class Louder(Intervention):
    """The site's key and value projections doubled: a stand-in for any change of weights."""

    changes = "condition"

    def __init__(self):
        self.sites = []

    @contextmanager
    def rerun(self, site, module):
        self.sites.append(site)
        with torch.no_grad():
            module.to_k.weight.mul_(2)
            module.to_v.weight.mul_(2)
            try:
                yield
            finally:
                module.to_k.weight.div_(2)
                module.to_v.weight.div_(2)


def rerun(*layers, **changes):
    return Lesion("leave_one_out", layers[0], tuple(layers), Replacement("rerun"), **changes)


def images(model, *lesions, filler=None):
    cells = [cell(model, subject, lesion) for subject, lesion in zip(SUBJECTS, lesions)]
    return generate(model, cells, {replacement_key(rerun("x")): filler or Louder()})


def reference(folder, sites):
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for site in sites:
            module = pipe.unet.get_submodule(site)
            module.to_k.weight.mul_(2)
            module.to_v.weight.mul_(2)
    return drawn(pipe)


def test_a_rerun_is_the_site_under_its_condition_to_the_bit(tiny_folder, tiny_model):
    layer, filler = tiny_model.anatomy.paths[2], Louder()
    sites = tiny_model.anatomy.sites[layer]
    ours = images(tiny_model, *[rerun(layer)] * 3, filler=filler)
    assert np.array_equal(ours, reference(tiny_folder, sites))
    assert not np.array_equal(ours, plain(tiny_folder, SUBJECTS))
    assert filler.sites == list(sites) * 4
    assert np.array_equal(images(tiny_model, None, None, None), plain(tiny_folder, SUBJECTS))


def test_a_rerun_is_blended_row_by_row(tiny_folder, tiny_model):
    layer = tiny_model.anatomy.paths[1]
    baseline = run(tiny_model, [cell(tiny_model, subject) for subject in SUBJECTS])
    whole = reference(tiny_folder, tiny_model.anatomy.sites[layer])
    mixed = images(tiny_model, None, rerun(layer), rerun(layer, strength=0.5))
    assert np.array_equal(mixed[0], baseline[0])
    assert np.array_equal(mixed[1], whole[1])
    assert 0 < np.abs(mixed[2] - baseline[2]).mean() < np.abs(whole[2] - baseline[2]).mean()
    late, cond = images(tiny_model, rerun(layer, window=(0.5, 1.0)), rerun(layer, branch="cond"))
    assert 0 < np.abs(late - baseline[0]).mean() < np.abs(whole[0] - baseline[0]).mean()
    assert np.abs(cond - baseline[1]).mean() > 0
    assert not any("forward" in vars(module) for module in tiny_model.denoiser.modules())


def test_the_condition_ends_with_an_error(tiny_folder, tiny_model):
    layer = tiny_model.anatomy.paths[0]

    class Failing(Louder):
        def rerun(self, site, module):
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        images(tiny_model, rerun(layer), filler=Failing())
    assert np.array_equal(images(tiny_model, None, None, None), plain(tiny_folder, SUBJECTS))
