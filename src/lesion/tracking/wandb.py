"""Weights & Biases: one run a job, grouped by multirun, and one for the report over them. Written against wandb 0.31.

Without an account or a network the run is logged offline by itself, and `wandb sync` uploads it later. Everything
wandb writes for a run stays in `FOLDER/wandb`; nothing is printed but one line that says where the log is.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

import lesion
from lesion.study.columns import GENERATION
from lesion.tracking import JobInfo, Tracker
from lesion.tracking._page import with_pictures
from lesion.tracking._plain import plain, text

if TYPE_CHECKING:
    import pandas as pd
    import wandb

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

MODES = ("auto", "online", "offline", "disabled")
PICTURES_PER_KEY = 108  # wandb.Image.MAX_ITEMS: further pictures of one key are dropped by W&B
TABLE_ROWS = 200_000  # wandb.Table.MAX_ARTIFACT_ROWS
ARTIFACT = "lesion-results"
RESULTS = "results.parquet"
RUN_ID = "id.txt"  # file that names the run of a folder
NAME_LIMIT = 128  # characters of a run's name, group and job type
TAG_LIMIT = 64

_no_server: list[str] = []  # why an online start failed in this process: further jobs don't wait for it again


@dataclass(frozen=True)
class Options:
    """The keys of conf/tracker/wandb.yaml, explained there."""

    mode: str = "auto"
    project: str = "lesion"
    entity: str | None = None
    tags: tuple[str, ...] = ()
    notes: str | None = None
    max_table_images: int = 1000
    progress_every: float = 5.0  # seconds
    init_timeout: float = 10.0  # seconds
    finish_timeout: float = 300.0  # seconds
    service_timeout: float = 60.0  # seconds
    system_metrics: bool = True


class ServiceSilent(Exception):
    """W&B's own process, wandb-core, does not answer: it may be stopped, dead, or wait for a disk."""


class WandbTracker:
    """One W&B run. A failure in any method closes the run before it is passed on.

    Whatever waits for wandb-core has a deadline; when it has passed, that process is ended and what the run has logged
    until then stays on disk.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.run: wandb.Run | None = None
        self.folder = Path()
        self.last_progress = float("-inf")
        self._shown: set[Path] = set()  # pictures that were logged while the study ran
        self._unfinished: TextIO | None = None  # holds the run's id until the study has finished; locked

    def start(self, job: JobInfo) -> None:
        """Open the run: online if that is asked for and works, otherwise offline."""
        self.folder = job.folder.absolute()
        # Read once, when wandb starts its helper process: it would report errors home, and log into the home folder
        # or, where that cannot be written, on the terminal.
        cache = os.environ.get("WANDB_CACHE_DIR") or str(self.folder / "wandb" / "cache")
        with _environment(WANDB_ERROR_REPORTING="false", WANDB_CACHE_DIR=cache):
            mode, why = _choose_mode(self.options.mode)
            if mode != "disabled":
                self._start(job, mode, why)

    def _start(self, job: JobInfo, mode: str, why: str) -> None:
        if mode == "online" and _no_server:
            why = _no_server[0]
        elif mode == "online":
            try:
                self.run = self._within(lambda: self._open(job, "online"), self.options.init_timeout)
                log.info("W&B: logging online to %s", self.run.url)
                return
            except ServiceSilent:
                raise
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                why = f"could not start online ({reason})"
                _no_server.append(why)
        self.run = self._within(lambda: self._open(job, "offline"))
        where = self.run.settings.sync_dir
        log.info("W&B: %s, logging offline to %s; upload later with `wandb sync %s`", why, where, shlex.quote(where))

    def progress(self, done: int, total: int, images_per_second: float) -> None:
        """Log a point of the history, at most every `progress_every` seconds and always the last one."""
        now = time.monotonic()
        if self.run is None or (done < total and now - self.last_progress < self.options.progress_every):
            return
        self.last_progress = now
        with self._closing_on_error() as run:
            point = {"images_done": done, "images_left": total - done, "images_per_second": float(images_per_second)}
            self._within(lambda: run.log({**point, **self._newest()}))

    def _newest(self) -> dict[str, object]:
        """A picture of the run folder that was not logged yet, the newest; none where there is none."""
        found = [path for path in (self.folder / "images").glob("*/*.png") if path not in self._shown]
        newest = max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
        picture = _picture(newest, caption=text(f"{newest.parent.name}: {newest.stem}")) if newest else None
        if newest is None or picture is None:
            return {}
        self._shown.update(found)
        return {"made": picture}

    def finish(self, frame: pd.DataFrame, run_dir: Path, summary: Callable[[], Mapping[str, float]]) -> None:
        """Log the summary, all pictures, the report and its tables, a bar chart, the results table and an artifact."""
        if self.run is None:
            return
        import wandb

        with self._closing_on_error() as run, _environment(WANDB_DATA_DIR=str(self.folder / "wandb" / "data")):
            # WANDB_DATA_DIR is where wandb stages the files of artifacts and the pictures of tables.
            # A dot in a key of the summary is a level to W&B, and layers have dots.
            values = summary()
            totals = {text(key).replace(".", "_"): float(value) for key, value in values.items()}
            self._within(lambda: run.summary.update(totals))
            if pictures := _picture_lists(run_dir / "grids", "grids") | _named_pictures(run_dir / "figures", "figures"):
                self._within(lambda: run.log(pictures))
            if tables := _report_tables(run_dir / "tables"):
                self._within(lambda: run.log(tables))
            table = _results_table(frame, run_dir, self.options.max_table_images)
            self._within(lambda: run.log({"results": table}))
            if bars := _bars(values):
                self._within(lambda: run.log(bars))
            page = self._page(run_dir / "report.html")
            if page.is_file():
                report = wandb.Html(str(page), inject=False)
                self._within(lambda: run.log({"report": report}))
            artifact = wandb.Artifact(ARTIFACT, type="results")  # one name: every study is a version of it
            for path in _files(run_dir):
                name = path.relative_to(run_dir).as_posix()
                artifact.add_file(str(page if name == "report.html" else path), name=name)
            if (run_dir / "tables").is_dir():
                artifact.add_dir(str(run_dir / "tables"), name="tables")
            self._within(lambda: run.log_artifact(artifact))

    def _page(self, page: Path) -> Path:
        """A copy of the report's page that shows its pictures without its folder; the page itself if none can be."""
        alone = self.folder / "wandb" / page.name
        try:
            alone.write_text(with_pictures(page), encoding="utf-8", errors="replace", newline="\n")
        except (OSError, ValueError) as error:
            log.debug("W&B: the page is logged without its pictures: %s", error)
            return page
        return alone

    def close(self, exit_code: int) -> None:
        """End the run; online, wait at most `finish_timeout` seconds for the upload."""
        run, self.run = self.run, None
        self._forget(finished=exit_code == 0)
        if run is not None:
            extra: float | None = 0.0
            if not run.offline:
                extra = self.options.finish_timeout or None
                self._within(run.status)  # an answer before the long wait for uploads
            self._within(lambda: run.finish(exit_code=exit_code), extra)

    def _within(self, action: Callable[[], Answer], extra: float | None = 0.0) -> Answer:
        """What `action` returns or raises, if it does within `service_timeout` seconds and `extra` ones.

        extra: seconds that W&B itself may wait for the network; None: as long as it takes. Raises ServiceSilent after
        that, and ends wandb-core.
        """
        most = self.options.service_timeout
        answer: Future[Answer] = Future()

        def work() -> None:
            try:
                answer.set_result(action())
            except BaseException as error:
                answer.set_exception(error)

        # A thread of its own for each call: nobody waits for it at the end of the process, as for an executor's.
        threading.Thread(target=work, name="lesion-wandb", daemon=True).start()
        try:
            return answer.result(None if extra is None or not most else most + extra)
        except TimeoutError:
            if answer.done():  # one of wandb's own
                raise
            self.run = None
            _end_service()
            raise ServiceSilent(
                f"wandb-core has not answered for {most + (extra or 0):g} s (tracker.service_timeout); what it had "
                f"logged is in {self.folder / 'wandb'}"
            ) from None
        except Exception as error:
            if not _service_died():
                raise
            self.run = None
            _end_service()  # or it would be looked for at exit, with a traceback
            raise ServiceSilent(
                f"wandb-core has died ({error}); what it had logged is in {self.folder / 'wandb'}"
            ) from None

    @contextmanager
    def _closing_on_error(self) -> Iterator[wandb.Run]:
        assert self.run is not None
        try:
            yield self.run
        except ServiceSilent:
            raise
        except Exception:
            try:
                self.close(1)
            except Exception:
                log.debug("closing the run after a failure", exc_info=True)
            raise

    def _run_id(self, unfinished: Path | None) -> tuple[str, bool]:
        """The id of the job's run, and whether there is one with it already: a resumed study resumes its run.

        The run folder keeps it, and until the study has finished so does `unfinished`, as the same command takes a
        new folder when it resumes. No two processes have it at once.
        """
        known = self.folder / "wandb" / RUN_ID
        with suppress(OSError, AttributeError):  # a disk without locks: it is a run of its own
            self._unfinished = _locked(unfinished)
        kept = self._unfinished.read(64) if self._unfinished else ""
        with suppress(OSError, UnicodeError):
            kept = known.read_text(encoding="ascii") or kept
        found = kept.strip() if re.fullmatch("[0-9a-f]{8}", kept.strip()) else secrets.token_hex(4)
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(found, encoding="ascii")
        if self._unfinished:
            self._unfinished.truncate(0)
            self._unfinished.write(found)
            self._unfinished.flush()
        return found, found == kept.strip()

    def _forget(self, finished: bool) -> None:
        """Give the file of the unfinished study back, empty if it has finished."""
        file, self._unfinished = self._unfinished, None
        if file is not None:
            with suppress(OSError), file:
                if finished:
                    file.truncate(0)
                    os.unlink(file.name)

    def _open(self, job: JobInfo, mode: str) -> wandb.Run:
        """A new run in `mode` (online or offline). Raises what wandb raises; a failed attempt leaves no folder."""
        import wandb

        _silent_settings()
        # An agent of a W&B sweep says which run it is.
        run_id, resumed = self._run_id(job.unfinished) if not os.environ.get("WANDB_SWEEP_ID") else (None, False)
        try:
            return wandb.init(
                id=run_id,
                resume="allow" if resumed else None,
                notes=text(self.options.notes) if self.options.notes else None,
                name=text(job.name, NAME_LIMIT) or None,
                group=text(job.group, NAME_LIMIT) if job.group else None,
                job_type=text(job.job_type, NAME_LIMIT),
                project=self.options.project,
                entity=self.options.entity,
                tags=list(self.options.tags),
                config={text(key): plain(value) for key, value in {**job.config, **_scalars(job.config)}.items()},
                dir=str(self.folder),
                mode="online" if mode == "online" else "offline",
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    reinit="create_new",  # never another job's run, even if that one was not closed
                    disable_code=True,
                    init_timeout=self.options.init_timeout,
                    finish_timeout=self.options.finish_timeout,
                    x_disable_stats=not self.options.system_metrics,
                ),
            )
        except Exception:
            self._forget(finished=True)  # W&B takes an id that it could not open for in use
            (self.folder / "wandb" / RUN_ID).unlink(missing_ok=True)
            for left_over in (self.folder / "wandb").glob(f"*run-*-{run_id}"):
                shutil.rmtree(left_over, ignore_errors=True)
            raise


def _locked(path: Path | None) -> TextIO | None:
    """The file, made if need be, open and locked until it is closed. Raises OSError where another process has it."""
    if path is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="ascii", errors="replace")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    file.seek(0)
    return file


def _service_died() -> bool:
    """Whether this process has started wandb-core, and it has ended."""
    from wandb.sdk import wandb_setup

    try:  # internals, as in `_end_service`; the kernel may tell of the lost connection before the dead process
        process = wandb_setup._singleton._connection._proc._process
        process.wait(1)
    except (AttributeError, subprocess.TimeoutExpired):
        return False
    return True


def _end_service() -> None:
    """Kill wandb-core, which does not answer, so that nothing waits for it, least of all the end of this process.

    The next run in this process starts another one.
    """
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib.service import service_token

    with suppress(AttributeError):  # internals of wandb 0.31; in other versions the process may be elsewhere
        connection = wandb_setup._singleton._connection
        wandb_setup._singleton = None
        if connection is not None and connection._proc is not None:
            service_token.clear_service_in_env()
            connection._torn_down = True
            connection._cleanup()  # of what is done at exit
            connection._proc._process.kill()


def build(options: dict[str, object]) -> Tracker:
    """A W&B tracker. Raises ValueError for an unknown option or a wrong value, naming what is allowed."""
    allowed = [field.name for field in fields(Options)]
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"tracker.{unknown[0]}: unknown option of tracker=wandb, choose from {', '.join(allowed)}")
    values = {key: value for key, value in options.items() if value is not None}
    if values.get("mode", "auto") not in MODES:
        raise ValueError(f"tracker.mode={values['mode']}: choose one of {', '.join(MODES)}")
    for key in ("max_table_images", "progress_every", "init_timeout", "finish_timeout", "service_timeout"):
        value = values.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ValueError(f"tracker.{key}={value}: a number of at least 0")
    project = str(values.get("project", "lesion"))
    if not 0 < len(project) <= NAME_LIMIT or set(project) & set("/\\#?%:"):
        raise ValueError(f"tracker.project={project}: 1 to {NAME_LIMIT} characters, none of / \\ # ? % :")
    tags = values.get("tags", ())
    if not isinstance(tags, (list, tuple)):
        raise ValueError(f"tracker.tags={tags}: a list of words")
    values["tags"] = tuple(text(tag, TAG_LIMIT) for tag in tags if str(tag))
    if not isinstance(values.get("notes", ""), str):
        raise ValueError(f"tracker.notes={values['notes']}: a text, or null")
    return WandbTracker(Options(**values))  # type: ignore[arg-type]  # checked above, and by the config schema


def _choose_mode(asked: str) -> tuple[str, str]:
    """(online | offline | disabled, why) for the mode asked for; `auto` follows WANDB_MODE if that is set."""
    from_environment = os.environ.get("WANDB_MODE", "").lower()
    if asked != "auto":
        mode, why = asked, f"tracker.mode={asked}"
    elif from_environment:
        mode = {"run": "online", "shared": "online"}.get(from_environment, from_environment)
        mode, why = mode if mode in MODES[1:] else "offline", f"WANDB_MODE={from_environment}"
    else:
        mode, why = "online", ""
    # Without an account W&B would ask for one on the terminal.
    return ("offline", lacking) if mode == "online" and (lacking := _account_lacking()) else (mode, why)


def _account_lacking() -> str:
    """What is wrong with the credentials for the W&B host (environment, netrc, settings); "" if they are well formed.

    Makes no network call.
    """
    import wandb
    from wandb.sdk.lib import wbauth

    settings = _silent_settings()
    try:
        found = wbauth.authenticate_session(
            host=settings.base_url, source="lesion", prompt=False, update_session=False, verify=False
        )
    except wandb.Error as error:
        return f"the account's key is malformed ({' '.join(str(error).split())[:200].rstrip('.')})"
    return "" if found is not None else "no account found"


def _silent_settings() -> wandb.Settings:
    """W&B's process-wide settings, silenced: the login speaks before a run has settings of its own."""
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    wandb.termsetup(settings, None)  # setup applies it on its first call only
    return settings


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Sets environment variables for a while; there is no Settings equivalent for the ones used here."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _scalars(config: Mapping[str, object]) -> dict[str, object]:
    """What runs are grouped and filtered by, as single texts: groups of the config are mappings, which W&B cannot."""
    found: dict[str, object] = {"lesion_version": lesion.__version__}
    for key in ("selection", "replacement"):
        if isinstance(names := config.get(key), Mapping):
            found[f"{key}_name"] = "+".join(map(str, names))
    for key in ("model", "prompts", "scorer"):
        if isinstance(group := config.get(key), Mapping) and "name" in group:
            found[f"{key}_name"] = group["name"]
    return found


def _files(run_dir: Path) -> list[Path]:
    """The results of a run folder, or of every run below the folder of a multirun, and the report."""
    runs = [run_dir]
    if not (run_dir / RESULTS).is_file():
        below = sorted(path.parent for path in run_dir.rglob(RESULTS))
        runs = [path for path in below if "wandb" not in path.relative_to(run_dir).parts] or [run_dir]
    beside = [run / name for run in runs for name in ("floor.parquet", "maps.parquet")]
    return [run / RESULTS for run in runs] + [path for path in (*beside, run_dir / "report.html") if path.is_file()]


def _bars(summary: Mapping[str, float]) -> dict[str, object]:
    """A bar chart of the layers for each measure and setting of the summary (keys MEASURE/SETTING/LAYER)."""
    import wandb

    charts: dict[str, list[list[object]]] = {}
    for key, value in summary.items():
        name, _, layer = key.rpartition("/")
        if name.count("/") == 1:
            charts.setdefault(name, []).append([text(layer), float(value)])
    return {
        f"layers/{text(name).replace('/', '_')}": wandb.plot.bar(
            wandb.Table(columns=["layer", "value"], data=rows), "layer", "value", title=text(name.partition("/")[0])
        )
        for name, rows in charts.items()
    }


def _picture(path: Path, caption: str | None = None) -> wandb.Image | None:
    """The picture at `path`, or None if it is missing or unreadable. Does not keep the pixels in memory."""
    import wandb

    try:
        picture = wandb.Image(str(path), caption=caption)
    except Exception as error:  # missing, truncated, too large for PIL: no reason to lose the other pictures
        log.debug("W&B: left out %s: %s", path, error)
        return None
    picture._image = None  # wandb would hold every decoded picture until the end: 3 MB each at 1024 x 1024
    return picture


def _picture_lists(folder: Path, key: str) -> dict[str, object]:
    """All PNGs of `folder` as lists under `key`, `key_2`...: one size a list (W&B wants that), at most 108 each."""
    by_size: dict[tuple[int | None, int | None], list[wandb.Image]] = {}
    for path in sorted(folder.glob("*.png")):
        if picture := _picture(path, caption=text(path.stem)):
            by_size.setdefault((picture._width, picture._height), []).append(picture)
    chunks = [
        pictures[first : first + PICTURES_PER_KEY]
        for pictures in by_size.values()
        for first in range(0, len(pictures), PICTURES_PER_KEY)
    ]
    return {key if number == 1 else f"{key}_{number}": chunk for number, chunk in enumerate(chunks, start=1)}


def _named_pictures(folder: Path, key: str) -> dict[str, object]:
    """All PNGs of `folder`, each as `key/NAME`."""
    pictures = {f"{key}/{text(path.stem)}": _picture(path) for path in sorted(folder.glob("*.png"))}
    return {name: picture for name, picture in pictures.items() if picture is not None}


def _report_tables(folder: Path) -> dict[str, object]:
    """The CSV of every table of the report as `tables/NAME`; one that cannot be read is left out."""
    import pandas as pd
    import wandb

    found: dict[str, object] = {}
    for path in sorted(folder.glob("*.csv")):
        try:
            columns = _columns(pd.read_csv(path, nrows=TABLE_ROWS, keep_default_na=False, na_values=[""]))
        except (OSError, ValueError) as error:
            log.debug("W&B: left out %s: %s", path, error)
            continue
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        found[f"tables/{text(path.stem)}"] = wandb.Table(columns=list(columns), data=rows)
    return found


def _columns(frame: pd.DataFrame) -> dict[str, list[object]]:
    """Numbers stay numbers (missing or infinite: None), everything else becomes text: W&B wants one type a column."""
    import pandas as pd

    columns: dict[str, list[object]] = {}
    for name, column in frame.items():
        if pd.api.types.is_numeric_dtype(column):
            kept = column.astype(object).where(column.notna() & ~column.isin([float("inf"), float("-inf")]), None)
            columns[text(name)] = [plain(value) for value in kept]
        else:
            columns[text(name)] = [None if pd.isna(value) else text(value) for value in column]
    return columns


def _results_table(frame: pd.DataFrame, run_dir: Path, max_images: int) -> wandb.Table:
    """The frame as a W&B table: columns `baseline` and `picture` (for the first `max_images` images), then its own."""
    import wandb

    frame = frame.head(TABLE_ROWS)
    columns = _columns(frame)
    pictures: list[wandb.Image | None] = []
    left = max_images
    for image in columns.get("image", [None] * len(frame)):
        picture = _picture(run_dir / str(image)) if left > 0 and image else None
        left -= picture is not None
        pictures.append(picture)
    plain_ones = [place if pictures[row] else None for row, place in enumerate(_baselines(frame))]
    baselines = [None if place is None else _picture(run_dir / str(frame["image"].iloc[place])) for place in plain_ones]
    rows = [list(row) for row in zip(baselines, pictures, *columns.values(), strict=True)]
    return wandb.Table(columns=["baseline", "picture", *columns], data=rows)


def _baselines(frame: pd.DataFrame) -> list[int | None]:
    """The place of each row's baseline; None for a baseline, and where there is none."""
    if "selection" not in frame:
        return [None] * len(frame)
    own = [name for name in ("model", "prompt_id", "seed", *GENERATION) if name in frame]
    keys = list(map(tuple, frame[own].astype(object).where(frame[own].notna(), None).to_numpy()))
    plain_ones = {key: place for place, key in enumerate(keys) if frame["selection"].iloc[place] == "none"}
    return [None if plain_ones.get(key) == place else plain_ones.get(key) for place, key in enumerate(keys)]
