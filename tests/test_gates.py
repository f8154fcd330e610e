"""Lesions on compiled blocks: the same images as by hooks, and nothing compiled anew as lesions change."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch._dynamo.utils import counters

from conftest import tiny_spec
from lesion import models
from lesion.generate import generate
from lesion.lesions import Lesion, Replacement
from lesion.models import loading
from test_surgery import SUBJECTS, cell, fillers, plain, run, zero


@pytest.fixture
def compiled(tiny_folder, monkeypatch):
    """The tiny model with its blocks traced by dynamo and run as traced: no C++ compiler is needed."""
    monkeypatch.setattr(loading, "BACKEND", "eager")
    torch._dynamo.reset()
    loading.forget()
    yield models.load(models.resolve(tiny_spec(tiny_folder, compile=True)), "cpu")
    loading.forget()
    torch._dynamo.reset()


def graphs() -> int:
    return sum(counters["stats"][name] for name in ("unique_graphs",))


def test_gates_make_what_hooks_make_and_compile_once(tiny_model, compiled, tiny_folder):
    layers = tiny_model.anatomy.paths
    first, last = layers[0], layers[-1]
    studies = [
        [None, None, None],
        [zero(first)] * 3,
        [zero(*layers[1:]), zero(last), None],
        [zero(first, window=(0.5, 1.0)), zero(first, branch="cond"), zero(last, strength=0.5)],
    ]
    counters.clear()
    seen = []
    for lesions in studies:
        images = [
            run(model, [cell(model, subject, lesion) for subject, lesion in zip(SUBJECTS, lesions)])
            for model in (tiny_model, compiled)
        ]
        assert np.abs(images[0] - images[1]).max() < 1e-5
        seen.append(graphs())
    assert seen[0] > 0
    assert len(set(seen)) == 1, "compiled anew for a lesion"
    assert np.array_equal(run(compiled, [cell(compiled, s) for s in SUBJECTS]), plain(tiny_folder, SUBJECTS))
    assert not any(float(module.lesion_weight.abs().max()) for module, _ in compiled.gates.modules.values())


def test_another_size_of_batch_is_compiled_once(compiled):
    """A study's last batch is smaller, running out of memory halves them: code for any size serves all of these."""
    layers = compiled.anatomy.paths
    lesions = [zero(layer) for layer in layers[:2]] * 4
    cells = [cell(compiled, subject, lesion) for subject, lesion in zip(SUBJECTS * 4, lesions)]
    seen = []
    for size in (8, 5, 3, 2, 7):
        counters.clear()
        seen.append(run(compiled, cells[:size]))
        if size < 5 or size == 7:
            assert not graphs(), f"compiled anew for {size}"
    for images in seen[1:]:
        assert np.abs(images - seen[0][: len(images)]).max() < 1e-5


def test_models_after_one_another_are_all_compiled(compiled, tiny_folder, monkeypatch):
    """What was compiled for models that are gone does not count against dynamo's limit, after which it gives up."""
    monkeypatch.setattr(loading, "COMPILATIONS", 3)  # one of these models needs that many
    asked = [cell(compiled, SUBJECTS[0], zero(compiled.anatomy.paths[0]))]
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for dtype in ("bfloat16", "float32", "bfloat16"):
            model = models.load(models.resolve(tiny_spec(tiny_folder, compile=True, dtype=dtype)), "cpu")
            counters.clear()
            assert np.isfinite(run(model, asked)).all()
            assert graphs()


def test_means_pass_through_gates(tiny_model, compiled):
    class Ramp:
        """Another value for each step, branch and channel."""

        def fill(self, site, call, branches, output):
            channels = torch.arange(output.shape[-1], device=output.device) / output.shape[-1]
            return (call + 1) * 0.1 + branches[:, None, None] * 0.3 + channels[None, None]

    lesion = Lesion("all", "", tiny_model.anatomy.paths, Replacement("mean", {"calibration": 1}))
    made = [
        generate(model, [cell(model, s, lesion) for s in SUBJECTS], {"mean:[('calibration', 1)]": Ramp()})
        for model in (tiny_model, compiled)
    ]
    assert np.abs(made[0] - made[1]).max() < 1e-5
    assert np.abs(made[0] - run(tiny_model, [cell(tiny_model, s) for s in SUBJECTS])).max() > 1e-3


def test_a_replacement_that_reads_the_output_is_refused(compiled):
    layer = compiled.anatomy.paths[0]
    (filler,) = fillers(compiled, zero(layer)).values()
    filler.reads_output = True
    with pytest.raises(RuntimeError, match="compile=false"):
        generate(compiled, [cell(compiled, SUBJECTS[0], zero(layer))], {"zero:[]": filler})


def test_switches_make_cells_of_their_own(cli, monkeypatch):
    monkeypatch.setattr(loading, "BACKEND", "eager")
    frames = {}
    for switches in ("", "performance.compile=true", "performance.channels_last=true", "performance.tf32=true"):
        code, _, err = cli(*filter(None, [switches]), "replacement=[zero,mean]")
        assert code == 0, err
        frames[switches] = pd.read_parquet(cli.newest() / "results.parquet")
    torch._dynamo.reset()
    loading.forget()
    cells = [set(frame.cell) for frame in frames.values()]
    assert sum(map(len, cells)) == len(set.union(*cells))
    scores = [frame.clip_similarity.to_numpy() for frame in frames.values()]
    for other in scores[1:]:
        np.testing.assert_allclose(other, scores[0], atol=1e-4)
