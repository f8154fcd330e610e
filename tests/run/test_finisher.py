"""The report over the jobs of a launcher is drawn once, by the job that ends last."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import lesion.cli.report
from lesion.cli import study
from lesion.run import finisher, job


def test_one_of_those_that_end_together_draws(tmp_path):
    for _ in range(20):
        finisher.begin(tmp_path, 8, {"overrides": ["a=1"]})
        with ThreadPoolExecutor(8) as pool:
            told = [one for one in pool.map(lambda number: finisher.ended(tmp_path, number), range(8)) if one]
        assert told == [{"jobs": 8, "overrides": ["a=1"]}]
    assert not finisher.drawn(tmp_path)
    (tmp_path / "report.html").write_text("")
    assert finisher.drawn(tmp_path)
    finisher.begin(tmp_path, 2, {})  # the same jobs once more
    assert not finisher.drawn(tmp_path) and finisher.ended(tmp_path, 1) is None
    (tmp_path / finisher.JOBS / "asked.json").write_text("[")
    assert finisher.ended(tmp_path, 0) is None  # whoever launched them draws it


def test_the_last_job_draws_the_report_and_the_launcher_does_not(cli, monkeypatch):
    """In this process, in which the jobs are too."""
    drawn, told = [], []

    def report(runs, out, mix):
        drawn.append(len(runs))
        (out / "report.html").write_text("")
        return SimpleNamespace(frame=None), [out / "report.html"]

    monkeypatch.setattr(lesion.cli.report, "report", report)
    monkeypatch.setattr(job, "track_report", lambda frame, runs, folder, overrides, tracker: told.append(overrides))
    monkeypatch.setattr(study, "_launched", lambda hydra: True)
    code, out, err = cli("-m", "selection=none", "hydra.sweep.dir=parts", "seeds=0,1")
    assert code == 0, err
    assert drawn == [2] and "seeds=0,1" in told[0] and len(told) == 1
    assert out.count("report over all jobs: ") == 2  # in the log of the job, and where the jobs were launched
    monkeypatch.setattr(finisher, "ended", lambda *_: None)  # as if the last job had been killed before it drew
    assert cli("-m", "selection=none", "hydra.sweep.dir=parts", "seeds=0,1")[0] == 0
    assert drawn == [2, 2]
