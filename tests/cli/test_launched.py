"""Jobs that a launcher starts elsewhere are checked without the devices of the machine on which that is done."""

from __future__ import annotations

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict, read_write

from lesion.cli import _hydra, study
from lesion.config.compose import compose
from lesion.config.schema import conf_dir
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
    checked = study._surveyed(job, alone=False)
    assert checked.request.device == checked.config.device == found
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


LAUNCHERS = {"submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray", "joblib": "joblib"}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_composes_and_says_what_it_needs(name, monkeypatch):
    launcher = compose([f"hydra/launcher={name}"]).hydra.launcher
    monkeypatch.setattr(_hydra, "_installed", lambda package: False)
    with pytest.raises(
        RequestError, match=rf"^hydra/launcher: {name} is not installed; pip install 'lesion\[{LAUNCHERS[name]}\]'"
    ):
        _hydra.check_launcher(launcher, name)
    lines = (conf_dir() / "hydra" / "launcher" / f"{name}.yaml").read_text().splitlines()
    assert {path.stem for path in (conf_dir() / "hydra" / "launcher").iterdir()} == set(LAUNCHERS)
    assert lines[0].startswith("# ")


@pytest.mark.parametrize("name", sorted({*LAUNCHERS} - {"ray"}))  # which is ours
def test_launchers_have_every_knob_of_their_plugins(name):
    """The overlays stand in the place of the plugins' own configs, which need the plugins."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    Plugins.instance()
    nodes = ConfigStore.instance().repo["hydra"]["launcher"]
    theirs = OmegaConf.to_container(nodes[f"{name}.yaml"].node, resolve=False)
    ours = yaml.safe_load((conf_dir() / "hydra" / "launcher" / f"{name}.yaml").read_text())
    assert ours["_target_"] == theirs["_target_"]
    assert set(ours) == set(theirs)


@pytest.mark.parametrize(("number", "seen"), [("null", ""), ("2", "0,1")])
def test_jobs_of_submitit_local_see_so_many_gpus(number, seen, monkeypatch, tmp_path):
    """All jobs the same ones, so that `auto` takes them in turn; by default none, which `auto` then refuses."""
    local = pytest.importorskip("submitit.local.local")
    shown = []

    def start(**given):
        shown.append(given["cuda_devices"])
        raise OSError("enough")

    monkeypatch.setattr(local, "start_controller", start)
    asked = ["hydra/launcher=submitit_local", f"hydra.launcher.gpus_per_node={number}", f"hydra.sweep.dir={tmp_path}"]
    config = compose(asked)
    launcher = instantiate(config.hydra.launcher, submitit_folder=str(tmp_path / "jobs"))
    launcher.setup(hydra_context=None, task_function=None, config=config)
    with pytest.raises(OSError, match="enough"):
        launcher.launch([["seeds=0"], ["seeds=1"]], 0)
    assert shown == [seen]


def test_a_launcher_that_is_not_installed_is_one_line(cli, monkeypatch):
    monkeypatch.setattr(_hydra, "_installed", lambda package: False)
    code, out, err = cli("-m", "hydra/launcher=ray", "seeds=0,1")
    assert (code, out) == (2, "")
    assert err == "lesion: hydra/launcher: ray is not installed; pip install 'lesion[ray]' brings it\n"
    assert list(cli.folder.iterdir()) == []
