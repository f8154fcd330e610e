"""Memory that was freed: kept for the next tensor, given back when asked. In processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lesion.models import allocator

CODE = """
import re, resource, sys
import numpy as np
from lesion.models import allocator

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024

if sys.argv[1] == "kept":
    allocator.keep_freed()
before, found = resident(), []
for _ in range(5):
    at = faults()
    block = np.full(96 << 20, 1, np.uint8)
    del block
    found.append(faults() - at)
held = resident() - before
allocator.give_back()
print(min(found[1:]), held, resident() - before)
"""


def run(how: str, **environment: str) -> list[int]:
    """Page faults of a further block of 96 MiB, MiB held after it was freed, and after they were given back."""
    given = {name: value for name, value in os.environ.items() if name not in allocator._OWN}
    found = subprocess.run(
        [sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True, env=given | environment
    )
    return [int(word) for word in found.stdout.split()]


@pytest.mark.skipif(allocator._glibc() is None, reason="another C library")
def test_freed_memory_is_kept_for_the_next_tensor_until_it_is_given_back():
    faults, held, left = run("kept")
    assert faults < 20 and held > 80 and left < 20
    for faults, held, _ in (run("untouched"), run("kept", MALLOC_TRIM_THRESHOLD_="131072")):
        assert faults >= 48 and held < 20  # pages of 2 MB at most


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(os, "confstr", lambda name: None, raising=False)
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    allocator.keep_freed()
    allocator.give_back()
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ
