"""Tables of a run folder: every changed bit is noticed or changes nothing."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
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


def test_pages_carry_checksums_where_the_digests_are_lost(tmp_path):
    frame = pd.DataFrame({"value": np.random.default_rng(0).random(4000)})
    (path,) = tables.write(tmp_path, {"results": frame})
    (tmp_path / tables.SUMS).unlink()
    whole = path.read_bytes()
    for place in range(1000, 20_000, 400):  # in the 32,000 bytes of its values
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(OSError, match=r"(?i)crc|checksum|corrupt"):
            tables.read(path)
