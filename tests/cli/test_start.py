"""What a start imports, told by `sys.modules` of a process that does nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SLOW = ("torch", "diffusers", "open_clip", "transformers", "wandb", "scipy.stats", "matplotlib")
# One process takes several ways in turn; a way that imports something slow is named with it.
WAYS = """
import contextlib, io, sys
from pathlib import Path
import lesion
def way(name, module, *arguments):
    sys.argv = ["lesion", *arguments]
    code = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            module.main()
        except SystemExit as end:
            code = end.code or 0
    print(name, code, *(slow for slow in {slow} if slow in sys.modules))
print("import", 0, *(slow for slow in {slow} if slow in sys.modules))
from lesion.cli import study
way("help", study, "--help")
way("unknown_key", study, "colour=red")
way("refused", study, "seeds=-1")
from lesion.cli import report
way("report_help", report, "--help")
way("dry_run", study, "dry_run=true", "hydra.run.dir=run", "store.dir=store")
print("pandas" in sys.modules)
""".replace("{slow}", repr(SLOW))


def test_help_and_refusals_import_nothing_slow(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WAYS], capture_output=True, text=True, check=True, cwd=tmp_path)
    ways = ["import 0", "help 0", "unknown_key 2", "refused 2", "report_help 0", "dry_run 0"]
    assert done.stdout.splitlines() == [*ways, "False"]
