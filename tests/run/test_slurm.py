"""A SLURM of one node, started here and stopped at the end: shards preempted, requeued and failed for real.

Needs root and Debian's slurmctld, slurmd, slurm-client and munge; skipped without. Each start writes an own
configuration with own ports, so a SLURM that runs here is left alone.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest

from commands import Command, free_port, until
from lesion.report.merging import put_together, run_folders

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo", "squeue")
CONFIG = """
ClusterName=lesion
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=30
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=30
SchedulerParameters=bf_interval=1,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes={host} State=UP PriorityTier=10
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Runs a command of SLURM's, and returns its standard output."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    if os.getuid() or not all(map(shutil.which, PROGRAMS)):
        pytest.skip("needs root and Debian's slurmctld, slurmd, slurm-client and munge")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    folder = tmp_path_factory.mktemp("slurm")
    for one in (*folder.parents, folder):
        if one.stat().st_uid == 0 and one.is_relative_to(tmp_path_factory.getbasetemp()):
            one.chmod(0o755)  # munged wants a way to its socket
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o400)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, folder=folder, ports=(free_port(), free_port())))
    os.environ["SLURM_CONF"] = str(config)
    files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munged = [f"--{name}={folder}/munge.{end}" for name, end in files.items()]
    commands = (["munged", "--foreground", "--force", *munged], ["slurmctld", "-D"], ["slurmd", "-D", "-N", host])
    started = []

    def run(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        with (folder / "out.log").open("w") as log:
            for command in commands:
                started.append(subprocess.Popen(command, stdout=log, stderr=log))
                time.sleep(1)
        deadline = time.monotonic() + 30
        while subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout.split() != ["idle"]:
            if time.monotonic() > deadline:
                pytest.skip(f"SLURM does not start here: {(folder / 'out.log').read_text()[-500:]}")
            time.sleep(0.5)
        yield run
    finally:
        _cancel_all()
        for one in reversed(started):
            one.terminate()
        for one in started:
            try:
                one.wait(20)
            except subprocess.TimeoutExpired:
                one.kill()
        del os.environ["SLURM_CONF"]


def _cancel_all() -> None:
    """Cancel the jobs and wait until they are gone: without its daemons, SLURM's steps would wait for them forever."""
    subprocess.run(["scancel", "--user=root"], capture_output=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        left = subprocess.run(["squeue", "--noheader"], capture_output=True, text=True)
        if left.returncode or not left.stdout.strip():
            return
        time.sleep(0.5)


SHARDS = [
    *("debug=smoke", "seeds=[0,1,2,3]", "generation.steps=6", "generation.batch_size=1", "scorer.batch_size=1"),
    *("selection=only_one", "experiment=shards", "shard.count=2", "hydra/launcher=submitit_slurm"),
    *("hydra.launcher.gpus_per_node=null", "hydra.launcher.mem_gb=null", "hydra.launcher.cpus_per_task=1"),
    *("hydra.launcher.signal_delay_s=10", "hydra.sweep.dir=parts"),
]


@pytest.fixture
def lesion(tmp_path):
    with Command(tmp_path) as command:
        yield command


IMAGES = 16  # of the study in all


def logs(tmp_path: Path) -> str:
    return "".join(path.read_text() for path in (tmp_path / "parts" / ".submitit").rglob("*_log.*"))


def stored(tmp_path: Path) -> dict[str, int]:
    """When each image was stored, by its name."""
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store" / "cells").rglob("*.png")}


def claims(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "store" / "claims").rglob("*") if path.is_file()]


def jobs(slurm) -> dict[str, dict[str, str]]:
    """What SLURM knows of each job, by its number."""
    found = {}
    for text in slurm("scontrol", "show", "jobs").split("\n\n"):
        facts = dict(re.findall(r"(\w+)=(\S+)", text))
        if facts:
            found[facts["JobId"]] = facts
    return found


def ended(slurm, numbers) -> list[dict[str, str]]:
    """What SLURM knows of jobs once they are over: `lesion` returns with their results, before their processes end."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [job for number, job in jobs(slurm).items() if number in numbers]
        if not {job["JobState"] for job in found} & {"RUNNING", "COMPLETING"}:
            break
        time.sleep(0.5)
    return found


def test_a_preempted_shard_goes_back_in_the_queue_and_goes_on(slurm, lesion, tmp_path):
    """A job of higher priority needs both cores: SLURM signals the shards, and starts them again some time later."""
    run = lesion(*SHARDS)
    until(lambda: len(stored(tmp_path)) >= 2, run, lesion)
    slurm("sbatch", "--partition=urgent", "--ntasks=2", "--output=/dev/null", "--job-name=urgent", "--wrap=sleep 3")
    until(lambda: "Exiting gracefully after preemption/timeout" in logs(tmp_path), run, lesion)
    assert run.wait(400) == 0, lesion.said[-3000:] + logs(tmp_path)[-3000:]
    shards = ended(slurm, [number for number, job in jobs(slurm).items() if job["JobName"] == "lesion"])
    assert [job["JobState"] for job in shards] == ["COMPLETED"] * 2
    assert sum(int(job["Restarts"]) for job in shards) >= 1
    assert "Traceback" not in logs(tmp_path)
    assert (tmp_path / "parts" / "report.html").is_file()
    assert not claims(tmp_path)
    alone = [one for one in SHARDS if not re.match(r"experiment|shard\.|hydra", one)]
    assert lesion(*alone, "hydra.run.dir=whole", "store.dir=other").wait(400) == 0
    both = [put_together(run_folders([tmp_path / name]), tmp_path / name) for name in ("parts", "whole")]
    pd.testing.assert_frame_equal(*(frame.drop(columns="image") for frame, *_ in both), check_exact=True)


def process_of(tmp_path: Path) -> int:
    """Number of the process that does the only job."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_text().split("\0")
            if "submitit.core._submit" in words and words[0] != "srun" and str(tmp_path) in words[-2]:
                return int(path.parent.name)
    raise LookupError("there is no such process")


def test_at_its_time_limit_a_job_ends_cleanly_and_goes_on_from_its_store(slurm, lesion, tmp_path):
    """Its limit is moved to one or two minutes from now, and it is held until SLURM sends the signal, 90 s before a
    limit or up to a minute earlier, and wakes it: so that images are left to make on any machine.
    """
    before = jobs(slurm)
    one = [word for word in SHARDS if not re.match(r"experiment|shard\.|hydra.launcher.signal", word)]
    run = lesion(*one, "-m", "store.dir=store", "hydra.launcher.signal_delay_s=90", "hydra.launcher.timeout_min=9")
    until(lambda: len(stored(tmp_path)) >= 2, run, lesion)
    os.kill(process_of(tmp_path), signal.SIGSTOP)
    kept = stored(tmp_path)
    assert 2 <= len(kept) < IMAGES
    number, job = next((number, job) for number, job in jobs(slurm).items() if number not in before)
    hours, minutes, _ = map(int, job["RunTime"].split(":"))
    slurm("scontrol", "update", f"JobId={number}", f"TimeLimit={60 * hours + minutes + 2}")
    until(lambda: jobs(slurm)[number]["JobState"] == "PENDING", run, lesion)
    assert "this job is timed-out" in logs(tmp_path)
    assert "Exiting gracefully after preemption/timeout" in logs(tmp_path)
    assert "DUE TO TIME LIMIT" not in logs(tmp_path)  # as SLURM says of jobs that it ends itself
    assert not claims(tmp_path)
    assert kept.items() <= stored(tmp_path).items()
    kept = stored(tmp_path)
    assert len(kept) < IMAGES
    slurm("scontrol", "update", f"JobId={number}", "TimeLimit=60")
    assert run.wait(400) == 0, lesion.said[-3000:] + logs(tmp_path)[-3000:]
    (job,) = ended(slurm, [number])
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert "Traceback" not in logs(tmp_path)
    assert len(stored(tmp_path)) == IMAGES
    assert kept.items() <= stored(tmp_path).items()  # none was made again
    frame = pd.read_parquet(next((tmp_path / "parts").rglob("results.parquet")))
    assert list(frame["status"].unique()) == ["ok"]
    assert not claims(tmp_path)


def test_a_failed_shard_shows_as_failed_with_its_reason_in_its_log(slurm, lesion, tmp_path):
    before = jobs(slurm)
    run = lesion(*SHARDS, "device=cuda:99")  # accepted by the check; each job looks at its own machine
    assert run.wait(200) == 2
    assert lesion.said.splitlines()[-1].startswith("lesion: device: 'cuda:99' is not here")
    own = ended(slurm, jobs(slurm).keys() - before.keys())
    assert [job["JobState"] for job in own] == ["FAILED"] * 2
    assert logs(tmp_path).count("lesion: device: 'cuda:99' is not here") == 2


def test_ctrl_c_ends_the_command_and_leaves_the_jobs_at_work(slurm, lesion, tmp_path):
    before = jobs(slurm)
    run = lesion(*SHARDS)
    until(lambda: len(stored(tmp_path)) >= 2, run, lesion)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130
    assert lesion.said.splitlines()[-1].startswith("lesion: interrupted") and "Traceback" not in lesion.said
    assert not (tmp_path / "parts" / "report.html").exists()
    deadline, own = time.monotonic() + 400, jobs(slurm).keys() - before.keys()
    while {jobs(slurm)[number]["JobState"] for number in own} != {"COMPLETED"} and time.monotonic() < deadline:
        time.sleep(0.5)
    assert [job["JobState"] for job in ended(slurm, own)] == ["COMPLETED"] * 2
    assert len(stored(tmp_path)) == IMAGES and not claims(tmp_path)
    assert (tmp_path / "parts" / "report.html").is_file()  # by the job that ended last
