"""Claims: which process is making which image or its scores, so that processes on a shared file system do not make the
same.

Format: claims/<first 2 digits>/<key>, a JSON object of an `_Owner`, who updates its modification time regularly.
A claim is void when its process is dead or its modification time is too old, so a killed process blocks nobody. Also
void are a folder, pipe or link with a claim's name (at once), a file that names no owner (after some seconds), and a
claim dated further into the future than claims last. Claims only save work: two owners of one key would both store the
same image.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import stat
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

from lesion.store.files import clear, gone

log = logging.getLogger(__name__)
_LONGEST = 4096  # bytes that are read of a claim
_EMPTY_EXPIRES = 5.0  # seconds; a claim is empty if its process was killed between creating and writing it


@cache
def machine() -> str:
    """Return host, boot and process namespace: processes with the same value can see each other's ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.getnode():x}"


def _start_of(pid: int) -> str | None:
    """Return when a process of this machine started, in the kernel's ticks; None if it is dead, "" if unknown."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except (OSError, IndexError):
        pass
    if os.path.exists("/proc/self/stat"):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


@dataclass(frozen=True)
class _Owner:
    """The content of a claim.

    start: distinguishes a process from a later one with the same id.
    token: distinguishes claimants, also within one process.
    """

    machine: str
    pid: int
    start: str
    token: str

    @property
    def dead(self) -> bool:
        return self.machine == machine() and _start_of(self.pid) != self.start


@dataclass(frozen=True)
class _Claim:
    """Whatever is found under a claim's name.

    owner: None if it names none.
    modified: seconds, by the file system's clock.
    file: False for a folder, pipe, device or link, which no process creates as a claim.
    """

    owner: _Owner | None
    modified: float
    file: bool = True


def _read(path: str) -> _Claim | None:
    """Read a claim; return None if there is none. Never blocks."""
    try:
        facts = os.lstat(path)
        if not stat.S_ISREG(facts.st_mode):
            return _Claim(None, facts.st_mtime, file=False)
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            modified, text = os.fstat(file.fileno()).st_mtime, file.read(_LONGEST)
    except OSError as error:
        if gone(error):
            return None
        raise
    try:
        owner = _Owner(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return _Claim(None, modified)
    texts = (owner.machine, owner.start, owner.token)
    sound = all(isinstance(text, str) for text in texts) and type(owner.pid) is int and 0 < owner.pid < 2**31
    return _Claim(owner if sound else None, modified)


class Claims:
    """Claims on keys, one file per key: folder/ab/abcdef…. A context manager that releases all of them at its end.

    expires: seconds without an update by its owner after which a claim is void.
    required: whether methods raise OSError if the file system does. Otherwise there is one warning, and keys that
        cannot be claimed count as taken.
    what: is made under a claim, for warnings.
    """

    def __init__(self, folder: Path, expires: float = 120.0, required: bool = True, what: str = "images"):
        if expires <= 0:
            raise ValueError(f"expires must be above 0 s, not {expires}")
        self.folder, self.expires, self.required, self.what = folder, expires, required, what
        self._told: set[str] = set()  # warnings
        self._owner = _Owner(machine(), os.getpid(), _start_of(os.getpid()) or "", uuid.uuid4().hex)
        self._content = json.dumps(vars(self._owner)).encode()
        self._mine: set[str] = set()
        self._lock = threading.Lock()  # guards _mine and the creation and removal of its files
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release every claim and stop the heartbeat."""
        self._stop.set()
        if self._beating is not None:
            self._beating.join()
            self._beating, self._stop = None, threading.Event()
        self.release(set(self._mine))

    def take(self, keys: Iterable[str]) -> set[str]:
        """Claim those of `keys` that no living process holds; return those that are now ours."""
        now = _Clock(self.folder, self.required)
        taken: set[str] = set()
        with self._lock:
            for key in keys:
                try:
                    if key in self._mine or self._take(key, now):
                        self._mine.add(key)
                        taken.add(key)
                except OSError as error:
                    self._raise_or_warn(error)
                    taken.add(key)
        if taken and self._beating is None:
            self._beating = threading.Thread(target=self._beat, name="lesion-claims", daemon=True)
            self._beating.start()
        return taken

    def release(self, keys: Iterable[str]) -> None:
        """Release claims; leave those that are not ours."""
        with self._lock:
            for key in self._mine.intersection(keys):
                self._mine.discard(key)
                try:
                    if self._is_mine(key):
                        with suppress(FileNotFoundError):
                            os.unlink(self._path(key))
                except OSError as error:
                    self._raise_or_warn(error)

    def _raise_or_warn(self, error: OSError) -> None:
        if self.required:
            raise error
        self._warn(f"{self.what} cannot be claimed; other processes may make the same ones meanwhile", error)

    def held(self, keys: Iterable[str]) -> set[str]:
        """Return those of `keys` that other living owners hold."""
        now = _Clock(self.folder, self.required)
        found = ((key, _read(self._path(key))) for key in keys)
        return {key for key, claim in found if claim and not self._void(claim, now) and claim.owner != self._owner}

    def _path(self, key: str) -> str:
        return f"{self.folder}/{key[:2]}/{key}"

    def _is_mine(self, key: str) -> bool:
        claim = _read(self._path(key))
        return claim is not None and claim.owner == self._owner

    def _take(self, key: str, now: _Clock) -> bool:
        for _ in range(3):  # a claim can disappear while it is read
            try:
                self._create(self._path(key))
                return True
            except FileExistsError:
                claim = _read(self._path(key))
            if claim is not None:
                return self._void(claim, now) and self._steal(key, claim.owner, now)
        return False

    def _create(self, path: str) -> None:
        """Create a claim of ours. Raises FileExistsError."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        try:
            file = os.open(path, flags, 0o666)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            file = os.open(path, flags, 0o666)
        try:
            os.write(file, self._content)
        except OSError:  # a full disk
            os.unlink(path)
            raise
        finally:
            os.close(file)

    def _void(self, claim: _Claim, now: _Clock) -> bool:
        if not claim.file or (claim.owner is not None and claim.owner.dead):
            return True
        lasts = self.expires if claim.owner is not None else min(self.expires, _EMPTY_EXPIRES)
        return abs(now.seconds - claim.modified) > lasts

    def _steal(self, key: str, judged: _Owner | None, now: _Clock) -> bool:
        """Replace a void claim by ours; return whether that succeeded.

        Several processes may try at once. The lock on the void file admits one of them. Where locks do not reach other
        hosts, checking the file that was moved away detects nearly every conflict.
        """
        path = self._path(key)
        aside = f"{path}.{uuid.uuid4().hex}"
        if judged is None:
            log.warning("a claim that names no owner is void and removed (%s)", path)
        with _alone_with(path) as alone:
            claim = _read(path) if alone else None
            if claim is None or claim.owner != judged or not self._void(claim, now):
                return False
            with suppress(FileNotFoundError):
                os.rename(path, aside)
            claim = _read(aside)
            if claim is None:  # released at this moment
                return False
            try:
                if claim.owner != judged:
                    _put_back(aside, path)
                    return False
                self._create(path)
            except FileExistsError:
                return False
            finally:
                clear(Path(aside))
        return True

    def _beat(self) -> None:
        """Update our claims regularly, and forget those that were lost."""
        stop = self._stop
        while not stop.wait(self.expires / 4):
            with self._lock:
                keys = tuple(self._mine)
            lost: list[str] = []
            for key in keys:
                try:
                    with self._lock:
                        if key not in self._mine:
                            continue
                        if self._is_mine(key):
                            os.utime(self._path(key))
                        else:
                            self._mine.discard(key)
                            lost.append(key)
                except OSError as error:
                    self._warn(
                        f"claims cannot be renewed; other processes may make the same {self.what} meanwhile", error
                    )
            if lost:
                why = f"{len(lost)}, the first on {lost[0]}: removed, or this process was suspended for too long"
                self._warn("claims were lost", why)

    def _warn(self, what: str, why: object) -> None:
        """Log a warning, each only once."""
        if what not in self._told:
            log.warning("%s (%s)", what, why)
        self._told.add(what)


def _put_back(aside: str, path: str) -> None:
    """Move a claim back. Raises FileExistsError if another process has claimed the key meanwhile."""
    try:
        os.link(aside, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.rename(aside, path)


@contextmanager
def _alone_with(path: str) -> Iterator[bool]:
    """Yield whether we alone lock this file; True without locks. The kernel releases the lock with the process."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield False
        return
    except OSError:
        if stat.S_ISREG(os.lstat(path).st_mode):
            raise
        yield True  # a folder or link, which no process locks
        return
    try:
        alone = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        except OSError:  # a file system without locks
            pass
        yield alone
    finally:
        os.close(file)


class _Clock:
    """The file system's own time in seconds, read on first use, since the clocks of hosts may differ.

    required: whether to raise OSError if it cannot be read, instead of using this host's clock.
    """

    def __init__(self, folder: Path, required: bool):
        self._folder, self._required = folder, required
        self._seconds: float | None = None

    @property
    def seconds(self) -> float:
        if self._seconds is None:
            path = self._folder / f".clock.{uuid.uuid4().hex}"
            try:
                path.touch(exist_ok=False)
                try:
                    self._seconds = path.stat().st_mtime
                finally:
                    path.unlink(missing_ok=True)
            except OSError:
                if self._required:
                    raise
                self._seconds = time.time()
        return self._seconds
