"""Studies as W&B sees them: a resumed one, a multirun and its report, a sweep; all offline, read back from the logs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import lesion.report
from lesion.run import maker
from wandb_logs import merged, records

SWEEP = Path(__file__).parents[2] / "docs" / "wandb-sweep.yaml"
TRACKED = [
    "tracker=wandb",
    "tracker.mode=offline",
    "tracker.system_metrics=false",
    "selection=leave_one_out",
    "layers.include=[mid_block.*]",
]


def logged(folder: Path) -> SimpleNamespace:
    """What the only run of a folder has logged."""
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found = records(log)
    (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    history = [merged(record.history.item) for record in found if record.WhichOneof("record_type") == "history"]
    values = {key: value for point in history for key, value in point.items()}
    summary: dict[str, object] = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            summary |= merged(record.summary.update)
    artifacts = [record.artifact for record in found if record.WhichOneof("record_type") == "artifact"]
    files = [entry.path for one in artifacts if one.type == "results" for entry in one.manifest.contents]
    config = merged(run.config.update)
    return SimpleNamespace(run=run, config=config, values=values, summary=summary, files=files, folder=log.parent)


def test_a_multirun_is_a_group_of_its_jobs_and_their_report(cli, monkeypatch):
    def report(folder: Path, *args: object, **options: object) -> list[Path]:
        (folder / "report.html").write_text("<p>all jobs</p>")
        return [folder / "report.html"]

    monkeypatch.setattr(lesion.report, "write_report", report)
    monkeypatch.setattr(lesion.report, "findings", lambda frame, *_, **__: SimpleNamespace(frame=frame))
    monkeypatch.setattr(lesion.report, "ranking_lines", lambda known: [])
    code, out, err = cli("-m", "replacement=zero,null_prompt", *TRACKED, "hydra.sweep.dir=both", "tracker.tags=[demo]")
    assert code == 0 and "report over all jobs" in out, err
    whole, *jobs = (logged(cli.folder / "both" / name) for name in (".", "0", "1"))
    assert [one.run.job_type for one in (whole, *jobs)] == ["lesion-report", "lesion-study", "lesion-study"]
    assert {one.run.run_group for one in (whole, *jobs)} == {"both"} and list(whole.run.tags) == ["demo"]
    assert whole.config["replacement_name"] == "zero+null_prompt" and whole.config["jobs"] == 2
    assert "replacement=zero,null_prompt" in whole.config["overrides"]
    of_jobs = {f"{number}/{name}.parquet" for number in (0, 1) for name in ("results", "floor")}
    assert set(whole.files) == {*of_jobs, "report.html"}
    assert (whole.folder / "files" / whole.values["report"]["path"]).read_text() == "<p>all jobs</p>"
    table = json.loads((whole.folder / "files" / whole.values["results"]["path"]).read_text())
    assert len(table["data"]) == len({json.dumps(row) for row in table["data"]}) == 2 + 2 * 2  # baselines once
    assert all(row[1] is not None for row in table["data"]), "a picture in every row"
    both = {key: value for one in jobs for key, value in one.summary.items() if key.startswith("importance/")}
    assert len(both) == 2 and both.items() <= whole.summary.items()


def test_a_resumed_study_resumes_its_run_in_another_folder(cli, monkeypatch):
    generate = maker.generate

    def broken(*args: object, **options: object) -> object:
        raise ZeroDivisionError("as if killed")

    ids = []
    for number, make in enumerate((broken, generate, generate)):
        monkeypatch.setattr(maker, "generate", make)
        code, _, err = cli(*TRACKED, f"hydra.run.dir=part{number}")
        assert code == (1 if make is broken else 0), err
        ids.append((cli.folder / f"part{number}" / "wandb" / "id.txt").read_text())
        assert len(list((cli.folder / "store" / "unfinished").iterdir())) == (1 if make is broken else 0)
    assert ids[0] == ids[1] != ids[2]
    assert [logged(cli.folder / f"part{number}").run.run_id for number in range(3)] == ids


@pytest.mark.slow
def test_an_agent_of_wandb_runs_the_sweep_of_the_pages(cli, monkeypatch, tmp_path):
    """The real agent, told by a stand-in of the server which values are next."""
    from wandb.wandb_agent import Agent

    config = yaml.safe_load(SWEEP.read_text(encoding="utf-8"))
    values = {key: {"value": one["values"][0] if "values" in one else one["value"]} for key, one in
              config["parameters"].items()}  # fmt: skip
    small = dict(default.split("=", 1) for default in [*cli.defaults, *TRACKED] if not default.startswith("prompts"))
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_RUN_ID", "")  # the agent sets both; so they are put back after the test
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "")
    script = tmp_path / "bin" / "lesion"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m lesion "$@" 2>{tmp_path}/err.txt\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    agent = Agent(None, None, sweep_id="sweep123")
    agent._sweep_command = [*config["command"], *(f"{key}={value}" for key, value in small.items()), "prompts.limit=1"]
    agent._command_run({"run_id": "trial001", "program": config["program"], "args": values})
    assert agent._run_processes["trial001"]._popen.wait(120) == 0, (tmp_path / "err.txt").read_text()
    one = logged(cli.newest())
    assert one.run.run_id == "trial001" and one.run.sweep_id == "sweep123"
    assert one.config["generation"]["guidance"] == 1.5 and one.config["prompts_name"] == "colour"
