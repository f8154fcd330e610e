"""Processes that take over part of the work of this one, one for each further core.

They are plain children that read calls from their input, not those of `multiprocessing`: that imports a user's script
once more in each, lets no daemon have children (jobs of joblib, workers of a study), and forks, which CUDA does not
survive. Whatever becomes of them, every call is made: one that did not end well elsewhere is made here. Imports the
standard library only.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import IO, Any, Generic, NoReturn, TypeVar

MANY = 100  # images of a study whose report is worth further processes
MOST = 8  # processes, this one among them: each takes some 200 MB
PATIENCE = 120.0  # seconds for one call, after which it is made here
NICE = 5  # of a process while it imports, where the system has no class for what can wait: all else goes first
_START = (
    "import pickle, sys; sys.path[:], *how = pickle.load(sys.stdin.buffer); "
    "from lesion.processes import _serve; _serve(*how)"
)
T = TypeVar("T")


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Call(Generic[T]):
    """A call that is to be made, here or elsewhere."""

    def __init__(self, owner: Processes, work: Callable[[], T]):
        self.owner, self._work = owner, work
        self._taken = self._ended = False
        self._value: T
        self._error: Exception | None = None

    def result(self) -> T:
        """What it returns; raises what it raises. Makes it, or others, here while it is not made elsewhere."""
        self.owner._end(self)
        if self._error:
            raise self._error
        return self._value

    def _make(self) -> None:
        try:
            self._value = self._work()
        except Exception as error:
            self._error = error
        self._ended = True


class Processes:
    """Other processes that make calls, from `start` to `close`; before, without and after them calls are made here.

    count: how many; None: one a core but this one. prepare: functions, as "module:name", that each runs first, such as
    imports that take long, in what time all other work leaves (on Linux; elsewhere at a low priority).
    """

    def __init__(self, count: int | None = None, prepare: Sequence[str] = ()):
        self.count = min(MOST, cores()) - 1 if count is None else count
        self._prepare = tuple(prepare)
        self._waiting: deque[Call[Any]] = deque()
        self._changed = threading.Condition()
        self._running: dict[threading.Thread, subprocess.Popen[bytes]] = {}
        self._started = self._closed = False

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start them, once; where that cannot be, this process makes all calls."""
        with self._changed:
            if self._started or self._closed:
                return
            self._started = True
        command = [sys.executable, "-P", "-c", _START]
        for _ in range(self.count):
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,  # what goes wrong goes wrong here again, and is told
                    process_group=0,  # Ctrl-C of a terminal is for this process, which ends them
                )
            except (OSError, ValueError):
                return
            thread = threading.Thread(target=self._feed, args=(process,), name="lesion-processes", daemon=True)
            self._running[thread] = process
            thread.start()

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return not any(thread.is_alive() for thread in list(self._running))

    def call(self, work: Callable[[], T]) -> Call[T]:
        """Have `work` done: a function of a module, or a `partial` of one, whose arguments and value can be pickled."""
        made = Call(self, work)
        with self._changed:
            self._waiting.append(made)
            self._changed.notify_all()
        return made

    def close(self) -> None:
        """End the processes, whatever they do; calls that are still asked for are made here."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for process in self._running.values():
            process.terminate()
        for thread, process in self._running.items():
            thread.join(5)
            process.kill()
            thread.join()
        self._running.clear()

    def _end(self, call: Call[Any]) -> None:
        """Return once a call is made, by making calls here in the meantime."""
        while True:
            with self._changed:
                while call._taken and not call._ended and not self._waiting:
                    if not self._changed.wait(PATIENCE):
                        for process in self._running.values():
                            process.kill()
                if call._ended:
                    return
                mine = self._waiting.popleft() if call._taken else call
                with contextlib.suppress(ValueError):
                    self._waiting.remove(mine)
                mine._taken = True
            mine._make()

    def _next(self) -> Call[Any] | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            taken = self._waiting.popleft()
            taken._taken = True
            return taken

    def _feed(self, process: subprocess.Popen[bytes]) -> None:
        """Give one process call after call."""
        assert process.stdin
        assert process.stdout
        call: Call[Any] | None = None
        try:
            _send(process.stdin, (sys.path, self._prepare, os.getpid()))
            pickle.load(process.stdout)
            while (call := self._next()) is not None:
                _send(process.stdin, (os.getcwd(), call._work))
                well, value = pickle.load(process.stdout)
                with self._changed:
                    call._ended, call._taken = well, well
                    call._value = value
                    self._changed.notify_all()
                call = None
        except Exception:  # it died, or something cannot be pickled
            pass
        finally:
            with self._changed:
                if call is not None:
                    call._taken = False
                self._changed.notify_all()
            process.terminate()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()


def drawers(images: int) -> Processes:
    """Processes that draw parts of a report of so many images; none for few, since they take seconds to start."""
    return Processes(None if images >= MANY else 0, ["lesion.report.figures:prepare", "lesion.report.findings:prepare"])


def _send(pipe: IO[bytes], what: object) -> None:
    pipe.write(pickle.dumps(what))  # whole or not at all
    pipe.flush()


def _serve(prepare: Sequence[str], parent: int) -> None:
    """What such a process does, until its input ends or its parent does."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    back = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is printed must not come between
    with contextlib.suppress(ImportError):
        importlib.import_module("numpy")  # it starts threads, which would wait for all else for good if imported below
    thread = threading.Thread(target=_prepare, args=(prepare,), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        if os.getppid() != parent:  # it died, so that nobody will read an answer
            os._exit(0)
    signal.signal(signal.SIGTERM, _leave)
    _send(back, None)
    while True:
        try:
            folder, work = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            os.chdir(folder)
            answer = pickle.dumps((True, work()))
        except Exception:
            answer = pickle.dumps((False, None))
        back.write(answer)
        back.flush()


def _prepare(functions: Sequence[str]) -> None:
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # this thread alone: it gets what others leave
    except (AttributeError, OSError):  # not Linux, or a sandbox
        with contextlib.suppress(OSError):
            os.nice(NICE)
    for one in functions:
        module, _, name = one.partition(":")
        getattr(importlib.import_module(module), name)()


def _leave(*_: object) -> NoReturn:
    raise SystemExit  # so that files in the making are removed
