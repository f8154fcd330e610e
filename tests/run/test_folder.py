"""A run folder holds one request's results, and no other request's run writes over them."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from lesion.errors import RequestError
from lesion.run import job
from lesion.run.folder import RECORD, by_key, claim, fresh

ONE = ["selection=leave_one_out", "layers.include=[mid_block.*]", "generation.steps=1"]


def _each(function, arguments):
    """What several processes that begin together get."""
    with multiprocessing.get_context("fork").Pool(len(arguments)) as pool:
        return pool.starmap(function, arguments, chunksize=1)


def _claimed(folder, request):
    try:
        claim(folder, request, "hydra.run.dir")
    except RequestError as error:
        return str(error)
    return ""


def test_no_two_processes_get_one_fresh_folder(tmp_path):
    found = _each(fresh, [(tmp_path / "12-00-00",)] * 6)
    assert sorted(path.name for path in found) == ["12-00-00", *(f"12-00-00-{number}" for number in range(2, 7))]
    assert all(path.is_dir() for path in found)


def test_one_of_several_processes_gets_a_folder_that_all_name(tmp_path):
    said = _each(_claimed, [(tmp_path / "out", {"seeds": number, "window": 1}) for number in range(6)])
    assert said.count("") == 1
    assert all("hydra.run.dir" in line and "(seeds differ)" in line for line in said if line)
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == [".hydra", RECORD.name]
    assert _claimed(tmp_path / "out", {"seeds": said.index(""), "window": 1}) == ""


def test_an_existing_folder_is_never_written_over(cli):
    """With the default name another folder is taken, as by processes that start in the same second."""
    there = "hydra.run.dir=out/${now:%Y}"
    for seed in (0, 1):
        assert cli(*ONE, there, f"seeds={seed}")[0] == 0
    assert [sorted(frame.seed.unique()) for frame in cli.frames()] == [[0], [1]]
    named = "hydra.run.dir=mine"
    assert cli(*ONE, named, "seeds=0")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (cli.folder / "mine").rglob("*")}
    for again in (["seeds=1"], ["prompts.items=[a dog]"], ["selection=only_one", "layers.include=null"]):
        code, out, err = cli(*ONE, named, *again)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert "hydra.run.dir: " in err
        assert again[0].split("=")[0] in err
    assert {path: path.stat().st_mtime_ns for path in (cli.folder / "mine").rglob("*")} == before


def test_the_same_request_goes_on_in_its_folder_and_leaves_no_old_picture(cli, drawn, empty_figures):
    named = [*ONE, "hydra.run.dir=mine"]
    assert cli(*named)[0] == 0
    files = {path for path in (cli.folder / "mine").rglob("*") if path.is_file()}
    old = cli.folder / "mine" / "grids" / "of-an-earlier-state.png"
    old.write_bytes(b"")
    assert cli(*named, "generation.batch_size=2", "tracker=none")[0] == 0
    assert {path for path in (cli.folder / "mine").rglob("*") if path.is_file()} == files


def test_a_folder_of_version_0_1_belongs_to_the_request_in_its_config(cli):
    named = [*ONE, "hydra.run.dir=mine"]
    assert cli(*named)[0] == 0
    (cli.folder / "mine" / RECORD).unlink()
    code, _, err = cli(*named, "seeds=1")
    assert code == 2
    assert "(seeds differ)" in err
    assert cli(*named)[0] == 0


def test_prompts_that_change_in_their_file_are_another_request(cli):
    cli.defaults = [default for default in cli.defaults if not default.startswith("prompts")]
    named = [*ONE, "hydra.run.dir=mine", "prompts=a.txt"]
    (cli.folder / "a.txt").write_text("a cat\n")
    assert cli(*named)[0] == 0
    (cli.folder / "a.txt").write_text("a dog\n")
    code, _, err = cli(*named)
    assert code == 2
    assert "prompts (content)" in err


def test_by_how_many_workers_images_are_made_is_no_part_of_the_request():
    assert by_key({"workers": 1, "seeds": [0]}) == by_key({"workers": 2, "seeds": [0]}) == {"seeds": [0]}


def test_a_sweep_takes_its_folder_whole_or_not_at_all(cli):
    def swept(*arguments):
        return cli("-m", *ONE, "~hydra.callbacks.sweep_report", *arguments)

    for seeds in ("0,1", "0"):
        assert swept(f"seeds={seeds}", "hydra.sweep.dir=out/${now:%Y}")[0] == 0
    assert sorted(len(list(path.glob("*/results.parquet"))) for path in (cli.folder / "out").iterdir()) == [1, 2]
    assert swept("seeds=0", "hydra.sweep.dir=mine")[0] == 0
    assert swept("seeds=0,1", "hydra.sweep.dir=mine")[0] == 0  # its first jobs are the same
    code, _, err = swept("seeds=3,1", "hydra.sweep.dir=mine")
    assert (code, err.count("\n")) == (2, 1)
    assert "hydra.sweep.dir: " in err
    code, _, err = swept("seeds=0,1", "hydra.sweep.dir=other", "hydra.sweep.subdir=same")
    assert code == 2
    assert "hydra.sweep.subdir: " in err
    assert not (cli.folder / "other").exists()
    seeds = {path.parent.name: set(pd.read_parquet(path).seed) for path in (cli.folder / "mine").glob("*/*.parquet")
             if path.name == "results.parquet"}  # fmt: skip
    assert seeds == {"0": {0}, "1": {1}}


def test_a_sweep_of_no_jobs_is_refused(cli):
    for empty in ("model.name=glob(*)", "generation.steps=range(3,3)"):
        code, _, err = cli("-m", empty)
        assert (code, err.count("\n")) == (2, 1)
        assert all(word in err for word in (*empty.split("="), "no job"))
    assert list(cli.folder.iterdir()) == []


def test_jobs_that_change_their_folder_share_store_and_files(cli):
    cli.defaults = [default for default in cli.defaults if not default.startswith("prompts")]
    (cli.folder / "a.txt").write_text("a cat\n")
    code, _, err = cli("-m", *ONE, "prompts=a.txt", "seeds=0,1", "hydra.job.chdir=true", "hydra.sweep.dir=out")
    assert code == 0, err
    assert [path.parent for path in cli.folder.rglob("cells")] == [cli.folder / "store"]
    assert len(list((cli.folder / "store" / "cells").rglob("*.png"))) == 4


@pytest.mark.slow
def test_three_studies_that_start_together_keep_three_results(cli):
    there = "hydra.run.dir=out/${now:%Y}"
    commands = [
        [sys.executable, "-m", "lesion.cli.study", *cli.defaults, *ONE, f"seeds={seed}", there] for seed in range(3)
    ]
    package = str(Path(sys.modules["lesion"].__file__).parents[1])
    processes = [subprocess.Popen(command, env={**os.environ, "PYTHONPATH": package}) for command in commands]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert sorted(frame.seed.unique().tolist() for frame in cli.frames()) == [[0], [1], [2]]


def test_places_that_cannot_be_folders_are_refused_in_one_line(cli):
    here = cli.folder
    before = here.parent / f"{here.name}-odd"
    before.mkdir()
    (before / "file").touch()
    (before / "dangling").symlink_to("nowhere")
    (before / "loop").symlink_to("loop")
    (before / "r1").mkdir()
    (before / "r1" / "images").touch()
    (before / "r2" / "results.parquet").mkdir(parents=True)
    (before / "r3" / "lesion.log").mkdir(parents=True)
    (before / "r4" / ".hydra" / "config.yaml").mkdir(parents=True)
    long = "a" * 300
    store = SimpleNamespace(dry_run=False, store=None)
    for place in ["/dev/null", "file", "file/x", "dangling", "loop", long, "r1", "r2", "r3", "r4"]:
        with pytest.raises(RequestError, match=r"^hydra.run.dir: .*(cannot be|in the way of)"):
            claim(before / place, {"seeds": 0}, "hydra.run.dir")
    for place in ["/proc/x", "/dev/null/x", "file", "dangling", "loop", f"{long}/x"]:
        store.store = before / place
        with pytest.raises(RequestError, match=r"^store.dir: .*cannot be made"):
            job._check_store(store, None, None)
    code, out, err = cli(*ONE, f"hydra.run.dir={before}/r1")
    assert (code, out, err.count("\n")) == (2, "", 1) and "images' is in the way of a folder" in err, err
    assert list(here.iterdir()) == [] and len(list(before.rglob("*"))) == 12
    here.rmdir()
    code, out, err = cli(*ONE)
    assert (code, out) == (2, "") and err == "lesion: command line: the folder in which it is run is gone; change it\n"
    here.mkdir()
