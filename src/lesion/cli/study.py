"""The console script `lesion`: a Hydra application whose refusals are one line and exit code 2.

Exit codes: 0 all fine; 1 some image failed; 2 the request is wrong; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lesion.cli import one_line
from lesion.config.schema import conf_dir, register
from lesion.errors import RequestError, StudyFailed
from lesion.study.prompts import ENDINGS


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="lesion")
def job(config: DictConfig) -> None:
    """One Hydra job: one study of one model."""
    from hydra.core.hydra_config import HydraConfig

    from lesion.config.parsing import parse
    from lesion.run.job import JobContext, run

    details = HydraConfig.get()
    multirun = details.mode is not None and details.mode.name == "MULTIRUN"
    context = JobContext(
        folder=Path(details.runtime.output_dir),
        name=f"{details.job.name}-{details.job.override_dirname or 'defaults'}"[:120],
        group=Path(details.sweep.dir).as_posix() if multirun else None,
        config=_plain(config),
    )
    run(parse(config), context)


def _plain(config: DictConfig) -> dict[str, Any]:
    data = OmegaConf.to_container(config, resolve=True)
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


class CheckFirst(Callback):
    """Checks every job of a run or sweep before Hydra writes a file, so that a wrong request leaves no trace."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _check_or_exit([config])

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _check_or_exit(_jobs(config))


class SweepReport(Callback):
    """Writes one report over all jobs of a multirun into its folder."""

    folder: Path | None = None  # of the multirun whose report is still to be written

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        SweepReport.folder = Path(config.hydra.sweep.dir)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        report_sweep()


def report_sweep() -> None:
    """The report over all jobs, once. If it cannot be written, that is said; results and exit code stay the jobs'.

    Hydra does not call `on_multirun_end` after a job that failed, so `main` comes here too.
    """
    folder, SweepReport.folder = SweepReport.folder, None
    if folder is None or not any(folder.rglob("results.parquet")):  # no multirun, or one with dry_run
        return
    try:
        from lesion.cli.report import report
        from lesion.report.merging import run_folders

        _, written = report(run_folders([folder]), folder, mix=True)
        print(f"\nreport over all jobs: {written[-1]}")
    except Exception as error:  # whatever it is, the jobs are done and their results on disk
        reason = " ".join(str(error).split()) or type(error).__name__
        print(
            f"lesion: the report over all jobs could not be written ({reason}); their results are complete, "
            f"`lesion-report --mix {folder}` tries again",
            file=sys.stderr,
        )


def _jobs(config: DictConfig) -> Iterator[DictConfig]:
    """The config of each job of a sweep of Hydra's basic sweeper; others pick values as they go and check per job."""
    if not str(config.hydra.sweeper.get("_target_", "")).endswith("BasicSweeper"):
        return
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    loader = GlobalHydra.instance().config_loader()
    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create(config_loader=loader).parse_overrides([*given, *config.hydra.overrides.task])
    for batch in BasicSweeper.split_arguments(overrides, None):
        for job_overrides in batch:
            yield loader.load_sweep_config(config, list(job_overrides))


def _check_or_exit(configs: Any) -> None:
    """A callback's exceptions are swallowed by Hydra, its SystemExit is not."""
    from lesion.config.parsing import parse
    from lesion.run.job import survey

    try:
        for config in configs:
            with_hydra_off = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
            survey(parse(with_hydra_off))
    except (RequestError, HydraException, OmegaConfBaseException) as error:
        sys.exit(_refuse(error))


def _refuse(error: Exception) -> int:
    """Print why the request is wrong in one line; 2."""
    print(f"lesion: {one_line(error)}", file=sys.stderr)
    return 2


def _with_prompt_files(arguments: list[str]) -> list[str]:
    """`prompts=my.csv` is short for `prompts=file prompts.path=my.csv`."""
    out = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "prompts" and all(part.strip("'\" ").endswith(ENDINGS) for part in value.split(",")):
            out += ["prompts=file", f"prompts.path={value}"]
        else:
            out.append(argument)
    return out


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed with a traceback
    register(conf_dir())
    sys.argv[1:] = _with_prompt_files(sys.argv[1:])
    try:
        job()
    except StudyFailed as failure:
        report_sweep()
        print(f"lesion: {failure}", file=sys.stderr)
        sys.exit(1)
    except (RequestError, HydraException, OmegaConfBaseException) as error:
        sys.exit(_refuse(error))
    except KeyboardInterrupt:
        print("lesion: interrupted; finished images are kept, run the same command again to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
