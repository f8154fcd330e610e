"""The console script `lesion`: a Hydra application whose refusals are one line and exit code 2.

Exit codes: 0 all fine; 1 some image failed, or something unforeseen stopped the study; 2 the request is wrong; 130
interrupted (SIGINT); 143 told to end (SIGTERM); 129 its terminal is gone (SIGHUP).
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import signal
import string
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

import lesion
from lesion.cli import _hydra, in_utf8, keep_traceback, say, unforeseen
from lesion.config.compose import one_line, plain, with_hydras, with_own_keys
from lesion.config.overrides import prepared, split
from lesion.config.schema import conf_dir, register
from lesion.errors import RequestError, StudyFailed, visible
from lesion.models.devices import ELSEWHERE, HERE, Place

if TYPE_CHECKING:
    from lesion.config.parsing import Request
    from lesion.models.source import Source
    from lesion.study.grid import Study

# Our files of launchers stand before those of the plugins, which Hydra warns of, also in the processes of jobs.
warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
OF_HYDRA = (ValueError, TypeError, AttributeError, AssertionError)  # what it raises at keys of its own, unchecked


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="lesion")
def job(config: DictConfig) -> None:
    """One Hydra job: one study of one model."""
    from hydra.core.hydra_config import HydraConfig

    details = HydraConfig.get()
    # submitit logs in its handlers of signals: while a line is written, that cannot be, and prints a traceback.
    logging.raiseExceptions = False
    # Hydra keeps what a job raises for the process that launched it, and submitit then ends the job's own as a success.
    failed: list[Exception] = []
    if SUBMITIT in os.environ:
        atexit.register(lambda: _end_as_failed() if failed else None)
    try:
        _job(config, details)
    except Exception as error:
        _ended(details)
        failed.append(error)
        if not _is_multirun(details):
            raise PastHydra(error) from None
        if _launched(details):
            _say(error)  # into the log of the job: the launcher names the first reason only
        raise
    _ended(details)


class PastHydra(BaseException):
    """Takes a job's error to `main`: Hydra, where it sees one, prints all overrides before the reason."""

    def __init__(self, error: Exception):
        self.error = error


SUBMITIT = "SUBMITIT_EXECUTOR"  # environment variable of processes that submitit starts


def _end_as_failed() -> None:
    """End this process with exit code 1, by which SLURM shows its job as failed; to be called last of all."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)


def _say(error: Exception) -> None:
    """Print why a job failed in one line."""
    if isinstance(error, StudyFailed):
        say("lesion", str(error))
    elif isinstance(error, (RequestError, HydraException, OmegaConfBaseException)):
        _refuse(error)
    else:
        unforeseen("lesion", error, 1)


def _job(config: DictConfig, details: Any) -> None:
    from lesion.config.parsing import parse
    from lesion.run import folder
    from lesion.run.job import JobContext, run, survey, sweep

    multirun = _is_multirun(details)
    with_hydras(config, details)
    with_own_keys(config, details.runtime.choices["model"], alone=not multirun)
    context = JobContext(
        folder=Path(details.runtime.output_dir),
        name=f"{details.job.name}-{details.job.override_dirname or 'defaults'}"[:120],
        group=Path(details.sweep.dir).as_posix() if multirun else None,
        config=plain(config),
    )
    launched = multirun and _launched(details)
    checked = _checked.pop() if _checked else None
    if checked is not None and checked.config == config:
        request, surveyed = checked.request, checked.surveyed
    else:
        request = parse(config, Path(details.runtime.cwd), Place(job=details.job.num if launched else None))
        surveyed = survey(request)
    if not request.dry_run:
        folder.claim(context.folder, folder.asked(context.config, surveyed[1]), "hydra.run.dir")
    _started.append(context.folder)
    sweep.job()
    try:
        run(request, context, surveyed)
    except RequestError:  # found only while the model was loaded
        if not multirun:
            folder.emptied(context.folder, f"{details.job.name}.log", _new)
        raise
    if request.dry_run:  # Hydra has written what was asked
        folder.emptied(context.folder, f"{details.job.name}.log", _new)


@dataclass
class Checked:
    """A job's config as it will get it, and what it asks for."""

    config: DictConfig
    request: Request
    surveyed: tuple[Source, Study]


_checked: list[Checked] = []  # the job of this run, as `CheckFirst` found it right, so that it need not do so again
_new: list[Path] = []  # folders that were not there before this run or sweep, the innermost first
_started: list[Path] = []  # folders of the jobs of this process that began: from then on what is there is written


class CheckFirst(Callback):
    """Checks every job of a run or sweep before Hydra writes a file, so that a wrong request leaves no trace; and takes
    the run folder: one that was not there where its name has the time in it, else the one that is asked for.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with _exiting():
            _hydra.check_keys(config.hydra)
            _hydra.check_files(config.hydra)
            _take([config], config, "run")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        from lesion.run import finisher
        from lesion.run.job import sweep

        with _exiting():
            _hydra.check_keys(config.hydra)
            _hydra.check_files(config.hydra)
            _hydra.check_launcher(config.hydra.launcher, str(config.hydra.runtime.choices["hydra/launcher"]))
            if not _basic(config):
                for job in _samples(config):
                    _surveyed(job, alone=False)
            jobs = _take(_jobs(config) if _basic(config) else (), config, "sweep")
            sweep.begin(jobs)
            if jobs and _launched(config.hydra):
                asked = {"overrides": _typed(config), "tracker": plain(config.tracker)}
                finisher.begin(Path(config.hydra.sweep.dir), jobs, asked)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from lesion.run import folder
        from lesion.run.job import sweep

        sweep.end()
        folder.emptied(Path(config.hydra.sweep.dir).absolute(), "multirun.yaml", _new)  # if all its jobs were dry runs


class SweepReport(Callback):
    """Writes one report over all jobs of a multirun into its folder, and tells the tracker."""

    config: DictConfig | None = None  # of the multirun whose report is still to be written

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        SweepReport.config = config

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        report_sweep()


def report_sweep() -> None:
    """The report over all jobs, once. If it cannot be written, that is said; results and exit code stay the jobs'.

    Hydra does not call `on_multirun_end` after a job that failed, so `main` comes here too.
    """
    config, SweepReport.config = SweepReport.config, None
    if config is None:  # no multirun
        return
    from lesion.run import finisher

    folder = Path(config.hydra.sweep.dir)
    if finisher.drawn(folder):
        print(visible(f"\nreport over all jobs: {folder / 'report.html'}", keep="\n"))
    else:
        _draw(folder, _typed(config), plain(config.tracker))


def _draw(folder: Path, overrides: Sequence[str], tracker: Mapping[str, Any]) -> None:
    """Write the report over all jobs of a multirun into its folder, and tell the tracker.

    overrides: of its command line. tracker: `name` and options of conf/tracker.
    """
    if not any(folder.rglob("results.parquet")):  # jobs with dry_run, or refused ones
        return
    try:
        from lesion.cli.report import report
        from lesion.report.merging import run_folders
        from lesion.run.job import track_report

        runs = run_folders([folder])
        known, written = report(runs, folder, mix=True)
        track_report(known.frame, runs, folder, overrides, tracker)
        print(visible(f"\nreport over all jobs: {written[-1]}", keep="\n"))
    except Exception as error:  # whatever it is, the jobs are done and their results on disk
        reason = " ".join(str(error).split()) or type(error).__name__
        say(
            "lesion",
            f"the report over all jobs could not be written ({reason}); their results are complete, "
            f"`lesion-report --mix {folder}` tries again",
        )


def _ended(details: Any) -> None:
    """Note that a job of a launcher has ended; the last one draws the report over all."""
    from lesion.run import finisher

    if not (_is_multirun(details) and _launched(details)):
        return
    folder = Path(details.runtime.cwd, details.sweep.dir)
    if (asked := finisher.ended(folder, details.job.num)) is not None:
        _draw(folder, asked["overrides"], asked["tracker"])


def _is_multirun(details: Any) -> bool:
    return details.mode is not None and details.mode.name == "MULTIRUN"


def _launched(hydra: Any) -> bool:
    """Whether a launcher starts the jobs of a sweep in processes of their own, here or on another machine."""
    return not str(hydra.launcher.get("_target_", "")).endswith("BasicLauncher")


def _basic(config: DictConfig) -> bool:
    """Whether the jobs of a sweep are known before the first: those of Hydra's basic sweeper are."""
    return str(config.hydra.sweeper.get("_target_", "")).endswith("BasicSweeper")


def _samples(config: DictConfig) -> Iterator[DictConfig]:
    """Configs of jobs that a sweeper which picks values as it goes may come to; each job is checked again by itself."""
    loader = GlobalHydra.instance().config_loader()
    for overrides in _hydra.samples(config.hydra.sweeper.get("params"), _typed(config), loader):
        yield loader.load_sweep_config(config, overrides)


def _typed(config: DictConfig) -> list[str]:
    """The overrides of the command line, with what each job resolves for itself."""
    texts: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    return list(texts)


def _jobs(config: DictConfig) -> Iterator[DictConfig]:
    """The config of each job of a sweep of Hydra's basic sweeper."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    loader = GlobalHydra.instance().config_loader()
    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create(config_loader=loader).parse_overrides([*given, *_typed(config)])
    for override in overrides:
        if override.is_sweep_override():
            key, _, value = str(override.input_line).partition("=")
            try:
                if any(True for _ in override.sweep_string_iterator()):
                    continue
            except ValueError as error:  # of a range whose step is 0
                raise RequestError(key, f"{value} names no job: {error}") from None
            raise RequestError(key, f"{value} names no job")
    for batch in BasicSweeper.split_arguments(overrides, None):
        for job_overrides in batch:
            yield loader.load_sweep_config(config, list(job_overrides))


def _surveyed(job: DictConfig, alone: bool) -> Checked:
    """Check one job. Raises RequestError where what it asks for is wrong.

    alone: whether it is the only one.
    """
    from lesion.config.parsing import parse
    from lesion.run.job import survey

    task = OmegaConf.masked_copy(job, [str(key) for key in job if key != "hydra"])
    OmegaConf.set_struct(task, True)
    with_hydras(task, job.hydra)
    with_own_keys(task, job.hydra.runtime.choices.model, alone)
    request = parse(task, place=HERE if alone or not _launched(job.hydra) else ELSEWHERE)
    return Checked(task, request, survey(request))


def _take(jobs: Iterable[DictConfig], config: DictConfig, mode: str) -> int:
    """Check each job, then take the folder that `hydra.run.dir` or `hydra.sweep.dir` names; how many make images."""
    from lesion.run import folder

    key = f"hydra.{mode}.dir"
    place = Path(config.hydra[mode].dir).absolute()
    timed = "${now:" in OmegaConf.to_container(config.hydra[mode], resolve=False)["dir"]  # type: ignore[operator,index,call-overload]
    wanted: dict[Path, dict[str, Any]] = {}
    made = 0
    choices: set[str] = set()
    files: dict[str, str] = {}  # which model's job has the weights of this id
    for number, given in enumerate(jobs):
        if mode == "sweep":
            with read_write(given), open_dict(given):
                given.hydra.job.num, given.hydra.job.id = number, f"job_id_for_{number}"
        checked = _surveyed(given, alone=mode == "run")
        request = checked.request
        own = place / given.hydra.sweep.subdir if mode == "sweep" else place
        nowhere = request.dry_run and timed and mode == "run"  # no other job or study has its folder
        asked = {} if nowhere else folder.asked(plain(checked.config), checked.surveyed[1])
        if wanted.setdefault(own, asked) != asked:
            raise RequestError("hydra.sweep.subdir", f"several jobs would write to {str(own)!r}; give each its own")
        if not timed:
            folder.check(own, asked, key)
        if request.dry_run:
            wanted.pop(own)
        made += not request.dry_run
        if mode == "run":
            _checked[:] = [checked]
        choice = str(given.hydra.runtime.choices.model)
        choices.add(choice)
        if files.setdefault(request.model.id, choice) != choice and any(
            text.lstrip("+").startswith("model.id=") for text in _typed(config)
        ):
            raise RequestError(
                "model.id",
                f"would be the weights of {files[request.model.id]} and of {choice}; models.{choice}.id=… is "
                f"for {choice} alone",
            )
    if mode == "sweep" and _basic(config):
        for name in map(str, config.get("models") or {}):
            if name not in choices:
                raise RequestError(
                    f"models.{name}", f"is for model={name}; the jobs' models: {', '.join(sorted(choices))}"
                )
    _new[:] = [one for one in (place, *place.parents) if not os.path.lexists(one)]
    if not timed:
        for own, asked in wanted.items():
            folder.claim(own, asked, key)
        return made
    try:
        place = folder.fresh(place)
    except OSError as error:
        raise RequestError(key, f"{str(place)!r} cannot be made: {error.strerror}") from None
    _new[:] = [place, *(one for one in _new if one in place.parents)]
    with read_write(config), open_dict(config):
        config.hydra[mode].dir = str(place)
        if mode == "sweep":  # each job's config is composed from these anew
            quoted = str(place).replace("\\", "\\\\").replace("'", "\\'")
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")
    return made


@contextmanager
def _exiting() -> Iterator[None]:
    """A callback's exceptions are swallowed by Hydra, its SystemExit is not."""
    try:
        yield
    except (RequestError, HydraException, OmegaConfBaseException) as error:
        sys.exit(_refuse(error))
    except Exception as error:
        sys.exit(unforeseen("lesion", error, 2))


def _refuse(error: Exception) -> int:
    """Print why the request is wrong in one line; 2."""
    say("lesion", one_line(error))
    return 2


TOLD = {signal.SIGTERM: "told to end", signal.SIGHUP: "told to end, since its terminal is gone"}


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which schedulers end jobs, or SIGHUP: as Ctrl-C, finished images are stored and claims given back."""

    def __init__(self, number: int):
        self.number = signal.Signals(number)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
    raise Terminated(number)


def _of_hydra(error: Exception) -> bool:
    """Whether an error arose in Hydra or in what it called, and in no module of ours that it called."""
    frames = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [place for place, path in enumerate(frames) if path.is_relative_to(Path(lesion.__file__).parent)]
    return any({"hydra", "omegaconf"} & {*path.parts} for path in frames[ours[-1] if ours else 0 :])


def _check_here() -> None:
    try:
        os.getcwd()
    except OSError:
        raise RequestError("command line", "the folder in which it is run is gone; change it") from None


def _help() -> str:
    """What Hydra would print, without the lists of all groups and the whole config that it makes for templates."""
    text = OmegaConf.load(conf_dir() / "lesion.yaml").hydra.help.template
    return string.Template(text).substitute()


def main() -> None:
    in_utf8()
    raising, logging.raiseExceptions = logging.raiseExceptions, False  # of a closed output, with a traceback each time
    before = {number: signal.getsignal(number) for number in TOLD}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _terminate)
    try:
        _main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        logging.raiseExceptions = raising


def _main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed with a traceback
    _started.clear()
    _checked.clear()
    _new.clear()
    register(conf_dir())
    if "--version" in sys.argv[1:]:
        print(f"lesion {lesion.__version__}")
        return
    try:
        _check_here()
        flags, overrides = split(sys.argv[1:])
        if flags and {*flags} <= {"--help", "-h"}:
            print(_help())
            return
        sys.argv[1:] = [*flags, *prepared(overrides)]
        try:
            job()
        except PastHydra as passed:
            raise passed.error from passed.error.__cause__
    except StudyFailed as failure:
        report_sweep()
        say("lesion", f"{failure} ({keep_traceback(failure)})" if failure.__cause__ else str(failure))
        sys.exit(1)
    except (RequestError, HydraException, OmegaConfBaseException) as error:
        sys.exit(_refuse(error))
    except KeyboardInterrupt as stop:
        what, number = "interrupted", signal.SIGINT
        if isinstance(stop, Terminated):
            what, number = TOLD[stop.number], stop.number
        with suppress(OSError):  # of a terminal that is gone
            say("lesion", f"{what}; finished images are kept, run the same command again to resume")
        sys.exit(128 + number)
    except BrokenPipeError:  # who read our output has closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        for one in (error, error.__cause__):
            # Hydra's own files do not fit, or its folder cannot be made.
            if isinstance(one, OSError) and (one.errno in FULL or (not _started and _of_hydra(one))):
                code = _refuse(RequestError("hydra.run.dir", f"cannot be written to: {one.strerror}"))
                sys.exit(1 if _started else code)
        if not _started and isinstance(error, OF_HYDRA) and _of_hydra(error):
            why = str(error) or type(error).__name__
            sys.exit(_refuse(RequestError("command line", f"cannot be read: {why}")))  # such as KEY.x=1 of a list
        sys.exit(unforeseen("lesion", error, 1 if _started else 2))


if __name__ == "__main__":
    main()
