"""Seconds of whole processes that make no image, and of a job up to its first denoiser call.

Each is held against `python -c "import torch, diffusers"` in the same round: seconds of two machines do not compare.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from bench.report import Row, alternate, ratios
from bench.scale import fill
from bench.setup import Options, Setup, request
from lesion.run import job as runner
from lesion.store.images import Store

REFERENCE = "import torch, diffusers"
MAIN = "from lesion.cli.{} import main; main()"
# What each process runs, and the most that its seconds may be of the reference's (5 s on two quiet cores).
WAYS: dict[str, tuple[str, str, float | None]] = {
    "import lesion": ("import lesion", "import lesion", 0.06),
    "help": ("lesion --help", MAIN.format("study"), 0.3),
    "refused": ("lesion seeds=-1, which is refused", MAIN.format("study"), 0.4),
    "dry run": ("lesion dry_run=true of the embedded model", MAIN.format("study"), 0.5),
    "inspect": ("lesion-inspect model=embedded, which builds the modules", MAIN.format("structure"), None),
    "report help": ("lesion-report --help", MAIN.format("report"), 0.15),
}
ARGUMENTS = {
    "help": ["--help"],
    "refused": ["seeds=-1"],
    "dry run": ["dry_run=true", "tracker=none"],
    "inspect": ["model=embedded"],
    "report help": ["--help"],
}
REOPEN = """
import sys
from hydra import compose, initialize_config_dir
from lesion.config.parsing import parse
from lesion.config.schema import conf_dir, register
from lesion.run.job import results
register(conf_dir())
with initialize_config_dir(str(conf_dir()), version_base="1.3"):
    request = parse(compose("lesion", ["experiment=demo", "tracker=none", *sys.argv[1:]]))
frame = results(request)
assert (frame["status"] == "ok").all() and frame["clip_similarity"].notna().all()
"""
FIRST_CALL = """
import os, sys
from lesion.models import loading
load = loading._load
def first_call(*arguments):
    print("denoiser called", flush=True)
    os._exit(0)
def watched(source, device):
    model = load(source, device)
    model.denoiser.register_forward_pre_hook(first_call)
    return model
loading._load = watched
from lesion.cli.study import main
main()
"""


def seconds(code: str, arguments: list[str], folder: Path) -> float:
    """Of a process that runs this code. Raises RuntimeError where it ends with a traceback."""
    source = str(Path(runner.__file__).parents[2])
    paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    found = time.perf_counter() - began
    if re.search("^Traceback", done.stderr, re.MULTILINE) or done.returncode not in (0, 2):
        raise RuntimeError(f"{arguments} failed: {done.stderr.strip()[-2000:]}")
    return found


def start(this: Setup, options: Options) -> tuple[str, list[Row]]:
    subjects, layers = (2, 3) if options.quick else (400, 12)
    include = f"layers.include=[{','.join(this.paths()[:layers])}]"
    finished = [*this.overrides(subjects), include, f"store.dir={options.scratch / 'finished'}"]
    _, study = runner.survey(request(finished))
    fill(study, Store(options.scratch / "finished"))
    runner.results(request(finished))  # scores every image
    fresh = ["tracker=none", f"store.dir={options.scratch / 'empty'}", "hydra.run.dir=run"]

    def way(code: str, arguments: list[str]) -> float:
        return seconds(code, arguments, options.scratch)

    sides = {name: (code, ARGUMENTS.get(name, [])) for name, (_, code, _) in WAYS.items()}
    sides |= {"reference": (REFERENCE, []), "reopening": (REOPEN, finished), "first call": (FIRST_CALL, fresh)}
    if options.quick:  # whether it works at all: few processes
        sides = {name: sides[name] for name in ("report help", "reopening")} | {"reference": ("import numpy", [])}
    found = alternate(
        options.repeats,
        {name: lambda code=code, given=given: way(code, given) for name, (code, given) in sides.items()},  # type: ignore[misc]
    )
    what = {name: (said, most) for name, (said, _, most) in WAYS.items()}
    what["reopening"] = (f"a finished study of {len(study):,} cells to its table", 0.8)
    what["first call"] = ("a job with images to make, up to its first denoiser call", None)
    rows = [Row("reference", f'python -c "{sides["reference"][0]}"', found["reference"], " s")]
    for name, (said, most) in what.items():
        if name not in found:
            continue
        rows.append(Row(name, f"{said} / reference", ratios(found[name], found["reference"]), "x", at_most=most))
        rows.append(Row("", "the same in seconds", found[name], " s"))
    note = (
        "Whole processes, from interpreter start to exit, files in the system's cache; each over the reference of the "
        "same round. Made-up images in the finished study."
    )
    return note, rows
