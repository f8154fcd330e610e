"""Work that is not done twice: sites nobody reads, text features, and the steps before a late lesion begins."""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler, StableDiffusionPipeline
from diffusers.models.attention import FeedForward
from safetensors.torch import load_file, save_file
from torch import nn

from lesion.generation.generate import generate
from lesion.generation.snapshots import State, States, _capture, _restore, first_step
from lesion.models import memory, text_cache
from lesion.models.schedulers import FLOW, SCHEDULERS, make
from lesion.models.text_cache import TextMemory
from lesion.replacements.mean import Mean
from lesion.replacements.zero import Zero
from lesion.study.lesions import Lesion, Replacement
from lesion.surgery.anatomy import examine
from lesion.surgery.hook_points import keeps_shape
from lesion.surgery.intervention import Intervention
from lesion.surgery.operation import replacement_key
from test_surgery import SUBJECTS, cell, drawn, fillers, plain, run, zero

LATE = (0.5, 1.0)


def counted(model, module, cells, at_work=None, **more):
    """How often the module's own computation ran while the cells were made, and the images."""
    calls = []
    forward = module.forward
    module.forward = lambda *args, **kwargs: calls.append(args) or forward(*args, **kwargs)
    try:
        at_work = at_work or fillers(model, *(c.lesion for c in cells if c.lesion))
        images = generate(model, cells, at_work, **more)
    finally:
        del module.forward
    return len(calls), images


def site_of(model, layer):
    return model.denoiser.get_submodule(model.anatomy.sites[layer][0])


def test_a_site_replaced_in_every_row_is_not_computed(tiny_model):
    first, second, *_ = tiny_model.anatomy.paths
    to_out = site_of(tiny_model, first).to_out[0]  # inside the site: its own forward is what is spared
    both = [cell(tiny_model, subject, zero(first)) for subject in SUBJECTS]
    assert counted(tiny_model, to_out, both)[0] == 0
    mixed = [cell(tiny_model, SUBJECTS[0], zero(first)), cell(tiny_model, SUBJECTS[1], zero(second))]
    assert counted(tiny_model, to_out, mixed)[0] == 4
    assert counted(tiny_model, to_out, [cell(tiny_model, SUBJECTS[0], zero(first, window=LATE))])[0] == 2
    assert counted(tiny_model, to_out, [cell(tiny_model, SUBJECTS[0], zero(first, branch="cond"))])[0] == 4
    assert counted(tiny_model, to_out, [cell(tiny_model, SUBJECTS[0], zero(first, strength=0.5))])[0] == 4


def test_neither_is_the_norm_before_it(tiny_model):
    first, second, *_ = tiny_model.anatomy.paths
    norm = tiny_model.denoiser.get_submodule(tiny_model.anatomy.sites[first][0].removesuffix(".attn2")).norm2
    both = [cell(tiny_model, subject, zero(first)) for subject in SUBJECTS]
    assert counted(tiny_model, norm, both)[0] == 0
    mixed = [cell(tiny_model, SUBJECTS[0], zero(first)), cell(tiny_model, SUBJECTS[1], zero(second))]
    assert counted(tiny_model, norm, mixed)[0] == 4
    assert counted(tiny_model, norm, [cell(tiny_model, SUBJECTS[0], zero(first, window=LATE))])[0] == 2
    assert counted(tiny_model, norm, [cell(tiny_model, SUBJECTS[0], zero(first, branch="cond"))])[0] == 4
    self_attention = dataclasses.replace(tiny_model, anatomy=examine(tiny_model.denoiser, kind="self_attention"))
    asked = [cell(tiny_model, SUBJECTS[0], zero(first, kind="self_attention"))]
    assert counted(self_attention, norm, asked)[0] == 4


@pytest.mark.parametrize("name", ["zero", "mean"])
def test_a_feed_forward_replaced_in_every_row_is_not_computed(tiny_model, tiny_folder, name):
    model = dataclasses.replace(tiny_model, anatomy=examine(tiny_model.denoiser, kind="feed_forward"))
    first, second, *_ = model.anatomy.paths
    sites = model.anatomy.sites[first]
    table = {site: torch.arange(4 * 2 * site_of(model, first).net[2].out_features).reshape(4, 2, -1) / 500
             for site in sites}  # fmt: skip
    filler = {"zero": Zero(), "mean": Mean(table)}[name]

    def lesion(layer):
        return Lesion("leave_one_out", layer, (layer,), Replacement(name), kind="feed_forward")

    cells = [cell(model, subject, lesion(first)) for subject in SUBJECTS]
    at_work = {replacement_key(lesion(first)): filler}
    feed_forward = site_of(model, first)
    norm = model.denoiser.get_submodule(sites[0].removesuffix(".ff")).norm3
    for part in (feed_forward.net[2], norm):  # inside the site: its own forward is what is spared
        assert counted(model, part, cells, at_work)[0] == 0
        mixed = [cells[0], cell(model, SUBJECTS[1], lesion(second))]
        if name == "zero":
            assert counted(model, part, mixed, at_work)[0] == 4

    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for site in sites:
        calls = []

        def hook(module, args, output, site=site, calls=calls):
            calls.append(None)
            if name == "zero":
                return torch.zeros_like(output)
            return table[site][len(calls) - 1].repeat_interleave(len(SUBJECTS), 0)[:, None].expand_as(output)

        pipe.unet.get_submodule(site).register_forward_hook(hook)
    assert np.array_equal(generate(model, cells, at_work), drawn(pipe))


def test_a_feed_forward_of_another_width_behind_than_in_front_has_no_placeholder():
    assert keeps_shape(FeedForward(8))
    assert keeps_shape(FeedForward(8, activation_fn="gelu-approximate", final_dropout=True))
    assert not keeps_shape(FeedForward(8, dim_out=4))
    assert not keeps_shape(nn.Linear(8, 8))


def test_sparing_changes_no_bit(tiny_model, tiny_folder, monkeypatch):
    layers = tiny_model.anatomy.paths
    cells = [cell(tiny_model, subject, zero(*layers[1:])) for subject in SUBJECTS]
    spared = run(tiny_model, cells)
    monkeypatch.setattr("lesion.surgery.hook_points.HookPoint.placeholder", lambda hook, call: None)
    assert np.array_equal(spared, run(tiny_model, cells))


def test_a_filler_that_reads_the_output_gets_it(tiny_model):
    class Halved(Intervention):
        reads_output = True

        def fill(self, site, call, branches, output):
            return output / 2

    layer = tiny_model.anatomy.paths[0]
    to_out = site_of(tiny_model, layer).to_out[0]
    lesion = Lesion("leave_one_out", layer, (layer,), Replacement("zero"))
    calls = []
    handle = to_out.register_forward_hook(lambda *_: calls.append(1))
    generate(tiny_model, [cell(tiny_model, SUBJECTS[0], lesion)], {"zero:[]": Halved()})
    handle.remove()
    assert len(calls) == 4


def test_a_prompt_goes_through_the_text_encoder_once(tiny_model, tiny_folder):
    encoder = tiny_model.pipe.text_encoder
    seen = []
    handle = (
        encoder.text_model.embeddings.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(kwargs.get("input_ids", args[0] if args else None))),
            with_kwargs=True,
        )
        if hasattr(encoder, "text_model")
        else encoder.embeddings.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(kwargs.get("input_ids", args[0] if args else None))),
            with_kwargs=True,
        )
    )
    subjects = [("a red circle", 0), ("a red circle", 1), ("a blue square", 0)]
    first = run(tiny_model, [cell(tiny_model, subject) for subject in subjects])
    assert sum(seen) == 4  # two prompts, and the empty one twice: alone it would round differently
    again = run(tiny_model, [cell(tiny_model, subject) for subject in reversed(subjects)])
    handle.remove()
    assert sum(seen) == 4
    assert np.array_equal(first, plain(tiny_folder, subjects))
    assert np.array_equal(again, plain(tiny_folder, subjects[::-1]))
    assert "forward" not in vars(encoder)


def test_text_is_encoded_again_when_anything_of_the_encoder_has_changed(tiny_model, tiny_folder):
    """A weight changed in place or through `.data`, another object in its place, a hook, a LoRA and its scale."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    encoder, memory = tiny_model.pipe.text_encoder, TextMemory()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    runs = []
    embedding = next(module for module in encoder.modules() if isinstance(module, torch.nn.Embedding))
    embedding.register_forward_pre_hook(lambda *_: runs.append(1))

    def encoded():
        """The remembered features; whether the encoder ran for them; and whether they are what it would give."""
        runs.clear()
        with torch.inference_mode(), memory.attached(tiny_model.pipe):
            features = encoder(ids)[0]
        ran = bool(runs)
        with torch.inference_mode():
            assert torch.equal(features, encoder(ids)[0])
        return ran

    layer = next(module for path, module in encoder.named_modules() if path.endswith("layers.0.self_attn"))
    changes = [
        lambda: torch.no_grad()(layer.v_proj.weight.mul_)(2),
        lambda: layer.v_proj.weight.data.mul_(2),
        lambda: setattr(layer.v_proj.weight, "data", layer.v_proj.weight.data * 2),
        lambda: setattr(layer.v_proj, "bias", torch.nn.Parameter(layer.v_proj.bias + 1)),
        lambda: layer.register_forward_hook(lambda module, args, output: (output[0] * 2, *output[1:])),
        lambda: inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), encoder),
        lambda: [one.scaling.update(default=7.0) for one in encoder.modules() if isinstance(one, LoraLayer)],
        lambda: [one.enable_adapters(False) for one in encoder.modules() if isinstance(one, LoraLayer)],
    ]
    assert encoded() and not encoded()
    for change in changes:
        change()
        assert encoded() and not encoded()


class Encoder(nn.Module):
    """Of three tokens: features of 3 x 4 float32 and their sum, 56 bytes."""

    def forward(self, ids):
        return (ids.float()[..., None].expand(-1, -1, 4), ids.sum(1, keepdim=True))


class Pipe:
    components: ClassVar = {"text_encoder": Encoder(), "unet": nn.Linear(1, 1)}


def test_text_memory_forgets_the_oldest():
    memory, encoder = TextMemory(limit=2 * 56), Pipe.components["text_encoder"]
    ids = torch.arange(9).reshape(3, 3)
    with memory.attached(Pipe):
        for rows in ([0, 1], [1, 0, 1], [2], [0, 1, 2]):
            features, total = encoder(ids[rows])
            assert torch.equal(features[..., 0], ids[rows].float()) and torch.equal(total[:, 0], ids[rows].sum(1))
            assert len(memory.kept) <= 2


def test_text_features_stay_on_the_accelerator_until_its_memory_runs_out(monkeypatch):
    monkeypatch.setattr(text_cache, "_apart", lambda device: True)  # as if main memory were another one
    texts, encoder, copied = TextMemory(near=2 * 56), Pipe.components["text_encoder"], []
    used = texts.kept.used
    monkeypatch.setattr(texts.kept, "used", lambda key: copied.append(key) or used(key))
    ids = torch.arange(9).reshape(3, 3)
    with texts.attached(Pipe):
        for rows, copies in (([0, 1], 2), ([1, 0], 2), ([2, 2], 3), ([0, 2], 3), ([1, 0], 4), ([0, 1, 2], 5)):
            features, total = encoder(ids[rows])
            assert torch.equal(features[..., 0], ids[rows].float()) and torch.equal(total[:, 0], ids[rows].sum(1))
            assert len(copied) == copies and len(texts.near) == 2, rows
            features.zero_()  # what a pipeline does with its features is no business of those that are kept
        memory.release("cpu")
        assert len(texts.near) == 0 and len(texts.kept) == 3
        assert torch.equal(encoder(ids)[0][..., 0], ids.float()) and len(copied) == 8


def test_keys_and_values_of_the_text_are_computed_once_a_call(tiny_model):
    site = site_of(tiny_model, tiny_model.anatomy.paths[0])
    assert counted(tiny_model, site.to_k, [cell(tiny_model, SUBJECTS[0])])[0] == 1
    assert "forward" not in vars(site.to_v)


def on(model, scheduler, monkeypatch):
    monkeypatch.setattr(model.pipe, "scheduler", make(scheduler, model.pipe.scheduler))


@pytest.mark.parametrize(
    ("scheduler", "recorded", "window"),
    [
        pytest.param(name, recorded, window, marks=[] if fast else [pytest.mark.slow])
        for name in sorted(set(SCHEDULERS) - set(FLOW))
        for recorded, window, fast in (
            (True, LATE, True),
            (False, (0.4, 1.0), name in ("ddim", "dpmpp", "heun")),
            (False, LATE, False),
            (True, (0.4, 1.0), False),
        )
    ],
)
def test_a_late_lesion_goes_on_from_the_baseline_to_the_bit(
    tiny_model, tmp_path, monkeypatch, scheduler, recorded, window
):
    """Same company in both batches; noisy and multistep schedulers too, Heun's also between the halves of a step."""
    on(tiny_model, scheduler, monkeypatch)
    baselines = [cell(tiny_model, subject, steps=6) for subject in SUBJECTS]
    late = [cell(tiny_model, subject, zero(*tiny_model.anatomy.paths, window=window), steps=6) for subject in SUBJECTS]
    conv_in = tiny_model.denoiser.conv_in
    total, whole = counted(tiny_model, conv_in, late)
    untouched = run(tiny_model, baselines)
    states = States(tmp_path)
    if recorded:
        assert np.array_equal(generate(tiny_model, baselines, {}, states, [window]), untouched)
        assert len(list(tmp_path.rglob("*.safetensors"))) == len(SUBJECTS)
    start = first_step(window, total)
    calls, images = counted(tiny_model, conv_in, late, states=states, windows=[window])
    assert states.usable
    assert np.array_equal(images, whole)
    assert not np.array_equal(images, untouched)
    assert calls == total - start + (0 if recorded else start)
    assert counted(tiny_model, conv_in, late[:1], states=states, windows=[window])[0] == total - start
    assert not {"forward", "step"} & {*vars(tiny_model.denoiser), *vars(tiny_model.pipe.scheduler)}


def test_a_scheduler_with_unknown_memory_makes_every_step(tiny_model, tmp_path, monkeypatch):
    layer = tiny_model.anatomy.paths[0]
    late = [cell(tiny_model, SUBJECTS[0], zero(layer, window=LATE))]
    whole = run(tiny_model, late)
    monkeypatch.setattr(tiny_model.pipe.scheduler, "noise_tree", object(), raising=False)
    states = States(tmp_path)
    assert np.array_equal(
        counted(tiny_model, tiny_model.denoiser.conv_in, late, states=states, windows=[LATE])[1], whole
    )
    assert not states.usable


@pytest.mark.parametrize(
    ("scheduler", "arguments", "total"),
    [
        ("euler", {"timesteps": list(range(950, 0, -100))}, 10),
        ("euler", {"sigmas": [14.0, 9.0, 5.0, 3.0, 1.5, 0.8, 0.4, 0.1]}, 7),  # the last is where it ends
        ("dpmpp", {"timesteps": list(range(950, 0, -100))}, 10),
    ],
)
def test_arguments_that_change_the_number_of_steps(tiny_model, tmp_path, monkeypatch, scheduler, arguments, total):
    """The state at 0.6 of 10 steps is not the one at 0.2 of the 30 that the settings speak of."""
    on(tiny_model, scheduler, monkeypatch)
    model = dataclasses.replace(tiny_model, arguments=arguments)
    windows = [(0.2, 1.0), (0.6, 1.0)]
    layers = model.anatomy.paths

    def late(window, subjects=SUBJECTS):
        return [cell(model, subject, zero(*layers, window=window), steps=30) for subject in subjects]

    whole = [run(model, late(window)) for window in windows]
    assert not np.array_equal(*whole)
    generate(model, [cell(model, subject, steps=30) for subject in SUBJECTS], {}, States(tmp_path), windows)
    for window, images in zip(windows, whole, strict=True):
        start, fresh = first_step(window, total), States(tmp_path)  # as in a process that made no baseline
        calls, found = counted(model, model.denoiser.conv_in, late(window), states=fresh, windows=windows)
        assert np.array_equal(found, images), window
        assert calls == total - start


def test_states_of_another_number_of_steps_are_not_used(tiny_model, tmp_path, caplog):
    """Should a library ever change how many steps a key's image takes: made from noise, and said so."""
    layer = tiny_model.anatomy.paths[0]
    late = [cell(tiny_model, subject, zero(layer, window=LATE), steps=6) for subject in SUBJECTS]
    whole = run(tiny_model, late)
    states = States(tmp_path)
    generate(tiny_model, [cell(tiny_model, subject, steps=6) for subject in SUBJECTS], {}, states, [LATE])
    for one in late:
        state = states.get(one.baseline.key, 3, 6)
        assert states.get(one.baseline.key, 3, 5) is None
        states.put(one.baseline.key, 3, dataclasses.replace(state, calls=5))
    states = States(tmp_path)
    calls, images = counted(tiny_model, tiny_model.denoiser.conv_in, late, states=states, windows=[LATE])
    assert np.array_equal(images, whole) and calls == 6
    assert not states.usable and "the pipeline takes 6 steps, the kept states are of 5" in caplog.text


def test_a_disk_that_keeps_no_states_costs_no_image(tiny_model, tmp_path, caplog):
    baselines = [cell(tiny_model, subject) for subject in SUBJECTS]
    late = [cell(tiny_model, subject, zero(*tiny_model.anatomy.paths, window=LATE)) for subject in SUBJECTS]
    (tmp_path / "file").write_text("no folder")
    states = States(tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(generate(tiny_model, baselines, {}, states, [LATE]), run(tiny_model, baselines))
        late_images = counted(tiny_model, tiny_model.denoiser.conv_in, late, states=states, windows=[LATE])[1]
    assert np.array_equal(late_images, run(tiny_model, late))
    assert caplog.text.count("cannot be kept") == 1


def test_a_number_goes_back_where_it_was(tmp_path):
    """Heun's dt is in main memory whatever the device: beside float16 latents it would be rounded first."""

    def halfway():
        scheduler = HeunDiscreteScheduler()
        scheduler.set_timesteps(4)
        return scheduler

    scheduler, latents = halfway(), torch.randn(1, 4, 8, 8)
    latents = scheduler.step(torch.randn(1, 4, 8, 8), scheduler.timesteps[0], latents).prev_sample
    states = States(tmp_path)
    states.put("ab12", 1, _capture(scheduler, latents, [torch.Generator()], 7)[0])
    other = halfway()
    like = torch.empty(1, 4, 8, 8, device="meta")  # as good as a GPU: only what is put there is there
    assert _restore(other, [states.get("ab12", 1, 7)], [torch.Generator()], like).device.type == "meta"
    assert other.dt.device.type == "cpu" and torch.equal(other.dt, scheduler.dt)
    assert other.prev_derivative.device.type == "meta"


def test_states_of_another_form_are_not_used(tmp_path, tiny_model, caplog):
    tiny_model.pipe.scheduler.set_timesteps(4)
    (state,) = _capture(tiny_model.pipe.scheduler, torch.randn(1, 4, 8, 8), [torch.Generator().manual_seed(1)], 4)
    states = States(tmp_path)
    del state.plain["on_cpu"]
    states.put("ab12", 3, state)
    assert states.get("ab12", 3, 4) is None
    assert "is not used" in caplog.text


def test_states_on_disk(tmp_path, tiny_model, caplog):
    states = States(tmp_path)
    assert states.get("ab12", 3, 4) is None
    tiny_model.pipe.scheduler.set_timesteps(4)
    (state,) = _capture(tiny_model.pipe.scheduler, torch.randn(1, 4, 8, 8), [torch.Generator().manual_seed(1)], 4)
    path = states.path("ab12", 3)

    def kept():
        states.put("ab12", 3, state)
        found = states.get("ab12", 3, 4)
        assert isinstance(found, State) and found.plain == state.plain
        assert all(torch.equal(found.tensors[name], state.tensors[name]) for name in state.tensors)
        return path.read_bytes()

    whole = kept()
    for damaged in (b"torn", whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        path.write_bytes(damaged)
        caplog.clear()
        assert states.get("ab12", 3, 4) is None and not path.exists()
        assert caplog.text.count("is damaged and removed") == 1
        kept()
    save_file(load_file(path), path, metadata={"plain": "{}", "calls": "4"})  # as an earlier version's, without digest
    assert states.get("ab12", 3, 4) is None
