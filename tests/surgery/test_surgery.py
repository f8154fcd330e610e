"""Lesions on a live model, against a dozen lines of plain diffusers and plain hooks, and against planted truths."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from contextlib import ExitStack
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from conftest import settings, small_pipeline, tiny_spec
from denoisers import TEXT, inputs
from denoisers import build as build_denoiser
from lesion import models, replacements
from lesion.denoising.run import Denoising, branches_of
from lesion.generation.generate import call, generate, generators, to_pixels
from lesion.models import loading
from lesion.replacements.donor_prompt import DonorPrompt
from lesion.replacements.double import Double
from lesion.replacements.identity import Identity
from lesion.replacements.mask import Mask
from lesion.replacements.null_prompt import NullPrompt
from lesion.replacements.resample import Resample
from lesion.replacements.zero import Zero
from lesion.study.grid import Cell
from lesion.study.layers import KINDS
from lesion.study.lesions import Lesion, Replacement
from lesion.study.prompts import Prompt
from lesion.surgery.anatomy import examine
from lesion.surgery.hook_points import Call, Share, Update, blend
from lesion.surgery.operation import Lesions, replacement_key
from lesion.surgery.tokens import Places, with_tokens

ZERO, CROSS = Replacement("zero"), "cross_attention"
SUBJECTS = [("a red circle", 0), ("a blue square", 1), ("two stars", 7)]


def fillers(model, *lesions):
    bench = replacements.Bench(model, settings(), None, 4)
    return {replacement_key(lesion): replacements.build(lesion.replacement.name, {}, bench) for lesion in lesions}


def cell(model, subject, lesion=None, **changes):
    return Cell(model.identity, Prompt(subject[0]), subject[1], settings(**changes), lesion)


def zero(*layers, **changes):
    return Lesion("leave_one_out", layers[0], tuple(layers), ZERO, **changes)


def run(model, cells):
    return generate(model, cells, fillers(model, *(c.lesion for c in cells if c.lesion)))


@cache
def plain_pipeline(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain(folder, subjects, hooked=(), steps=4, guidance=3.0):
    """Plain diffusers; `hooked` modules put out zeros."""
    pipe = plain_pipeline(folder)
    with ExitStack() as hooks:
        for name in hooked:
            module = pipe.unet.get_submodule(name)
            hooks.callback(module.register_forward_hook(lambda *args: torch.zeros_like(args[-1])).remove)
        return drawn(pipe, subjects, steps, guidance)


def drawn(pipe, subjects=SUBJECTS, steps=4, guidance=3.0):
    """The plain pipeline call."""
    return pipe(
        [prompt for prompt, _ in subjects],
        generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in subjects],
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=16,
        width=16,
        output_type="np",
    ).images


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_baseline_is_plain_diffusers_to_the_bit(tiny_folder, tiny_model, guidance):
    ours = run(tiny_model, [cell(tiny_model, subject, guidance=guidance) for subject in SUBJECTS])
    assert np.array_equal(ours, plain(tiny_folder, SUBJECTS, guidance=guidance))


def test_own_noise_is_that_of_prompt_and_seed_and_shared_noise_that_of_the_seed(tiny_folder, tiny_model):
    subjects = [("a red circle", 3), ("a blue square", 3)]
    cells = [cell(tiny_model, subject, noise="own") for subject in subjects]
    seeds = [one.noise_seed for one in cells]
    by_hand = [hashlib.sha256(f"{hashlib.sha256(t.encode()).hexdigest()}\n{s}".encode()) for t, s in subjects]
    assert seeds == [int(digest.hexdigest()[:16], 16) // 2 for digest in by_hand]
    same = [(prompt, seed) for (prompt, _), seed in zip(subjects, seeds)]
    assert np.array_equal(run(tiny_model, cells), plain(tiny_folder, same))
    assert [cell(tiny_model, subject).noise_seed for subject in subjects] == [3, 3]
    nothing = zero(tiny_model.anatomy.paths[1], strength=1e-9)
    lesioned = run(tiny_model, [cell(tiny_model, subject, nothing, noise="own") for subject in subjects])
    assert np.abs(lesioned - plain(tiny_folder, same)).max() < 1e-6  # the noise of its baseline


def test_baseline_in_a_batch_agrees_with_single_calls(tiny_folder, tiny_model):
    together = run(tiny_model, [cell(tiny_model, subject) for subject in SUBJECTS])
    for image, subject in zip(together, SUBJECTS):
        alone = to_pixels(plain(tiny_folder, [subject])[0])[0].astype(int)
        assert (abs(to_pixels(image)[0].astype(int) - alone) <= 1).mean() >= 0.999


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_zero_is_a_plain_hook_to_the_bit(tiny_folder, tiny_model, guidance):
    whole = plain(tiny_folder, SUBJECTS, guidance=guidance)
    for layer, sites in tiny_model.anatomy.sites.items():
        ours = run(tiny_model, [cell(tiny_model, subject, zero(layer), guidance=guidance) for subject in SUBJECTS])
        assert np.array_equal(ours, plain(tiny_folder, SUBJECTS, sites, guidance=guidance)), layer
        assert not np.array_equal(ours, whole), f"{layer} does nothing"


def test_mixed_batch_agrees_with_each_cell_alone(tiny_model):
    """Tolerance 1e-4 of the range [0, 1]: matrix products of other shapes sum in another order (float32)."""
    paths = tiny_model.anatomy.paths
    lesions = [None, *(zero(path) for path in paths), zero(*paths), zero(paths[1], window=(0.5, 1.0), strength=0.5)]
    cells = [cell(tiny_model, SUBJECTS[i % 3], lesion) for i, lesion in enumerate(lesions)]
    together = run(tiny_model, cells)
    for image, one in zip(together, cells):
        assert np.abs(image - run(tiny_model, [one])[0]).max() < 1e-4
    assert len({image.tobytes() for image in together}) == len(cells)


def test_untouched_images_of_a_lesioned_batch_keep_every_bit(tiny_model):
    baseline = run(tiny_model, [cell(tiny_model, subject) for subject in SUBJECTS])
    cells = [cell(tiny_model, subject) for subject in SUBJECTS]
    cells[1] = cell(tiny_model, SUBJECTS[1], zero(*tiny_model.anatomy.paths))
    mixed = run(tiny_model, cells)
    assert np.array_equal(mixed[[0, 2]], baseline[[0, 2]])
    assert not np.array_equal(mixed[1], baseline[1])


def test_windows_branches_and_strength(tiny_model):
    layers = tiny_model.anatomy.paths
    subject = SUBJECTS[0]
    calls: dict[str, list[torch.Tensor]] = {}

    def record(name, lesion):
        """Which rows are zero at each denoiser call, at the first site."""
        site = tiny_model.anatomy.sites[layers[0]][0]
        seen = calls.setdefault(name, [])
        maps = fillers(tiny_model, lesion)
        handle = tiny_model.denoiser.get_submodule(site).register_forward_hook(
            lambda module, args, output: seen.append((output == 0).all(dim=(1, 2)).tolist())
        )
        clients = [Lesions(tiny_model.anatomy, [lesion], maps)]
        call(tiny_model, [Prompt(subject[0])], generators([subject[1]]), settings(), clients)
        handle.remove()
        return seen

    off, on = [False, False], [True, True]
    assert record("window", zero(layers[0], window=(0.5, 1.0))) == [off, off, on, on]
    assert record("again", zero(layers[0], window=(0.5, 1.0))) == [off, off, on, on]  # no drift on a second call
    assert record("early", zero(layers[0], window=(0.0, 0.25))) == [on, off, off, off]
    assert record("uncond", zero(layers[0], branch="uncond")) == [[True, False]] * 4
    assert record("cond", zero(layers[0], branch="cond")) == [[False, True]] * 4
    baseline = run(tiny_model, [cell(tiny_model, subject)])
    assert np.array_equal(run(tiny_model, [cell(tiny_model, subject, zero(*layers, strength=0.0))]), baseline)
    whole = run(tiny_model, [cell(tiny_model, subject, zero(*layers))])
    half = run(tiny_model, [cell(tiny_model, subject, zero(*layers, strength=0.5))])
    assert 0 < np.abs(half - baseline).mean() < np.abs(whole - baseline).mean()


def test_blend_keeps_and_replaces_to_the_bit():
    output, values, weights = torch.randn(4, 3, 2), torch.randn(1, 2), [0.0, 1.0, 0.25, 0.0]
    output[0, 0, 0] = torch.inf  # a kept row keeps even this; a replaced row loses it
    mixed = blend(output, values, Share.of(torch.tensor(weights), weights, output.dim()))
    assert torch.equal(mixed[[0, 3]], output[[0, 3]])
    assert torch.equal(mixed[1], values.expand(3, 2))
    assert torch.allclose(mixed[2], 0.75 * output[2] + 0.25 * values)


def test_a_strength_and_a_difference_are_not_rounded_in_half_precision():
    output, values, weights = torch.tensor([[[1.0]]]).bfloat16(), torch.tensor([[[9.0]]]).bfloat16(), [0.3]
    mixed = blend(output, values, Share.of(torch.tensor(weights), weights, 3))
    assert mixed.dtype == torch.bfloat16 and mixed.item() == torch.tensor(1 + 0.3 * 8).bfloat16().item()
    block = torch.nn.Identity()
    hidden, out = torch.tensor([[[256.0]]]).bfloat16(), torch.tensor([[[0.75]]]).bfloat16()
    update = Update("block").read(Call(block, block.forward, (hidden,), {}), out, 0)
    assert update.item() == -255.25  # bfloat16 has -255


class Counted(TorchDispatchMode):
    """Counts operators, copies from main memory and waits for the device."""

    def __init__(self):
        super().__init__()
        self.operators = self.copies = self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, out = str(function), function(*args, **(kwargs or {}))
        self.operators += 1
        tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, torch.Tensor)]
        devices = {one.device.type for one in tensors if one.dim()}  # numbers are handed over with the operator
        self.copies += len(devices) > 1
        waiting = any(one in name for one in ("_local_scalar", "nonzero", "equal.default"))
        self.waits += waiting and any(one.device.type == "meta" for one in tensors)
        return out


def counted(by, lesions, calls, intervention=None, family="unet", kind=CROSS, tokens=None, images=2):
    """Of each of some denoiser calls of a small denoiser, on a device that computes nothing.

    tokens: places of the one set of them. images: in the batch, all of them.
    """
    with torch.device("meta"):
        denoiser = build_denoiser(family)
    found, anatomy = [], examine(denoiser, by, kind)
    if tokens:
        anatomy = with_tokens(anatomy, ["padding"])
    places = Places([{(branch, "padding"): tokens for branch in (0, 1)}] * images, TEXTS[family]) if tokens else None
    client = Lesions(anatomy, lesions(anatomy), {"zero:[]": intervention or Zero()}, places)
    pipe = SimpleNamespace(_num_timesteps=calls)
    run = Denoising(pipe, denoiser, images, [client])
    given = tree_map_only(torch.Tensor, lambda one: one.to("meta"), inputs(family, 2 * images)[0])
    with run.running():
        for _ in range(calls):
            with Counted() as now:
                denoiser(**given)
            found.append(now)
    return found


def test_a_late_window_is_one_table_a_batch_and_heads_are_one_mask():
    def late(anatomy):
        return [zero(*anatomy.paths[:3], window=(0.5, 1.0)), zero(anatomy.paths[4])]

    bare = counted("attention", lambda anatomy: [None, None], 1)[0]
    found = counted("attention", late, 6)
    # Two images have other branches of guidance: the table of weights, and the branches.
    assert [now.copies for now in found] == [2, 0, 0, 2, 0, 0]
    assert not any(now.waits for now in found)

    def only_one(anatomy):
        return [zero(*(path for path in anatomy.paths if path != kept)) for kept in anatomy.paths[:2]]

    heads = counted("head", only_one, 2)[-1]
    layers = counted("attention", only_one, 2)[-1]
    assert (bare.copies, heads.copies) == (0, 0)
    assert heads.operators - layers.operators < 40 * 6  # of six layers; head by head it was 15 a head and more


def all_layers(**changes):
    """Of two images, with a source prompt's image beside each."""
    return lambda anatomy: [zero(*anatomy.paths, **changes), zero(anatomy.paths[0], **changes), None, None]


TEXTS = {"unet": 7, "flux": TEXT, "sd3": TEXT}  # tokens of a text
READ = collections.defaultdict(lambda: (torch.empty(1, 7, 16, device="meta"), None))


@pytest.mark.parametrize(
    ("intervention", "more"),
    [
        (Double(), {}),
        (NullPrompt(), {}),
        (DonorPrompt(READ), {}),
        (Resample("a donor", True), {}),
        (Identity(), {"kind": "self_attention"}),
        (Zero(), {"kind": "block"}),
        (Zero(), {"tokens": (1, 2)}),
        (Mask(), {"tokens": (1, 2)}),
        (NullPrompt(), {"tokens": (1, 2)}),
        (Resample("a donor", True), {"tokens": (1, 2)}),
        (Zero(), {"kind": "text_to_image", "family": "flux"}),
        (Zero(), {"kind": "joint_attention", "family": "flux"}),
        (Mask(), {"kind": "text_to_image", "family": "flux", "tokens": (1, 2)}),
        (Zero(), {"kind": "text_to_image", "family": "sd3", "tokens": (1, 2)}),
        (Zero(), {"kind": "text_stream", "family": "sd3"}),
    ],
)
def test_nothing_is_copied_and_nothing_waited_for_once_lesions_are_where_the_rows_are(intervention, more):
    lesions = all_layers(branch="cond" if "family" not in more else "both")
    found = counted("attention", lesions, 3, intervention, images=4, **more)
    assert [(now.copies, now.waits) for now in found[1:]] == [(0, 0)] * 2
    assert found[0].waits == 0


def test_branches_of_rows():
    assert branches_of(4, 2).tolist() == [0, 0, 1, 1]
    assert branches_of(2, 2).tolist() == [1, 1]
    with pytest.raises(RuntimeError, match="3 rows for 2 images"):
        branches_of(3, 2)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_lesions_come_off_whatever_happens(tiny_folder, tiny_model, error):
    def fail(module, args, output):
        raise error("planted")

    layer = tiny_model.anatomy.paths[0]
    handle = tiny_model.denoiser.get_submodule(tiny_model.anatomy.sites[layer][0]).register_forward_hook(fail)
    with pytest.raises(error, match="planted"):
        run(tiny_model, [cell(tiny_model, SUBJECTS[0], zero(layer))])
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_model.denoiser.modules())
    ours = run(tiny_model, [cell(tiny_model, subject) for subject in SUBJECTS])
    assert np.array_equal(ours, plain(tiny_folder, SUBJECTS))


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_any_attention_processor_and_none_swapped(tiny_model, processor):
    tiny_model.denoiser.set_attn_processor(processor())
    before = dict(tiny_model.denoiser.attn_processors)
    cells = [cell(tiny_model, SUBJECTS[0], zero(path)) for path in tiny_model.anatomy.paths]
    images = run(tiny_model, [cell(tiny_model, SUBJECTS[0]), *cells])
    assert tiny_model.denoiser.attn_processors == before
    assert all(np.abs(image - images[0]).max() > 1e-3 for image in images[1:])


def planted(tmp_path, silent):
    """A model whose layers named by `silent` have a zeroed cross-attention output projection."""
    loading.forget()
    pipe = small_pipeline()
    with torch.no_grad():
        for path, module in pipe.unet.named_modules():
            if path.endswith("attn2"):
                module.to_out[0].weight.mul_(8)
                if silent(path):
                    module.to_out[0].weight.zero_()
                    module.to_out[0].bias.zero_()
    pipe.save_pretrained(tmp_path / "planted")
    return models.load(models.resolve(tiny_spec(tmp_path / "planted")), "cpu")


def test_planted_layer_that_does_nothing(tmp_path):
    """Importance of a layer with a zeroed output projection is exactly 0, of the others it is not."""
    chosen = "up_blocks.0.attentions.1"
    model = planted(tmp_path, lambda path: path.startswith(chosen))
    baseline = run(model, [cell(model, subject) for subject in SUBJECTS])
    for layer in model.anatomy.paths:
        images = run(model, [cell(model, subject, zero(layer)) for subject in SUBJECTS])
        assert np.array_equal(images, baseline) == (layer == chosen), layer


def test_planted_layer_that_does_everything(tmp_path):
    """Where only one layer has a non-zero output projection, removing it equals removing all, to the bit."""
    chosen = "mid_block.attentions.0"
    model = planted(tmp_path, lambda path: not path.startswith(chosen))
    one = run(model, [cell(model, subject, zero(chosen)) for subject in SUBJECTS])
    everything = run(model, [cell(model, subject, zero(*model.anatomy.paths)) for subject in SUBJECTS])
    assert np.array_equal(one, everything)
    assert not np.array_equal(one, run(model, [cell(model, subject) for subject in SUBJECTS]))


def test_pixels_as_diffusers_makes_them_and_invalid_images():
    image = np.random.default_rng(0).random((8, 8, 3), dtype=np.float32)
    from diffusers.image_processor import VaeImageProcessor

    assert np.array_equal(to_pixels(image)[0], np.asarray(VaeImageProcessor.numpy_to_pil(image)[0]))
    assert to_pixels(image)[1] == ""
    image[0, 0, 0] = np.nan
    assert to_pixels(image)[1] == "image has non-finite values"
    assert to_pixels(np.zeros((8, 8, 3), np.float32))[1] == "image is all black"


@pytest.mark.parametrize("by", ["attention", "transformer_block", "block", "stage"])
@pytest.mark.parametrize(
    ("kind", "leaf"), [("self_attention", "attn1"), ("feed_forward", "ff"), ("cross_attention", "attn2")]
)
def test_kinds_and_granularities_are_plain_hooks_to_the_bit(tiny_folder, tiny_model, by, kind, leaf):
    model = dataclasses.replace(tiny_model, anatomy=examine(tiny_model.denoiser, by, kind))
    path = model.anatomy.paths[0]
    hooked = [
        name for name, _ in model.denoiser.named_modules() if name.startswith(f"{path}.") and name.endswith(f".{leaf}")
    ]
    assert list(model.anatomy.sites[path]) == hooked
    images = run(model, [cell(model, subject, zero(path, kind=kind)) for subject in SUBJECTS])
    assert np.array_equal(images, plain(tiny_folder, SUBJECTS, hooked))
    assert not np.array_equal(images, plain(tiny_folder, SUBJECTS))


def test_kinds_make_cells_of_their_own(tiny_model):
    layer = tiny_model.anatomy.paths[0]
    keys = {cell(tiny_model, SUBJECTS[0], zero(layer, kind=kind)).key for kind in KINDS}
    assert len(keys) == len(KINDS)
    assert (
        cell(tiny_model, SUBJECTS[0], zero(layer)).key == cell(tiny_model, SUBJECTS[0], zero(layer, kind=KINDS[0])).key
    )
