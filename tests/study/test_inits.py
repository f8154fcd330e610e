"""Init images are read as diffusers reads them, or refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lesion.study import inits
from lesion.study.inits import read_init, with_inits
from lesion.study.prompts import parse_prompts, slug, slug_of_0_1


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
    monkeypatch.setattr(inits, "LARGEST", 1 << 20)
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no disk
    with pytest.raises(ValueError, match="more than 1 MiB"):
        read_init(tmp_path / "huge.png")


def test_a_column_image_lies_beside_its_file(tmp_path, monkeypatch):
    sets = tmp_path / "sets"
    sets.mkdir()
    Image.new("RGB", (8, 8)).save(sets / "a.png")
    (sets / "a.csv").write_text("text,image\na cat,a.png\n")
    monkeypatch.chdir(tmp_path)
    (prompt,) = with_inits(parse_prompts({"path": "sets/a.csv"}).prompts, None, "generation.init")
    assert prompt.image == str(sets / "a.png")


def test_a_folder_of_init_images_may_have_the_ids_of_version_0_1(tmp_path):
    prompts = parse_prompts({"items": ["a cat", "a dog"]})[1]
    for name in (slug("a cat"), slug_of_0_1("a dog")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    assert [Path(p.image).stem for p in with_inits(prompts, str(tmp_path), "generation.init")] == [
        slug("a cat"),
        slug_of_0_1("a dog"),
    ]
