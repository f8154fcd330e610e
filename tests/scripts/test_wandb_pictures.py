"""The pictures of docs/wandb.md hold what the files of an offline run hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import wandb_pictures  # noqa: E402


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "wandb" / "offline-run-1"
    media = run / "files" / "media" / "table"
    (media / "layers").mkdir(parents=True)
    columns = ["prompt_id", "image", *wandb_pictures.COLUMNS[2:]]
    rows = [["p", "0.png", "a <b>", 0, "none", "", "", 1.0, 1.0]]
    rows += [["p", f"{n}.png", "a <b>", 0, "leave_one_out", "zero", f"mid.{n}", 1 - n / 10, 0.5] for n in range(1, 8)]
    for n in range(8):
        Image.new("RGB", (2, 2), (n, 0, 0)).save(tmp_path / f"{n}.png")
    (media / "results_6_ab.table.json").write_text(json.dumps({"columns": columns, "data": rows}))
    bars = {"columns": ["layer", "value"], "data": [["mid.1", 0.1], ["mid.2", 0.4], ["mid.3", -0.1]]}
    (media / "layers" / "importance_zero_table_7_cd.table.json").write_text(json.dumps(bars))
    return run


def test_the_rows_that_changed_most_stand_with_their_baselines(run):
    page = wandb_pictures.results(run)
    assert [f"mid.{n}" in page for n in range(1, 8)] == [False, False, *[True] * 5]
    assert page.index("mid.7") < page.index("mid.3") and "a &lt;b&gt;" in page
    pictures = [wandb_pictures.picture(run.parents[1] / f"{n}.png") for n in range(8)]
    assert page.count(pictures[0]) == 5 and [page.count(one) for one in pictures[1:]] == [0, 0, 1, 1, 1, 1, 1]


def test_bars_have_the_lengths_of_the_values(run):
    page = wandb_pictures.bars(run)
    assert "layers/importance_zero<" in page
    assert [f"width:{share}%" in page for share in ("25.0", "100.0", "0.0")] == [True] * 3


def test_the_pictures_of_the_docs_are_there_and_small():
    text = (ROOT / "docs" / "wandb.md").read_text()
    for name in ("wandb-results", "wandb-layers"):
        assert f"images/{name}.png" in text
        assert (ROOT / "docs" / "images" / f"{name}.png").stat().st_size < 150_000
    with pytest.raises(SystemExit, match="no table"):
        wandb_pictures.results(ROOT / "docs")
