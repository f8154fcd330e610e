"""docs/reliability.md: every row names a test that is there, and says of each whether it is slow."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (?!accident|---).*\|$", re.M)
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`( \(slow\))?")


def test_every_accident_has_its_test():
    rows = ROW.findall((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))
    assert len(rows) > 40
    for row in rows:
        named = NAMED.findall(row)
        assert named, row
        for file, name, slow in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            (found,) = [one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == name]
            marks = [ast.unparse(one) for one in found.decorator_list]
            assert bool(slow) == any(mark.startswith("pytest.mark.slow") for mark in marks), f"{file}::{name}"
