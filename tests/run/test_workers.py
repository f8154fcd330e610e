"""Several processes of one machine make one study: results of one process, each image made once, deaths survived."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from lesion.errors import RequestError
from lesion.models import devices, loading
from lesion.run import environment, job
from lesion.run import workers as processes


@pytest.mark.parametrize(
    ("asked", "workers", "expected"),
    [
        ("all", 1, ("cuda:0", "cuda:1")),
        ("all", 2, ("cuda:0", "cuda:1", "cuda:0", "cuda:1")),
        ("cuda:1", 1, ("cuda:1",)),
        ("cpu", 3, ("cpu", "cpu", "cpu")),
        ("auto", 2, ("cuda", "cuda")),
    ],
)
def test_each_worker_has_its_device(asked, workers, expected, monkeypatch):
    monkeypatch.setattr(devices, "cuda_devices", lambda: 2)
    assert devices.devices(asked, workers) == expected
    monkeypatch.setattr(devices, "cuda_devices", lambda: 0)
    assert devices.devices("all", workers, devices.ELSEWHERE) == ("cuda",) * workers, "the worker's machine has them"
    with pytest.raises(
        RequestError, match=r"^device: all: this machine has no GPU that CUDA finds; allowed: auto, cpu"
    ):
        devices.devices("all", workers)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("workers=0", "workers: must be a whole number from 1 to 64; got 0"),
        ("workers=65", "workers: must be a whole number from 1 to 64; got 65"),
        ("workers=two", "workers: must be a whole number; got 'two'"),
    ],
)
def test_wrong_numbers_of_workers_are_refused(cli, wrong, words):
    code, _, err = cli(wrong)
    assert (code, err.strip()) == (2, f"lesion: {words}")


@pytest.mark.slow  # each worker imports and loads all
@pytest.mark.timeout(300)
def test_workers_make_the_study_of_one_process(cli):
    wanted = ["seeds=[0,1,2]", "generation.batch_size=2"]
    code, _, err = cli(*wanted, "store.dir=alone")
    assert code == 0, err
    alone = pd.read_parquet(cli.newest() / "results.parquet")
    code, _, err = cli(*wanted, "store.dir=together", "device=cpu", "workers=2")
    assert code == 0, err
    pd.testing.assert_frame_equal(pd.read_parquet(cli.newest() / "results.parquet"), alone)
    assert environment.read(cli.newest())["runs"][0]["images"] == len(alone), "each is made once, and all are counted"
    assert not [path for path in Path("together/claims").rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_a_killed_worker_leaves_the_others_make(cli, monkeypatch):
    from multiprocessing import active_children

    def kill_one():
        while not list(Path("store/cells").rglob("*.png")):
            time.sleep(0.02)
        os.kill(active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    code, out, err = cli("seeds=[0,1,2,3]", "generation.batch_size=1", "device=cpu", "workers=2")
    killer.join()
    assert code == 0, err
    assert "died (exit code -9); the others make its part" in out + err
    (frame,) = cli.frames()
    assert (frame.status == "ok").all()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_model_that_no_worker_can_load_is_refused_as_in_one_process(cli, tiny_folder, monkeypatch):
    (weights,) = (tiny_folder / "unet").glob("*.safetensors")
    aside, tracker = weights.with_suffix(".aside"), job.make_tracker

    def late(*arguments):  # after all checks
        weights.rename(aside)
        return tracker(*arguments)

    monkeypatch.setattr(job, "make_tracker", late)
    loader, headers = f"'{tiny_folder}' cannot be loaded: ", f"'{tiny_folder / 'unet'}' has no weights: "
    for workers, refused in ((1, loader), (2, headers)):  # each worker reads the weights' headers first
        loading.forget()
        try:
            code, out, err = cli("device=cpu", f"workers={workers}", "selection=none")
        finally:
            aside.rename(weights)
        assert code == 2 and err.splitlines()[-1].lstrip().startswith(f"lesion: model.id: {refused}"), out + err
        assert "An error occurred while trying to fetch" not in out + err  # a library's, of each process
        assert out.count(" stopped: ") == (workers if workers > 1 else 0)
        assert not cli.frames()


def _unable(connection, share):
    """A worker, in whose process the model breaks down."""

    def loaded(work):
        raise ZeroDivisionError("by the model")

    job.loaded = loaded
    processes._work(connection, share)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_stops_every_worker_stops_the_study(cli, monkeypatch):
    monkeypatch.setattr(processes, "_work", _unable)
    code, out, err = cli("device=cpu", "workers=2", "selection=none")
    assert code == 1 and "stopped by an unforeseen" in err.splitlines()[-1], out + err
    assert all(f"worker {number} on cpu stopped: " in out and "by the model" in out for number in (0, 1))
    assert (cli.frames()[0].status == "failed").all()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("told", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_told_to_end_workers_keep_what_is_finished(cli, told, code):
    wanted = ["seeds=[0,1,2,3]", "generation.batch_size=1", "generation.steps=20", "device=cpu", "workers=2"]
    given = {override.split("=")[0] for override in wanted}
    base = [default for default in cli.defaults if default.split("=")[0] not in given]
    command = [sys.executable, "-m", "lesion.cli.study", *base, *wanted]
    package = str(Path(sys.modules["lesion"].__file__).parents[1])
    with Path("log.txt").open("wb") as log:
        run = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": package}, stdout=log, stderr=log)
    while not list(Path("store").rglob("cells/*/*.png")):
        time.sleep(0.05)
    run.send_signal(told)
    assert run.wait() == code, Path("log.txt").read_text()[-2000:]
    said = Path("log.txt").read_text()
    assert "finished images are kept" in said and "Traceback" not in said and "died" not in said
    assert not [path for path in Path("store/claims").rglob("*") if path.is_file()]
