"""Broken folders of models and adapters: each refused in one line by its files' form, before anything loads them."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import settings, tiny_spec
from lesion import models
from lesion.errors import RequestError
from lesion.models import Lora, check_files, files, requirements, resolve

WEIGHTS = "diffusion_pytorch_model.safetensors"


def put(name: str, data: bytes | str):
    def change(folder: Path) -> None:
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return change


def renamed(name: str, other: str):
    def change(folder: Path) -> None:
        (folder / name).rename((folder / name).with_name(other))

    return change


def taken_out(name: str):
    def change(folder: Path) -> None:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return change


def cut(name: str, size: int):
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:size])

    return change


def sharded(weight_map: object):
    def change(folder: Path) -> None:
        (folder / "unet" / WEIGHTS).rename(folder / "unet" / "a.safetensors")
        text = json.dumps({"weight_map": weight_map})
        (folder / "unet" / f"{WEIGHTS}.index.json").write_text(text)

    return change


def piped(name: str):
    def change(folder: Path) -> None:
        taken_out(name)(folder)
        os.mkfifo(folder / name)

    return change


def changed(name: str, **values: object):
    """values: of keys of a JSON file; of `...` the key is taken out."""

    def change(folder: Path) -> None:
        data = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))

    return change


def linked(name: str, target: str):
    def change(folder: Path) -> None:
        taken_out(name)(folder)
        (folder / name).symlink_to(target)

    return change


def without_tokenizer(*names: str):
    """Only these files, each with two bytes, in the tokenizer's folder."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder / "tokenizer")
        (folder / "tokenizer").mkdir()
        for name in names:
            put(f"tokenizer/{name}", "{}")(folder)

    return change


def tensors(*entries: object, room: int = 16) -> bytes:
    header = json.dumps({f"t{number}": entry for number, entry in enumerate(entries)}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * room


def entry(first: object, last: object, **more: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [4], "data_offsets": [first, last], **more}


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
BROKEN = {
    "folder": (taken_out("vae"), "no folder for its component vae .AutoencoderKL."),
    "config": (taken_out("unet/config.json"), "unet' has no config.json"),
    "empty": (lambda folder: (taken_out("tokenizer")(folder), (folder / "tokenizer").mkdir()), "tokenizer' is empty"),
    "pipe": (piped("unet/config.json"), "config.json' is no regular file"),
    "pipe of a tokenizer": (piped("tokenizer/tokenizer.json"), "tokenizer.json' is no regular file"),
    "torn config": (cut("unet/config.json", 40), "unet/config.json' is no valid JSON"),
    "list": (put("vae/config.json", "[1]"), "vae/config.json' holds no mapping"),
    "index null": (put("model_index.json", "null"), "model_index.json' holds no mapping"),
    "deep": (put("scheduler/scheduler_config.json", "[" * 100_000), "scheduler_config.json' is no valid JSON"),
    "latin": (put("vae/config.json", b'{"a": "\xff"}'), "vae/config.json' is no valid JSON"),
    "tokenizer": (put("tokenizer/tokenizer.json", "{"), "tokenizer.json' is no valid JSON"),
    "size": (
        put("text_encoder/config.json", '{"hidden_size": -1}'),
        "says hidden_size = -1; possible: whole numbers from 1 to 100,000,000",
    ),
    "sizes": (
        put("vae/config.json", '{"block_out_channels": [8, 0]}'),
        r"says block_out_channels = 0; possible: whole numbers from 1 to",
    ),
    "weights": (taken_out(f"vae/{WEIGHTS}"), f"vae' has no weights: {WEIGHTS}"),
    "text": (taken_out("text_encoder/model.safetensors"), "text_encoder' has no weights: model.safetensors"),
    "variant": (
        renamed(f"unet/{WEIGHTS}", "diffusion_pytorch_model.fp16.safetensors"),
        "variant fp16; give model.variant=fp16",
    ),
    "variant of two": (
        renamed(f"unet/{WEIGHTS}", "diffusion_pytorch_model.bf16-00001-of-00002.safetensors"),
        "variant bf16; give model.variant=bf16",
    ),
    "pickled": (
        renamed(f"unet/{WEIGHTS}", "diffusion_pytorch_model.bin"),
        "but diffusion_pytorch_model.bin: pickled weights can run code",
    ),
    "pickle": (
        put(f"unet/{WEIGHTS}", b"\x80\x02}q\x00X\x01\x00\x00\x00a."),
        "is no safetensors file, whatever its name",
    ),
    "pointer": (put(f"unet/{WEIGHTS}", POINTER), "is a git-lfs pointer"),
    "nothing": (put(f"unet/{WEIGHTS}", ""), "is empty"),
    "short": (cut(f"unet/{WEIGHTS}", -7), "cut short or damaged"),
    "header": (cut(f"unet/{WEIGHTS}", 100), "cut short within its header"),
    "shape": (
        put(f"unet/{WEIGHTS}", tensors(entry(0, 16, shape=[5]))),
        "is cut short or damaged: invalid shape",
    ),
    "no places": (put(f"unet/{WEIGHTS}", tensors({"dtype": "F32"})), "damaged: .*missing field"),
    "overlap": (put(f"unet/{WEIGHTS}", tensors(entry(0, 16), entry(8, 24), room=24)), "damaged: invalid offset"),
    "same place": (put(f"unet/{WEIGHTS}", tensors(entry(0, 16), entry(0, 16))), "damaged: invalid offset"),
    "hole": (put(f"unet/{WEIGHTS}", tensors(entry(0, 16), entry(32, 48), room=48)), "damaged: invalid offset"),
    "starts late": (put(f"unet/{WEIGHTS}", tensors(entry(16, 32), room=32)), "damaged: invalid offset"),
    "more bytes": (put(f"unet/{WEIGHTS}", tensors(entry(0, 16), room=20)), "cut short or damaged"),
    "dtype": (put(f"unet/{WEIGHTS}", tensors(entry(0, 16, dtype="Q4_K"))), "damaged: .*Q4_K"),
    "dtype list": (put(f"unet/{WEIGHTS}", tensors(entry(0, 16, dtype=["F32"]))), "cut short or damaged"),
    "no whole shape": (put(f"unet/{WEIGHTS}", tensors(entry(0, 16, shape=[4.0]))), "cut short or damaged"),
    "negative shape": (put(f"unet/{WEIGHTS}", tensors(entry(0, 16, shape=[-2, -2]))), "cut short or damaged"),
    "endless": (put(f"unet/{WEIGHTS}", tensors(entry(0, float("inf")))), "cut short or damaged"),
    "true places": (put(f"unet/{WEIGHTS}", tensors(entry(False, 16))), "cut short or damaged"),
    "nested header": (put(f"unet/{WEIGHTS}", struct.pack("<Q", 50_000) + b'{"a":' * 10_000), "cut short or damaged"),
    "no tensors": (put(f"unet/{WEIGHTS}", tensors(room=0)), "holds no tensors"),
    "page": (put(f"unet/{WEIGHTS}", "<!DOCTYPE html><html>404</html>"), "is no safetensors file, whatever"),
    "endless file": (linked(f"unet/{WEIGHTS}", "/dev/zero"), "has no weights"),
    "dangling": (linked(f"unet/{WEIGHTS}", "nowhere"), "has no weights"),
    "circle": (linked(f"unet/{WEIGHTS}", WEIGHTS), "has no weights"),
    "file": (lambda folder: (taken_out("vae")(folder), put("vae", "x")(folder)), "no folder for its component vae"),
    "pointer of a config": (put("unet/config.json", POINTER), "unet/config.json' is a git-lfs pointer"),
    "pointer of the index": (put("model_index.json", POINTER), "model_index.json' is a git-lfs pointer"),
    "pointer of words": (put("tokenizer/tokenizer.json", POINTER), "tokenizer.json' is a git-lfs pointer"),
    "pointer of old": (put(f"vae/{WEIGHTS}", POINTER.replace("git-lfs", "hawser")), "is a git-lfs pointer"),
    "pointer of a shard": (
        lambda folder: (sharded({"x": "a.safetensors"})(folder), put("unet/a.safetensors", POINTER)(folder)),
        "a.safetensors' is a git-lfs pointer",
    ),
    "nested value": (put("unet/config.json", '{"a": ' + "[" * 500 + "]" * 500 + "}"), "nested too deep; possible: 20"),
    "layers": (
        changed("unet/config.json", layers_per_block=10**9),
        "layers_per_block = 1000000000; possible: .* to 10",
    ),
    "fewer than no layers": (changed("unet/config.json", layers_per_block=-1), "layers_per_block = -1; possible"),
    "layers of text": (changed("text_encoder/config.json", num_hidden_layers=10**7), "num_hidden_layers = 10000000"),
    "nested size": (changed("text_encoder/config.json", a={"vocab_size": 0}), "says a.vocab_size = 0; possible"),
    "heads": (changed("unet/config.json", attention_head_dim=0), "says attention_head_dim = 0; possible"),
    "groups": (changed("unet/config.json", norm_num_groups=0), "says norm_num_groups = 0; possible"),
    "size as text": (changed("unet/config.json", in_channels="4"), "says in_channels = 4; possible: whole numbers"),
    "no whole size": (changed("unet/config.json", sample_size=4.5), "says sample_size = 4.5; possible: whole numbers"),
    "nan": (changed("vae/config.json", scaling_factor=float("nan")), "says scaling_factor = nan; possible: numbers"),
    "no scale": (changed("vae/config.json", scaling_factor=0), "says scaling_factor = 0; possible: numbers from"),
    "null scale": (changed("vae/config.json", scaling_factor=None), "says scaling_factor = None; possible: numbers"),
    "betas": (changed("scheduler/scheduler_config.json", beta_end=5), "says beta_end = 5; possible: numbers from 0 to"),
    "offset": (changed("scheduler/scheduler_config.json", steps_offset=5000), "steps_offset = 5000; possible"),
    "nothing of a tokenizer": (without_tokenizer("tokenizer_config.json"), "has no words of CLIPTokenizer"),
    "empty tokenizer": (put("tokenizer/tokenizer.json", "{}"), "tokenizer.json' has no words of CLIPTokenizer"),
    "empty vocabulary": (without_tokenizer("vocab.json", "merges.txt"), "vocab.json' has no words"),
    "no merges": (
        lambda folder: (without_tokenizer()(folder), put("tokenizer/vocab.json", '{"a": 0}')(folder)),
        "has a vocab.json without its merges.txt",
    ),
    "not in the index": (changed("model_index.json", vae=...), "names no vae, which StableDiffusionPipeline needs"),
    "null in the index": (changed("model_index.json", unet2=None, text_encoder=[None, None]), "names no text_encoder"),
    "text in the index": (changed("model_index.json", tokenizer="CLIPTokenizer"), "names no tokenizer, which"),
    "no class": (changed("model_index.json", _class_name=...), "names the class None; allowed: one of diffusers"),
    "absolute shard": (sharded({"x": "/a.safetensors"}), "names '/a.safetensors'; allowed: .safetensors files beside"),
    "shard of another kind": (sharded({"x": "a.txt"}), "names 'a.txt'; allowed: .safetensors files beside it"),
    "long shard": (sharded({"x": "a" * 300 + ".safetensors"}), "cannot be read: File name too long"),
    "two variants": (
        lambda folder: [
            renamed(f"unet/{WEIGHTS}", "diffusion_pytorch_model.fp16.safetensors")(folder),
            put("unet/diffusion_pytorch_model.bf16.safetensors", "x")(folder),
        ],
        "weights of the variant bf16 and fp16; give model.variant=bf16",
    ),
    "shard": (sharded({"x": "a.safetensors", "y": "b.safetensors"}), "names 'b.safetensors', which is not there"),
    "shard away": (sharded({"x": "../vae/a.safetensors"}), "allowed: .safetensors files beside it"),
    "shard pickled": (sharded({"x": "a.bin"}), "allowed: .safetensors files beside it"),
    "no shards": (sharded([]), "names no files of weights"),
}


@pytest.fixture
def copy(tiny_folder, tmp_path):
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_by_the_form_of_its_files(case, copy, monkeypatch):
    change, words = BROKEN[case]
    change(copy)
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("opened a pickle"))
    with pytest.raises(RequestError, match=f"^model.id: .*{words}") as error:
        check_files(resolve(tiny_spec(copy)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["prediction_type", "timestep_spacing"])
def test_words_that_no_scheduler_knows_are_refused(key, copy):
    changed("scheduler/scheduler_config.json", **{key: "nonsense"})(copy)
    with pytest.raises(RequestError, match=f"model.id: the scheduler of .* has {key} 'nonsense'; allowed: .*, "):
        requirements.check(resolve(tiny_spec(copy)), settings())


def test_names_that_no_file_can_have_are_refused(tiny_folder):
    for key, spec in (
        ("model.id", tiny_spec(Path("/" + "x" * 300))),
        ("model.vae", tiny_spec(tiny_folder, vae="/" + "x" * 300)),
        ("model.loras", tiny_spec(tiny_folder, loras=(Lora("/" + "x" * 300),))),
    ):
        with pytest.raises(RequestError, match=f"^{key}: .*x' cannot be read: File name too long"):
            resolve(spec)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_what_only_a_class_can_tell_of_its_config_is_one_line(component, copy):
    """A width that its heads do not divide, and blocks that there are not."""
    changed("text_encoder/config.json" if component == "text_encoder" else "unet/config.json",
            num_attention_heads=3, down_block_types=["Nope", "Nope"])(copy)  # fmt: skip
    source = resolve(tiny_spec(copy))
    check_files(source)
    for stage in (lambda: models.load(source, "cpu"), lambda: source.skeleton(component)):
        with pytest.raises(RequestError, match=r"^model.id: .* cannot be (loaded|built): ") as error:
            stage()
        assert "\n" not in str(error.value)


def test_whole_folders_pass_with_shards_and_variants_too(copy, tiny_folder):
    check_files(resolve(tiny_spec(tiny_folder)))
    check_files(resolve(models.ModelSpec("embedded", "embedded")))
    names = files.check_safetensors(tiny_folder / "unet" / WEIGHTS, "model.id")
    assert names == sorted(load_file(tiny_folder / "unet" / WEIGHTS))
    sharded(dict.fromkeys(names, "a.safetensors"))(copy)
    renamed(f"vae/{WEIGHTS}", "diffusion_pytorch_model.fp16.safetensors")(copy)
    check_files(resolve(tiny_spec(copy, variant="fp16")))
    with pytest.raises(RequestError, match=r"model.variant: .* has no weights of a variant 'fp16'; allowed: null"):
        check_files(resolve(tiny_spec(tiny_folder, variant="fp16")))


def test_a_broken_adapter_or_folder_leaves_no_trace(cli, copy, tmp_path):
    for name, data, words in (
        ("pickled.safetensors", b"\x80\x02}q\x00X\x01\x00\x00\x00a.", "is no safetensors file"),
        ("pointer.safetensors", POINTER.encode(), "is a git-lfs pointer"),
        ("page.safetensors", b"<!DOCTYPE html>", "is no safetensors file"),
        ("places.safetensors", tensors(entry(0, 16), entry(8, 24), room=24), "is cut short or damaged"),
        ("other.safetensors", None, "holds no LoRA"),
    ):
        path = tmp_path.parent / name
        path.write_bytes(data) if data else save_file({"weight": torch.zeros(2)}, path)
        with pytest.raises(RequestError, match=f"^model.loras: .*{words}"):
            check_files(resolve(tiny_spec(copy, loras=(Lora(str(path)),))))
    for given, wanted in (("lora_A", "lora_B"), ("lora_up", "lora_down"), ("lora.down", "lora.up")):
        save_file({f"unet.to_q.{given}.weight": torch.zeros(2, 4)}, path)
        with pytest.raises(RequestError, match=f"has unet.to_q.{given}.weight without unet.to_q.{wanted}.weight"):
            check_files(resolve(tiny_spec(copy, loras=(Lora(str(path)),))))
    (copy / "unet" / WEIGHTS).unlink()
    moved = copy.rename(tmp_path.parent / f"{tmp_path.name}-model")
    code, out, err = cli(f"model.id={moved}")
    assert (code, out, err.count("\n")) == (2, "", 1) and "has no weights" in err, err
    assert list(cli.folder.iterdir()) == []
