"""Processes that draw the report of a job: started before its last image, gone with it, however it ends."""

from __future__ import annotations

import os
import subprocess

import pytest

import lesion.report
from lesion import processes


@pytest.fixture
def started(monkeypatch):
    """The processes that a job starts for its report, of which each has one image at least."""
    made = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(processes.subprocess, "Popen", Recorded)
    monkeypatch.setattr(processes, "MANY", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    return lambda: [one for one in made if "lesion.processes" in " ".join(map(str, one.args))]


def test_a_job_starts_them_and_leaves_none(cli, drawn, started):
    assert cli("selection=none")[0] == 0
    (one,) = started()
    assert one.poll() is not None
    assert (cli.newest() / "report.html").is_file()
    assert cli("selection=none")[0] == 0  # nothing to make: they would come too late
    assert len(started()) == 1


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (OSError(28, "No space left"), 1)])
def test_none_is_left_where_the_report_is_stopped_or_fails(cli, started, monkeypatch, error, code):
    def stopped(*args, processes, **options):
        assert processes.count == 1
        raise error

    monkeypatch.setattr(lesion.report, "write_report", stopped)
    assert cli("selection=none")[0] == code
    (one,) = started()
    assert one.poll() is not None
