"""A study with attention maps: made once, resumed, remade where damaged; images and keys as without."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import AutoTokenizer

import lesion
from lesion.run import job
from lesion.run.capture import in_store, maps_of
from lesion.run.job import plan_lines
from lesion.store import maps as stored
from lesion.store.images import Store

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def asked(tiny_folder, tiny_clip, tmp_path):
    """A study of one prompt on the tiny model: a baseline and three lesioned images."""
    return [
        "model=local",
        f"model.id={tiny_folder}",
        f"scorer.clip_model=local-dir:{tiny_clip}",
        "scorer.metrics=[clip_similarity]",
        "prompts=inline",
        "prompts.items=[a red circle and a blue star]",
        "seeds=0",
        "layers.include=[down_blocks.0.*, mid_block.*]",
        "selection=leave_one_out",
        "generation.steps=2",
        "generation.height=16",
        "generation.width=16",
        "generation.batch_size=4",
        f"store.dir={tmp_path / 'store'}",
    ]


def plan(study):
    """What a dry run of it says."""
    store = Store(study._request.store)
    counts = in_store(study._study, store, maps_of(study._request, study._source))
    return "\n".join(plan_lines(study._source, study._study, counts, store, study._request))


def test_maps_of_a_study_are_made_once_and_damaged_ones_again(asked, tmp_path, caplog):
    plain = lesion.study(*asked).run(tmp_path / "plain").frame
    images = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("store/cells/*/*.png")}
    study = lesion.study(*asked, "capture=maps")
    bound = re.search(r"attention maps: at most ([\d.]+) MiB more on disk; .* x 1 heads x 1 steps", plan(study))
    results = study.run(folder := tmp_path / "maps")
    assert images == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("store/cells/*/*.png")}
    files = sorted(tmp_path.glob("store/maps/*/*.safetensors"))
    assert {path.name[:32] for path in files} == set(plain.cell)
    total = sum(path.stat().st_size for path in files) / 2**20
    assert bound and 0.3 * float(bound[1]) < total <= float(bound[1]) + 0.05
    assert results.frame[["cell", "clip_similarity"]].equals(plain[["cell", "clip_similarity"]])
    assert all((folder / stored.beside_image(image)).is_file() for image in results.frame.image)
    _looks_at(results)
    maps = results.maps
    assert maps.equals(pd.read_parquet(folder / "maps.parquet"))
    assert set(maps.cell) == set(plain.cell) and set(maps.word) > {"red", "<special>"}
    assert np.allclose(maps[maps.selection == "none"].groupby("map_layer")["share"].sum(), 1, atol=1e-5)
    shares = maps[maps.aspect != ""].groupby("cell")["share"].mean()
    assert np.allclose(results.frame["attention_share"], shares[results.frame.cell])
    shares = maps[maps.word.isin(["red", "blue"])].groupby("cell")["share"].mean()
    assert np.allclose(results.frame["attention_share_colour"], shares[results.frame.cell])
    assert job.results(study._request)["attention_share"].equals(results.frame["attention_share"])

    before = {path: (path.stat().st_mtime_ns, stored.read(path, path.name[:32])) for path in files}
    files[0].write_bytes(files[0].read_bytes()[:-50])
    files[1].unlink()
    study.run(tmp_path / "again")
    assert "is damaged and removed" in caplog.text
    for path, (when, content) in before.items():
        again = stored.read(path, path.name[:32])
        assert again.entries == content.entries
        for layer, values in content.layers["cond"].items():
            assert np.allclose(again.layers["cond"][layer], values, atol=1e-5, equal_nan=True)
        assert (path.stat().st_mtime_ns == when) == (path not in files[:2])
    assert "at most 0.0 MiB more" in plan(study)
    apart = plan(lesion.study(*asked, "capture=maps", "capture.heads=each"))
    assert "x 2 heads" in apart and "at most 0.0 MiB" not in apart


def _looks_at(results):
    """From Python: one layer, all merged, a phrase, an image under a lesion; and what there is not."""
    layers = ["down_blocks.0.attentions.0", "mid_block.attentions.0"]
    base = results.attention(layer=layers[0], word="red")
    assert base.shape == (8, 8) and base.dtype == np.float32 and 0 < base.min() < base.max() < 1
    phrase = results.attention(layer=layers[0], word="Red Circle")
    assert np.allclose(phrase, base + results.attention(layer=layers[0], word="circle"))
    everything = ("a", "red", "circle", "and", "a#2", "blue", "star", "<special>", "<rest>")
    whole = sum(results.attention(layer=layers[1], word=word) for word in everything)
    assert whole.shape == (4, 4) and np.allclose(whole, 1, atol=1e-5)
    assert results.attention(word="star").shape == (8, 8)
    other = results.attention(layer=layers[1], word="red", selection="leave_one_out", lesioned=layers[0])
    assert np.abs(other - results.attention(layer=layers[1], word="red")).max() > 1e-6
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "attention.md").read_text(), re.S)
    asked = example.splitlines()
    assert len(asked) == 5 and "capture=" in asked[0]
    exec("\n".join(asked[1:]), {"results": results})
    for wrong, words in (
        ({"layer": "up", "word": "red"}, "layer: 'up' has no map here; there are: down_blocks.0.attentions.0"),
        ({"word": "ring"}, "word: 'ring' has no map here; there are: a, red, circle, and, a#2, blue, star, <special>"),
        ({"word": None}, "word: None"),
        ({"word": "red", "branch": "uncond"}, "branch: 'uncond' was not captured; there is: cond"),
        ({"word": "red", "head": 0}, "head: got 0; allowed: null"),
        (
            {"layer": layers[0], "word": "red", "selection": "leave_one_out", "lesioned": layers[0]},
            "has no map here",
        ),
    ):
        with pytest.raises(lesion.RequestError, match=re.escape(words)):
            results.attention(**wrong)


def test_wrong_requests_are_refused_before_anything_is_made(asked, tmp_path):
    for override, words in {
        "capture=map": "capture: there is no choice 'map'; allowed: maps, none",
        "capture.layers=[nowhere*]": "capture.layers: 'nowhere*' matches none; allowed: down_blocks.0",
        "performance.compile=true": "capture: works without performance.compile only",
    }.items():
        with pytest.raises(lesion.RequestError, match=re.escape(words)):
            lesion.study(*asked, *(["capture=maps"] if not override.startswith("capture=") else []), override)
    assert not list(tmp_path.rglob("store"))


def test_words_that_no_encoder_sees_are_named_once_and_counted(asked, tiny_folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # as with CI=true
    text = " ".join(["circle"] * 40) + " star"
    study = lesion.study(*asked, f"prompts.items=[{text}, a red circle]", "seeds=[0,1]", "selection=none")
    assert np.isfinite(study.run(tmp_path / "run").frame.clip_similarity).all()
    shown = capfd.readouterr().err
    (said,) = re.findall("1 of 2 prompts is too long: no text encoder sees .*", shown)
    assert "star" in said and "truncated" not in shown and "Token indices" not in shown, "nor do libraries say it again"
    frame = pd.read_parquet(tmp_path / "run" / "results.parquet")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "tokenizer")
    expected = {text: len(tokenizer(text)["input_ids"]) - tokenizer.model_max_length, "a red circle": 0}
    assert expected[text] > 0
    assert frame["truncated_tokens"].tolist() == [expected[one] for one in frame["prompt"]]
    assert job.results(study._request)["truncated_tokens"].equals(frame["truncated_tokens"])
