"""What a run folder records of the processes that filled it."""

from __future__ import annotations

import hashlib
from importlib import metadata

import torch

from lesion.run import environment


def test_each_process_that_makes_images_is_recorded_with_its_versions(cli):
    folder = cli.folder / "run"
    assert cli(f"hydra.run.dir={folder}")[0] == 0
    kept = environment.read(folder)
    (first,) = kept["runs"]
    assert first["images"] == 2 * (1 + 2 * 3) and first["batch_sizes"] == [4]
    assert first["packages"]["torch"] == metadata.version("torch") and first["torch"] == torch.__version__
    assert first["threads"] == torch.get_num_threads() and first["device"] == "cpu"
    assert kept["config"]["generation.steps"] == 3 and kept["config"]["store.dir"] == "store"
    for name, digest in kept["files"].items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert set(kept["files"]) == set(environment.HYDRA)
    assert cli(f"hydra.run.dir={folder}")[0] == 0  # makes nothing
    assert environment.read(folder)["runs"] == [first]
    next((cli.folder / "store" / "cells").rglob("*.png")).unlink()
    assert cli(f"hydra.run.dir={folder}")[0] == 0
    assert [run["images"] for run in environment.read(folder)["runs"]] == [14, 1]


def test_a_commit_is_told_of_the_checkout_of_this_package_only(tmp_path, monkeypatch):
    assert len(environment._commit().rstrip("+")) in (0, 40)
    monkeypatch.setattr(environment, "PACKAGE", tmp_path)
    assert environment._commit() == ""
    assert environment.read(tmp_path) is None
    (tmp_path / environment.RECORD).write_text("[")
    assert environment.read(tmp_path) == {}


def test_images_and_the_record_tell_the_commit_of_the_start(monkeypatch):
    before, said = environment.commit(), environment.code()
    monkeypatch.setattr(environment, "_commit", lambda: "f" * 40)  # somebody commits while the study runs
    assert environment.here("cpu")["commit"] == before and environment.code() == said
