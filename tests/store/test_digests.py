"""Digests of weights that a machine remembers: of what the file has, whatever happens to it."""

from __future__ import annotations

import hashlib
import os
import time

import pytest

from lesion.store import digests


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file that counts as large, last changed long ago; reading it is counted."""
    path, read = tmp_path / "weights.safetensors", digests._read
    monkeypatch.setenv("LESION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "LARGE", 1)
    monkeypatch.setattr(digests, "SETTLED", -1.0)
    monkeypatch.setattr(digests, "_read", lambda path: (counts.append(path), read(path))[1])
    counts = []
    path.write_bytes(b"first")
    return path, counts


def asked(path) -> bytes:
    """As by another process, which has read nothing yet."""
    digests._sha256.cache_clear()
    found = digests.sha256_of(path)
    assert found == hashlib.sha256(path.read_bytes()).digest()
    return found


def test_a_file_is_read_once_a_machine(weights, tmp_path):
    path, read = weights
    (tmp_path / "link").symlink_to(path)
    assert asked(path) == asked(path) == asked(tmp_path / "link")
    assert len(read) == 1
    (note,) = (tmp_path / "cache" / "digests").iterdir()
    for damage in (b"", b"[]", note.read_bytes().replace(b'"sha256": "', b'"sha256": "00')[:-3] + b'"}'):
        note.write_bytes(damage)
        asked(path)
    assert len(read) == 4


def test_a_changed_file_is_read_again(weights):
    path, read = weights
    asked(path)
    facts = path.stat()
    path.write_bytes(b"other")  # as long, and its time is put back
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    asked(path)
    other = path.with_name("new")
    other.write_bytes(b"third")
    os.utime(other, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    other.replace(path)
    asked(path)
    assert len(read) == 3


def test_a_file_that_may_still_change_within_one_tick_is_not_remembered(weights, tmp_path, monkeypatch):
    path, read = weights
    monkeypatch.setattr(digests, "SETTLED", 2.0)
    asked(path)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(time, "time_ns", lambda: path.stat().st_ctime_ns + 3 * 10**9)
    asked(path), asked(path)
    assert len(read) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(weights, tmp_path, monkeypatch):
    path, read = weights
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LESION_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert asked(path) == asked(path)
    assert len(read) == 2
