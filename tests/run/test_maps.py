"""A study with attention maps: made once, resumed, remade where damaged; images and keys as without."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import lesion
from lesion.report import attention
from lesion.store import maps as stored

DOCS = Path(__file__).parents[2] / "docs"


def test_maps_of_a_study_are_made_once_and_damaged_ones_again(cli):
    few = ("prompts.items=[a red circle and a star]", "selection=leave_one_out")
    code, _, err = cli(*few)
    assert code == 0, err
    plain = cli.frames()[0]
    images = {path.name: path.stat().st_mtime_ns for path in cli.folder.glob("store/cells/*/*.png")}
    code, out, _ = cli(*few, "capture=maps", "dry_run=true")
    bound = re.search(r"attention maps: at most ([\d.]+) MiB more on disk; .* x 1 heads x 1 steps", out)
    code, _, err = cli(*few, "capture=maps")
    assert code == 0, err
    assert images == {path.name: path.stat().st_mtime_ns for path in cli.folder.glob("store/cells/*/*.png")}
    files = sorted(cli.folder.glob("store/maps/*/*.safetensors"))
    assert {path.name[:32] for path in files} == set(plain.cell)
    total = sum(path.stat().st_size for path in files) / 2**20
    assert bound and 0.3 * float(bound[1]) < total <= float(bound[1]) + 0.05
    folder = cli.newest()
    results = lesion.open(folder)
    assert results.frame[["cell", "clip_similarity"]].equals(plain[["cell", "clip_similarity"]])
    assert all((folder / stored.beside_image(image)).is_file() for image in results.frame.image)
    _looks_at(results)
    made = attention.pictures(folder, results.frame, "clip_similarity")
    assert [one.word for one in made] == ["a", "red", "circle", "and", "a#2", "star"]
    assert all(Image.open(one.path).width > 400 for one in made)
    maps = pd.read_parquet(folder / "maps.parquet")
    assert set(maps.cell) == set(plain.cell) and set(maps.word) > {"red", "<special>"}
    assert np.allclose(maps[maps.selection == "none"].groupby("map_layer")["share"].sum(), 1, atol=1e-5)

    before = {path: (path.stat().st_mtime_ns, stored.read(path, path.name[:32])) for path in files}
    files[0].write_bytes(files[0].read_bytes()[:-50])
    files[1].unlink()
    code, _, err = cli(*few, "capture=maps")
    assert code == 0, err
    assert "is damaged and removed" in (cli.newest() / "lesion.log").read_text()
    for path, (when, content) in before.items():
        again = stored.read(path, path.name[:32])
        assert again.entries == content.entries
        for layer, values in content.layers["cond"].items():
            assert np.allclose(again.layers["cond"][layer], values, atol=1e-5, equal_nan=True)
        assert (path.stat().st_mtime_ns == when) == (path not in files[:2])
    code, out, _ = cli(*few, "capture=maps", "dry_run=true")
    assert "at most 0.0 MiB more" in out
    code, out, _ = cli(*few, "capture=maps", "capture.heads=each", "dry_run=true")
    assert "x 2 heads" in out and "at most 0.0 MiB" not in out


def _looks_at(results):
    """From Python: one layer, all merged, a phrase, an image under a lesion; and what there is not."""
    layers = ["down_blocks.0.attentions.0", "mid_block.attentions.0"]
    base = results.attention(layer=layers[0], word="red")
    assert base.shape == (8, 8) and base.dtype == np.float32 and 0 < base.min() < base.max() < 1
    phrase = results.attention(layer=layers[0], word="Red Circle")
    assert np.allclose(phrase, base + results.attention(layer=layers[0], word="circle"))
    everything = ("a", "red", "circle", "and", "a#2", "star", "<special>", "<rest>")
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
        ({"word": "blue"}, "word: 'blue' has no map here; there are: a, red, circle, and, a#2, star, <special>"),
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


def test_wrong_requests_are_refused_before_anything_is_made(cli):
    for override, words in {
        "capture=map": "Available options in 'capture': maps none",
        "capture.layers=[nowhere*]": "capture.layers: 'nowhere*' matches none; allowed: down_blocks.0",
        "performance.compile=true": "capture: works without performance.compile only",
    }.items():
        code, _, err = cli(*(["capture=maps"] if not override.startswith("capture=") else []), override)
        assert (code, words in err) == (2, True), (override, err)
    assert not list(cli.folder.rglob("store"))


def test_words_that_no_model_sees_are_named_once(cli):
    text = " ".join(["circle"] * 40) + " star"
    code, _, err = cli(f"prompts.items=[{text}, a red circle]", "seeds=[0,1]", "selection=none")
    assert code == 0, err
    said = (cli.newest() / "lesion.log").read_text()
    assert len(re.findall("no text encoder sees", said)) == 1
    assert re.search(r"no text encoder sees .*star", said)
    assert np.isfinite(cli.frames()[-1].clip_similarity).all()
