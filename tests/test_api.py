"""From Python: every example of docs/python.md and the notebook run; cells and numbers are the command line's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.version import getbase
from matplotlib.figure import Figure
from nbclient import NotebookClient
from PIL import Image

import lesion
from lesion.generation.generate import generate
from lesion.models import EMBEDDED
from lesion.run import maker

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLES = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.S)


def test_import_costs_little():
    """The modules that take time are not imported before they are used."""
    code = (
        "import sys, lesion; heavy = {'torch', 'diffusers', 'pandas', 'hydra', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; assert lesion.__version__ and 'study' in dir(lesion)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def keys(cli):
    """The keys of the `cli` fixture, as Python has them."""
    return dict(
        model="local",
        prompts="inline",
        seeds=0,
        layers={"include": ["down_blocks.0.*", "mid_block.*", "up_blocks.1.attentions.1"]},
        generation={"steps": 3, "height": 16, "width": 16, "batch_size": 4},
        **{
            one.split("=")[0]: one.split("=", 1)[1]
            for one in cli.defaults
            if one.startswith(("model.id", "scorer.clip"))
        },
        **{"prompts.items": ["a red circle", "two stars"]},
    )


def test_a_study_is_that_of_the_command_line_to_the_bit(cli, keys, monkeypatch):
    assert cli("store.dir=a", "hydra.run.dir=typed")[0] == 0
    study = lesion.study(**keys, **{"store.dir": "b"})
    plan = study.plan()
    assert plan.loc["in all", ["images", "in_store", "to_make"]].tolist() == [14, 0, 14]
    results = study.run(folder="stated")
    typed = pd.read_parquet(cli.folder / "typed" / "results.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(results.folder / "results.parquet"), typed)
    for cell in typed.cell:
        place = Path("cells") / cell[:2] / f"{cell}.png"
        assert np.array_equal(Image.open(cli.folder / "a" / place), Image.open(cli.folder / "b" / place))

    # Again: no network runs. Then opened, with everything that is there.
    with pytest.raises(lesion.RequestError, match=r"confirm: every run folder must have one plan"):
        results.confirmed()
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *args, **kwargs: pytest.fail("ran a network"))
    again = lesion.study(**keys, **{"store.dir": "b"})
    assert again.plan().loc["in all", "to_make"] == 0
    pd.testing.assert_frame_equal(again.run().frame.drop(columns="image"), results.frame.drop(columns="image"))
    planned = lesion.study(**keys, **{"store.dir": "b"}, confirm={"hypotheses": ["changes", "loses"]}).run()
    file = planned.folder / "confirmation.json"
    said = json.loads(file.read_text())
    assert sorted(said["halves"].values()) == ["confirming", "exploring"]
    assert not (planned.confirmed()["verdict"] == "confirmed").any(), "one prompt a half shows nothing"
    file.write_text(file.read_text().replace('"alpha": 0.05', '"alpha": 0.5'))
    with pytest.raises(lesion.RequestError, match=r"confirm: confirmation.json was changed"):
        planned.confirmed()
    opened = lesion.open(results.folder)
    by_hand = typed[typed.selection == "leave_one_out"].groupby("layer").clip_similarity.mean()
    importance = opened.importance().set_index("layer")["mean"]
    assert importance.to_dict() == pytest.approx((1 - by_hand).to_dict())
    assert set(opened.sufficiency()["layer"]) == set(typed[typed.selection == "only_one"].layer)
    alone = opened.importance()
    assert "findings" not in vars(opened), "the rest takes long for a large study"
    assert len(opened.findings.layers)
    pd.testing.assert_frame_equal(opened.importance(), alone)
    layer = typed[typed.selection == "leave_one_out"].layer.iloc[0]
    row = typed[(typed.selection == "leave_one_out") & (typed.layer == layer) & (typed.prompt == "two stars")].iloc[0]
    picture = opened.image(layer=layer, selection="leave_one_out", prompt="two stars")
    assert np.array_equal(picture, Image.open(results.folder / row.image).convert("RGB"))
    assert isinstance(opened.plot.layers(), Figure) and opened.plot.grid(prompt=1)._repr_png_()[:4] == b"\x89PNG"
    assert opened.failures.empty and "14" in repr(opened) and "14" in opened._repr_html_()
    with pytest.raises(lesion.RequestError, match=r"prompt: name one of: 0 a-red-circle.*, 1 two-stars"):
        opened.image(layer=layer, selection="leave_one_out")
    with pytest.raises(lesion.RequestError, match=r"layer: 'mid' is not here; there are: down_blocks.0"):
        opened.image(layer="mid", prompt=0)
    with pytest.raises(lesion.RequestError, match=r"folder: .* holds the results of another request"):
        lesion.study(**{**keys, "seeds": 1}, **{"store.dir": "b"}).run(folder="stated")


@pytest.mark.parametrize(
    "text", ["a, b = c", 'it\'s "quoted"', "[x] {y: z}", "${seeds}", "ein Kreis, 丸", "a\\'b", " padded "]
)
def test_any_text_arrives_as_it_is(keys, text):
    study = lesion.study(**{**keys, "prompts.items": [text, {"text": f"{text}2", "id": "two"}]})
    assert [one.text for one in study._study.prompts] == [text, f"{text}2"]
    negative = lesion.study(**keys, **{"generation.negative_prompt": text}, dry_run=True)
    assert negative.config["generation"]["negative_prompt"] == text


def test_metrics_take_options_as_a_dict(keys):
    given = {"clip_similarity": {}, "lpips": {"net": "vgg"}}
    for how in ({"scorer.metrics": given}, {"scorer": {"metrics": given}}, {"scorer.metrics": list(given)}):
        metrics = lesion.study(**{**keys, **how})._request.scorer.metrics
        assert [getattr(one, "name", one) for one in metrics] == list(given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((["generation.step=3"], {}), "step"),
        (([], {"generation.steps": 0}), "generation.steps"),
        (([], {"selection": "some"}), "selection"),
        (([], {"seeds": object()}), "seeds: got <object"),
        (([3], {}), "takes overrides as texts"),
        (([], {"replacement": {"mean": {"calibrations": 1}}}), "replacement"),
    ],
)
def test_a_wrong_request_is_one_line(keys, given, says):
    overrides, more = given
    with pytest.raises(lesion.RequestError) as error:
        lesion.study(*overrides, **{**keys, **more})
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        *("generation.step=3", "model=nope", "seeds=-1", "generation.steps=[1", "prompts=none.csv"),
        *("generation.steps=${nope}", "store.dir=${nope}", "seeds=[0,${nope:1}]"),
    ],
)
def test_a_refusal_is_the_line_of_the_command_line(cli, override):
    code, _, err = cli(override)
    kept = [one for one in cli.defaults if one.split("=")[0] != override.split("=")[0]]
    with pytest.raises(lesion.RequestError) as error:
        lesion.study(*kept, override)
    assert code == 2 and err.strip().splitlines()[-1] == f"lesion: {error.value}"


def test_hydra_elsewhere_in_the_process_is_left_alone(keys, tmp_path):
    """A notebook may have a Hydra application of its own, initialised, with a schema of the same name."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "mine.yaml").write_text("a: 1\n")
    registered = ConfigStore.instance().repo.get("schema.yaml")
    ConfigStore.instance().store(name="schema", node={"theirs": 1})
    try:
        with initialize_config_dir(str(folder), version_base="1.2"):
            hydra = GlobalHydra.instance().hydra
            for _ in range(2):
                lesion.study(**keys)
                with pytest.raises(lesion.RequestError):
                    lesion.study("nope=1")
            assert GlobalHydra.instance().hydra is hydra and str(getbase()) == "1.2" and compose("mine").a == 1
            assert ConfigStore.instance().repo["schema.yaml"].node == {"theirs": 1}
        lesion.study(**keys)
        assert not GlobalHydra.instance().is_initialized()
    finally:
        ConfigStore.instance().repo["schema.yaml"] = registered
        if registered is None:
            del ConfigStore.instance().repo["schema.yaml"]


def test_failures_are_in_the_results_and_multiruns_open(cli, keys, monkeypatch):
    def failing(model, cells, *rest):
        if any(cell.lesion and cell.lesion.layer.startswith("mid") for cell in cells):
            raise RuntimeError("boom")
        return generate(model, cells, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(maker, "generate", failing)
        with pytest.warns(UserWarning, match="boom"):
            results = lesion.study(**keys).run(folder="failed")
    assert len(results.frame) == 14 and set(results.failures.layer) == {"mid_block.attentions.0"}
    assert len(results.failures) == 4 and results.failures.reason.str.contains("boom").all()
    with pytest.raises(lesion.RequestError, match="boom"):
        results.image("mid_block.attentions.0", "only_one", prompt=1)

    assert cli("-m", "seeds=0,1", "hydra.sweep.dir=both")[0] == 0
    both = lesion.open("both")
    assert len(both.frame) == 28 and both.failures.empty
    with pytest.raises(lesion.RequestError, match=r"seed: name one of: 0, 1"):
        both.image(prompt=0)
    place = pd.read_parquet("both/1/results.parquet").query("selection == 'none'").image.iloc[0]
    assert np.array_equal(both.image(prompt=0, seed=1), Image.open(Path("both/1") / place).convert("RGB"))
    lesion.study(**{**keys, "generation": {**keys["generation"], "steps": 2}}).run(folder="other")
    with pytest.raises(lesion.RequestError, match=r"open: these runs cannot be compared: steps"):
        lesion.open("both", "other")
    several = lesion.open("both", "other", mix=True)
    assert len(several.settings) == 2
    with pytest.raises(lesion.RequestError, match=r"steps: .* name one of"):
        several.plot.sheet([0], ["mid_block.attentions.0"], seed=0)
    shown = several.plot.sheet([0], ["mid_block.attentions.0"], seed=0, steps=2).axes[0].images[0].get_array()
    frame = pd.read_parquet("other/results.parquet").query("selection == 'none' and seed == 0")
    assert np.array_equal(
        shown, Image.open(Path("other") / frame.image.iloc[0]).convert("RGB")
    )  # the baseline of these


@pytest.mark.timeout(300)
def test_every_example_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"FOLDER": EMBEDDED}
    assert len(EXAMPLES) >= 8
    for example in EXAMPLES:
        if "lesion.study(" in example:  # as written but for the number of prompts and layers
            example = example.replace(
                "seeds=[0],", 'seeds=[0], layers={"include": ["up_blocks.2.*"]}, prompts="shape",'
            ).replace('"generation.steps": 8', '"generation.steps": 2')
        example = example.replace('pipe("a red circle")', 'pipe("a red circle", num_inference_steps=1)')
        exec(example, names)
    assert isinstance(names["image"], Image.Image)
    assert names["again"].frame.equals(names["results"].frame)


@pytest.mark.timeout(300)
@pytest.mark.slow  # a kernel of its own; what it does is in the documented examples too
def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(DOCS / "example.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("image/png" in data for data in shown) == 3 and sum("text/html" in data for data in shown) >= 4
