"""`replacement=lora_off` against plain diffusers and PEFT with the matrices of a layer set to zero."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from conftest import settings
from lesion import replacements
from lesion.errors import RequestError
from lesion.generation.generate import generate
from lesion.models import loading
from lesion.study.layers import KINDS
from lesion.study.lesions import Lesion, Replacement
from lesion.surgery.anatomy import examine
from lesion.surgery.operation import replacement_key
from test_surgery import SUBJECTS, cell, drawn, plain

OFF = Replacement("lora_off")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def opened(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_lora(pipeline_folder, folder, targets=TARGETS, seed=0):
    """A LoRA of loud random matrices, rank 2, in diffusers' format."""
    pipe = opened(pipeline_folder)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    matrices = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(str(folder), unet_lora_layers=matrices)
    return folder


@pytest.fixture(scope="module")
def lora(tiny_folder, tmp_path_factory):
    return write_lora(tiny_folder, tmp_path_factory.mktemp("loras") / "one")


@pytest.fixture
def bare(tiny_model):
    """The tiny model, on which a test may put LoRAs: it is not kept for others."""
    yield tiny_model
    loading.forget()


def with_loras(model, *folders, weights=None):
    put_on(model.pipe, folders, weights)
    return model


def put_on(pipe, folders, weights):
    for index, folder in enumerate(folders):
        pipe.load_lora_weights(str(folder), adapter_name=f"lora_{index}")
    pipe.set_adapters([f"lora_{i}" for i in range(len(folders))], weights or [1.0] * len(folders))


def off(*layers, **changes):
    return Lesion("leave_one_out", layers[0], tuple(layers), OFF, **changes)


def images(model, lesions, subjects=SUBJECTS):
    """Image i under lesions[i]."""
    filler = replacements.build("lora_off", {}, replacements.Bench(model, settings(), None, 4))
    cells = [cell(model, subject, lesion) for subject, lesion in zip(subjects, lesions, strict=True)]
    made = generate(model, cells, {replacement_key(off("x")): filler})
    assert not any("forward" in vars(module) for module in model.denoiser.modules())
    return made


def reference(folder, loras, sites, weights=None, when=lambda call: True):
    """Plain diffusers and PEFT; at the calls that `when` names, the second matrices within `sites` are zero."""
    pipe = opened(folder)
    put_on(pipe, loras, weights)
    parts = [
        matrix.weight
        for path, module in pipe.unet.named_modules()
        if isinstance(module, LoraLayer) and any(path.startswith(f"{site}.") for site in sites)
        for matrix in module.lora_B.values()
    ]
    assert parts
    kept, calls = [part.detach().clone() for part in parts], iter(range(100))

    def before(*_):
        off_now = when(next(calls))
        with torch.no_grad():
            for part, full in zip(parts, kept, strict=True):
                part.copy_(torch.zeros_like(full) if off_now else full)

    pipe.unet.register_forward_pre_hook(before)
    return drawn(pipe)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in ("cross_attention", "self_attention", "block")])
def test_a_layers_lora_off_is_its_matrices_at_zero(tiny_folder, lora, bare, kind):
    model = replace(with_loras(bare, lora), anatomy=examine(bare.denoiser, "attention", kind))
    baseline = images(model, [None] * 3)
    assert not np.array_equal(baseline, plain(tiny_folder, SUBJECTS)), "this LoRA does nothing"
    for layer in model.anatomy.paths[::3]:
        ours = images(model, [off(layer, kind=kind)] * 3)
        assert np.array_equal(ours, reference(tiny_folder, [lora], model.anatomy.sites[layer]))
        assert np.abs(ours - baseline).max() > 1e-3


def test_off_in_all_layers_is_the_base_model_to_the_bit(tiny_folder, bare, tmp_path):
    """Of a LoRA on cross-attention alone, so that the sites hold all of it."""
    lora = write_lora(tiny_folder, tmp_path, [f"attn2.{target}" for target in TARGETS])
    model = with_loras(bare, lora)
    assert not np.array_equal(images(model, [None] * 3), plain(tiny_folder, SUBJECTS))
    assert np.array_equal(images(model, [off(*model.anatomy.paths)] * 3), plain(tiny_folder, SUBJECTS))


@pytest.mark.skipif("block" not in KINDS, reason="kind block is not there yet")
def test_off_in_all_blocks_is_the_base_model_to_the_bit(tiny_folder, lora, bare):
    model = replace(with_loras(bare, lora), anatomy=examine(bare.denoiser, "attention", "block"))
    lesion = off(*model.anatomy.paths, kind="block")
    assert np.array_equal(images(model, [lesion] * 3), plain(tiny_folder, SUBJECTS))


def test_several_loras_with_weights_go_together(tiny_folder, lora, bare, tmp_path):
    loras, weights = [lora, write_lora(tiny_folder, tmp_path, seed=1)], [0.7, -0.4]
    model = with_loras(bare, *loras, weights=weights)
    layer = model.anatomy.paths[2]
    ours = images(model, [off(layer)] * 3)
    assert np.array_equal(ours, reference(tiny_folder, loras, model.anatomy.sites[layer], weights))


def test_windows(tiny_folder, lora, bare):
    model = with_loras(bare, lora)
    layer = model.anatomy.paths[1]
    sites = model.anatomy.sites[layer]
    ours = images(model, [off(layer, window=(0.0, 0.5))] * 3)
    assert np.array_equal(ours, reference(tiny_folder, [lora], sites, when=lambda call: call < 2))
    assert not np.array_equal(ours, images(model, [off(layer)] * 3))


def test_strength(tiny_folder, lora, bare):
    model = with_loras(bare, lora)
    layers = model.anatomy.paths
    baseline = images(model, [None] * 3)
    assert np.array_equal(baseline, reference(tiny_folder, [lora], [layers[0]], when=lambda call: False))
    made = {strength: images(model, [off(*layers, strength=strength)] * 3) for strength in (0.0, 0.5, 1.0)}
    assert np.array_equal(made[0.0], baseline)
    assert 0 < np.abs(made[0.5] - baseline).mean() < np.abs(made[1.0] - baseline).mean()


def test_a_mixed_batch_agrees_with_each_cell_alone(lora, bare):
    model = with_loras(bare, lora)
    layers = model.anatomy.paths
    lesions = [off(layers[0]), None, off(layers[0], layers[4], strength=0.3)]
    together = images(model, lesions)
    for image, subject, lesion in zip(together, SUBJECTS, lesions, strict=True):
        assert np.abs(image - images(model, [lesion], [subject])[0]).max() < 1e-4
    assert np.abs(together[0] - images(model, [None, None, None])[0]).max() > 1e-3
    assert np.array_equal(together[1], images(model, [None, None, None])[1])


def test_a_lora_elsewhere_is_refused_by_name(tiny_folder, bare, tmp_path):
    model = with_loras(bare, write_lora(tiny_folder, tmp_path, ["attn1.to_q"]))
    with pytest.raises(RequestError, match=r"lora_off: no LoRA .* cross_attention"):
        replacements.build("lora_off", {}, replacements.Bench(model, settings(), None, 4))


def test_without_a_lora_it_is_refused_before_the_model_loads(cli, monkeypatch):
    def never(*args):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "_load", never)
    code, _, err = cli("replacement=lora_off")
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "replacement" in err and "lora_off" in err and "model.loras" in err
    code, _, err = cli("replacement=lora_off", "+replacement.lora_off.adapter=x")
    assert code == 2
    assert "allowed: none" in err


def test_heads_and_compiled_blocks_are_refused(cli, lora):
    for wrong in ("layers.by=head", "performance.compile=true"):
        code, _, err = cli("replacement=lora_off", wrong, f"model.loras=[{{path: {lora}}}]")
        assert code == 2
        assert "lora_off" in err and len(err.strip().splitlines()) == 1


def test_from_command_to_table(cli, lora):
    code, _, err = cli(
        "replacement=lora_off", f"model.loras=[{{path: {lora}, weight: 1.0}}]", "selection=[leave_one_out,all]"
    )
    assert code == 0, err
    (frame,) = cli.frames()
    lesioned = frame[frame.selection != "none"]
    assert set(frame.replacement) == {"", "lora_off"}
    assert (lesioned.clip_similarity < 1 - 1e-6).any()


def test_the_experiment_runs_and_can_be_read(cli, lora, tiny_folder, tiny_clip, tmp_path, monkeypatch):
    """On a tiny model with a LoRA of its own."""
    from test_configs import small
    from test_scoring import write_dino

    cli.defaults = []
    code, _, err = cli(
        "experiment=lora", f"model.loras.0.path={lora}", *small(tiny_folder, tiny_clip, write_dino(tmp_path / "dino"))
    )
    assert code == 0, err
    (frame,) = cli.frames()
    assert (frame.status == "ok").all()
    assert set(frame.selection) == {"none", "leave_one_out", "only_one", "all"}
    assert set(frame.kind) == {"", "block"} and set(frame.replacement) == {"", "lora_off"}
    assert len(frame) == 1 + 7 + 7 + 1
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import lora_demo

    shares = lora_demo.read_run(cli.newest())
    assert list(shares["leave_one_out"]) == list(shares["only_one"]) == list(frame.layer.unique()[1:8])
    assert shares["none"]["-"] == {"new_colour": 0.0, "images": 1}
