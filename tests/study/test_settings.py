"""Settings of generation and columns of results: declared once, and the keys of version 0.1 stay."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hydra import compose, initialize_config_dir

from conftest import settings
from lesion.config.parsing import parse
from lesion.config.schema import conf_dir, register
from lesion.errors import RequestError
from lesion.run.job import survey
from lesion.study.columns import COLUMNS, EARLIER, GENERATION, IDENTITY, LESION, MADE, NEEDED, SEVERAL
from lesion.study.settings import DECLARED, Settings

OLD = Path(__file__).parents[1] / "fixtures" / "v0.1"
RUNS = sorted(path.name for path in (OLD / "runs").iterdir())


def asked(*overrides):
    register(conf_dir())
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return parse(compose("lesion", list(overrides)))


@pytest.mark.parametrize("name", RUNS)
def test_cells_have_the_keys_and_columns_they_had_in_version_0_1(name, monkeypatch):
    monkeypatch.chdir(OLD)
    request = asked(*yaml.safe_load((OLD / "runs" / name / "overrides.yaml").read_text()), "device=cpu")
    then = pd.read_parquet(OLD / "runs" / name / "results.parquet")
    _, study = survey(request)
    assert [cell.key for cell in study.cells()] == then["cell"].tolist()
    layers = then.loc[then["layer"] != "", ["layer", "layer_index"]].drop_duplicates()
    paths = dict(zip(layers["layer_index"], layers["layer"], strict=True))
    padded = [paths.get(number, "") for number in range(max(paths, default=-1) + 1)]
    of_cells = [column for column in COLUMNS if column.of]
    for column in of_cells:
        if column.name != "prompt_id":  # longer since
            values = [column.of(cell, padded) for cell in study.cells()]
            later = [column.earlier] * len(then)  # of a column that 0.1 did not have
            assert values == then.get(column.name, pd.Series(later)).tolist(), column.name


def test_columns_mean_what_they_meant_for_comparing_runs():
    """Those of version 0.1, by hand, and what was added."""
    assert LESION == ("kind", "replacement", "window_start", "window_end", "branch", "strength")
    then = ("task", "steps", "guidance", "height", "width", "scheduler", "negative_prompt", "noising")
    assert (*then, "noise", "steering", "steering_settings") == GENERATION  # the last three since
    assert set(IDENTITY) == {"fingerprint", "dtype", "device", "scorer_identity", "importance_metric", "protocol"}
    assert set(MADE) == {"fingerprint", "dtype", "device"}
    assert SEVERAL == ("lesioned", "order", "permutation")
    assert {"model", "prompt_id", "seed", "selection", "layer", "status", "image", "cell"} <= set(NEEDED)
    assert {
        **{"kind": "cross_attention", "lesioned": "", "aspects": "", "init": "", "noising": 0.0},
        "negative_prompt": "",
        "noise": "shared",
        **dict.fromkeys(("boxes", "steering", "steering_settings", "steering_layers"), ""),
        **dict.fromkeys(("card", "torch", "diffusers", "lesion"), ""),
    } == EARLIER


def test_what_is_at_its_default_is_in_no_key_and_not_passed():
    plain = settings()
    assert set(plain.identity()) == {"task", "steps", "guidance", "height", "width", "scheduler"}
    assert plain.arguments(2) == {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16}
    other = settings(negative_prompt="b", noising=0.5, batch_size=3)
    assert other.identity() == {**plain.identity(), "negative_prompt": "b", "noising": 0.5}
    assert other.arguments(2) == {**plain.arguments(2), "negative_prompt": ["b", "b"], "strength": 0.5}
    assert settings(batch_size=3) == plain  # it changes no pixel


def test_own_noise_makes_cells_of_its_own_and_leaves_calibration_as_it_is():
    own = settings(noise="own")
    assert own.identity() == {**settings().identity(), "noise": "own"}
    assert own.provenance() == settings().provenance()
    (_, study), (_, shared) = survey(asked("generation.noise=own")), survey(asked())
    assert set(study.keys()).isdisjoint(shared.keys())
    with pytest.raises(RequestError, match=r"generation\.noise: must be shared or own; got 'other'"):
        asked("generation.noise=other")


def test_every_declared_argument_is_kept_from_model_arguments():
    from lesion.models.source import SETTLED

    arguments = {one.argument for one in DECLARED if one.argument}
    assert arguments == {"num_inference_steps", "guidance_scale", "height", "width", "negative_prompt", "strength"}
    assert arguments <= SETTLED
    assert [one.name for one in DECLARED][:6] == ["task", "steps", "guidance", "height", "width", "scheduler"]
    assert Settings("txt2img", 4, 1.0, 8, 8).scheduler == ""


REPOSITORY = Path(__file__).parents[2]
# What a process sees in which the declaration of CONTRIBUTING.md is made.
SEEN = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from lesion import tasks
from lesion.config.compose import one_line
from lesion.config.parsing import parse
from lesion.config.schema import conf_dir, register
from lesion.errors import RequestError
from lesion.models.calling import arguments
from lesion.report import merging
from lesion.run.job import _check_pipeline, survey
from lesion.study.columns import row

old = Path(sys.argv[1])
register(conf_dir())

def refusal(make):
    try:
        make()
    except (RequestError, HydraException, merging.Refused) as error:
        return one_line(error)

def asked(*overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return parse(compose("lesion", ["device=cpu", *overrides]))

class Pipe:
    def __call__(self, prompt, eta=0.0):
        pass

def called(study):
    return arguments(Pipe(), study.settings, ["a"], [None])

(_, plain), (_, noisy) = survey(asked()), survey(asked("generation.eta=0.5"))
run = merging.read(old, old)
other = merging.Run(old / "other", run.frame.assign(eta=0.5))
flux = SimpleNamespace(pipeline="FluxPipeline", embedded_guidance=True)
print(json.dumps({
    "type": refusal(lambda: asked("generation.eta=much")),
    "range": refusal(lambda: asked("generation.eta=1.5")),
    "not_taken": refusal(lambda: _check_pipeline(noisy.settings, ("both",), flux)),
    "keys": [next(study.keys()) for study in (plain, noisy)],
    "identity": noisy.settings.identity().get("eta"),
    "provenance": ["eta" in study.settings.provenance() for study in (plain, noisy)],
    "columns": [row(next(study.cells()), ())["eta"] for study in (plain, noisy)],
    "earlier": run.frame["eta"].unique().tolist(),
    "apart": refusal(lambda: merging.check([run, other])),
    "alike": refusal(lambda: merging.check([run, run])),
    "called": [called(study).get("eta") for study in (plain, noisy)],
    "tasks": tasks.known(),
    "task": asked("generation.task=outpaint").settings.task,
}))
"""


def with_declaration(folder):
    """A copy of the package and conf/, links but for the files that the diff in CONTRIBUTING.md changes."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    changed = {}
    for part in diff.split("--- ")[1:]:
        name, before, *added = part.splitlines()
        assert all(line.startswith("+") for line in added)
        content = (REPOSITORY / name).read_text()
        assert content.count(f"{before[1:]}\n") == 1
        lines = "".join(f"{line}\n" for line in (before[1:], *(line[1:] for line in added)))
        changed[name] = content.replace(f"{before[1:]}\n", lines)
    for name in (*changed, "src/lesion/tasks/outpaint.py"):
        for above in reversed(Path(name).parents):
            (folder / above).mkdir(exist_ok=True)
    for own in [*folder.rglob("*"), folder / "src"]:
        if own.name not in (folder.name, "src"):
            for one in (REPOSITORY / own.relative_to(folder)).iterdir():
                if not (own / one.name).exists() and str(one.relative_to(REPOSITORY)) not in changed:
                    (own / one.name).symlink_to(one)
    for name, content in changed.items():
        (folder / name).write_text(content)
    (folder / "src/lesion/tasks/outpaint.py").write_text("from lesion.tasks import Task\n\nTASK = Task()\n")
    return changed


def test_a_setting_is_declared_once(tmp_path):
    """The diff of CONTRIBUTING.md, and a file for a task, are all that it takes."""
    folder = tmp_path / "copy"
    folder.mkdir()
    changed = with_declaration(folder)
    assert sorted(changed) == ["conf/lesion.yaml", "src/lesion/study/settings.py"]
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SEEN, str(OLD / "runs" / "grid")],
        env=os.environ | {"PYTHONPATH": str(folder / "src")},
        cwd=tmp_path / "work",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert "'much'" in seen["type"]
    assert seen["range"] == "generation.eta: must be a number in [0, 1]; got 1.5"
    assert seen["not_taken"] == "generation.eta: FluxPipeline takes none; allowed: 0.0"
    _, without = survey(asked("device=cpu"))
    assert seen["keys"][0] == next(without.keys()) != seen["keys"][1]
    assert seen["identity"] == 0.5
    assert seen["provenance"] == [False, True]
    assert seen["columns"] == [0.0, 0.5]
    assert seen["earlier"] == [0.0]
    assert re.search(r"cannot be compared: eta of \S+ is 0.0 in .*grid, 0.5 in ", seen["apart"])
    assert seen["alike"] is None
    assert seen["called"] == [None, 0.5]
    assert seen["tasks"] == ["txt2img", "img2img", "outpaint"]
    assert seen["task"] == "outpaint"
