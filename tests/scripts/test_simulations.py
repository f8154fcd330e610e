"""The scripts that docs quote figures of planted data from: they run, and say what they should."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import budget_saving
import simulate_inference


@pytest.mark.parametrize(
    ("script", "arguments", "lines"),
    [
        pytest.param(budget_saving, [], 10, marks=pytest.mark.slow),
        (simulate_inference, ["seeds"], 21),
        (simulate_inference, ["floors"], 3),
        pytest.param(simulate_inference, ["shapley"], 4, marks=pytest.mark.slow),
        pytest.param(simulate_inference, ["sparse"], 28, marks=pytest.mark.slow),
        pytest.param(simulate_inference, ["ranks"], 12, marks=pytest.mark.slow),
        pytest.param(simulate_inference, ["claims"], 3, marks=pytest.mark.slow),
        pytest.param(simulate_inference, ["ratios"], 6, marks=pytest.mark.slow),
    ],
)
def test_a_line_a_case(script, arguments, lines, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.__name__, *arguments, "--times", "1"])
    script.main()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(said) == 2 + lines and len({line.count("|") for line in said}) == 1
    assert "nan" not in "".join(said)
