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

from conftest import tiny_spec
from lesion import models
from lesion.errors import RequestError
from lesion.models import Lora, check_files, files, resolve

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


def tensor(entry: object) -> bytes:
    header = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 16


def piped(name: str):
    def change(folder: Path) -> None:
        taken_out(name)(folder)
        os.mkfifo(folder / name)

    return change


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
        "says hidden_size = -1; possible: 1 to 100,000,000",
    ),
    "sizes": (
        put("vae/config.json", '{"block_out_channels": [8, 0]}'),
        r"says block_out_channels = .8, 0.; possible: 1 to",
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
        put(f"unet/{WEIGHTS}", tensor({"dtype": "F32", "shape": [5], "data_offsets": [0, 16]})),
        "says of 'a' what cannot be",
    ),
    "no places": (put(f"unet/{WEIGHTS}", tensor({"dtype": "F32"})), "its header names no tensors"),
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
        ("other.safetensors", None, "holds no LoRA"),
    ):
        path = tmp_path.parent / name
        path.write_bytes(data) if data else save_file({"weight": torch.zeros(2)}, path)
        with pytest.raises(RequestError, match=f"^model.loras: .*{words}"):
            check_files(resolve(tiny_spec(copy, loras=(Lora(str(path)),))))
    (copy / "unet" / WEIGHTS).unlink()
    moved = copy.rename(tmp_path.parent / f"{tmp_path.name}-model")
    code, out, err = cli(f"model.id={moved}")
    assert (code, out, err.count("\n")) == (2, "", 1) and "has no weights" in err, err
    assert list(cli.folder.iterdir()) == []
