"""A Ray of this machine, started by the launcher or here: shards run, killed and failed for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from commands import Command, free_port, until
from hydra_plugins import lesion_ray
from lesion.config.compose import compose
from lesion.errors import RequestError, StudyFailed
from lesion.report.merging import put_together, run_folders

ray = pytest.importorskip("ray", reason="needs pip install 'lesion[ray]'")
pytestmark = pytest.mark.timeout(600)
STUDY = [
    *("debug=smoke", "seeds=[0,1,2,3]", "generation.steps=6", "generation.batch_size=1", "scorer.batch_size=1"),
    "selection=only_one",
]
SHARDS = ["experiment=shards", "shard.count=2", "hydra/launcher=ray", "hydra.sweep.dir=parts"]


@pytest.fixture
def lesion(tmp_path):
    with Command(tmp_path) as command:
        command.environment["RAY_DEDUP_LOGS"] = "0"
        yield command


@pytest.fixture
def cluster(lesion, tmp_path_factory):
    """A Ray of two cores that was started in another folder, as one of several machines is."""
    elsewhere, port = tmp_path_factory.mktemp("elsewhere"), free_port()
    lesion.environment |= {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": f"127.0.0.1:{port}"}
    words = [
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        "--num-cpus=2",
        f"--port={port}",
        "--include-dashboard=false",
    ]
    command = [str(Path(sys.executable).with_name("ray")), *words, "--disable-usage-stats"]
    with (elsewhere / "ray.log").open("w") as log:
        head = subprocess.Popen(command, cwd=elsewhere, env=lesion.environment, stdout=log, stderr=log)

    try:
        until(lambda: "--block" in (elsewhere / "ray.log").read_text(), head, lesion)
        yield
    finally:
        head.terminate()
        head.wait(60)


def stored(folder: Path) -> list[Path]:
    return list((folder / "store" / "cells").rglob("*.png"))


def workers() -> dict[str, int]:
    """Number of the process that does each job of a cluster of this machine."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:
            continue
        if words[0].startswith("ray::lesion "):
            found[words[0].removeprefix("ray::")] = int(path.parent.name)
    return found


@pytest.mark.slow  # a Ray of its own; that a job's error is its task's is tested below
def test_a_job_that_fails_is_told_with_its_reason(lesion):
    local = "hydra.launcher.ray.init.address=local"
    run = lesion("-m", "dry_run=true", "device=cpu,cuda:99", "hydra/launcher=ray", local)
    assert run.wait(300) == 2, lesion.said
    assert "to make: " in lesion.said
    assert "\nlesion: device: 'cuda:99' is not here" in lesion.said
    assert "Traceback" not in lesion.said


STATES = """
import ray
from ray._private.state import state
from ray.core.generated.common_pb2 import TaskStatus
ray.init(logging_level="error", log_to_driver=False)
for event in state._get_all_task_events():
    when = event.state_updates.state_ts_ns
    print(event.task_info.name, TaskStatus.Name(max(when, key=when.get)), sep="=")
"""


def states(lesion) -> dict[str, str]:
    """Of each job, what `ray list tasks` shows, which needs a dashboard: from where it is read from."""
    done = subprocess.run([sys.executable, "-c", STATES], env=lesion.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split("=") for line in done.stdout.splitlines() if line.startswith("lesion "))


@pytest.mark.slow
def test_a_failed_shard_is_a_failed_task_and_its_reason_is_in_the_merged_results(cluster, lesion, tmp_path, disk):
    """The disk of the second shard's store is full soon after the start."""
    stores = tmp_path / "stores"
    stores.mkdir()
    (stores / "1").symlink_to(disk("nr_inodes=24"))
    run = lesion(*SHARDS, *STUDY, "store.dir=stores/${shard.index}")
    assert run.wait(300) == 1, lesion.said
    assert states(lesion) == {"lesion 0": "FINISHED", "lesion 1": "FAILED"}
    frame, *_ = put_together(run_folders([tmp_path / "parts"]), tmp_path / "parts")
    failed = frame[frame["status"] == "failed"]
    assert len(frame) == 16 and 0 < len(failed) < 8
    assert failed["reason"].str.contains("No space left on device").all()
    (said,) = [line for line in lesion.said.splitlines() if line.startswith("lesion: ")]  # Ray marks those of tasks
    assert said.startswith(f"lesion: {len(failed)} of 8 images failed") and "No space left on device" in said
    assert (tmp_path / "parts" / "report.html").is_file()
    assert "Traceback" not in lesion.said


@pytest.mark.slow
def test_ctrl_c_cancels_the_tasks_which_keep_what_is_finished(cluster, lesion, tmp_path):
    steps = [*STUDY, "generation.steps=200"]
    run = lesion(*SHARDS, *[word for word in steps if word != "generation.steps=6"])
    until(lambda: len(stored(tmp_path)) >= 2 and len(workers()) == 2, run, lesion)
    run.send_signal(signal.SIGINT)
    assert run.wait(lesion_ray.PATIENCE + 60) == 130
    said = [line for line in lesion.said.splitlines() if line.startswith("lesion: ")]
    assert said == ["lesion: interrupted; finished images are kept, run the same command again to resume"]
    assert "Traceback" not in lesion.said
    assert not workers()
    assert 2 <= len(stored(tmp_path)) < 16
    assert not [path for path in (tmp_path / "store" / "claims").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_killed_worker_s_shard_is_done_by_another(cluster, lesion, tmp_path):
    run = lesion(*SHARDS, *STUDY)
    until(lambda: len(stored(tmp_path)) >= 2 and len(workers()) == 2, run, lesion)
    before = workers()
    os.kill(before["lesion 1"], signal.SIGKILL)
    until(lambda: workers().get("lesion 1", before["lesion 1"]) != before["lesion 1"], run, lesion)
    assert run.wait(300) == 0, lesion.said
    assert (tmp_path / "parts" / "report.html").is_file()
    assert not [path for path in (tmp_path / "store" / "claims").rglob("*") if path.is_file()]
    assert lesion(*STUDY, "hydra.run.dir=whole", "store.dir=other").wait(400) == 0, lesion.said
    both = [put_together(run_folders([tmp_path / name]), tmp_path / name) for name in ("parts", "whole")]
    pd.testing.assert_frame_equal(*(frame.drop(columns="image") for frame, *_ in both), check_exact=True)
    for table in (tmp_path / "whole" / "tables").iterdir():
        assert table.read_bytes() == (tmp_path / "parts" / "tables" / table.name).read_bytes(), table.name


def test_what_a_job_raises_its_task_raises(monkeypatch):
    """By which Ray shows the task as failed; Hydra keeps it in what the job returns."""
    done = JobReturn(status=JobStatus.FAILED, _return_value=StudyFailed("3 of 4 images failed"))
    config = compose([])
    monkeypatch.setattr(Singleton, "set_state", lambda state: None)  # which makes Hydra run the module anew
    monkeypatch.setattr(lesion_ray, "run_job", lambda **given: done)
    with pytest.raises(StudyFailed, match="3 of 4"):
        lesion_ray._job(None, config, None, None, os.getcwd())


@pytest.mark.parametrize("where", ["hydra.launcher.ray.init.address", "RAY_ADDRESS"])
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_at_which_no_cluster_answers_is_refused_at_once(monkeypatch, where, scheme):
    address = f"{scheme}127.0.0.1:{free_port()}"
    named = address if "init" in where else None
    monkeypatch.setenv("RAY_ADDRESS", address if named is None else "127.0.0.1:1")  # what the config says comes first
    launcher = lesion_ray.RayLauncher(OmegaConf.create({"init": {"address": named}, "remote": {}}))
    launcher.setup(hydra_context=None, task_function=None, config=compose(["hydra.sweep.dir=/tmp"]))
    began = time.monotonic()
    with pytest.raises(RequestError, match=rf"^{where}: no Ray cluster answers at '{address}' \(Connection refused\)"):
        launcher.launch([["seeds=0"]], 0)
    assert time.monotonic() - began < lesion_ray.ANSWER + 5


def test_what_ray_refuses_is_a_refusal():
    launcher = lesion_ray.RayLauncher(OmegaConf.create({"init": {"colour": "red"}, "remote": {}}))
    launcher.setup(hydra_context=None, task_function=None, config=compose(["hydra.sweep.dir=/tmp"]))
    with pytest.raises(RequestError, match=r"^hydra.launcher.ray.init: Ray refuses: .*colour"):
        launcher.launch([["seeds=0"]], 0)
