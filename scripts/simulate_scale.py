"""What prompts, claims, listings, score files and the merge of large studies cost, without a model (docs/scale.md).

    python scripts/simulate_scale.py merge --rows 1000000 --shards 256
    python scripts/simulate_scale.py open --rows 1000000
    python scripts/simulate_scale.py listing --rows 1000000
    python scripts/simulate_scale.py claims --rows 100000 --workers 16
    python scripts/simulate_scale.py parts --rows 1000000 --workers 256
    python scripts/simulate_scale.py prompts --rows 200000 --images 100

Each prints JSON: seconds on the clock, cpu (seconds of processor time, which other work changes less), peak
(resident memory of the process that is measured, MiB), and what it counted. `--folder` keeps what was made up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from bench.child import made_up, peak
from lesion.run import table
from lesion.run.publish import Publisher
from lesion.store import tables
from lesion.store.claims import Claims
from lesion.store.images import Picture, Store
from lesion.store.scores import Scores
from lesion.study.grid import Cell, Study
from lesion.study.prompts import parse_prompts
from lesion.study.shards import Shard

LAYERS = 12  # leave_one_out and only_one of these, and a baseline: 25 cells a subject
SEEDS = 4
METRIC = "clip_similarity"


def study(rows: int) -> Study:
    """Lay out a study of about so many cells: prompts with 4 seeds and 25 cells each."""
    whole: Study = made_up(max(1, round(rows / (1 + 2 * LAYERS) / SEEDS)), SEEDS, LAYERS)
    return whole


class Scored:
    """What `ScoreQueue` tells of images that are all there, with similarities that depend on layer and key."""

    identities = {METRIC: "made up"}  # noqa: RUF012
    spec = SimpleNamespace(name="made up", importance=METRIC)
    fact = Picture(1, 1, "0" * 32, "")

    def picture(self, key: str) -> Picture:
        return self.fact

    def values(self, cell: Cell) -> dict[str, float]:
        if cell.lesion is None:
            return {METRIC: 1.0}
        layer = int(cell.lesion.layer.rpartition(".")[2])
        return {METRIC: 0.9 - 0.03 * layer + int(cell.key[:4], 16) / 2**20}


def shards(folder: Path, rows: int, count: int) -> int:
    """Write the run folders of so many shards; return their rows. One that is there stays."""
    whole, total = study(rows), 0
    for index in range(count):
        part, run = replace(whole, shard=Shard(index, count)), folder / str(index)
        total += len(part)
        if (run / "results.parquet").exists():
            continue
        run.mkdir(parents=True, exist_ok=True)
        frame = table.results(part, Scored(), part.layers, {}, Publisher(Store(folder / "store"), run))  # type: ignore[arg-type]
        tables.write(run, {"results": frame})
    return total


def merge(folder: Path, rows: int, count: int) -> dict[str, Any]:
    """Make the report over all shards as `lesion-report` does."""
    total = shards(folder, rows, count)
    return {"rows": total, "shards": count} | _measured("report", str(folder))


def reopened(folder: Path, rows: int, count: int) -> dict[str, Any]:
    """Open one run folder from Python and work out its importance."""
    total = shards(folder, rows, 1)
    return {"rows": total} | _measured("reopened", str(folder / "0"))


def _measured(what: str, given: str) -> dict[str, Any]:
    command = [sys.executable, __file__, what, "--folder", given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _report(folder: Path) -> dict[str, Any]:
    from lesion.cli.report import report
    from lesion.report.merging import run_folders

    began, cpu = time.perf_counter(), time.process_time()
    known, written = report(run_folders([folder]), folder, mix=True)
    return {"merged": len(known.frame), "files": len(written), "seconds": time.perf_counter() - began,
            "cpu": time.process_time() - cpu}  # fmt: skip


def _reopened(folder: Path) -> dict[str, Any]:
    from lesion.api import open as opened

    began, cpu = time.perf_counter(), time.process_time()
    results = opened(folder)
    read, read_cpu = time.perf_counter() - began, time.process_time() - cpu
    found = results.importance()
    return {"read": read, "read cpu": read_cpu, "layers": len(found), "seconds": time.perf_counter() - began,
            "cpu": time.process_time() - cpu}  # fmt: skip


def listing(folder: Path, rows: int, count: int) -> dict[str, Any]:
    """List a store of so many empty files, as each start does."""
    for number in range(256):
        (folder / "cells" / f"{number:02x}").mkdir(parents=True, exist_ok=True)
    for key in _keys(rows):
        (folder / "cells" / key.hex()[:2] / f"{key.hex()}.png").touch()
    before, began = peak(), time.perf_counter()
    known = Store(folder).known()
    seconds = time.perf_counter() - began
    return {"listed": len(known), "files a folder": rows // 256, "seconds": seconds,
            "bytes an image": (peak() - before) / rows}  # fmt: skip


def _keys(rows: int) -> list[bytes]:
    raw = np.random.default_rng(0).bytes(16 * rows)
    return [raw[16 * i : 16 * (i + 1)] for i in range(rows)]


def claims(folder: Path, rows: int, count: int) -> dict[str, Any]:
    """So many claimants take and give back every key in batches of 32."""
    keys = [key.hex() for key in _keys(rows)]
    claimants = [Claims(folder, required=True) for _ in range(count)]
    began, taken = time.perf_counter(), 0
    for place in range(0, rows, 32):
        batch, one = keys[place : place + 32], claimants[place // 32 % count]
        taken += len(one.take(batch))
        one.release(batch)
    seconds = time.perf_counter() - began
    for one in claimants:
        one.close()
    return {"claims": taken, "seconds": seconds, "microseconds a claim": 1e6 * seconds / rows}


def parts(folder: Path, rows: int, count: int) -> dict[str, Any]:
    """So many workers write the scores of their images, 2,048 at a time; then one process reads them, and again."""
    keys, files = [key.hex() for key in _keys(rows)], 0
    share = -(-rows // count)
    for worker in range(count):
        scores = Scores(folder, {METRIC: "made up"})
        own = keys[worker * share : (worker + 1) * share]
        for place in range(0, len(own), 2048):
            for key in own[place : place + 2048]:
                scores.add_picture(key, Picture(1, 1, key, ""))
                scores.add_values(key, key, {METRIC: 1.0})
            scores.flush()
    files = sum(1 for path in folder.rglob("*.parquet"))
    found = []
    for _ in range(2):
        began = time.perf_counter()
        Scores(folder, {METRIC: "made up"}).load()
        found.append(time.perf_counter() - began)
    return {"records": rows, "files": files, "first read, merging": found[0], "second read": found[1],
            "files after": sum(1 for path in folder.rglob("*.parquet"))}  # fmt: skip


def prompts(folder: Path, rows: int, count: int) -> dict[str, Any]:
    """Load so many prompts from a file of each form; then whole dry runs, without images and beside other studies'."""
    texts = [f"a photo of {n} animals in front of a white house and a tree, number {n}" for n in range(rows)]
    files = {
        "csv": "id,prompt,category\n" + "".join(f'{n},"{text}",kind {n % 7}\n' for n, text in enumerate(texts)),
        "jsonl": "".join(json.dumps({"prompt": text, "tag": f"kind {n % 7}"}) + "\n" for n, text in enumerate(texts)),
        "txt": "\n".join(texts),
    }
    found: dict[str, Any] = {}
    for form, text in files.items():
        (folder / f"a.{form}").write_text(text, encoding="utf-8")
        began = time.process_time()
        loaded = parse_prompts({"path": str(folder / f"a.{form}")}).prompts
        found[f"load {form}, cpu"] = time.process_time() - began
        if len(loaded) != rows:
            raise RuntimeError(f"{len(loaded)} of {rows} prompts are loaded")
    found["dry run, cpu"] = _dry_run(folder, "a.csv")
    other = made_up(count, 1, LAYERS)
    for cell in itertools.islice(other.cells(), count):
        Store(folder / "store").put(cell, np.zeros((64, 64, 3), np.uint8))
    found[f"dry run beside {count} images of another study, cpu"] = _dry_run(folder, "a.csv")
    return {"prompts": rows, **found}


def _dry_run(folder: Path, name: str) -> float:
    """Seconds of processor time of a whole process, from the interpreter's start to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "lesion", f"prompts={name}", "dry_run=true", "tracker=none"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


TASKS = {"merge": merge, "open": reopened, "listing": listing, "claims": claims, "parts": parts, "prompts": prompts}
INNER = {"report": _report, "reopened": _reopened}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*TASKS, *INNER])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shards", "--workers", "--images", type=int, default=256, dest="count")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.task in INNER:
        found = INNER[given.task](given.folder)
    else:
        with tempfile.TemporaryDirectory() as fresh:
            found = TASKS[given.task](given.folder or Path(fresh), given.rows, given.count)
    print(json.dumps({"peak MiB": round(peak() / 2**20), **found}))


if __name__ == "__main__":
    main()
