"""`lesion` in processes of its own, for tests of what starts and ends them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import lesion


class Command:
    """Starts `lesion` in a folder, and ends at the end of a `with` what still runs.

    environment: of its processes. said: their output so far, kept in out.log.
    group: each is the leader of a process group of its own, as a command typed at a terminal is.
    """

    def __init__(self, folder: Path, group: bool = False):
        self.log, self.folder, self.group = folder / "out.log", folder, group
        self._started: list[subprocess.Popen[bytes]] = []
        source = str(Path(lesion.__file__).parents[1])
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}

    def __call__(self, *arguments: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            words = [sys.executable, "-m", "lesion", *arguments]
            one = subprocess.Popen(
                words,
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=self.group,
            )
        self._started.append(one)
        return one

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for one in self._started:  # of a test that failed
            one.kill()
            one.wait()

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def until(true: Callable[[], bool], run: subprocess.Popen[bytes], command: Command, seconds: float = 400) -> None:
    """Wait while a process runs; fails with what the command said where it ends before, or time is up."""
    deadline = time.monotonic() + seconds
    while not true():
        assert run.poll() is None and time.monotonic() < deadline, command.said[-3000:]
        time.sleep(0.1)
