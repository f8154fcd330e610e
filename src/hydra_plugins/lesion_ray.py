"""Hydra's launcher for Ray: each job of a multirun is a task of a Ray cluster.

In the place of hydra-ray-launcher 1.2, of which a job that fails is a task that Ray shows as finished, whose jobs write
to the folder in which the cluster was started, and whose boto3 excludes the python-dateutil that pandas brings.
Hydra loads launchers from packages of this name only, at each start: Ray is imported where jobs are launched.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

log = logging.getLogger(__name__)
PATIENCE = 30.0  # seconds in which tasks that are cancelled store what is finished
ANSWER = 5.0  # seconds in which a cluster's address takes a connection; Ray itself tries for minutes


class RayLauncher(Launcher):  # type: ignore[misc]
    """Starts jobs as tasks. ray: `init` and `remote`, arguments of the functions of Ray's of these names."""

    def __init__(self, ray: DictConfig) -> None:
        options: Any = OmegaConf.to_container(ray, resolve=True)
        self.init: dict[str, Any] = options["init"] or {}
        self.remote: dict[str, Any] = options["remote"] or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs, and wait for all. What a job raised is in its return value, after that of the others."""
        import ray

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        folder = Path(str(self.config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        if not ray.is_initialized():
            _check_answers(self.init.get("address"))
            with _refusing("init"):
                ray.init(**self.init)
        with _refusing("remote"):
            task = ray.remote(**self.remote)(_job) if self.remote else ray.remote(_job)
        log.info("%d jobs as tasks of Ray; results go to %s", len(job_overrides), folder)
        state, running = Singleton.get_state(), []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            name = " ".join(filter_overrides(overrides))
            log.info("\t#%d : %s", number, name)
            config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id, config.hydra.job.num = f"job_id_for_{number}", number
            named = task.options(name=f"{config.hydra.job.name} {number}")
            running.append(named.remote(self.context, config, self.task, state, os.getcwd()))
        try:
            return [self._ended(number, one, job) for number, (one, job) in enumerate(zip(running, job_overrides))]
        except BaseException:  # such as Ctrl-C
            for one in running:
                ray.cancel(one)
            ray.wait(running, num_returns=len(running), timeout=PATIENCE)
            raise

    def _ended(self, number: int, task: Any, overrides: Sequence[str]) -> JobReturn:
        """Wait for a task, and return what came of it, also where it failed or its workers died too often."""
        import ray

        from lesion.errors import StudyFailed

        try:
            done: JobReturn = ray.get(task)
            return done
        except ray.exceptions.TaskCancelledError:
            why: Exception = StudyFailed(f"job {number} was cancelled; run the same command again to resume")
        except ray.exceptions.RayTaskError as error:
            why = error.cause
        except ray.exceptions.RayError as error:
            why = StudyFailed(
                f"job {number} has lost its worker too often ({type(error).__name__}); finished images are kept, run "
                "the same command again to resume"
            )
        return JobReturn(overrides=overrides, status=JobStatus.FAILED, _return_value=why)


def _check_answers(address: str | None) -> None:
    """Raise RequestError where nobody takes a connection at the cluster's address, given here or in RAY_ADDRESS."""
    from lesion.errors import RequestError

    where = "hydra.launcher.ray.init.address"
    if address in (None, "auto"):
        where, address = "RAY_ADDRESS", os.environ.get("RAY_ADDRESS")
    found = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address or "")
    if found is None:  # local, or the cluster of this machine; Ray refuses what is neither
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=ANSWER).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        message = f"no Ray cluster answers at {address!r} ({why}); start one, or name its address"
        raise RequestError(where, message) from error


@contextmanager
def _refusing(key: str) -> Iterator[None]:
    """Raises RequestError for what Ray makes of its arguments."""
    from lesion.errors import RequestError

    try:
        yield
    except Exception as error:  # ValueError, TypeError, ConnectionError, RuntimeError and Ray's own
        raise RequestError(f"hydra.launcher.ray.{key}", f"Ray refuses: {error}") from error


def _job(context: HydraContext, config: DictConfig, task: TaskFunction, state: Any, folder: str) -> JobReturn:
    """One task. Raises what the job raised, by which Ray shows the task as failed. folder: of the command."""
    os.chdir(folder)  # a cluster's workers start elsewhere
    setup_globals()
    Singleton.set_state(state)
    HydraConfig.instance().set_config(config)
    done = run_job(
        hydra_context=context,
        task_function=task,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
    if done.status is JobStatus.FAILED:
        raise done._return_value
    return done
