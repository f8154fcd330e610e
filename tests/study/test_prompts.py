"""Prompts and init images are read as they are written, or refused with the line that is wrong."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lesion.errors import RequestError
from lesion.study.prompts import _read, parse_prompts, read_init, slug, slug_of_0_1, with_inits

BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # where str.splitlines breaks, and no newline is


def parse(path: Path):
    return parse_prompts({"path": str(path)})[1]


def test_only_newlines_end_a_line(tmp_path):
    texts = [f"a red{mark}circle" for mark in BREAKS] + ["two\nlines", 'a "quoted", text']
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["text", "aspects"], *([text, "colour"] for text in texts)])
    prompts = parse(tmp_path / "a.csv")
    assert [prompt.text for prompt in prompts] == texts
    assert {prompt.aspects for prompt in prompts} == {("colour",)}
    (tmp_path / "a.txt").write_bytes("\r\n".join(texts[: len(BREAKS)]).encode())
    assert [prompt.text for prompt in parse(tmp_path / "a.txt")] == texts[: len(BREAKS)]
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"text": "a{mark}b"}}' for mark in BREAKS[:3]), encoding="utf-8")
    assert [prompt.text for prompt in parse(tmp_path / "a.jsonl")] == [f"a{mark}b" for mark in BREAKS[:3]]


def test_an_id_of_zero_is_an_id(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n0,a cat\n1,a dog\n,a cow\n")
    assert [prompt.id for prompt in parse(tmp_path / "a.csv")] == ["0", "1", slug("a cow")]
    (tmp_path / "a.jsonl").write_text('{"id": 0, "text": "a cat"}\n{"id": "", "prompt_id": 7, "text": "a dog"}')
    assert [prompt.id for prompt in parse(tmp_path / "a.jsonl")] == ["0", "7"]


def test_ids_keep_the_letters_of_any_script_and_fit_a_file_name():
    assert slug("A red circle!").startswith("a-red-circle-")
    assert slug("一只 红色的猫").startswith("一只-红色的猫-")
    assert slug("हिन्दी चित्र").startswith("हिन्दी-चित्र-")
    assert slug("caf\u00e9")[:4] == slug("cafe\u0301")[:4] == "caf\u00e9"
    for text in ("", "🎉", "a" * 500, "字" * 500, "𠀀" * 500):
        assert len(slug(text)) <= 80
        assert len(slug(text).encode()) <= 255
    captions = [chr(0x4E00 + i) + chr(0x4E00 + j) for i in range(80) for j in range(80)]
    assert len(set(map(slug, captions))) == len(captions) > len({slug_of_0_1(text) for text in captions})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"text,aspects\na red circle, on white, shape\n", ["line 2", "double quotes"]),
        ("a.csv", b"text\n\n\na cat\na dog, a cow\n", ["line 5", "2 fields for 1 columns"]),
        ("a.csv", b"text,text\na,b\n", ["line 1", "'text' twice"]),
        ("a.csv", b'text\n"a', ["line 2", "CSV"]),
        ("a.csv", b"text\na\nb\0\n", ["line 3", "NUL"]),
        ("a.csv", "text\na cat\n".encode("utf-16-le"), ["line 1", "UTF-16"]),
        ("a.csv", "text\na cat\n".encode("utf-16"), ["UTF-8"]),
        ("a.csv", "text\nein Bär\n".encode("latin-1"), ["UTF-8"]),
        ("a.txt", b"a\0b\n", ["line 1", "NUL"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a", "text": "b"}\n', ["line 2", "'text' is given twice"]),
        ("a.jsonl", b"[" * 100_000, ["line 1", "JSON"]),
        ("a.jsonl", b'{"text": "a", "id": ' + b"9" * 5000 + b"}", ["line 1", "JSON"]),
        ("a.jsonl", b'{"text": "a", "aspects": ["\\ud800"]}', ["aspect", "surrogate"]),
        ("a.jsonl", b'{"text": "a", "aspects": ["\\u0000"]}', ["aspect", "NUL"]),
        ("a.jsonl", b'{"text": "a", "id": "' + b"\xf0\xa0\x80\x80" * 70 + b'"}', ["too long", "255 bytes"]),
        ("a.jsonl", b'{"text": "a", "id": "' + b"x" * 81 + b'"}', ["too long", "80"]),
        ("a.jsonl", b'{"text": "a", "id": "../b"}', ["not allowed"]),
    ],
)
def test_what_would_be_misread_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError) as refused:
        parse(tmp_path / name)
    assert all(word in str(refused.value) for word in ["prompts.path", *words]), refused.value
    assert len(str(refused.value)) < 500


def test_rows_shorter_than_the_header_and_empty_columns_are_fine(tmp_path):
    (tmp_path / "a.csv").write_text("text,aspects,,\na cat,animal,,\na dog\n")
    assert [(prompt.text, prompt.aspects) for prompt in parse(tmp_path / "a.csv")] == [
        ("a cat", ("animal",)),
        ("a dog", ()),
    ]


@pytest.mark.parametrize("ending", [".txt", ".csv", ".jsonl", ".png"])
def test_a_fifo_is_refused_at_once(tmp_path, ending):
    os.mkfifo(path := tmp_path / f"a{ending}")
    with pytest.raises((RequestError, ValueError), match="no regular file"):
        read_init(path) if ending == ".png" else _read(path, "prompts.path")


def pictures(folder: Path) -> dict[str, Path]:
    """Files in modes and formats of every kind, each of which version 0.1 read right."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 6, 4), np.uint8)
    rgba, made = Image.fromarray(noise), {}
    palette = rgba.convert("RGB").quantize(16)
    palette.info["transparency"] = 3
    rgb = rgba.convert("RGB")
    kinds = {"rgba.png": rgba, "p.png": palette, "rgb.webp": rgba, "cmyk.jpg": rgba.convert("CMYK")}
    kinds |= {f"{mode}.png": rgba.convert(mode) for mode in ("1", "L", "LA")}
    kinds |= {f"rgb.{ending}": rgb for ending in ("png", "jpg", "bmp", "tiff")}
    for name, picture in kinds.items():
        picture.save(folder / name)
        made[name] = folder / name
    return made


def test_init_images_are_read_as_diffusers_reads_them_and_keep_their_identity(tmp_path):
    import hashlib

    from diffusers.utils import load_image

    for name, path in pictures(tmp_path).items():
        picture, digest = read_init(path)
        assert picture.tobytes() == load_image(str(path)).tobytes(), name
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest(), name  # as version 0.1


def test_an_orientation_turns_the_image_and_makes_another_identity(tmp_path):
    import hashlib

    from diffusers.utils import load_image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8))
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        for name in ("a.png", "a.jpg", "a.webp", "a.tiff"):
            picture.save(path := tmp_path / name, exif=exif)
            found, digest = read_init(path)
            assert found.tobytes() == load_image(str(path)).tobytes(), (name, orientation)
            assert found.size == ((6, 8) if orientation < 5 else (8, 6)), (name, orientation)
            with Image.open(path) as then:
                right = then.convert("RGB").tobytes() == found.tobytes()
            assert (digest == hashlib.sha256(path.read_bytes()).hexdigest()) == right, (name, orientation)


def test_16_bit_grey_is_scaled(tmp_path):
    import hashlib

    values = np.linspace(0, 65535, 48).reshape(8, 6).astype(np.uint16)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(values).save(path := tmp_path / name)
        picture, digest = read_init(path)
        expected = np.round(values / 257).astype(np.uint8)
        assert np.array_equal(np.asarray(picture), np.stack([expected] * 3, -1)), name
        assert digest != hashlib.sha256(path.read_bytes()).hexdigest()
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ValueError, match="32 bits"):
        read_init(tmp_path / "f.tiff")


def test_other_formats_and_decompression_bombs_are_refused(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.gif")
    (tmp_path / "a.eps").rename(tmp_path / "eps.png")
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("a program was started"))
    for name in ("eps.png", "a.gif"):
        with pytest.raises(ValueError, match="PNG, JPEG, WEBP, BMP, TIFF"):
            read_init(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    for size in (60, 400):  # Pillow warns of the first and raises at the second
        Image.new("1", (1, size)).save(tmp_path / "large.png")
        with pytest.raises(ValueError, match="exceeds limit"):
            read_init(tmp_path / "large.png")


def test_a_column_image_lies_beside_its_file(tmp_path, monkeypatch):
    sets = tmp_path / "sets"
    sets.mkdir()
    Image.new("RGB", (8, 8)).save(sets / "a.png")
    (sets / "a.csv").write_text("text,image\na cat,a.png\n")
    monkeypatch.chdir(tmp_path)
    (prompt,) = with_inits(parse(Path("sets/a.csv")), None, "generation.init")
    assert prompt.image == str(sets / "a.png")


def test_a_folder_of_init_images_may_have_the_ids_of_version_0_1(tmp_path):
    prompts = parse_prompts({"items": ["a cat", "a dog"]})[1]
    for name in (slug("a cat"), slug_of_0_1("a dog")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    assert [Path(p.image).stem for p in with_inits(prompts, str(tmp_path), "generation.init")] == [
        slug("a cat"),
        slug_of_0_1("a dog"),
    ]


def test_files_are_read_as_utf_8_whatever_the_locale(tmp_path):
    (tmp_path / "a.txt").write_text("ein Bär\n", encoding="utf-8")
    code = (
        "import sys; from pathlib import Path; from lesion.study.prompts import _read; "
        "print(ascii(_read(Path(sys.argv[1]), 'k')))"
    )
    env = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.txt")], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "['ein B\\xe4r']\n"
    command = [sys.executable, "-m", "lesion.cli.study", "tracker=红"]  # starts over in UTF-8 mode
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2 and done.stderr.startswith("lesion: ") and "红" in done.stderr
