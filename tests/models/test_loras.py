"""LoRA adapters: the images of plain diffusers with the same adapters, sites as in the base model, and refusals."""

from __future__ import annotations

import shutil

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from conftest import tiny_spec
from lesion import models
from lesion.errors import RequestError
from lesion.generation.generate import generate
from lesion.models import EMBEDDED, ModelSpec, resolve
from lesion.models.loras import Lora, parse
from lesion.replacements import Bench, build
from lesion.surgery.anatomy import examine
from lesion.surgery.operation import replacement_key
from single_file import write_single_file
from test_surgery import SUBJECTS, cell
from test_surgery import zero as zeroed

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def write_lora(base, folder, seed, text=False):
    """A loud random adapter on every attention of the UNet (and of the text encoder), made with peft."""
    torch.manual_seed(seed)
    pipe = diffusers.DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    parts = {"unet": (pipe.unet if hasattr(pipe, "unet") else pipe.transformer, TARGETS)}
    if text:
        parts["text_encoder"] = (pipe.text_encoder, ["q_proj", "v_proj"])
    found = {}
    for name, (part, targets) in parts.items():
        part.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
        with torch.no_grad():
            for key, value in part.named_parameters():
                if "lora_" in key:
                    value.normal_(std=0.3)
        found[f"{name if hasattr(pipe, name) else 'transformer'}_lora_layers"] = get_peft_model_state_dict(part)
    type(pipe).save_lora_weights(folder, **found)
    return folder


@pytest.fixture(scope="session")
def adapters(tiny_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("loras")
    return write_lora(tiny_folder, root / "one", 1), write_lora(tiny_folder, root / "two", 2, text=True)


def plain(folder, loras, hooks=()):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for number, (path, _) in enumerate(loras):
        pipe.load_lora_weights(path, weight_name="pytorch_lora_weights.safetensors", adapter_name=f"a{number}")
    if loras:
        pipe.set_adapters([f"a{number}" for number in range(len(loras))], [weight for _, weight in loras])
    for path in hooks:
        pipe.unet.get_submodule(path).register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    return pipe(
        [text for text, _ in SUBJECTS],
        generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in SUBJECTS],
        num_inference_steps=4, guidance_scale=3.0, height=16, width=16, output_type="np",
    ).images  # fmt: skip


def with_loras(folder, *loras, **more):
    return resolve(tiny_spec(folder, loras=parse([{"path": str(path), "weight": w} for path, w in loras]), **more))


def made(model, lesion=None):
    cells = [cell(model, subject, lesion) for subject in SUBJECTS]
    fillers = {}
    if lesion:
        fillers[replacement_key(lesion)] = build("zero", {}, Bench(model, cells[0].settings, None, 2))
    return generate(model, cells, fillers)


def test_images_are_those_of_plain_diffusers_with_the_same_adapters(tiny_folder, adapters):
    one, two = adapters
    pictures = [plain(tiny_folder, [])]
    for chosen in ([(one, 1.0)], [(one, 0.5)], [(one, 0.7), (two, -0.4)]):
        model = models.load(with_loras(tiny_folder, *chosen), "cpu")
        pictures.append(plain(tiny_folder, chosen))
        assert np.array_equal(made(model), pictures[-1])
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_sites_and_lesions_are_those_of_the_base_model(tiny_folder, adapters):
    source = with_loras(tiny_folder, (adapters[0], 1.0))
    model = models.load(source, "cpu")
    skeleton = source.skeleton("unet")
    for kind in ("cross_attention", "self_attention", "feed_forward"):
        assert examine(model.denoiser, kind=kind) == examine(skeleton, kind=kind)
    layer = model.anatomy.paths[1]
    ours = made(model, zeroed(layer))
    assert np.array_equal(ours, plain(tiny_folder, [(adapters[0], 1.0)], model.anatomy.sites[layer]))
    assert not np.array_equal(ours, made(model))


def test_adapters_are_part_of_the_fingerprint(tiny_folder, adapters, tmp_path):
    one, two = adapters
    base = resolve(tiny_spec(tiny_folder)).fingerprint
    assert with_loras(tiny_folder).fingerprint == base
    moved = shutil.copytree(one, tmp_path / "elsewhere")
    file = shutil.copy(one / "pytorch_lora_weights.safetensors", tmp_path / "my.safetensors")
    same = [with_loras(tiny_folder, (path, 0.5)).fingerprint for path in (one, moved, file)]
    assert len(set(same)) == 1
    others = [with_loras(tiny_folder, (one, 0.6)), with_loras(tiny_folder, (two, 0.5))]
    others.append(with_loras(tiny_folder, (one, 0.5), (two, 0.5)))
    assert len({base, same[0], *(other.fingerprint for other in others)}) == 5


def test_an_adapter_on_a_single_file(tmp_path):
    lora = write_lora(EMBEDDED, tmp_path / "lora", 3)
    file = write_single_file(EMBEDDED, tmp_path / "one.safetensors")
    options = {"dtype": "float32", "loras": (Lora(str(lora), 0.5, "style"),)}
    single = ModelSpec("one", str(file), pipeline="StableDiffusionPipeline", config=str(EMBEDDED), **options)
    folder = models.load(resolve(ModelSpec("embedded", "embedded", **options)), "cpu")
    images = made(folder)
    apart = np.abs(made(models.load(resolve(single), "cpu")) - images)
    assert apart.max() < 1e-5  # weights that a file puts at other addresses may be multiplied in another order
    assert not np.array_equal(
        images, made(models.load(resolve(ModelSpec("embedded", "embedded", dtype="float32")), "cpu"))
    )


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart_alpha"])
def test_adapters_on_transformers(name, folder_of, tmp_path):
    folder = folder_of(name)
    if name == "pixart_alpha":  # diffusers has no loader for it
        lora = tmp_path / "any.safetensors"
        lora.write_bytes(b"")
        with pytest.raises(RequestError, match="PixArtAlphaPipeline takes no LoRA adapters"):
            models.load(with_loras(folder, (lora, 1.0)), "cpu")
        return
    lora = write_lora(folder, tmp_path / "lora", 4)
    model = models.load(with_loras(folder, (lora, 0.5)), "cpu")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.load_lora_weights(lora, adapter_name="a")
    pipe.set_adapters(["a"], [0.5])
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "np"}
    noise = [torch.Generator("cpu").manual_seed(seed) for _, seed in SUBJECTS]
    theirs = pipe([text for text, _ in SUBJECTS], generator=noise, **given).images
    assert np.array_equal(made(model), theirs)
    assert not np.array_equal(theirs, made(models.load(resolve(tiny_spec(folder)), "cpu")))


def test_what_cannot_be_put_on_is_refused_in_one_line(tiny_folder, tiny_sdxl_folder, adapters, tmp_path):
    for items, words in (
        ("x", "must be a list"),
        ([{"weight": 1}], "needs a path"),
        ([{"path": "a", "scale": 1}], "unknown key 'scale'; allowed: path, weight"),
        ([{"path": "a", "weight": "loud"}], r"model.loras\[0\].weight: must be a finite number"),
        ([{"path": "a", "weight": float("nan")}], "finite"),
        ([{"path": "a", "weight": 10**400}], r"model.loras\[0\].weight: must be a finite number from -1000 to 1000"),
        ([{"path": "a", "weight": 1e308}], "from -1000 to 1000"),
        ([{"path": ""}], "needs a path"),
        ([{"path": "a", "file": "/x.safetensors"}], r"model.loras\[0\].file: must be the name of a .safetensors file"),
        ([{"path": "a", "file": "weights.bin"}], "must be the name of a .safetensors file"),
        ([{"path": "a", "file": 5}], "must be the name of a .safetensors file"),
        ([{"path": "a", "name": "a.b"}], "letters"),
        ([{"path": "a", "name": "x"}, {"path": "b", "name": "x"}], "twice"),
    ):
        with pytest.raises(RequestError, match=words):
            parse(items)
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"")
    for path, words in (
        ("/nonesuch/lora.safetensors", "no file or folder"),
        (tmp_path / "empty", "must hold one .safetensors file"),
        (tmp_path / "weights.bin", "is no .safetensors file"),
        ("nobody/nothing", "the hub did not give it"),
    ):
        with pytest.raises(RequestError, match=words) as error:
            with_loras(tiny_folder, (path, 1.0))
        assert str(error.value).startswith("model.loras: ") and "\n" not in str(error.value)
    (tmp_path / "torn.safetensors").write_bytes(b"no tensors")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_sdxl_folder, torch_dtype=torch.float32)
    assert pipe.unet.config.cross_attention_dim == 32
    for folder, path in ((tiny_folder, tmp_path / "torn.safetensors"), (tiny_sdxl_folder, adapters[0])):
        with pytest.raises(RequestError, match=r"does not fit StableDiffusion(XL)?Pipeline"):
            models.load(with_loras(folder, (path, 1.0)), "cpu")


def test_an_adapter_may_be_a_bare_path():
    assert parse(["a/b", {"path": "c", "weight": 2, "name": "sea"}]) == (
        Lora("a/b", 1.0, "lora_0"),
        Lora("c", 2.0, "sea"),
    )
