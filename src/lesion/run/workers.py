"""Several processes of this machine make the images of one study: one for each GPU, or a few on the CPU.

They share it by the claims of the store, as processes that a user starts side by side do. Each makes whole batches, so
that an image has the same company, and the same pixels, as in one process.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from lesion.config.parsing import Request
from lesion.errors import RequestError, place_of
from lesion.models import Source
from lesion.run.environment import Making
from lesion.study.grid import Study

if TYPE_CHECKING:
    from lesion.run.job import Work

log = logging.getLogger(__name__)
PATIENCE = 30.0  # seconds in which a worker that is told to end stores what it has made


@dataclass(frozen=True)
class _Share:
    """What a worker needs to know. request: for its device. workers: among how many the CPU's threads are divided."""

    request: Request
    source: Source
    study: Study
    folder: Path | None
    failures: dict[str, str]
    workers: int


@dataclass
class _Done:
    """The last that a worker tells. error: what stopped it; None where it came to its end."""

    failures: dict[str, str] = field(default_factory=dict)
    making: Making = field(default_factory=Making)
    error: Exception | None = None


def generate(work: Work, failures: Mapping[str, str], progress: Callable[[int], None]) -> dict[str, str]:
    """Make what the store lacks, but for earlier failures, in one process for each of the request's devices.

    progress: called with the number of further images.

    Returns the reason for each cell that could not be made. A worker that dies is told of, and the others make its
    part. Raises what stopped the first worker where none came to its end.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
    running: dict[Connection, BaseProcess] = {}
    ended: list[_Done] = []
    request = replace(work.request, budget=None, attribution=None, check_store=False)
    try:
        for number, device in enumerate(work.request.devices):
            here, there = context.Pipe(duplex=False)
            own = replace(request, device=device, devices=(device,))
            workers = len(work.request.devices)
            share = _Share(own, work.source, work.study, work.publisher.folder, dict(failures), workers)
            process: BaseProcess = context.Process(
                target=_work, args=(there, share), name=f"worker {number} on {device}", daemon=True
            )
            process.start()
            there.close()
            running[here] = process
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                try:
                    told = connection.recv()
                except (EOFError, OSError):
                    process = running.pop(connection)
                    process.join()
                    if process.exitcode:
                        log.warning("%s died (exit code %s); the others make its part", process.name, process.exitcode)
                    continue
                if isinstance(told, int):
                    progress(told)
                elif isinstance(told, logging.LogRecord):
                    told.msg = f"{running[connection].name}: {told.msg}"
                    logging.getLogger(told.name).handle(told)
                else:
                    ended.append(told)
                    if told.error:
                        log.warning("%s stopped: %s", running[connection].name, told.error)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join(PATIENCE)
            process.kill()
    for one in ended:
        work.making.images += one.making.images
        work.making.used(one.making.batch_sizes)
    if all(one.error for one in ended):
        raise next((one.error for one in ended if one.error), RuntimeError("all workers died"))
    found = {key: reason for one in ended for key, reason in one.failures.items()}
    return {key: reason for key, reason in found.items() if key in failures or not work.store.has(key)}


def _work(parent: Connection, share: _Share) -> None:
    """What a worker does."""
    for number in (signal.SIGINT, signal.SIGHUP):  # of a terminal, which the parent gets too
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # claims are given back
    threading.Thread(target=_end_with_parent, daemon=True).start()
    lock = threading.Lock()

    def tell(what: object) -> None:
        with lock, suppress(OSError):
            parent.send(what)

    handler = _Telling(tell)
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    done = _Done()
    try:
        _make(share, done, lambda: tell(1))
    except KeyboardInterrupt:  # told to end: what is finished is stored, claims are given back
        return
    except RequestError as error:
        done.error = error
    except Exception as error:  # a model can raise anything
        done.error = RuntimeError(place_of(error))
    tell(done)
    parent.close()


def _make(share: _Share, done: _Done, each: Callable[[], None]) -> None:
    import torch

    from lesion.run.job import Work, loaded, make

    if share.request.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // share.workers))
    work = Work.of(share.request, (share.source, share.study), share.folder)
    done.making = work.making
    done.failures = make(work, loaded(work), share.failures, lambda more: None, each)


class _Telling(QueueHandler):
    """Sends records to the parent."""

    def __init__(self, tell: Callable[[object], None]):
        super().__init__(queue=None)  # type: ignore[arg-type]
        self.tell = tell

    def enqueue(self, record: logging.LogRecord) -> None:
        self.tell(record)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
