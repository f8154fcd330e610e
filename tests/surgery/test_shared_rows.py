"""Rows that both guidance branches share: the same values as without, on half of the rows up to the first text."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from denoisers import STEPS, apart, build, hooked, inputs, lesion
from lesion.denoising.run import Denoising
from lesion.replacements.zero import Zero
from lesion.surgery.anatomy import examine
from lesion.surgery.intervention import Intervention
from lesion.surgery.operation import Lesions, replacement_key
from lesion.surgery.shared_rows import SharedRows
from test_surgery import SUBJECTS, cell, run, zero

IMAGES = 3


def calls_of(name="unet"):
    """Denoiser calls of three images in which both branches have the same latents."""
    calls = inputs(name, 2 * IMAGES)
    for call in calls:
        call["sample"] = torch.cat([call["sample"][:IMAGES]] * 2)
        call["timestep"] = call["timestep"][0]
    return calls


def rows_of(denoiser, lesions, calls, intervention=None, shared=True, kind="cross_attention"):
    """Outputs, and how many rows convolutions and attentions ran on, by path, in the last call."""
    interventions = {replacement_key(one): intervention or Zero() for one in lesions if one}
    client = Lesions(examine(denoiser, kind=kind), lesions, interventions)
    pipe = SimpleNamespace(_num_timesteps=len(calls), scheduler=SimpleNamespace(timesteps=range(len(calls))))
    rows, handles = {}, []
    for path, module in denoiser.named_modules():
        if path.endswith(("conv1", "attn1.to_q", "attn2.to_q")):
            note = lambda module, args, output, path=path: rows.update({path: len(output)})  # noqa: E731
            handles.append(module.register_forward_hook(note))
    with Denoising(pipe, denoiser, IMAGES, [client, *([SharedRows(client)] if shared else [])]).running():
        found = [denoiser(**call).sample for call in calls]
    for handle in handles:
        handle.remove()
    assert not any("forward" in vars(module) for module in denoiser.modules())
    return found, rows


@pytest.mark.parametrize("kept", [[], [-1], [2], [0], [-1, 2, -2]])
def test_half_of_the_rows_up_to_the_first_layer_that_is_kept(kept):
    denoiser, calls = build("unet"), calls_of()
    paths = examine(denoiser).paths
    lesions = [lesion(*(path for path in paths if path != paths[one])) for one in kept] or [lesion(*paths)]
    lesions = lesions if len(lesions) == IMAGES else lesions * IMAGES
    ours, rows = rows_of(denoiser, lesions, calls)
    theirs, before = rows_of(denoiser, lesions, calls, shared=False)
    assert apart(ours, theirs) < 2e-6
    assert set(before.values()) == {2 * IMAGES} and set(rows.values()) <= {IMAGES, 2 * IMAGES}
    first = min((list(range(len(paths)))[one] for one in kept), default=len(paths))
    if first == 0:
        assert rows == before and apart(ours, theirs) < 1e-6
        return
    order = list(rows)  # in the order of the calls
    place = order.index(f"{paths[first]}.transformer_blocks.0.attn2.to_q") if kept else len(order)
    assert [rows[path] for path in order[:place]] == [IMAGES] * place and place > 2
    assert [rows[path] for path in order[place:]] == [2 * IMAGES] * (len(order) - place)


class Ramp(Intervention):
    """Another value for each branch."""

    def fill(self, site, call, branches, output):
        return branches[:, None, None] * 0.3 + 0.1


@pytest.mark.parametrize(
    "case", ["cond", "half", "one without", "window", "by branch", "latents", "kind", "extras", "strength 0"]
)
def test_where_branches_differ_or_an_image_has_no_lesion_nothing_is_shared(case):
    denoiser, calls = build("unet"), calls_of()
    paths, change = examine(denoiser).paths, {}
    changes = {"cond": {"branch": "cond"}, "half": {"strength": 0.5}, "window": {"window": (0.0, 0.5)}}
    one = lesion(*paths, **changes.get(case, {}))
    lesions = [
        one,
        one,
        lesion(*paths, strength=0.0) if case == "strength 0" else None if case == "one without" else one,
    ]
    if case == "latents":
        for call in calls:
            call["sample"][0] += 1
    if case == "extras":
        calls = [{**call, "cross_attention_kwargs": {"scale": 1.0}} for call in calls]
    if case == "kind":  # self-attention is lost, the text is read
        change, lesions = {"kind": "self_attention"}, [lesion(*paths, kind="self_attention")] * IMAGES
    intervention = Ramp() if case == "by branch" else None
    ours, rows = rows_of(denoiser, lesions, calls, intervention, **change)
    theirs, _ = rows_of(denoiser, lesions, calls, intervention, shared=False, **change)
    assert set(rows.values()) == {2 * IMAGES} and apart(ours, theirs) < 1e-6  # addresses decide over last bits


def test_a_block_that_is_bypassed_reads_no_text():
    denoiser, calls = build("unet"), calls_of()
    paths = examine(denoiser, kind="block").paths
    lesions = [lesion(*paths[:-1], kind="block")] * IMAGES
    ours, rows = rows_of(denoiser, lesions, calls, kind="block")
    theirs, _ = rows_of(denoiser, lesions, calls, shared=False, kind="block")
    assert apart(ours, theirs) < 2e-6 and next(iter(rows.values())) == IMAGES
    assert list(rows.values())[-1] == 2 * IMAGES
    hooks = {path: lambda module, args, kwargs, output: (args[0],) for path in paths[:-1]}
    assert apart(ours, hooked(denoiser, hooks, calls)) < 2e-6


def test_images_are_those_of_whole_rows(tiny_model, monkeypatch):
    assert not tiny_model.shared_rows
    model = dataclasses.replace(tiny_model, shared_rows=True)
    paths, halved = model.anatomy.paths, []
    cells = [cell(model, subject, zero(*paths[:-1])) for subject in SUBJECTS]
    before = SharedRows.after_call
    monkeypatch.setattr(SharedRows, "after_call", lambda self, *rest: (halved.append(self.halved), before(self, *rest)))
    ours = run(model, cells)
    assert halved[0] > 0 and len(halved) == STEPS
    assert np.abs(ours - run(tiny_model, cells)).max() < 1e-6
    assert len(halved) == STEPS
