"""Calls that other processes make: values and errors are those of calls made here, and no process is left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from lesion import processes
from lesion.processes import Call, Processes


@pytest.fixture
def one() -> Iterator[Processes]:
    """One process that has started."""
    with Processes(1) as made:
        made.start()
        assert elsewhere(made.call(os.getpid)) != os.getpid()
        yield made


def elsewhere(call: Call[int]) -> int:
    """The value of a call that is not made here."""
    wait(lambda: call._ended)
    return call.result()


def wait(done: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def children() -> set[int]:
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True
    )
    mine = {int(line) for line in listed.stdout.split()}
    return {pid for pid in mine if b"lesion.processes" in command_of(pid)}


def command_of(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def dies_unless(pid: int) -> int:
    if os.getpid() != pid:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def fails_unless(pid: int) -> int:
    if os.getpid() != pid:
        raise OSError(28, "no space there")
    return 7


def prints(text: str) -> str:
    print(text)
    os.system(f"echo {text}")
    return text


def test_values_are_those_of_calls_made_here_in_order(one):
    calls = [one.call(partial(divmod, number, 7)) for number in range(50)]
    assert [call.result() for call in calls] == [divmod(number, 7) for number in range(50)]
    assert one.call(partial(prints, "words")).result() == "words"
    text = one.call(partial(prints, "words"))
    wait(lambda: text._ended)
    assert text.result() == "words"


def test_calls_see_the_folder_that_this_process_is_in(one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = one.call(os.getcwd)
    wait(lambda: call._ended)
    assert call.result() == str(tmp_path)


def test_errors_are_those_of_calls_made_here(one):
    with pytest.raises(ZeroDivisionError, match="by zero"):
        one.call(partial(divmod, 1, 0)).result()
    assert one.call(partial(fails_unless, os.getpid())).result() == 7
    assert one.call(lambda: "not to be pickled").result() == "not to be pickled"


def test_a_killed_process_loses_no_call(one):
    calls = [one.call(partial(dies_unless, os.getpid())) for _ in range(3)]
    wait(lambda: calls[0]._taken)
    assert {call.result() for call in calls} == {os.getpid()}
    wait(lambda: one.alone)
    assert one.call(partial(divmod, 9, 2)).result() == (4, 1)
    assert children() == set()


def test_one_that_hangs_is_ended(one, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.5)
    call = one.call(partial(sleeps_unless, os.getpid()))
    wait(lambda: call._taken)
    assert call.result() == "here"
    wait(lambda: one.alone)


def sleeps_unless(pid: int) -> str:
    time.sleep(600 if os.getpid() != pid else 0)
    return "here"


def test_none_is_left_after_an_error_or_ctrl_c():
    with pytest.raises(KeyboardInterrupt), Processes(2) as several:
        several.start()
        elsewhere(several.call(os.getpid))
        calls = [several.call(partial(time.sleep, 600)) for _ in range(2)]
        wait(lambda: all(call._taken for call in calls))
        began = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - began < 30
    assert children() == set()


def test_ctrl_c_of_a_terminal_does_not_reach_them_and_they_end_with_this_process():
    code = (
        "import os, sys, time; from functools import partial; from lesion.processes import Processes\n"
        "several = Processes(1); several.start(); call = several.call(os.getpid)\n"
        "while not call._ended: time.sleep(0.01)\n"
        "print(call.result(), os.getpgid(call.result()) != os.getpgid(0), flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, apart = parent.stdout.readline().split()
        assert apart == "True"
        assert b"lesion.processes" in command_of(int(pid))
        parent.kill()
    wait(lambda: b"lesion.processes" not in command_of(int(pid)))


def test_one_that_still_prepares_ends_with_this_process_too():
    code = (
        "import time; from lesion.processes import Processes\n"
        "several = Processes(1, ['signal:pause']); several.start()\n"
        "print(*(one.pid for one in several._running.values()), flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        wait(lambda: Path(f"/proc/{pid}/task").is_dir() and len(os.listdir(f"/proc/{pid}/task")) > 1)  # it prepares
        parent.kill()
    wait(lambda: b"lesion.processes" not in command_of(pid))


_classes: list[int] = []


def note_class() -> None:
    _classes.append(os.sched_getscheduler(0))


def classes() -> tuple[list[int], set[int]]:
    """How what comes first was scheduled, and how the threads of this process are."""
    return _classes, {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux has this class")
def test_what_comes_first_gets_the_time_that_others_leave_and_calls_get_their_share():
    with Processes(1, [f"{__name__}:note_class"]) as one:
        one.start()

        def seen() -> bool:  # not at once: the thread that came first ends when others leave it time
            call = one.call(classes)
            wait(lambda: call._ended)
            return call.result() == ([os.SCHED_IDLE], {os.SCHED_OTHER})

        wait(seen)


def in_a_daemon() -> None:
    with Processes(1) as one:
        one.start()
        assert elsewhere(one.call(os.getpid)) != os.getpid()


def test_daemons_of_multiprocessing_have_them_too():
    """Jobs of a launcher may be such: they may have no children of multiprocessing."""
    daemon = multiprocessing.get_context("fork").Process(target=in_a_daemon, daemon=True)
    daemon.start()
    daemon.join(60)
    assert daemon.exitcode == 0


def test_none_on_one_core_and_none_for_a_small_report(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    with Processes() as none:
        none.start()
        assert none.alone
        assert none.call(os.getpid).result() == os.getpid()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(processes, "MANY", 100)
    assert processes.drawers(processes.MANY).count == processes.MOST - 1
    assert processes.drawers(processes.MANY - 1).count == 0


def test_where_none_can_be_started_calls_are_made_here(monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    with Processes(2) as none:
        none.start()
        assert none.alone
        assert none.call(os.getpid).result() == os.getpid()
