"""Disks that are full or read-only, folders that vanish, SIGTERM: what can be done is done, the rest is one line."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
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
from lesion.run.folder import FILES
from lesion.store import tables
from lesion.store.claims import machine
from lesion.store.images import Store
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


@pytest.mark.parametrize("options", ["size=28k", pytest.param("nr_inodes=24", marks=pytest.mark.slow)])
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
        # The tables' room, 11 files and folders of run and store, and one or two for each of 14 claims come first; each
        # image then needs two.
        pytest.param(f"nr_inodes={len(FILES) + 46}", True, marks=pytest.mark.slow),
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
    asked = ("selection=only_one", "generation.batch_size=1")  # rounds alike when it is made again
    assert cli(*asked)[0] == 0
    (frame,) = cli.frames()
    keys = [frame.cell[0], frame.cell[len(frame) - 1]]
    paths = [cli.folder / "store" / "cells" / key[:2] / f"{key}.png" for key in keys]
    whole = [path.read_bytes() for path in paths]
    for path in paths:
        flip(path)
    assert "damaged" not in cli(*asked)[1]
    for found in (2, 0):
        code, out, err = cli(*asked, "store.check=true")
        assert code == 0, err
        assert out.count("is damaged and removed") == found
        assert [path.read_bytes() for path in paths] == whole
        pd.testing.assert_frame_equal(pd.read_parquet(cli.newest() / "results.parquet"), frame)


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGTERM, "told to end"), (signal.SIGHUP, "its terminal is gone"), (signal.SIGINT, "interrupted")],
)
def test_a_signal_gives_claims_back_and_says_so(cli, monkeypatch, request, number, said):
    """In this process, as the cli fixture runs it: the signal comes while a batch is in the making."""
    outside, held = signal.getsignal(number), []
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    request.addfinalizer(lambda: signal.signal(number, outside))
    signal.signal(number, before)  # these tests may run where it is ignored, as under nohup

    def told(*_):
        held.extend((cli.folder / "store" / "claims").rglob("*"))
        os.kill(os.getpid(), number)
        time.sleep(5)
        pytest.fail("the signal was not seen")

    monkeypatch.setattr(making, "generate", told)
    code, _, err = cli("selection=none")
    assert code == 128 + number
    assert said in last(err) and "; finished images are kept" in last(err)
    assert [path for path in held if len(path.name) == 32]
    assert not [path for path in (cli.folder / "store" / "claims").rglob("*") if path.is_file()]
    assert signal.getsignal(number) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "lesion-claims"]


@pytest.fixture
def undisturbed(cli):
    """The results of `selection=only_one` on a store of its own, where nothing happens."""
    assert cli("selection=only_one", "store.dir=undisturbed", "hydra.run.dir=undisturbed-run")[0] == 0
    return tables.read(cli.folder / "undisturbed-run" / "results.parquet")


@pytest.mark.slow
def test_a_store_that_becomes_read_only_costs_what_is_not_stored_yet(cli, disk, monkeypatch, undisturbed):
    store, generate, calls = disk("size=4m"), making.generate, []

    def switched(*arguments):
        calls.append(len(calls))
        if len(calls) == 2:
            subprocess.run(["mount", "-o", "remount,ro", str(store)], check=True)
        return generate(*arguments)

    asked = ["selection=only_one", f"store.dir={store}", "hydra.run.dir=run", "generation.batch_size=2"]
    with monkeypatch.context() as patch:
        patch.setattr(making, "generate", switched)
        code, out, err = cli(*asked)
    assert code == 1 and "Traceback" not in out + err and "Read-only file system" in last(err)
    frame = tables.read(cli.folder / "run" / "results.parquet")
    assert frame.status.tolist().count("failed") == len(frame) - len(list((store / "cells").rglob("*.png"))) > 0
    code, _, err = cli(*asked)  # more to make in a store that cannot be written to
    assert code == 2 and "store.dir" in last(err)
    subprocess.run(["mount", "-o", "remount,rw", str(store)], check=True)
    shutil.rmtree(store / "claims")  # that could not be given back; in this test their process lives on
    assert cli(*asked)[0] == 0
    pd.testing.assert_frame_equal(tables.read(cli.folder / "run" / "results.parquet"), undisturbed, atol=1e-6)


def test_a_file_system_without_links_and_locks_serves_too(cli, monkeypatch, undisturbed):
    """A dead process's claim is in the way, which is taken over under a lock where there are locks."""

    def lacking(*_, **__):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    key = undisturbed.cell[1]
    claim = cli.folder / "store" / "claims" / key[:2] / key
    claim.parent.mkdir(parents=True)
    claim.write_text(f'{{"machine": "{machine()}", "pid": {os.getpid()}, "start": "1", "token": "t"}}')
    monkeypatch.setattr(os, "link", lacking)
    monkeypatch.setattr(fcntl, "flock", lacking)
    code, out, err = cli("selection=only_one")
    assert code == 0 and "Traceback" not in out + err, err
    pd.testing.assert_frame_equal(cli.frames()[0], undisturbed)
    folder = cli.newest()
    assert all((folder / image).is_file() for image in undisturbed.image)
    assert not [path for path in (cli.folder / "store").rglob("*") if path.is_file() and "claims" in path.parts]


@pytest.mark.slow
def test_clocks_two_hours_off_lose_nothing(cli, monkeypatch, undisturbed):
    """The first process is two hours ahead of the file system, the second two hours behind it."""
    now, now_ns, made, store = time.time, time.time_ns, [], Store(cli.folder / "store")
    generate = making.generate
    monkeypatch.setattr(making, "generate", lambda *given: made.append(len(given[1])) or generate(*given))
    for hours, lost in ((2, None), (-2, 3), (0, 4), (-2, None)):
        if lost is not None:  # one image is damaged, and one removed, before the next process looks
            keys = undisturbed.cell[lost], undisturbed.cell[lost + 2]
            flip(store.path(keys[0]))
            store.path(keys[1]).unlink()
        monkeypatch.setattr(time, "time", lambda hours=hours: now() + 3600 * hours)
        monkeypatch.setattr(time, "time_ns", lambda hours=hours: now_ns() + 3600 * 10**9 * hours)
        made.clear()
        code, _, err = cli("selection=only_one", "hydra.run.dir=run", "store.check=true")
        assert code == 0, err
        assert sum(made) == (len(undisturbed) if hours == 2 else 2 if lost else 0)
        found = tables.read(cli.folder / "run" / "results.parquet")
        pd.testing.assert_frame_equal(found, undisturbed, atol=1e-6)


def test_a_damaged_run_folder_is_written_anew(cli, undisturbed):
    """What it held of tables and records is torn; the same command goes on from the store."""
    assert cli("selection=only_one", "hydra.run.dir=run")[0] == 0
    run = cli.folder / "run"
    for name in ("results.parquet", "floor.parquet", "SHA256SUMS", "environment.json", ".hydra/request.json"):
        (run / name).write_bytes((run / name).read_bytes()[:-9])
    code, out, err = cli("selection=only_one", "hydra.run.dir=run")
    assert code == 0 and "Traceback" not in out + err, err
    pd.testing.assert_frame_equal(tables.read(run / "results.parquet"), undisturbed)


@pytest.mark.slow
def test_a_closed_standard_output_is_the_end_without_a_word(cli):
    """As of `lesion | head`, whose reader goes away: at once, and in a study with all that it logs."""
    package = str(Path(models.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    for more in (["dry_run=true"], ["selection=none"]):
        command = [sys.executable, "-m", "lesion", *cli.defaults, *more]
        run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        run.stdout.close()
        said = run.stderr.read()
        assert run.wait() == 141 and "Traceback" not in said and "BrokenPipe" not in said, said
