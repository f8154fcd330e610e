"""Lesions on compiled blocks: the same images as by hooks, and nothing compiled anew as lesions change."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from torch._dynamo.utils import counters

from conftest import settings, tiny_spec
from denoisers import apart, inputs, lesion, same, under, whole
from denoisers import build as build_denoiser
from lesion import models
from lesion.denoising.run import Denoising
from lesion.generation.generate import generate
from lesion.generation.snapshots import States
from lesion.models import loading
from lesion.models.source import BLOCKS
from lesion.replacements import Bench
from lesion.replacements import _means as means
from lesion.replacements.zero import Zero
from lesion.run.job import examined
from lesion.study.layers import KINDS, Layers
from lesion.study.lesions import Lesion, Replacement
from lesion.study.prompts import Prompt
from lesion.surgery.anatomy import examine, kinds_of
from lesion.surgery.compiled import Gates
from lesion.surgery.intervention import Intervention
from lesion.surgery.operation import replacement_key
from test_surgery import SUBJECTS, cell, fillers, plain, run, zero


@pytest.fixture
def compiled(tiny_folder, monkeypatch):
    """The tiny model with its blocks traced by dynamo and run as traced: no C++ compiler is needed."""
    monkeypatch.setattr(loading, "BACKEND", "eager")
    loading.forget()
    yield models.load(models.resolve(tiny_spec(tiny_folder, compile=True)), "cpu")
    loading.forget()


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


class Ramp(Intervention):
    """Another value for each step, branch and channel, and for the text's half."""

    def fill(self, site, call, branches, output):
        width = output.shape[1 if output.dim() == 4 else -1]
        rows = (call + 1) * 0.1 + branches[:, None] * 0.3 + torch.arange(width) / width + 0.5 * site.endswith(":text")
        return rows[:, :, None, None] if output.dim() == 4 else rows[:, None]


OTHERS = ("sd3", "pixart", "sana", "hunyuan", "qwen", "flux2", "zimage")


@pytest.fixture(
    scope="module", params=["unet", "flux", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def traced(request):
    """A denoiser by hooks, and one alike with its blocks traced by dynamo, and its gates."""
    torch.compiler.reset()
    denoisers = build_denoiser(request.param), build_denoiser(request.param)
    gates = Gates(denoisers[1], examine(denoisers[1], kind=kinds_of(denoisers[1])[0]))
    loading.compile_blocks(denoisers[1], backend="eager")
    yield request.param, *denoisers, gates
    torch.compiler.reset()


def through(gates, denoiser, anatomy, lesions, calls, intervention):
    """The outputs of a denoiser with these lesions on its gates; as `denoisers.under`."""
    client = gates.lesions(anatomy, lesions, {replacement_key(one): intervention for one in lesions if one})
    pipe = SimpleNamespace(_num_timesteps=len(calls), scheduler=SimpleNamespace(timesteps=range(len(calls))))
    with Denoising(pipe, denoiser, len(lesions), [client]).running():
        return calls_of(denoiser, calls)


def calls_of(denoiser, calls):
    with torch.inference_mode():
        return [whole(denoiser(**call).sample) for call in calls]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("cross_attention", "text_stream")])
def test_every_kind_of_site_passes_through_gates(traced, kind):
    name, hooked, compiled, gates = traced
    if kind not in kinds_of(hooked):
        pytest.skip(f"{name} has no such sites")
    anatomy, calls, seen = examine(hooked, kind=kind), inputs(name, 4), []
    first, last = anatomy.paths[0], anatomy.paths[-1]
    cases = [
        ([lesion(first, kind=kind)] * 2, Zero()),
        ([None, None], Zero()),
        ([lesion(*anatomy.paths, kind=kind, branch="cond"), lesion(last, kind=kind, window=(0.5, 1.0))], Zero()),
    ]
    if kind == "text_to_image":  # compiled with a second pass and without; a half of it and values make no sense to it
        cases += [([None, lesion(*anatomy.paths, kind=kind)], Zero())]
    else:
        cases += [([lesion(last, kind=kind, strength=0.5), lesion(*anatomy.paths, kind=kind)], Ramp())]
    for lesions, intervention in cases:
        theirs = under(hooked, anatomy, lesions, calls, intervention)
        ours = through(gates, compiled, anatomy, lesions, calls, intervention)
        assert apart(ours, theirs) < 1e-5
        assert lesions[0] is not None or same(ours, theirs)
        seen.append(graphs())
    assert seen[-1] == seen[2 if kind == "text_to_image" else 0], "compiled anew for a lesion"
    assert not any(float(module.lesion_weight.abs().max()) for module, _ in gates.modules.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "flux"])
def test_a_denoiser_compiled_as_a_whole_is_one_graph_whatever_the_lesions(name):
    """What docs/performance.md says of it: it is no switch of `performance`."""
    torch.compiler.reset()
    counters.clear()
    hooked, whole_one = build_denoiser(name), build_denoiser(name)
    anatomy, calls = examine(hooked, kind=kinds_of(hooked)[0]), inputs(name, 4)
    gates = Gates(whole_one, anatomy)
    whole_one.forward = torch.compile(whole_one.forward, backend="eager")
    first, last = (lesion(anatomy.paths[end], kind=anatomy.kind, window=(0.5, 1.0)) for end in (0, -1))
    for lesions in ([None, None], [first, None], [lesion(*anatomy.paths, kind=anatomy.kind, branch="cond"), last]):
        ours = through(gates, whole_one, anatomy, lesions, calls, Ramp())
        assert apart(ours, under(hooked, anatomy, lesions, calls, Ramp())) < 1e-5
    assert graphs() == 1 and not counters["graph_break"]
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["unet", "flux", *OTHERS])
def test_gates_of_every_denoiser_make_what_hooks_make(name):
    """Not compiled: in a moment."""
    hooked, gated = build_denoiser(name), build_denoiser(name)
    gates, calls = Gates(gated, examine(gated, kind=kinds_of(gated)[0])), inputs(name, 4)
    for kind in (kind for kind in kinds_of(hooked) if kind != "text_stream"):
        anatomy = examine(hooked, kind=kind)
        first, last = anatomy.paths[0], anatomy.paths[-1]
        intervention = Zero() if kind == "text_to_image" else Ramp()
        lesions = [lesion(first, kind=kind, branch="cond"), lesion(last, kind=kind, strength=0.5)]
        assert apart(through(gates, gated, anatomy, lesions, calls, intervention), calls_of(gated, calls)) > 1e-3
        theirs = under(hooked, anatomy, lesions, calls, intervention)
        assert apart(through(gates, gated, anatomy, lesions, calls, intervention), theirs) < 1e-5, kind


@pytest.mark.parametrize(
    ("name", "kind"), [("unet", "cross_attention"), ("flux", "joint_attention"), ("flux", "block")]
)
def test_values_on_gates_are_not_rounded_in_half_precision(name, kind):
    hooked, gated = build_denoiser(name).bfloat16(), build_denoiser(name).bfloat16()
    anatomy = examine(hooked, kind=kind)
    calls = [{key: value.bfloat16() for key, value in call.items()} for call in inputs(name, 4)]
    lesions = [lesion(*anatomy.paths, kind=kind, strength=0.3), lesion(*anatomy.paths, kind=kind)]
    ours = through(Gates(gated, anatomy), gated, anatomy, lesions, calls, Ramp())
    assert same(ours, under(hooked, anatomy, lesions, calls, Ramp()))


@pytest.mark.slow
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


@pytest.mark.slow  # three models and their compilations
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


def test_lesions_leave_nothing_behind(tiny_model, compiled, tmp_path):
    """Half-made baselines and calibration call the denoiser outside a lesion: no earlier batch may show in them."""
    layers = compiled.anatomy.paths
    window = (0.5, 1.0)
    seen = {}
    for name, model in {"hooks": tiny_model, "gates": compiled}.items():
        run(model, [cell(model, subject, zero(*layers)) for subject in SUBJECTS])
        late = [cell(model, subject, zero(layers[0], window=window)) for subject in SUBJECTS]
        states = States(tmp_path / name)
        images = generate(model, late, fillers(model, zero(layers[0])), states, [window])
        assert len(list(states.folder.rglob("*.safetensors"))) == len(SUBJECTS)
        run(model, [cell(model, subject, zero(*layers)) for subject in SUBJECTS])
        found = means.measure(Bench(model, settings(), tmp_path, 2), [(Prompt(text), seed) for text, seed in SUBJECTS])
        seen[name] = images, found
    assert np.abs(seen["hooks"][0] - seen["gates"][0]).max() < 1e-5
    assert seen["hooks"][1].keys() == seen["gates"][1].keys()
    for site, values in seen["hooks"][1].items():
        torch.testing.assert_close(seen["gates"][1][site], values, atol=1e-5, rtol=1e-4)
        assert float(values.abs().max()) > 1e-3  # not the zeros of the lesion


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_calibration_and_half_made_baselines_may_come_first(compiled, tiny_folder, tmp_path, dtype):
    """Nothing has fitted the gates to the rows and the precision of such a call before."""
    model = models.load(models.resolve(tiny_spec(tiny_folder, compile=True, dtype=dtype)), "cpu")
    layer, window = model.anatomy.paths[0], (0.5, 1.0)
    run(model, [cell(model, SUBJECTS[0])])  # as `batch_size: auto` does, with fewer rows
    found = means.measure(Bench(model, settings(), tmp_path, 3), [(Prompt(text), seed) for text, seed in SUBJECTS])
    assert all(torch.isfinite(values).all() for values in found.values())
    model = models.load(models.resolve(tiny_spec(tiny_folder, compile=True, dtype=dtype, name="fresh")), "cpu")
    late = [cell(model, subject, zero(layer, window=window)) for subject in SUBJECTS]
    states = States(tmp_path)
    images = generate(model, late, fillers(model, zero(layer)), states, [window])
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(SUBJECTS)
    assert np.array_equal(images, run(model, late))
    measured = means.measure(Bench(model, settings(), tmp_path, 3), [(Prompt(text), seed) for text, seed in SUBJECTS])
    assert all(torch.equal(values, measured[site]) for site, values in found.items())


@pytest.mark.parametrize(
    "by", ["block", *(pytest.param(by, marks=pytest.mark.slow) for by in ("stage", "transformer_block"))]
)
def test_layers_of_other_sizes_pass_through_gates(tiny_model, compiled, by):
    images = []
    for model in (tiny_model, compiled):
        model = replace(model, anatomy=examine(model.denoiser, by=by))
        lesions = [zero(model.anatomy.paths[0]), None, zero(model.anatomy.paths[-1])]
        images.append(run(model, [cell(model, subject, lesion) for subject, lesion in zip(SUBJECTS, lesions)]))
    assert np.abs(images[0] - images[1]).max() < 1e-5
    assert np.abs(images[1] - run(compiled, [cell(compiled, subject) for subject in SUBJECTS])).max() > 1e-3


@pytest.mark.parametrize(
    ("replacement", "more"),
    [
        ("null_prompt", ""),
        ("donor_prompt", "replacement.donor_prompt.prompt=x"),
        ("resample", "replacement.resample.prompt=x"),
    ],
)
def test_replacements_that_compiled_code_cannot_have_are_refused(cli, replacement, more):
    code, _, err = cli("performance.compile=true", f"replacement=[zero,{replacement}]", *filter(None, [more]))
    assert code == 2 and err.strip().count("\n") == 0
    assert f"performance.compile: does not work with replacement={replacement}; allowed here: false" in err
    assert not list(cli.folder.rglob("*.png"))


def test_components_beside_a_compiled_denoiser(tiny_folder, compiled):
    kind = "block"
    layers = Layers.of({"by": "attention", "tokens": None, "kind": kind, "include": None, "exclude": None,
                        "component": ["text_encoder", "denoiser", "vae"]})  # fmt: skip
    images = []
    for compile in (True, False):
        loading.forget()
        source = models.resolve(tiny_spec(tiny_folder, compile=compile))
        model = examined(models.load(source, "cpu"), source, layers)
        assert bool(model.gates) == compile
        paths = [anatomy.paths[0] for anatomy in (*model.components.values(), model.anatomy)]
        lesions = [None, *(zero(path, kind=kind) for path in paths), zero(*paths, kind=kind)]
        images.append(run(model, [cell(model, SUBJECTS[0], lesion) for lesion in lesions]))
    assert np.abs(images[0] - images[1]).max() < 1e-5
    assert all(np.abs(one - other).max() > 1e-3 for one, other in itertools.combinations(images[0], 2))


def test_a_denoiser_without_known_blocks_is_not_compiled(cli, folder_of, monkeypatch):
    folder = folder_of("pixart_sigma")
    asked = ("performance.compile=true", f"model.id={folder}", "layers.include=null")
    assert cli(*asked, "dry_run=true")[0] == 0
    monkeypatch.delitem(BLOCKS, "PixArtTransformer2DModel")
    code, _, err = cli(*asked)
    assert code == 2 and err.strip().count("\n") == 0
    assert "performance.compile: it is not known of which blocks PixArtTransformer2DModel is built" in err


@pytest.mark.parametrize("name", BLOCKS)
def test_the_blocks_that_diffusers_does_not_name_hold_every_site(name):
    """Those that it names take the place of this list, should a version of it name them."""
    (family,) = [family for family in OTHERS if family in name.lower().replace("dit", "")]
    denoiser, compiled = build_denoiser(family), []
    assert not getattr(denoiser, "_repeated_blocks", None)
    with mock.patch.object(torch.nn.Module, "compile", lambda module, backend: compiled.append(module)):
        loading.compile_blocks(denoiser)
    inside = {id(part) for block in compiled for part in block.modules()}
    for kind in kinds_of(denoiser):
        for path in examine(denoiser, kind=kind).by_path:
            assert id(denoiser.get_submodule(path)) in inside, path


def test_means_pass_through_gates(tiny_model, compiled):
    class Ramp(Intervention):
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
    (fine,) = fillers(compiled, zero(layer)).values()  # the others of its study go on
    generate(compiled, [cell(compiled, SUBJECTS[0], zero(layer))], {"zero:[]": fine, "another:[]": filler})


@pytest.mark.slow  # four models and a compilation
def test_switches_make_cells_of_their_own(cli, monkeypatch):
    monkeypatch.setattr(loading, "BACKEND", "eager")
    frames = {}
    for switches in ("", "performance.compile=true", "performance.channels_last=true", "performance.tf32=true"):
        code, _, err = cli(*filter(None, [switches]), "replacement=[zero,mean]", "selection=leave_one_out")
        assert code == 0, err
        frames[switches] = pd.read_parquet(cli.newest() / "results.parquet")
    loading.forget()
    cells = [set(frame.cell) for frame in frames.values()]
    assert sum(map(len, cells)) == len(set.union(*cells))
    scores = [frame.clip_similarity.to_numpy() for frame in frames.values()]
    for other in scores[1:]:
        np.testing.assert_allclose(other, scores[0], atol=1e-4)
