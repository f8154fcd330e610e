"""Disks that are full or read-only, folders that vanish, SIGTERM: what can be done is done, the rest is one line."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import hydra.core.utils
import pandas as pd
import pytest

from lesion import models
from lesion.run import maker as making
from lesion.run import publish
from lesion.store import tables
from lesion.store.scores import Scores
from lesion.tracking import none
from test_resume import flip


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def last(err: str) -> str:
    """The line that the command ends with."""
    line = err.strip().splitlines()[-1]
    assert line.startswith("lesion: ")
    return line


@pytest.fixture
def disk(tmp_path):
    """Mounts a small disk of memory at a place, such as `size=32k` or `nr_inodes=20`: one that really runs full."""
    mounted = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("file systems cannot be mounted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)  # -l: this process keeps its log open


def denied(monkeypatch, folder: Path) -> None:
    """As on a read-only disk, which root cannot write to either."""
    access = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode: (not mode & os.W_OK or not Path(path).is_relative_to(folder)) and access(path, mode),
    )


def test_what_only_saves_work_may_fail(cli, monkeypatch):
    """A file where claims/ should be, scores and means that cannot be kept: every image is made and scored."""
    (cli.folder / "store").mkdir()
    for name in ("claims", "scores", "means"):
        (cli.folder / "store" / name).write_text("in the way")
    code, out, err = cli("selection=only_one", "replacement=mean")
    assert code == 0, err
    assert out.count("images cannot be claimed") == out.count("scores cannot be kept") == 1
    assert "calibration means cannot be kept" in out
    (frame,) = cli.frames()
    assert (frame.status == "ok").all() and frame.clip_similarity.notna().all()

    # the same store, now complete and read-only, opens; with more to make it is refused
    for name in ("claims", "scores", "means"):
        (cli.folder / "store" / name).unlink()
    denied(monkeypatch, cli.folder / "store")
    monkeypatch.setattr(Scores, "flush", full)
    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("loaded a model for nothing"))
    code, out, err = cli("selection=only_one", "replacement=mean")
    assert code == 0, err
    pd.testing.assert_frame_equal(pd.read_parquet(cli.newest() / "results.parquet"), frame, atol=1e-6)
    assert cli("seeds=7", "dry_run=true")[0] == 0
    code, _, err = cli("seeds=7")
    assert code == 2 and err.count("\n") == 1 and "store.dir" in err and "write" in err


@pytest.mark.parametrize("options", ["size=28k", pytest.param("nr_inodes=16", marks=pytest.mark.slow)])
def test_a_store_that_runs_full_costs_the_images_that_do_not_fit(cli, disk, options):
    store = disk(options)
    code, out, err = cli("selection=only_one", f"store.dir={store}", "hydra.run.dir=run")
    assert code == 1 and "Traceback" not in out + err and "No space left on device" in last(err)
    assert out.count("could not be stored") == 1  # and not once an image
    frame = tables.read(cli.folder / "run" / "results.parquet")
    failed = frame[frame.status == "failed"]
    assert 0 < len(failed) < len(frame) and failed.reason.str.contains("No space left on device").all()
    assert len(list((store / "cells").rglob("*.png"))) == len(frame) - len(failed)
    assert not list(store.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=4m,nr_inodes=900", str(store)], check=True)
    made = {path: path.stat().st_mtime_ns for path in (store / "cells").rglob("*.png")}
    assert cli("selection=only_one", f"store.dir={store}", "hydra.run.dir=run")[0] == 0
    assert (tables.read(cli.folder / "run" / "results.parquet").status == "ok").all()
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())


@pytest.mark.parametrize(
    ("options", "shared"),
    [
        ("size=128k", False),
        pytest.param("size=150k", True, marks=pytest.mark.slow),
        pytest.param("nr_inodes=24", False, marks=pytest.mark.slow),
        pytest.param("nr_inodes=32", True, marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_runs_full_has_the_results(cli, disk, options, shared):
    """Images are in the store, on the same disk or another, and in the run folder before the tables are written."""
    full = disk(options)
    store = full / "store" if shared else cli.folder / "store"
    code, out, err = cli(f"store.dir={store}", f"hydra.run.dir={full / 'run'}")
    assert code == 1 and "Traceback" not in out + err and "No space left on device" in last(err)
    frame = tables.read(full / "run" / "results.parquet")
    assert len(frame) == 14
    if shared:
        assert {"ok", "failed"} <= set(frame.status)
    else:
        assert (frame.status == "ok").all() and "not all pictures could be put into" in last(err)


@pytest.mark.parametrize(
    "options",
    ["nr_inodes=4", *(pytest.param(one, marks=pytest.mark.slow) for one in ("nr_inodes=3", "nr_inodes=6", "size=16k"))],
)
def test_a_full_disk_under_the_run_folder_is_a_refusal(cli, disk, monkeypatch, options):
    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("loaded a model for nothing"))
    code, _, err = cli("selection=none", f"hydra.run.dir={disk(options)}/run")
    assert code == 2 and "Traceback" not in err and last(err).startswith("lesion: hydra.run.dir: ")
    assert "cannot be written to: No space left on device" in last(err)


def test_a_tracker_that_fills_the_disk_leaves_room_for_the_results(cli, disk, monkeypatch):
    folder = disk("size=200k") / "run"

    def fill(self, job):
        with suppress(OSError), (job.folder / "log").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    monkeypatch.setattr(none.NoTracker, "start", fill)
    _, out, err = cli("selection=none", f"hydra.run.dir={folder}")
    assert "Traceback" not in out + err
    assert len(tables.read(folder / "results.parquet")) == 2


def test_a_disk_that_is_full_before_a_later_job_is_one_line(cli, monkeypatch):
    save = hydra.core.utils._save_config
    monkeypatch.setattr(
        hydra.core.utils, "_save_config", lambda *args: full() if args[2].parent.name == "1" else save(*args)
    )
    code, _, err = cli("-m", "selection=none", "seeds=0,1")
    assert code == 1 and last(err) == "lesion: hydra.run.dir: cannot be written to: No space left on device"
    assert len(cli.frames()) == 1


def test_the_table_is_written_before_what_may_not_fit(cli, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(publish.os, "link", full)
        patch.setattr(publish.shutil, "copyfile", full)
        code, _, err = cli("selection=none")
    assert code == 1 and "Traceback" not in err and "not all pictures could be put into" in last(err)
    assert "No space left on device" in last(err)
    folder = cli.newest()
    assert (tables.read(folder / "results.parquet").status == "ok").all()
    import lesion.report

    with monkeypatch.context() as patch:
        patch.setattr(lesion.report, "write_report", full)
        code, _, err = cli("selection=none")
        assert code == 1 and "the report could not be written: No space left on device" in last(err)
        assert len(list((cli.newest() / "images").rglob("*.png"))) == 2
        patch.setattr(tables, "write", full)
        code, _, err = cli("selection=none")
        assert code == 1 and "results.parquet could not be written" in last(err)


def test_a_store_whose_folders_are_no_folders_is_refused(cli, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("loaded a model for nothing"))
    (cli.folder / "link").symlink_to("nowhere")
    (cli.folder / "file").write_text("")
    (cli.folder / "store").mkdir()
    (cli.folder / "store" / "cells").write_text("")
    for name in ("link", "file", "file/below", "store"):
        code, _, err = cli(f"store.dir={name}", "selection=none")
        assert code == 2 and err.count("\n") == 1 and "store.dir" in err, err


def test_a_store_that_vanishes_while_it_is_filled_is_filled_again(cli, monkeypatch):
    generate, calls = making.generate, []

    def vanishing(*arguments):
        calls.append(len(calls))
        if len(calls) == 2:
            shutil.rmtree(cli.folder / "store")
        return generate(*arguments)

    monkeypatch.setattr(making, "generate", vanishing)
    code, out, err = cli("selection=leave_one_out", "generation.batch_size=2")
    assert code == 0, err + out
    (frame,) = cli.frames()
    assert (frame.status == "ok").all() and frame.clip_similarity.notna().all()
    assert "Traceback" not in out + err


def test_a_store_that_becomes_a_file_fails_the_images_in_one_line(cli, monkeypatch):
    generate = making.generate

    def replaced(*arguments):
        if (cli.folder / "store").is_dir():
            shutil.rmtree(cli.folder / "store")
            (cli.folder / "store").write_text("in the way")
        return generate(*arguments)

    monkeypatch.setattr(making, "generate", replaced)
    code, out, err = cli("selection=none")
    assert code == 1 and "Traceback" not in out + err
    assert cli.frames()[0].reason.str.contains("Not a directory").all()


def test_every_image_is_compared_on_demand(cli):
    """A byte flips while size and time of the file stay: a finished study reads no image by itself."""
    assert cli("selection=only_one")[0] == 0
    (frame,) = cli.frames()
    keys = [frame.cell[0], frame.cell[len(frame) - 1]]
    paths = [cli.folder / "store" / "cells" / key[:2] / f"{key}.png" for key in keys]
    whole = [path.read_bytes() for path in paths]
    for path in paths:
        flip(path)
    assert "damaged" not in cli("selection=only_one")[1]
    for found in (2, 0):
        code, out, err = cli("selection=only_one", "store.check=true")
        assert code == 0, err
        assert out.count("is damaged and removed") == found
        assert [path.read_bytes() for path in paths] == whole
        pd.testing.assert_frame_equal(pd.read_parquet(cli.newest() / "results.parquet"), frame)


def test_sigterm_gives_claims_back_and_says_so(cli, monkeypatch):
    """In this process, as the cli fixture runs it: the signal comes while a batch is in the making."""
    before, held = signal.getsignal(signal.SIGTERM), []

    def told(*_):
        held.extend((cli.folder / "store" / "claims").rglob("*"))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        pytest.fail("the signal was not seen")

    monkeypatch.setattr(making, "generate", told)
    code, _, err = cli("selection=none")
    assert code == 143
    assert "told to end; finished images are kept" in last(err)
    assert [path for path in held if len(path.name) == 32]
    assert not [path for path in (cli.folder / "store" / "claims").rglob("*") if path.is_file()]
    assert signal.getsignal(signal.SIGTERM) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "lesion-claims"]
