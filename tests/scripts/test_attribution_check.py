"""scripts/attribution_check.py: what it says of scores, by hand, and of real lesions on some prompts, planted."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import attribution_check
from attribution_check import agreement, lesioned, said

HALVES = [slice(0, 4), slice(4, 8), slice(0, 8)]


def test_agreement_is_told_of_all_lesions_and_of_those_with_effect():
    real = np.array([0.4, 0.2, 0.3, 0.0005, 0.0])
    found = agreement(np.array([4.0, 3.0, 2.0, 1.0, 0.0]), real, 2)
    assert found == pytest.approx([1 - 6 * 2 / (5 * 24), 1 - 6 * 2 / (3 * 8), 3, 1])
    assert said(found, 2, 0.25) == "0.90, 0.50 (3), 1/2, 25.0 %"
    few = agreement(real[::-1], np.where(real > 0.25, real, 0), 2)
    assert np.isnan(few[1]) and said(few, 2, 1.0) == f"{few[0]:.2f}, 1/2, 100.0 %"


def test_real_lesions_of_other_prompts_say_what_is_of_the_prompts(monkeypatch):
    """Importance that is the same on every prompt, and one that is turned round on the second half of them."""
    monkeypatch.setattr(attribution_check, "DRAWS", 9)
    one = np.linspace(0.1, 0.6, 6)
    same, turned = np.outer(one, np.ones(8)), np.outer(one, np.ones(8))
    turned[:, 4:] = turned[::-1, 4:]
    rows = dict(lesioned(same, HALVES, 2))
    assert [name.split(",")[1].split()[0] for name in rows] == ["a", "half", "as"]
    assert all(cell.startswith("1.00, 1.00 (6), 2/2, ") for cells in rows.values() for cell in cells)
    assert [cells[2].split(", ")[-1] for cells in rows.values()] == ["25.0 %", "50.0 %", "100.0 %"]
    (*_, others) = dict(lesioned(turned, HALVES, 2)).values()
    assert [cell.split(", ")[0] for cell in others[:2]] == ["-1.00", "-1.00"] and others[0].endswith("0/2, 100.0 %")
