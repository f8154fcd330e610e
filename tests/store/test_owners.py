"""Files of the store say whose they are: what is foreign, edited or no file at all is noticed, told, and made again."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, PngImagePlugin

from conftest import settings
from lesion.generation.snapshots import State, States
from lesion.replacements import _means
from lesion.store import scores as parts_module
from lesion.store import tensors as tensorfiles
from lesion.store.claims import Claims
from lesion.store.files import atomically, clear, opened
from lesion.store.images import Damaged, Store, digest_of
from lesion.study.grid import ModelIdentity
from lesion.study.prompts import Prompt
from test_store import BLACK, KEYS, METRICS, a_cell, a_key, a_picture, files, fill, loaded, plant

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v0.1" / "store"

# --- names that no file has


def as_folder(path: Path) -> None:
    path.mkdir(parents=True)


def as_full_folder(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "mine.txt").write_text("kept")


def as_pipe(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def as_dangling_link(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("nowhere")


STRANGE = [as_folder, as_full_folder, as_pipe, as_dangling_link]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("strange", STRANGE)
def test_what_is_no_file_is_never_waited_for_and_makes_room(tmp_path, strange, caplog):
    store, cell = Store(tmp_path), a_cell()
    strange(store.path(cell.key))
    assert not store.has(cell.key)
    assert cell.key not in store.known()
    with pytest.raises(Damaged):
        store.get(cell.key)
    store.put(cell, BLACK)
    assert np.array_equal(store.get(cell.key).pixels, BLACK)
    strange(path := tmp_path / "tensors" / "a.safetensors")
    assert tensorfiles.read(path, lambda metadata: True) is None
    assert str(path) in caplog.text and not os.path.lexists(path)
    fill(tmp_path / "scores")
    strange(path := tmp_path / "scores" / "pictures" / f"{time.time_ns():020d}-{'0' * 16}.parquet")
    assert loaded(tmp_path / "scores").picture(a_key(1)) == a_picture(1)
    assert str(path) in caplog.text and not os.path.lexists(path)
    kept = [path.read_text() for path in tmp_path.rglob("mine.txt")]
    assert kept == (["kept"] * 3 if strange is as_full_folder else [])  # nothing of a user is deleted


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    with opened(tmp_path / "a") as file:
        assert file.read() == b"abc"
    for path in (tmp_path, Path("/dev/null"), tmp_path / "absent"):
        with pytest.raises(OSError, match=path.name), opened(path):
            pass
    clear(tmp_path / "absent")
    long = tmp_path / ("x" * 255)  # the longest name that there is
    with atomically(long) as temporary:
        temporary.write_text("whole")
    assert long.read_text() == "whole"


# --- images


def saved_again(store: Store, key: str, pixels: np.ndarray, change=lambda record: record) -> None:
    """As an image editor does, which keeps the note."""
    path = store.path(key)
    with Image.open(path) as image:
        record = json.loads(image.text["lesion"])
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("lesion", json.dumps(change(record)))
    Image.fromarray(pixels).save(path, pnginfo=notes)


def test_an_edited_image_shows_it_though_nothing_is_remembered(tmp_path):
    store, cell = Store(tmp_path), a_cell()
    picture = store.put(cell, BLACK)
    edited = BLACK.copy()
    edited[3, 5, 1] = 1
    saved_again(store, cell.key, BLACK)  # other bytes, the same pixels
    assert store.get(cell.key).picture.digest == picture.digest == digest_of(BLACK)
    saved_again(store, cell.key, edited)
    with pytest.raises(Damaged, match="not those that were made"):
        store.get(cell.key)


def test_an_image_of_version_0_1_is_compared_with_what_is_remembered(tmp_path):
    shutil.copytree(FIXTURE / "cells", tmp_path / "cells")
    store = Store(tmp_path)
    keys = sorted(path.stem for path in (tmp_path / "cells").rglob("*.png"))
    digests = {key: store.get(key, (64, 64)).picture.digest for key in keys}
    assert len(digests) > 50
    key = keys[0]
    assert store.get(key, (64, 64), digests[key]).picture.digest == digests[key]
    with pytest.raises(Damaged, match="not those that were made"):
        store.get(key, (64, 64), digests[keys[1]])
    saved_again(store, key, 255 - store.get(key).pixels)
    with pytest.raises(Damaged, match="not those that were made"):
        store.get(key, (64, 64), digests[key])


@pytest.mark.parametrize("record", [[], ["cell"], 3, 1e999, None, "text", {}, {"cell": 3}])
def test_a_record_of_another_form_is_damage(tmp_path, record):
    store, cell = Store(tmp_path), a_cell()
    store.put(cell, BLACK)
    saved_again(store, cell.key, BLACK, lambda old: record)
    with pytest.raises(Damaged):
        store.get(cell.key)
    saved_again_reason = {"cell": cell.key, "reason": ["black"]}
    store.put(cell, BLACK)
    saved_again(store, cell.key, BLACK, lambda old: saved_again_reason)
    with pytest.raises(Damaged):
        store.get(cell.key)


def test_the_size_is_compared_before_anything_is_decoded(tmp_path, recwarn):
    store, cell = Store(tmp_path), a_cell()
    store.put(cell, np.zeros((8, 24, 3), np.uint8))
    assert store.get(cell.key, (8, 24)).pixels.shape == (8, 24, 3)
    for size in ((24, 8), (8, 25), (16, 24)):
        with pytest.raises(Damaged, match=f"not of {size[1]} x {size[0]} pixels"):
            store.get(cell.key, size)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    whole = store.path(cell.key).read_bytes()
    bomb = chunk(b"IHDR", struct.pack(">IIBBBBB", 11_000, 11_000, 8, 2, 0, 0, 0))  # 121 megapixels, 347 MiB
    store.path(cell.key).write_bytes(whole[:8] + bomb + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b""))
    with pytest.raises(Damaged, match="not of 24 x 8"):
        store.get(cell.key, (8, 24))
    assert not recwarn.list  # Pillow, which warns of it, was not asked


# --- half-made images and means


def a_state(value: float) -> State:
    plain = {"scalars": {}, "lists": {}, "strides": [4, 4, 2, 1], "on_cpu": []}
    return State({"latents": torch.full((1, 1, 2, 2), value)}, plain, 4)


@pytest.mark.parametrize("other", [(a_key(2), 2), (a_key(1), 3)])
def test_half_made_images_that_are_swapped_are_noticed(tmp_path, caplog, other):
    states, mine = States(tmp_path), (a_key(1), 2)
    states.put(*mine, a_state(1.0))
    states.put(*other, a_state(2.0))
    assert states.get(*mine, 4).tensors["latents"].unique().tolist() == [1.0]
    paths = states.path(*mine), states.path(*other)
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    assert states.get(*mine, 4) is None and states.get(*other, 4) is None
    assert caplog.text.count("its content is of another owner") == 2
    assert not any(path.exists() for path in paths)


def test_half_made_images_of_version_0_1_are_taken_under_their_name(tmp_path):
    shutil.copytree(FIXTURE / "states", tmp_path / "states")
    paths = sorted((tmp_path / "states").rglob("*.safetensors"))
    assert len(paths) == 2
    for path in paths:
        key, _, step = path.stem.rpartition("-")
        assert States(tmp_path / "states").get(key, int(step), 4) is not None


def a_bench(folder: Path, **changes: object) -> SimpleNamespace:
    anatomy = SimpleNamespace(kind="cross_attention", by="attention", **changes)
    model = SimpleNamespace(identity=ModelIdentity("tiny", "f" * 32, "float32"), anatomy=anatomy)
    return SimpleNamespace(model=model, settings=settings(), folder=folder, batch_size=2, components=("denoiser",))


def test_means_of_another_calibration_or_site_set_are_noticed(tmp_path, caplog, monkeypatch):
    measured = []

    def measure(bench, subjects):
        measured.append([prompt.text for prompt, _ in subjects])
        return {"down.attn2": torch.full((4, 2, 3), float(len(measured)))}

    def means(text, seed=0, **changes):
        bench = a_bench(tmp_path)
        vars(bench.model.anatomy).update(changes)
        return _means.calibrated(bench, text, [Prompt(text)], [seed])["down.attn2"].unique().item()

    monkeypatch.setattr(_means, "measure", measure)
    asked = [("a", 0, {}), ("b", 0, {}), ("a", 1, {}), ("a", 0, {"kind": "self_attention"})]
    assert [means(text, seed, **more) for text, seed, more in asked] == [1, 2, 3, 4]
    assert [means(text, seed, **more) for text, seed, more in asked] == [1, 2, 3, 4]
    paths = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    content = paths[0].read_bytes()
    for path in paths[1:]:
        path.write_bytes(content)
    assert [means(text, seed, **more) for text, seed, more in asked] == [1, 5, 6, 7]
    assert caplog.text.count("its content is of another owner") == 3
    full = errno.ENOSPC, "No space left on device"
    monkeypatch.setattr(tensorfiles, "_save", lambda *_, **__: (_ for _ in ()).throw(OSError(*full)))
    assert means("c") == 8 and "cannot be kept" in caplog.text  # they serve this run


def test_means_of_version_0_1_are_told_by_their_provenance(tmp_path, caplog):
    (path,) = (FIXTURE / "means").iterdir()
    kept = Path(shutil.copy(path, tmp_path))
    read = tensorfiles.read(kept, lambda carried: _means._key(json.loads(carried["provenance"])) == path.stem)
    assert read is not None
    for belongs in (lambda carried: carried["absent"], lambda carried: json.loads("{"), lambda carried: False):
        shutil.copy(path, tmp_path)
        assert tensorfiles.read(kept, belongs) is None
        assert not kept.exists()
    assert caplog.text.count("its content is of another owner") == 3


# --- parts of scores


def folder_of(column: str, kind: str = "") -> str:
    return kind + parts_module._folder_name(column, METRICS[column])


def a_part(folder: Path) -> Path:
    return max(folder.iterdir())


def test_a_score_part_of_another_column_or_kind_is_noticed(tmp_path, caplog):
    scores = fill(tmp_path)
    scores.add_pair("clip", a_key(0), a_key(1), 0.5)
    scores.flush()
    right = {i: {"clip": i / 7, "ssim": -float(i)} for i in range(5)}
    ssim, clip, pairs = (
        tmp_path / name for name in (folder_of("ssim"), folder_of("clip"), folder_of("clip", "pairs-"))
    )
    values, of_pairs = a_part(ssim), a_part(pairs)
    foreign = [shutil.copy(values, clip), shutil.copy(of_pairs, ssim), shutil.copy(values, pairs)]
    late = clip / f"9{values.name[1:]}"  # would win by its time
    Path(foreign[0]).rename(late)
    scores = loaded(tmp_path)
    assert {i: scores.values(a_key(i), a_key(0)) for i in range(5)} == right
    assert scores.pair("clip", a_key(1), a_key(0)) == 0.5
    removed = [late, *map(Path, foreign[1:])]
    assert [str(path) in caplog.text and not path.exists() for path in removed] == [True] * 3
    assert "it holds values of" in caplog.text and "it holds pairs of" in caplog.text


def test_a_score_part_of_another_identity_is_noticed(tmp_path):
    """The same column made with other weights."""
    fill(tmp_path)
    (path,) = (tmp_path / folder_of("clip")).iterdir()
    other = {**METRICS, "clip": "ViT-L"}
    (there := tmp_path / parts_module._folder_name("clip", "ViT-L")).mkdir()
    shutil.copy(path, there)
    assert loaded(tmp_path, other).values(a_key(1), a_key(0)) == {"ssim": -1.0}
    assert path.exists() and not list(there.iterdir())


def as_of_0_1(path: Path) -> Path:
    """The part without its owner."""
    sink = path.with_suffix(".tmp")
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), sink)
    target = path.with_name(f"{path.name[:21]}{parts_module._digest(sink.read_bytes())}.parquet")
    sink.rename(target)
    path.unlink()
    return target


def test_a_score_part_of_version_0_1_counts_where_it_lies_alone(tmp_path, caplog):
    fill(tmp_path)
    clip, ssim = (as_of_0_1(a_part(tmp_path / folder_of(name))) for name in ("clip", "ssim"))
    assert loaded(tmp_path).values(a_key(2), a_key(0)) == {"clip": 2 / 7, "ssim": -2.0}
    assert caplog.text == ""
    copy = Path(shutil.copy(ssim, clip.parent))
    assert loaded(tmp_path).values(a_key(2), a_key(0)) == {"clip": 2 / 7}  # whose it is cannot be told
    assert clip.exists() and not ssim.exists() and not copy.exists()
    assert len(re.findall("is damaged and removed", caplog.text)) == 2


# --- claims


@pytest.mark.timeout(20)
@pytest.mark.parametrize("strange", STRANGE)
def test_a_claim_that_is_no_file_is_void(tmp_path, strange, caplog):
    strange(tmp_path / KEYS[0][:2] / KEYS[0])
    with Claims(tmp_path) as ours:
        assert ours.held(KEYS[:1]) == set()
        assert ours.take(KEYS[:1]) == {KEYS[0]}
        assert json.loads((tmp_path / KEYS[0][:2] / KEYS[0]).read_text())["pid"] == os.getpid()
    assert caplog.text.count("names no owner") == 1
    assert [path.name for path in files(tmp_path)] == (["mine.txt"] if strange is as_full_folder else [])


OWNER = {"machine": "elsewhere", "pid": 1, "start": "", "token": "t"}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"[" * 100_000,
        b"1" * 10_000,
        b"null",
        b"NaN",
        *(
            json.dumps({**OWNER, **changes}).encode()
            for changes in (
                {"pid": "1/../self"},
                {"pid": "\0"},
                {"pid": 10**400},
                {"pid": 1e308},
                {"pid": True},
                {"pid": -1},
                {"pid": None},
                {"machine": 3},
                {"start": [1]},
                {"token": {}},
                {"more": 1},
            )
        ),
    ],
)
def test_a_claim_of_absurd_content_lapses(tmp_path, content):
    path = plant(tmp_path, KEYS[0])
    path.write_bytes(content)
    with Claims(tmp_path) as ours:
        assert ours.take(KEYS[:1]) == set()  # it may still be in the writing
        os.utime(path, (time.time() - 6,) * 2)
        assert ours.take(KEYS[:1]) == {KEYS[0]}
    assert files(tmp_path) == []


def test_a_claim_dated_in_the_future_lapses(tmp_path):
    path = plant(tmp_path, KEYS[0])
    with Claims(tmp_path, expires=100) as ours:
        os.utime(path, (time.time() + 90,) * 2)  # clocks differ
        assert ours.take(KEYS[:1]) == set()
        os.utime(path, (time.time() + 110,) * 2)
        assert ours.take(KEYS[:1]) == {KEYS[0]}


def test_claims_that_are_not_required_cost_one_warning(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        caplog.clear()
        with Claims(folder, required=False) as ours:
            assert ours.take(KEYS) == set(KEYS)
            assert ours.take(KEYS[:3]) == set(KEYS[:3])
            ours.release(KEYS)
        assert len(caplog.records) == 1 and "cannot be claimed" in caplog.text
    plant(tmp_path / "claims", KEYS[1])
    caplog.clear()
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(full))
    monkeypatch.setattr(Path, "touch", lambda *_, **__: (_ for _ in ()).throw(full))
    with Claims(tmp_path / "claims", required=False) as ours:
        assert ours.take(KEYS[:3]) == {KEYS[0], KEYS[2]}  # what another holds is still left to it
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    assert len(files(tmp_path / "claims")) == 1


def test_claims_whose_folder_vanishes_are_no_error(tmp_path):
    with Claims(tmp_path / "store" / "claims", required=False) as ours:
        assert ours.take(KEYS[:3]) == set(KEYS[:3])
        shutil.rmtree(tmp_path / "store")
        (tmp_path / "store").write_text("in the way")
        ours.release(KEYS[:1])
