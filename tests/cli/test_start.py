"""What a start imports, told by `sys.modules` of a process that does nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

SLOW = ("torch", "diffusers", "open_clip", "transformers", "wandb", "scipy.stats", "matplotlib")
FINISHED = Path(__file__).parents[1] / "fixtures" / "v0.1"
# One process takes several ways in turn; a way that imports something slow is named with it.
WAYS = """
import contextlib, io, json, sys
slow, finished = json.loads(sys.argv[1])
def say(name, code):
    print(name, code, *(module for module in slow if module in sys.modules))
def way(name, module, *arguments):
    sys.argv = ["lesion", *arguments]
    code = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            module.main()
        except SystemExit as end:
            code = end.code or 0
    say(name, code)
import lesion
say("import", 0)
from lesion.cli import study
way("help", study, "--help")
way("unknown_key", study, "colour=red")
way("refused", study, "seeds=-1")
from lesion.cli import report
way("report_help", report, "--help")
from lesion.cli import audit
way("audit_help", audit, "--help")
way("dry_run", study, "dry_run=true", "scorer=openclip_vit_l14", "hydra.run.dir=run", "store.dir=other")
print("pandas" in sys.modules)
from hydra import compose, initialize_config_dir
from lesion.config.parsing import parse
from lesion.config.schema import conf_dir
from lesion.run.job import results
with initialize_config_dir(str(conf_dir()), version_base="1.3"):
    frame = results(parse(compose("lesion", finished)))
    say("reopened", len(frame) * (frame["status"] == "ok").all())
    request = parse(compose("lesion", [*finished, "capture=maps", "capture.layers=[mid*]"]))
from pathlib import Path
import numpy as np
from lesion.run.capture import maps_of
from lesion.run.job import JobContext, complete, survey
from lesion.store.maps import ImageMaps
source, study = survey(request)
maps = maps_of(request, source)
layer, entries = maps.capture.layers[0], {"a": [0], "<special>": [1], "<rest>": []}
for cell in study.cells():
    maps.put(cell, ImageMaps({"cond": {layer: np.full((1, 1, 2, 2, 2), 0.5, np.float32)}}, {"cond": entries}))
Path("again").mkdir()
outcome = complete(request, JobContext(Path("again"), "maps", None, {}), (source, study), report=False)
say("with_maps", len(outcome.frame) * (outcome.frame["attention_share"] == 0.5).all())
"""


def test_starts_import_nothing_slow(tmp_path: Path) -> None:
    shutil.copytree(FINISHED / "store", tmp_path / "store")
    run = yaml.safe_load((FINISHED / "runs" / "grid" / "overrides.yaml").read_text())
    done = subprocess.run(
        [sys.executable, "-c", WAYS, json.dumps([SLOW, run])],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    ways = ["import 0", "help 0", "unknown_key 2", "refused 2", "report_help 0", "audit_help 0", "dry_run 0", "False"]
    *lines, reopened, with_maps = done.stdout.splitlines()
    assert lines == ways
    for line, expected in ((reopened, "reopened"), (with_maps, "with_maps")):
        name, rows, *imported = line.split()
        assert (name, imported) == (expected, [])
        assert int(rows) > 10
