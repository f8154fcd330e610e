"""What is measured in a process of its own: `python -m bench.child plan|reopen|rerun|job JSON` prints JSON.

plan: {prompts, seeds, layers, folder} -> seconds, rows, peak. reopen: {overrides} -> seconds, rows, peak.
rerun: {overrides, run} -> seconds, rows, peak. job: {overrides, store, run} -> images, peak.
Peaks are resident memory of the whole process in bytes.
"""

from __future__ import annotations

import io
import json
import re
import resource
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


def peak() -> int:
    """The most resident memory of this process so far, bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage can carry a figure over from the process that started this one
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def made_up(prompts: int, seeds: int, layers: int) -> Any:
    """Lay out a study of leave-one-out and only-one, with no model behind it."""
    from lesion.study.grid import ModelIdentity, Study
    from lesion.study.lesions import Replacement
    from lesion.study.prompts import Prompt
    from lesion.study.settings import Settings

    return Study(
        model=ModelIdentity("model", "f" * 32, "float16", "cuda"),
        settings=Settings("txt2img", 30, 5.0, 1024, 1024, "EulerDiscreteScheduler"),
        prompts=tuple(Prompt(f"prompt number {i} of a large study", id=f"p{i}") for i in range(prompts)),
        seeds=tuple(range(seeds)),
        layers=tuple(f"down_blocks.0.attentions.{i}" for i in range(layers)),
        selections={"leave_one_out": {}, "only_one": {}},
        replacements=(Replacement("zero"),),
    )


def plan(prompts: int, seeds: int, layers: int, folder: str) -> dict[str, Any]:
    """Lay out, count and put in batches a study over an empty store."""
    from lesion.store.images import Store
    from lesion.study.plan import batches, tally  # and with them all that a study is of

    began = time.perf_counter()
    study = made_up(prompts, seeds, layers)
    known = Store(Path(folder)).known()
    counts = tally(study, known.lists)
    batched = sum(len(batch) for batch in batches(study, 32, known.__contains__))
    return {"seconds": time.perf_counter() - began, "rows": counts.rows, "batched": batched, "peak": peak()}


def reopen(overrides: list[str]) -> dict[str, Any]:
    """From the request of a finished study to its table."""
    from bench.setup import request
    from lesion.run import job as runner

    asked = request(overrides)
    began = time.perf_counter()
    table = runner.results(asked)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "rows": len(table),
        "scored": int(table["clip_similarity"].notna().sum()),
        "peak": peak(),
    }


def rerun(overrides: list[str], run: str) -> dict[str, Any]:
    """A whole job whose images are all there: what a user who starts it again waits for."""
    from bench.setup import request
    from lesion.run import job as runner

    asked, folder = request(overrides), Path(run)
    folder.mkdir(parents=True)
    began = time.perf_counter()
    with redirect_stdout(io.StringIO()):
        runner.run(asked, runner.JobContext(folder, folder.name, None, {}), runner.survey(asked))
    seconds = time.perf_counter() - began
    import pandas as pd

    return {"seconds": seconds, "rows": len(pd.read_parquet(folder / "results.parquet")), "peak": peak()}


def job(overrides: list[str], store: str, run: str) -> dict[str, Any]:
    """One whole job."""
    from bench.setup import job as whole

    _, frame = whole(Path(store), Path(run), overrides)
    return {"images": len(frame), "peak": peak()}


TASKS = {"plan": plan, "reopen": reopen, "rerun": rerun, "job": job}

if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](**json.loads(sys.argv[2]))))
