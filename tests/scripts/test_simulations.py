"""The scripts that docs quote figures of planted data from: they run, and say what they should."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import budget_saving
import interval_coverage


@pytest.mark.parametrize(
    ("script", "lines"),
    [
        pytest.param(budget_saving, 8, marks=pytest.mark.slow),
        (interval_coverage, len(interval_coverage.CASES)),
    ],
)
def test_a_line_a_case(script, lines, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.__name__, "--times", "1"])
    script.main()
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) == 2 + lines and len({line.count("|") for line in said}) == 1
    assert "nan" not in "".join(said)
