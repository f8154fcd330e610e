"""A report that is killed while it writes leaves the old file or the new one, never half of one."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lesion.report import contents, figures, html, merging, pictures, tables

FRAME = pd.read_parquet(Path(__file__).parents[1] / "fixtures" / "v0.1" / "runs" / "grid" / "results.parquet")
IMAGE = Image.new("RGB", (600, 600), "red")


def a_figure(folder: Path) -> None:
    figures.save(Figure(), folder / "figure")


def a_table(folder: Path) -> None:
    tables.write(folder, contents.status(FRAME))


def a_picture(folder: Path) -> None:
    pictures._save(IMAGE, folder / "picture.png")


def a_thumbnail(folder: Path) -> None:
    assert pictures._thumbnail(folder, "source.png")


def a_copy(folder: Path) -> None:
    merging._link(folder / "source.png", folder / "copy.png")


def a_page(folder: Path) -> None:
    html.write(folder, FRAME, [], {})


def a_long_page(folder: Path) -> None:
    html.write(folder, FRAME, [], {})


@pytest.mark.parametrize("write", [a_figure, a_table, a_picture, a_thumbnail, a_copy, a_page, a_long_page])
def test_every_file_is_written_in_one_step(tmp_path, monkeypatch, write):
    IMAGE.save(tmp_path / "source.png")
    if write is a_copy:
        monkeypatch.setattr(os, "link", lambda *_: os.close(-1))  # another disk
    if write is a_long_page:
        monkeypatch.setattr(html, "INLINE_ROWS", 0)
    before = set(tmp_path.rglob("*"))
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: moved.append(Path(target)) or replace(source, target))
    write(tmp_path)
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert made and set(moved) == made

    def killed(source, target):
        assert Path(source).stat().st_size
        raise KeyboardInterrupt

    contents_before = {path: path.write_bytes(b"old") for path in made}
    os.utime(tmp_path / "source.png", (4e9, 4e9))
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    assert {path: path.read_bytes() for path in contents_before} == dict.fromkeys(made, b"old")
