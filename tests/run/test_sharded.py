"""A study in shards: the run folders put together are what one process writes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pandas as pd
import pytest

from commands import Command, until
from lesion.cli import audit
from lesion.report.merging import put_together, run_folders

ASKED = [
    "selection=[leave_one_out,only_one]",
    "replacement=[zero,null_prompt]",
    "prompts.items=[a red circle,two stars,{text: a red circle, id: again}]",
    "seeds=[0,1]",
    "layers.include=[mid_block.*,up_blocks.1.attentions.1]",
    "generation.steps=1",
    "capture=maps",
]
BY_ONE = ["generation.batch_size=1", "scorer.batch_size=1"]  # an image's last bits depend on how many are made at once


def together(cli, folder: str, order=list) -> list[pd.DataFrame]:
    frame, floor, maps, notes = put_together(order(run_folders([cli.folder / folder])), cli.folder / folder)
    assert floor is not None and maps is not None and notes == []
    return [frame.drop(columns="image"), floor, maps]


def test_shards_put_together_are_the_study_to_the_bit(cli, capfd):
    code, out, err = cli("experiment=shards", "shard.count=2", *ASKED, *BY_ONE, "hydra.sweep.dir=parts")
    assert code == 0 and "shard 1 of 2 is done; a report over all: lesion-report " in out, err
    assert cli(*ASKED, *BY_ONE, "store.dir=other", "hydra.run.dir=whole")[0] == 0
    parts = together(cli, "parts")
    for one, other in zip(parts, together(cli, "whole"), strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    frames = cli.frames()
    assert len(frames) == 2 + 1 and {"study", "study_row"} <= set(frames[0]) and "study" not in frames[-1]
    made = list((cli.folder / "store" / "cells").rglob("*.png"))
    assert len(made) == len(list((cli.folder / "other" / "cells").rglob("*.png")))
    # In whatever order the shards are named, and with one of them twice.
    folders = run_folders([cli.folder / "parts"])
    again = put_together([*folders[1:], *folders], cli.folder / "parts")
    assert sorted(again[0]["cell"]) == sorted(parts[0]["cell"])
    for table, part in zip(again[1:3], parts[1:], strict=True):
        assert len(table) == len(part)
    # Both are signed off: pairs of their baselines with each other's are worked out from both.
    assert audit.main([str(cli.folder / "parts"), "--share", "0.1"]) == 0, capfd.readouterr().out
    assert " pairs with baselines of shards" not in capfd.readouterr().out
    later = next(path for path in (cli.folder / "parts").glob("*/floor.parquet") if len(pd.read_parquet(path)) > 1)
    table = pd.read_parquet(later)
    table["similarity"] -= 1e-3
    table.to_parquet(later, index=False)
    assert audit.main([str(cli.folder / "parts"), "--share", "0.1"]) == 1
    said = capfd.readouterr().out
    assert said.count("floor.parquet row ") == len(table) and "similarity is" in said


def test_shards_that_cannot_be_are_refused(cli):
    for wrong, said in (
        (["shard.count=3"], "shard.count: the study has 2 different prompts x seeds; allowed: 1 to 2"),
        (["experiment=shards", "shard.count=0"], "names no job"),
    ):
        code, _, err = cli(*wrong)
        assert code == 2 and said in err and err.count("\n") == 1, err
    assert list(cli.folder.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "package"), [("joblib", "hydra_joblib_launcher"), ("submitit_local", "hydra_submitit_launcher")]
)
def test_a_real_launcher_runs_shards_in_processes_of_their_own(tmp_path, launcher, package):
    pytest.importorskip(f"hydra_plugins.{package}")

    def lesion(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "lesion", "debug=smoke", "seeds=[0,1]", *BY_ONE, *arguments]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)

    shards = ["experiment=shards", f"hydra/launcher={launcher}", "hydra.sweep.dir=parts"]
    refused = lesion(*shards, "device=cuda:99")  # accepted by the check; each job looks at its own machine
    assert refused.returncode != 0
    if launcher == "joblib":
        assert refused.returncode == 2 and "lesion: device: 'cuda:99' is not here" in refused.stderr
    shutil.rmtree(tmp_path / "parts")
    done = lesion(*shards)
    assert done.returncode == 0, done.stderr
    assert "is validated against" not in done.stderr
    assert lesion("hydra.run.dir=whole", "store.dir=other").returncode == 0
    both = [put_together(run_folders([tmp_path / name]), tmp_path / name) for name in ("parts", "whole")]
    pd.testing.assert_frame_equal(*(frame.drop(columns="image") for frame, *_ in both), check_exact=True)
    pd.testing.assert_frame_equal(both[0][1], both[1][1], check_exact=True)
    for table in (tmp_path / "whole" / "tables").iterdir():
        assert table.read_bytes() == (tmp_path / "parts" / "tables" / table.name).read_bytes(), table.name


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("launcher", "keeps"), [("hydra/launcher=joblib", False), ("hydra/launcher=submitit_local", True), ("-m", True)]
)
def test_ctrl_c_ends_the_jobs_and_the_same_command_resumes(tmp_path, launcher, keeps):
    """As a terminal does it: to the command and all processes that it has started."""
    words = ["debug=smoke", "seeds=[0,1,2,3]", "selection=none", "generation.steps=20", *BY_ONE, "store.dir=store"]
    words += ["hydra.sweep.dir=parts", "experiment=shards", launcher]
    store = tmp_path / "store"

    def images():
        return list((store / "cells").rglob("*.png"))

    def claims():
        return [path for path in (store / "claims").rglob("*") if path.is_file()]

    with Command(tmp_path, group=True) as lesion:
        run = lesion(*words)
        until(lambda: bool(claims()), run, lesion)
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(120) == 130, lesion.said[-3000:]
        last = [line for line in lesion.said.splitlines() if "lesion: " in line][-1]
        assert last.endswith("lesion: interrupted; finished images are kept, run the same command again to resume")
        assert "leaked" not in lesion.said and not (keeps and claims())
        assert "submitit_local" in launcher or "Traceback" not in lesion.said  # submitit's own
        kept = {path: path.stat().st_mtime_ns for path in images()}
        assert len(kept) < 4
        assert lesion(*words).wait(300) == 0, lesion.said[-3000:]
    assert len(images()) == 4 and not (keeps and claims())  # those of the dead on stored images are in nobody's way
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
