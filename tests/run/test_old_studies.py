"""A study made by version 0.1 opens unchanged: no image, score, calibration mean or snapshot is made anew.

tests/fixtures/v0.1 holds its store, and of each run the command line, results.parquet and floor.parquet.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from lesion.report.merging import merge, read

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v0.1"
RUNS = sorted(path.name for path in (FIXTURE / "runs").iterdir())
RENAMED = ["prompt_id", "prompt_id_a", "prompt_id_b", "image"]  # ids of prompts became longer; paths hold them


@pytest.fixture
def old(cli):
    """The store of version 0.1 as this run's own, and the command lines that fill it."""
    shutil.copytree(FIXTURE / "store", cli.folder / "store")
    shutil.copy(FIXTURE / "init.png", cli.folder)

    def run(name, *more):
        overrides = yaml.safe_load((FIXTURE / "runs" / name / "overrides.yaml").read_text())
        code, _, err = cli(*overrides, *more, defaults=False)
        assert code == 0, err
        return cli.newest()

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for kind in ("cells", "means", "states", "scores")
        for path in sorted((folder / kind).rglob("*"))
        if path.is_file() and "pictures" not in path.parts  # facts of files, which have another age here
    }


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_study_opens_without_running_any_network(old, cli, monkeypatch, name):
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda self, *args, **kwargs: pytest.fail(f"ran {type(self)}"))
    before = files(cli.folder / "store")
    folder = old(name)
    assert files(cli.folder / "store") == before
    for table in ("results", "floor"):
        then = pd.read_parquet(FIXTURE / "runs" / name / f"{table}.parquet")
        now = pd.read_parquet(folder / f"{table}.parquet")
        same = [column for column in then if column not in RENAMED]
        pd.testing.assert_frame_equal(now[same], then[same])
    results = pd.read_parquet(folder / "results.parquet")
    for row in results.itertuples():
        stored = cli.folder / "store" / "cells" / row.cell[:2] / f"{row.cell}.png"
        assert (folder / row.image).read_bytes() == stored.read_bytes()
    runs = [read(where, folder) for where in (FIXTURE / "runs" / name, folder)]
    merged, floor, _ = merge(runs)
    assert set(merged.prompt_id) == set(results.prompt_id)  # a prompt has one name, whichever version made its image
    assert len(merged) == len(results)
    assert set(floor.prompt_id_a) <= set(results.prompt_id)


def test_means_and_snapshots_serve_an_image_that_is_lost(old, cli, monkeypatch):
    """The late half of one image under `mean` costs two denoiser calls: nothing is calibrated, no early step made."""
    frame = pd.read_parquet(FIXTURE / "runs" / "grid" / "results.parquet")
    late = (frame.replacement == "mean") & (frame.window_start == 0.5) & (frame.selection == "only_one")
    lost = frame[late].iloc[0].cell
    place = Path("store") / "cells" / lost[:2] / f"{lost}.png"
    (cli.folder / place).unlink()
    calls = []
    forward = diffusers.UNet2DConditionModel.forward

    def counted(self, sample, *args, **kwargs):
        calls.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", counted)
    old("grid")
    assert calls == [2, 2]
    then, now = (np.asarray(Image.open(root / place), int) for root in (FIXTURE, cli.folder))
    assert np.abs(then - now).max() <= 1  # made alone now, in a batch of eight then
    assert sorted(path.name for path in (cli.folder / "store" / "means").iterdir()) == sorted(
        path.name for path in (FIXTURE / "store" / "means").iterdir()
    )
