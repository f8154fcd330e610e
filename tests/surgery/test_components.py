"""Lesions of text encoders and of the autoencoder's decoder, against plain diffusers, its clip_skip and plain hooks."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import UMT5Config, UMT5EncoderModel

from conftest import settings, tiny_spec
from lesion import lesioned, models, replacements
from lesion.analysis.importance import layer_table
from lesion.analysis.settings import layers_in_order, rows
from lesion.analysis.settings import settings as settings_in
from lesion.cli import structure
from lesion.errors import RequestError
from lesion.generation.generate import generate
from lesion.generation.snapshots import States
from lesion.models import components as listed
from lesion.models import loading
from lesion.models.words import words_of
from lesion.report.merging import Refused, put_together, run_folders
from lesion.run.job import examined
from lesion.study.components import AFTER, check_axes, components_of
from lesion.study.grid import Cell, Study
from lesion.study.inits import with_inits
from lesion.study.layers import Layers
from lesion.study.lesions import Axes, Lesion, Replacement
from lesion.study.plan import batches
from lesion.study.prompts import Prompt
from lesion.surgery.operation import replacement_key

TEXTS, SEEDS = ("a red circle", "two STARS"), (0, 7)
CALIBRATION = {"calibration": {"prompts": {"name": "own", "items": ["a dog", "one cat sits", "a"]}, "seeds": [3]}}


def loaded(folder, component="text_encoder", kind="block", by="attention"):
    source = models.resolve(tiny_spec(folder))
    return examined(models.load(source, "cpu"), source, asked(component, kind, by))


def lesion_of(*layers, kind="block", replacement="zero", **changes):
    return Lesion("all", "", layers, Replacement(replacement), kind=kind, **changes)


def cells(model, *lesions, texts=TEXTS, seeds=SEEDS, **changes):
    """Every text with its seed and lesion; one lesion for all, or one each."""
    lesions = lesions * len(texts) if len(lesions) == 1 else lesions or (None,) * len(texts)
    embedded = True if hasattr(model.denoiser.config, "guidance_embeds") else None
    given = settings(
        **{"steps": 2, "scheduler": type(model.pipe.scheduler).__name__, "embedded_guidance": embedded, **changes}
    )
    return [
        Cell(model.identity, Prompt(text), seed, given, lesion)
        for text, seed, lesion in zip(texts, seeds, lesions, strict=True)
    ]


def fillers_of(model, given, folder=None, options=None):
    fillers = {}
    lesions = {cell.lesion for cell in given if cell.lesion}
    studied = components_of(tuple(sorted({layer for lesion in lesions for layer in lesion.layers})))
    for lesion in lesions:
        bench = replacements.Bench(model, given[0].settings, folder, 2, studied)
        fillers[replacement_key(lesion)] = replacements.build(lesion.replacement.name, options or {}, bench)
    return fillers


def made(model, given, folder=None, options=None, **more):
    return generate(model, given, fillers_of(model, given, folder, options), **more)


@lru_cache
def pipeline(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if (
        type(pipe.text_encoder).__name__ == "CLIPTextModel"
    ):  # where diffusers' clip_skip looks, and transformers 4 has it
        vars(pipe.text_encoder).setdefault("text_model", pipe.text_encoder)
    return pipe


def plain(folder, hooks=lambda pipe: (), guidance=3.0, texts=TEXTS, seeds=SEEDS, **more):
    """Plain diffusers. hooks: (module, hook) pairs of the pipeline."""
    pipe = pipeline(folder)
    # In front of those with which transformers takes hidden states out.
    handles = [module.register_forward_hook(hook, prepend=True) for module, hook in hooks(pipe)]
    generator = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    more = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np", **more}
    try:
        return pipe(prompt=list(texts), generator=generator, guidance_scale=guidance, **more).images
    finally:
        for handle in handles:
            handle.remove()


def hooked(component, path, hook):
    """For `plain`: one hook on a module of a component."""
    return lambda pipe: [(getattr(pipe, component).get_submodule(path), hook)]


def zeroed(component, path):
    """This module puts out zeros, in the place of the first of several tensors."""

    def nothing(module, args, output):
        if isinstance(output, tuple):
            return torch.zeros_like(output[0]), *output[1:]
        return torch.zeros_like(output)

    return hooked(component, path, nothing)


def bypassed(component, path):
    """This layer hands on its input, and whatever else it gives."""

    def hand_on(module, args, output):
        return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]

    return hooked(component, path, hand_on)


def test_bypassing_the_last_layers_is_clip_skip_to_the_bit(folder_of):
    """Diffusers skips layers for the prompt, not for the negative prompt: branch=cond. Without guidance it is both."""
    folder = folder_of("sd")
    model = loaded(folder)
    paths = model.components["text_encoder"].paths
    assert paths == ("text_encoder.encoder.layers.0", "text_encoder.encoder.layers.1")

    found = [plain(folder)]
    for skip in (1, 2):
        found.append(plain(folder, clip_skip=skip))
        assert np.array_equal(made(model, cells(model, lesion_of(*paths[-skip:], branch="cond"))), found[-1])
    assert len({image.tobytes() for image in found}) == 3
    alone = plain(folder, guidance=1.0, clip_skip=1)
    assert np.array_equal(made(model, cells(model, lesion_of(paths[-1]), guidance=1.0)), alone)
    both = made(model, cells(model, lesion_of(paths[-1])))
    uncond = made(model, cells(model, lesion_of(paths[-1], branch="uncond")))
    assert len({one.tobytes() for one in (*found, both, uncond)}) == 5


LEAVES = {"self_attention": ("self_attn", "layer.0.SelfAttention"), "feed_forward": ("mlp", "layer.1.DenseReluDense")}


@pytest.mark.parametrize(
    ("name", "component", "module"),
    [
        ("sdxl", "text_encoder_2", "text_model.encoder.layers.0"),
        ("sd3", "text_encoder_3", "encoder.block.0"),  # of T5 the first layer makes the bias of positions for all
        ("flux", "text_encoder_2", "encoder.block.1"),
        ("pixart_sigma", "text_encoder", "encoder.block.0"),
    ],
)
def test_lesions_of_a_text_encoder_are_plain_hooks_to_the_bit(name, component, module, folder_of):
    folder, plainly = folder_of(name), {}
    if name == "pixart_sigma":
        plainly = {"use_resolution_binning": False, "clean_caption": False}
    untouched = plain(folder, **plainly)
    layer = f"{component}.{module.removeprefix('text_model.')}"
    for kind in ("block", "self_attention", "feed_forward"):
        model = loaded(folder, component, kind)
        source = models.resolve(tiny_spec(folder))
        assert model.components[component].paths == listed.layer_paths(source, (component,), "attention", kind)
        leaf = LEAVES.get(kind, ("", ""))["block" in module]
        change = zeroed(component, f"{module}.{leaf}") if leaf else bypassed(component, module)
        ours = made(model, cells(model, lesion_of(layer, kind=kind)))
        assert np.array_equal(ours, plain(folder, change, **plainly)), kind
        assert not np.array_equal(ours, untouched), kind


def test_the_last_layer_of_sdxls_encoders_is_dead_where_their_last_but_one_is_read(folder_of):
    """A truth known beforehand: the first encoder's last layer goes nowhere; the second's is in the pooled text."""
    model = loaded(folder_of("sdxl"), ["text_encoder", "text_encoder_2"])
    untouched = made(model, cells(model))
    first, second = (f"{name}.encoder.layers.1" for name in ("text_encoder", "text_encoder_2"))
    assert np.array_equal(made(model, cells(model, lesion_of(first))), untouched)
    assert not np.array_equal(made(model, cells(model, lesion_of(second))), untouched)


def test_text_features_of_a_lesion_are_its_own_and_made_once(folder_of):
    """One batch with every lesion and none: each image is that of its lesion alone; no prompt is encoded twice."""
    model = loaded(folder_of("sd"))
    first, second = model.components["text_encoder"].paths
    lesions = [None, lesion_of(first), lesion_of(second), lesion_of(first, strength=0.5), lesion_of(first, second)]
    alone = [made(model, cells(model, one, texts=TEXTS[:1] * 2)) for one in lesions]
    model.texts.clear()
    rows = []
    norm = model.pipe.text_encoder.encoder.layers[1].layer_norm1
    hook = norm.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    given = cells(model, *lesions, texts=TEXTS[:1] * 5, seeds=(0,) * 5)
    fillers = fillers_of(model, given)
    together = generate(model, given, fillers)
    encoded = sum(rows)
    assert np.array_equal(generate(model, given, fillers), together)
    hook.remove()
    assert encoded == sum(rows) == 2 * (5 + 5)  # two, so as not to be alone: the prompt and the empty one
    assert all(np.allclose(mine, own[0], atol=1e-5) for mine, own in zip(together, alone, strict=True))
    assert np.array_equal(together[0], alone[0][0])
    assert len({image.tobytes() for image in together}) == 5
    assert np.array_equal(made(model, cells(model)), plain(folder_of("sd")))  # nothing stays behind


DECODER = "decoder.up_blocks.1.resnets.0"  # where the number of channels changes


def test_lesions_of_the_decoder_are_plain_hooks_and_need_no_denoising(folder_of, tmp_path):
    folder = folder_of("sd")
    model = loaded(folder, "vae")
    paths = model.components["vae"].paths
    assert paths[:3] == tuple(f"vae.decoder.mid_block.{one}" for one in ("resnets.0", "attentions.0", "resnets.1"))
    modules = {path.removeprefix("vae."): "to_out.0" if "attentions" in path else "conv2" for path in paths}
    states, calls, decoded = States(tmp_path), [], []
    baselines = made(model, cells(model), states=states, windows=[AFTER])
    assert np.array_equal(baselines, plain(folder))
    hooks = [
        model.denoiser.conv_in.register_forward_hook(lambda *_: calls.append(1)),
        model.pipe.vae.decoder.register_forward_hook(lambda module, args, output: decoded.append(len(args[0]))),
    ]
    for path in ("decoder.mid_block.attentions.0", DECODER):
        change = zeroed("vae", f"{path}.{modules[path]}")
        ours = made(model, cells(model, lesion_of(f"vae.{path}")), states=states, windows=[AFTER])
        assert np.array_equal(ours, plain(folder, change)), path
        assert not np.array_equal(ours, baselines), path
    assert not calls and decoded == [2, 2]
    mixed = made(model, cells(model, lesion_of(paths[0]), lesion_of(paths[-1])), states=states, windows=[AFTER])
    assert not calls and decoded[2:] == [1, 1]  # each by itself
    fresh = States(tmp_path / "fresh")  # nothing kept: the baselines are denoised first, and not decoded
    again = made(model, cells(model, lesion_of(paths[0]), lesion_of(paths[-1])), states=fresh, windows=[AFTER])
    assert len(calls) == 2 and decoded[4:] == [1, 1] and np.array_equal(again, mixed)
    for hook in hooks:
        hook.remove()
    for row, path in enumerate((paths[0], paths[-1])):
        name = path.removeprefix("vae.")
        expected = plain(folder, zeroed("vae", f"{name}.{modules[name]}"))
        assert np.allclose(mixed[row], expected[row], atol=1e-5)  # alone in its decode


def test_lesions_of_flux2s_decoder_are_plain_hooks(folder_of):
    folder = folder_of("flux2_klein")
    model = loaded(folder, "vae")
    assert type(model.pipe.vae).__name__ == "AutoencoderKLFlux2"
    untouched = plain(folder)
    for path, leaf in (("decoder.mid_block.attentions.0", "to_out.0"), (DECODER, "conv2")):
        ours = made(model, cells(model, lesion_of(f"vae.{path}")))
        assert np.array_equal(ours, plain(folder, zeroed("vae", f"{path}.{leaf}"))), path
        assert not np.array_equal(ours, untouched), path


def test_umt5_is_lesioned_as_t5(folder_of, tmp_path):
    """PixArt's pipeline takes any encoder; of UMT5 each layer has a bias of positions of its own."""
    folder, plainly = tmp_path / "umt5", {"use_resolution_binning": False, "clean_caption": False}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder_of("pixart_sigma"))
    torch.manual_seed(0)
    pipe.register_modules(text_encoder=UMT5EncoderModel(UMT5Config(**pipe.text_encoder.config.to_diff_dict())).eval())
    pipe.save_pretrained(folder)
    untouched = plain(folder, **plainly)
    for kind, module in (("block", "encoder.block.0"), ("self_attention", "encoder.block.1.layer.0.SelfAttention")):
        model = loaded(folder, "text_encoder", kind)
        layer = "text_encoder." + ".".join(module.split(".")[:3])
        change = (bypassed if kind == "block" else zeroed)("text_encoder", module)
        ours = made(model, cells(model, lesion_of(layer, kind=kind)))
        assert np.array_equal(ours, plain(folder, change, **plainly)), kind
        assert not np.array_equal(ours, untouched), kind


def test_double_is_a_plain_hook(folder_of):
    folder = folder_of("sd")

    def twice(module, args, output):
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    for component, layer, module, kind in (
        ("text_encoder", "encoder.layers.0", "encoder.layers.0.mlp", "feed_forward"),
        ("text_encoder", "encoder.layers.1", "encoder.layers.1.self_attn", "self_attention"),
        ("vae", "decoder.mid_block.attentions.0", "decoder.mid_block.attentions.0.to_out.0", "self_attention"),
    ):
        model = loaded(folder, component, kind)
        ours = made(model, cells(model, lesion_of(f"{component}.{layer}", kind=kind, replacement="double")))
        expected = plain(folder, hooked(component, module, twice))
        assert np.allclose(ours, expected, atol=2e-6), layer
        assert np.abs(ours - plain(folder)).max() > 1e-5, layer


def test_layers_of_the_decoder_by_block_and_kind(folder_of):
    source = models.resolve(tiny_spec(folder_of("sd")))
    assert loaded(folder_of("sd"), "vae", by="block").components["vae"].paths == (
        "vae.decoder.mid_block", "vae.decoder.up_blocks.0", "vae.decoder.up_blocks.1"
    )  # fmt: skip
    for by in ("attention", "block", "stage"):
        for kind in ("block", "self_attention"):
            there = loaded(folder_of("sd"), "vae", kind, by).components["vae"]
            assert there.paths == listed.layer_paths(source, ("vae",), by, kind)
    assert list(there.by_path) == ["vae.decoder.mid_block.attentions.0"]


def test_means_are_those_of_the_calibration_prompts(folder_of, tmp_path):
    """Against sums over plain calls, one prompt at a time: of the negative prompt for the unconditional branch."""
    folder = folder_of("sd")
    texts = CALIBRATION["calibration"]["prompts"]["items"]
    for component, path, kind in (
        ("text_encoder", "encoder.layers.1", "block"),
        ("text_encoder", "encoder.layers.0.mlp", "feed_forward"),
        ("vae", f"{DECODER}.conv2", "block"),
    ):
        seen = []

        def look(module, args, output, seen=seen):
            added = output - args[0] if "Layer" in type(module).__name__ else output
            seen.append(added.mean(dim=(2, 3)) if added.dim() == 4 else added.mean(dim=1))

        def watch(pipe, component=component, path=path, look=look):
            return [(getattr(pipe, component).get_submodule(path), look)]

        with torch.no_grad():
            plain(folder, watch, texts=texts, seeds=(3, 3, 3))
        means = [one.double().mean(dim=0).float() for one in seen]

        def put_in(pipe, component=component, path=path, means=means):
            count = iter(range(9))

            def replaced(module, args, output):
                value = means[next(count)]
                if output.dim() == 4:
                    return value[None, :, None, None].expand_as(output)
                return args[0] + value if "Layer" in type(module).__name__ else value.expand_as(output)

            return [(getattr(pipe, component).get_submodule(path), replaced)]

        model = loaded(folder, component, kind)
        layer = f"{component}.{path.removesuffix('.conv2').removesuffix('.mlp')}"
        lesion = dataclasses.replace(
            lesion_of(layer, kind=kind), replacement=replacements.describe("mean", CALIBRATION)
        )
        ours = made(model, cells(model, lesion), tmp_path, CALIBRATION)
        assert np.allclose(ours, plain(folder, put_in), atol=1e-5), path
        assert not np.allclose(ours, made(model, cells(model)), atol=1e-3), path


def test_batches_do_not_mix_images_that_are_denoised_with_those_that_are_not():
    layers = ("text_encoder.encoder.layers.0", "mid_block.attentions.0", "vae.decoder.mid_block.resnets.0")
    study = Study(
        models.identity_of(models.resolve(models.ModelSpec("embedded", "embedded")), "cpu"),
        settings(), (Prompt("a"), Prompt("b")), (0,), layers, {"leave_one_out": {}}, (Replacement("zero"),),
        kind="block",
    )  # fmt: skip
    found = [{cell.lesion and cell.lesion.layer for cell in batch} for batch in batches(study, 99, lambda key: False)]
    assert found == [{None}, set(layers[:2]), {layers[2]}]
    assert study.begins == ((0.0, 1.0), AFTER)


def test_a_study_of_several_components_from_the_command_line(cli):
    """A job of one component asks for the same cells; `component` is in the results where it is used."""
    study = ["layers.kind=block", "selection=leave_one_out", "prompts.items=[a red circle]", "generation.steps=1"]
    several = [
        "layers.include=[text_encoder.*,mid_block*,vae.*mid_block*]",
        "layers.component=[vae,denoiser,text_encoder]",
    ]
    code, _, err = cli(*study, *several)
    assert code == 0, err
    (frame,) = cli.frames()
    assert frame["component"].tolist() == ["", "text_encoder", "text_encoder", "denoiser", *["vae"] * 3]
    assert frame["layer_index"].tolist() == [-1, 0, 1, 2, 0, 1, 2]
    assert frame.loc[1:, "clip_similarity"].lt(1).all()
    assert layers_in_order(frame) == frame["layer"].tolist()[1:]
    code, out, err = cli(*study, "layers.component=text_encoder", "layers.include=null")
    assert code == 0, err
    _, out, _ = cli(*study, "layers.component=text_encoder", "layers.include=null", "dry_run=true")
    assert "already in the store store: 3" in out
    _, out, _ = cli(*study, "layers.include=null", "dry_run=true")
    assert "already in the store store: 2" in out
    # What is compared with one another is of one component; runs of others stand beside it.
    tokens = ["layers.by=token", "layers.tokens=[words]", "layers.kind=cross_attention", "layers.include=null"]
    code, _, err = cli(*study, *tokens)
    assert code == 0, err
    both, _, _, _ = put_together(run_folders([cli.folder / "outputs"]), cli.folder)
    assert both["component"].tolist() == [*frame["component"], "denoiser"]
    assert both["layer"].tolist() == [*frame["layer"], "denoiser.tokens.words"]
    assert [(table["layer"].iloc[0], len(table)) for table in map(layer_table, (rows(both, one) for one in
            settings_in(both)))] == [("text_encoder.encoder.layers.0", 6), (both["layer"].iloc[-1], 1)]  # fmt: skip
    code, _, err = cli(*study, "layers.component=[denoiser]", "layers.include=[up_blocks.0*,mid_block*]")
    assert code == 0, err
    with pytest.raises(Refused, match="protocol of replacement zero of 'local' is"):
        put_together(run_folders([cli.folder / "outputs"]), cli.folder)


def asked(component, kind="block", by="attention"):
    return Layers.of({"by": by, "kind": kind, "include": None, "exclude": None, "component": component})


def axes(window=(0.0, 1.0), branch="both"):
    return Axes(selections={"all": {}}, windows=(window,), branches=(branch,))


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: asked("text_encoder", "cross_attention"), "layers.kind: text_encoder has no cross_attention; allowed"),
        (lambda: asked("vae", "feed_forward"), "layers.kind: vae has no feed_forward; .*: self_attention, block"),
        (lambda: asked("text_encoder", by="stage"), "layers.by: text_encoder has no stage"),
        (lambda: asked(["vae", "vae"]), "layers.component: names 'vae' twice"),
        (lambda: check_axes(("denoiser", "text_encoder"), axes((0.5, 1.0))), "window: text_encoder runs once an image"),
        (lambda: check_axes(("vae",), axes(branch="cond")), "branch: vae decodes .* allowed with it: both"),
        (lambda: replacements.check("resample", "block", ["both"], components=("vae",)),
         "replacement: resample suits the denoiser only; with vae: double, mean, zero$"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(refused, words):
    with pytest.raises(RequestError, match=words):
        refused()
    check_axes(("denoiser",), axes((0.5, 1.0), "cond"))
    check_axes(("text_encoder",), axes(branch="cond"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["layers.component=unet"], ["layers.component: got 'unet'", "text_encoder_3, denoiser, vae"]),
        (["layers.component=text_encoder_2"],
         ["layers.component: StableDiffusionPipeline has no text_encoder_2; allowed: denoiser", "text_encoder, vae"]),
        (["layers.component=vae", "attribution=gradients"], ["layers.component: does not go with attribution"]),
        (["model.id=embedded", "layers.component=vae", "layers.kind=self_attention"],
         ["layers.kind: the decoder of this AutoencoderKL has no self_attention; allowed: block"]),
    ],
)  # fmt: skip
def test_wrong_requests_are_one_line_and_write_nothing(cli, given, words):
    code, _, err = cli("layers.include=null", "layers.kind=block", *given)
    assert code == 2 and all(word in err for word in words), err
    assert len(err.strip().splitlines()) == 1
    assert not list(cli.folder.rglob("*.parquet")) and not (cli.folder / "store").exists()


def test_components_of_classes_that_are_not_known_are_refused_by_class(folder_of):
    source = models.resolve(tiny_spec(folder_of("sana")))
    for component, name in (("text_encoder", "Gemma2Model"), ("vae", "AutoencoderDC")):
        with pytest.raises(RequestError, match=f"{component} is a {name}; layers are known of"):
            listed.layer_paths(source, (component,), "attention", "block")


@pytest.mark.parametrize(
    ("name", "component", "kind"),
    [("sdxl", "text_encoder_2", "feed_forward"), ("pixart_sigma", "text_encoder", ""), ("sd", "vae", "")],
)
def test_inspect_lists_the_layers_of_a_component(name, component, kind, folder_of):
    lines = structure.report(
        ["model=local", f"model.id={folder_of(name)}", f"component={component}", f"kind={kind}", "depth=0"]
    )
    source = models.resolve(tiny_spec(folder_of(name)))
    paths = listed.layer_paths(source, (component,), "attention", kind or "block")
    assert [line.split()[0] for line in lines[4 : 4 + len(paths)]] == list(paths)
    assert f"{len(paths)} layers, {len(paths)} sites" in lines
    with pytest.raises(RequestError, match="kind: got 'text_stream'; allowed: "):
        structure.report(["model=local", f"model.id={folder_of(name)}", f"component={component}", "kind=text_stream"])


def test_inspect_says_which_classes_it_knows_and_where_the_tokens_of_a_prompt_are(folder_of):
    given = ["model=local", f"model.id={folder_of('sana')}", "component=text_encoder", "depth=0"]
    assert any(
        "no layers to lesion: text_encoder is a Gemma2Model; known are CLIP" in one for one in structure.report(given)
    )
    lines = structure.report(["model=local", f"model.id={folder_of('sd3')}", "depth=0", "prompt='a red cat'"])
    at = lines.index(next(line for line in lines if line.endswith(" text tokens")))
    words = words_of(diffusers.DiffusionPipeline.from_pretrained(folder_of("sd3")), "a red cat")
    table = dict(line.split(maxsplit=1) for line in lines[at + 3 : at + 9])
    assert lines[at] == f"{words.length} text tokens" and words.columns["red"] == (2, 3, 4, 79, 80, 81, 82)
    assert table["word:red"] == "2-4, 79-82" and table["begin"] == "0" and set(table) == {
        "begin", "end", "padding", "word:a", "word:red", "word:cat"
    }  # fmt: skip
    with pytest.raises(RequestError, match=r"prompt: .* puts a template around"):
        structure.report(["model=local", f"model.id={folder_of('qwen_image')}", "prompt=a"])


def sequentially(pipe, device):
    """As diffusers does, whose own "cpu:0" accelerate takes for another device than "cpu"."""
    pipe.remove_all_hooks()
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        accelerate.cpu_offload(part, execution_device=torch.device(device))


@pytest.mark.parametrize(("way", "task"), [("model", "img2img"), ("sequential", "txt2img"), ("compile", "img2img")])
def test_components_go_with_offloading_compiling_and_img2img(way, task, folder_of, tmp_path, monkeypatch):
    """As where weights stay and nothing is compiled: each component by itself and all of them, zero and mean."""
    init, calibration, changes = tmp_path / "init.png", CALIBRATION, {}
    if task == "img2img":
        drawn = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(drawn).save(init)
        calibration, changes = {**CALIBRATION, "init": str(init)}, {"task": task, "steps": 4, "noising": 0.7}
    monkeypatch.setattr(loading, "check_offload", lambda *_: None)  # which an accelerator is needed for
    monkeypatch.setattr(diffusers.DiffusionPipeline, "enable_sequential_cpu_offload", sequentially)
    monkeypatch.setattr(loading, "BACKEND", "eager")
    images = []
    for asked_for in ({}, {"compile": True} if way == "compile" else {"offload": way}):
        loading.forget()
        source = models.resolve(tiny_spec(folder_of("sd"), **asked_for))
        model = examined(models.load(source, "cpu"), source, asked(["text_encoder", "denoiser", "vae"]))
        if way == "sequential" and asked_for:
            assert next(model.pipe.vae.parameters()).device.type == "meta"
        assert bool(model.gates) == ("compile" in asked_for)
        first = [one.paths[0] for one in (*model.components.values(), model.anatomy)]
        lesions = [lesion_of(*layers) for layers in (*([path] for path in first), first)]
        lesions += [dataclasses.replace(one, replacement=replacements.describe("mean", calibration)) for one in lesions]
        given = cells(model, None, *lesions, texts=["a cat"] * 9, seeds=[7] * 9, **changes)
        if task == "img2img":
            prompts = with_inits([given[0].prompt], str(init), "generation.init")
            given = [dataclasses.replace(cell, prompt=prompts[0]) for cell in given]
        images.append(made(model, given, tmp_path / str(len(images)), calibration))
    loading.forget()
    assert np.array_equal(*images) if way != "compile" else np.abs(images[0] - images[1]).max() < 1e-5
    assert len({image.tobytes() for image in images[0]}) == 9


def test_layers_of_a_pipeline_of_ones_own(folder_of):
    """`lesion.lesioned` on the user's pipeline: as a plain hook, and nothing stays behind."""
    folder = folder_of("sd")
    pipe, untouched = pipeline(folder), plain(folder)
    last = "text_encoder.encoder.layers.1"
    with lesioned(pipe, last, component="text_encoder", branch="cond"):
        skipped = plain(folder)
    assert np.array_equal(skipped, plain(folder, clip_skip=1))
    with lesioned(pipe, "text_encoder*", component="text_encoder"):
        both = plain(folder)
    with lesioned(pipe, f"vae.{DECODER}", component="vae"):
        assert np.array_equal(plain(folder), plain(folder, zeroed("vae", f"{DECODER}.conv2")))
        decoded = plain(folder)
    assert np.array_equal(plain(folder), untouched)
    assert len({one.tobytes() for one in (untouched, skipped, both, decoded)}) == 4
    for words, more in (
        ("by: token needs to know each image's prompt; use lesion.study; allowed here: attention", {"by": "token"}),
        ("by: attention_token needs", {"by": "attention_token", "component": "text_encoder"}),
        ("component: got 'unet'", {"component": "unet"}),
        ("component: StableDiffusionPipeline has no text_encoder_2", {"component": "text_encoder_2"}),
        ("layers: 'x' matches no layer; allowed: vae.decoder", {"component": "vae"}),
        ("branch: vae decodes one image", {"component": "vae", "branch": "cond"}),
        ("window: vae runs once an image", {"component": "vae", "window": (0.0, 0.5)}),
        ("replacement: mean needs a calibration", {"component": "vae", "replacement": "mean"}),
        ("layers.kind: vae has no feed_forward", {"component": "vae", "kind": "feed_forward"}),
    ):
        with pytest.raises(RequestError, match=words), lesioned(pipe, "x", **more):
            pass
