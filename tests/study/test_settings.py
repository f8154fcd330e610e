"""Settings of generation and columns of results: declared once, and the keys of version 0.1 stay."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml
from hydra import compose, initialize_config_dir

from conftest import settings
from lesion.config.parsing import parse
from lesion.config.schema import conf_dir, register
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
            assert values == then[column.name].tolist(), column.name


def test_columns_mean_what_they_meant_for_comparing_runs():
    """Those of version 0.1, by hand."""
    assert LESION == ("kind", "replacement", "window_start", "window_end", "branch", "strength")
    assert GENERATION == ("task", "steps", "guidance", "height", "width", "scheduler", "negative_prompt", "noising")
    assert set(IDENTITY) == {"fingerprint", "dtype", "device", "scorer_identity", "importance_metric", "protocol"}
    assert set(MADE) == {"fingerprint", "dtype", "device"}
    assert SEVERAL == ("lesioned", "order", "permutation")
    assert {"model", "prompt_id", "seed", "selection", "layer", "status", "image", "cell"} <= set(NEEDED)
    assert EARLIER == {
        **{"kind": "cross_attention", "lesioned": "", "aspects": "", "init": "", "noising": 0.0},
        "negative_prompt": "",
    }


def test_what_is_at_its_default_is_in_no_key_and_not_passed():
    plain = settings()
    assert set(plain.identity()) == {"task", "steps", "guidance", "height", "width", "scheduler"}
    assert plain.arguments(2) == {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16}
    other = settings(negative_prompt="b", noising=0.5, batch_size=3)
    assert other.identity() == {**plain.identity(), "negative_prompt": "b", "noising": 0.5}
    assert other.arguments(2) == {**plain.arguments(2), "negative_prompt": ["b", "b"], "strength": 0.5}
    assert settings(batch_size=3) == plain  # it changes no pixel


def test_every_declared_argument_is_kept_from_model_arguments():
    from lesion.models.source import SETTLED

    arguments = {one.argument for one in DECLARED if one.argument}
    assert arguments == {"num_inference_steps", "guidance_scale", "height", "width", "negative_prompt", "strength"}
    assert arguments <= SETTLED
    assert [one.name for one in DECLARED][:6] == ["task", "steps", "guidance", "height", "width", "scheduler"]
    assert Settings("txt2img", 4, 1.0, 8, 8).scheduler == ""
