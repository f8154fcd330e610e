"""What the embedded model must reach, on captions it never saw (the figures of its card)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from lesion.analysis.importance import NO_EFFECT

SCRIPTS = Path(__file__).parents[1] / "scripts"
GOALS = {
    "background": 0.97,
    "colour": 0.95,
    "shape": 0.92,
    "count": 0.90,
    "binding": 0.85,
    "relation": 0.70,
    "everything": 0.70,
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.xfail(
    strict=True, reason="the weights as they are miss shape, binding, relation and everything at once: see their card"
)
def test_the_embedded_model_draws_what_held_out_captions_ask(tmp_path):
    command = [sys.executable, SCRIPTS / "evaluate_embedded.py", "--captions", "256", "--json", tmp_path / "f.json"]
    subprocess.run(command, check=True)
    figures = json.loads((tmp_path / "f.json").read_text())
    reached = {aspect: right / asked for aspect, (right, asked) in figures["generated, pixels"].items()}
    assert {aspect: reached[aspect] for aspect, goal in GOALS.items() if reached[aspect] < goal} == {}
    assert all(right == asked for right, asked in figures["ceiling, pixels"].values())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_tells_layers_apart(cli):
    """At least 8 of the 16 layers have an effect by the table's own rule, which lies above what rounding does.

    Leaving the strongest out gives a similarity below 0.90.
    """
    cli.defaults = []
    code, out, err = cli("experiment=demo", "tracker=none")
    assert code == 0, err
    frame = pd.read_parquet(cli.newest() / "results.parquet")
    assert len(frame) == 264
    left_out = frame[frame.selection == "leave_one_out"].groupby("layer").clip_similarity
    assert (left_out.mean() < 1 - NO_EFFECT).sum() >= 8
    assert left_out.mean().min() < 0.90
    assert len([line for line in out.splitlines() if "attentions" in line]) == 16
