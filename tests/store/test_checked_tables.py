"""Tables of a run folder: every changed bit is noticed or changes nothing."""

from __future__ import annotations

import hashlib
import io
import random
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from lesion.report.merging import Refused, read
from lesion.store import tables

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v0.1" / "runs" / "grid"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    frames = {name: pd.read_parquet(FIXTURE / f"{name}.parquet") for name in ("results", "floor")}
    assert tables.write(folder, frames) == [folder / "results.parquet", folder / "floor.parquet"]
    return folder, frames


def test_tables_come_back_with_digests_that_sha256sum_reads(written):
    folder, frames = written
    for name, frame in frames.items():
        pd.testing.assert_frame_equal(tables.read(folder / f"{name}.parquet"), frame)
        pd.testing.assert_frame_equal(pd.read_parquet(folder / f"{name}.parquet"), frame)
    if shutil.which("sha256sum"):
        command = ["sha256sum", "--strict", "-c", tables.SUMS]
        assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0
    tables.write(folder, frames)  # again, in place of the old ones
    read(folder, folder)


@pytest.mark.parametrize("name", ["results.parquet", "floor.parquet", tables.SUMS])
def test_no_changed_bit_loads_other_values(written, tmp_path, name):
    folder, frames = written
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    whole, rng, noticed = (tmp_path / name).read_bytes(), random.Random(0), 0
    flips = 600 if name == "results.parquet" else 60
    for _ in range(flips):
        place = rng.randrange(8 * len(whole))
        broken = bytearray(whole)
        broken[place // 8] ^= 1 << place % 8
        (tmp_path / name).write_bytes(broken)
        try:
            found = {one: tables.read(tmp_path / f"{one}.parquet") for one in frames}
        except ValueError:
            noticed += 1
        else:
            assert all(found[one].equals(frames[one]) for one in frames)
    assert noticed == flips if name.endswith(".parquet") else noticed > flips / 2


def test_a_changed_table_is_refused_by_lesion_report(written, tmp_path):
    folder, frames = written
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    frames["results"].assign(clip_similarity=0.5).to_parquet(tmp_path / "results.parquet", index=False)
    with pytest.raises(Refused, match="its content has changed: SHA256SUMS has another digest"):
        read(tmp_path, tmp_path)
    (tmp_path / tables.SUMS).unlink()  # as the message says
    assert set(read(tmp_path, tmp_path).frame.clip_similarity) == {0.5}
    read(FIXTURE, tmp_path)  # of version 0.1


def test_a_table_shows_a_changed_bit_also_where_the_digests_beside_it_are_lost(written, tmp_path):
    folder, frames = written
    whole, path = (folder / "results.parquet").read_bytes(), tmp_path / "results.parquet"
    rng, noticed = random.Random(1), 0
    for _ in range(600):
        place = rng.randrange(8 * len(whole))
        broken = bytearray(whole)
        broken[place // 8] ^= 1 << place % 8
        path.write_bytes(broken)
        try:
            found = tables.read(path)
        except ValueError:
            noticed += 1
        else:  # a bit of the words before the digest
            assert found.equals(frames["results"])
    assert noticed >= 595
    path.write_bytes(whole)
    assert tables.read(path).equals(frames["results"])
    path.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    with pytest.raises(ValueError, match="it is not what its own digest is of"):
        tables.read(path)


def test_the_digest_is_that_of_the_file_with_zeros_in_its_place(written):
    content = (written[0] / "results.parquet").read_bytes()
    start = content.rindex(b"lesion-sha256:") + len(b"lesion-sha256:")
    zeroed = content[:start] + b"0" * 64 + content[start + 64 :]
    assert hashlib.sha256(zeroed).hexdigest().encode() == content[start : start + 64]
    pages = pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True)  # for who reads a part of it
    assert pages.read().num_rows == len(written[1]["results"])
