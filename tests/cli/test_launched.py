"""Jobs that a launcher starts elsewhere are checked without the devices of the machine on which that is done."""

from __future__ import annotations

import pytest
from omegaconf import open_dict, read_write

from lesion.cli import study
from lesion.config.compose import compose
from lesion.errors import RequestError
from lesion.models import devices


@pytest.fixture
def job(monkeypatch):
    """The config of job 3 of a multirun on a machine without GPUs."""
    monkeypatch.setattr(devices, "cuda_devices", lambda: 0)
    config = compose([])
    with read_write(config), open_dict(config):
        config.hydra.job.num = 3
        config.hydra.launcher = {"_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"}
    return config


@pytest.mark.parametrize(
    ("device", "found"),
    [
        ("cuda", "cuda"),
        ("auto", "auto"),
        ("cuda:5", "cuda:5"),
        ("cuda:${hydra.job.num}", "cuda:3"),
        ("cuda:${hydra:job.num}", "cuda:3"),
    ],
)
def test_the_check_on_a_login_node_asks_for_no_device(job, device, found):
    job.device, job.model.offload = device, "model"
    task, request, _ = study._surveyed(job, alone=False)
    assert request.device == task.device == found
    with read_write(job):
        job.hydra.launcher._target_ = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    with pytest.raises(RequestError, match=r"^device|^model.offload"):  # which makes them here
        study._surveyed(job, alone=False)


def test_its_form_is_checked_there(job):
    job.device = "cuda:${hydra.job.name}"
    with pytest.raises(RequestError, match=r"^device: got 'cuda:lesion'; allowed: auto, cpu, cuda, cuda:N"):
        study._surveyed(job, alone=False)


def test_a_job_takes_its_number_from_hydra(cli):
    code, _, err = cli("-m", "seeds=${hydra.job.num}", "generation.steps=1,2", "selection=none", "hydra.sweep.dir=out")
    assert code == 0, err
    assert [sorted(set(frame.seed)) for frame in cli.frames()] == [[0], [1]]
    assert cli("device='cuda:${hydra.job.num}'")[0] == 2  # alone, a job has none
