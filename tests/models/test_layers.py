"""Lists of layers that are shipped or remembered, against the modules that they are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from lesion import tasks
from lesion.errors import RequestError
from lesion.models import EMBEDDED, ModelSpec, calling, facts, layers, loading, resolve, schedulers
from lesion.models.defaults import default_of_class
from lesion.models.source import Source, pipeline_class
from lesion.surgery.anatomy import examine
from shipped import assert_shipped
from test_anatomy import SD15, SDXL, on_meta

TINY = {
    "block_out_channels": [8, 8],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}


def unet(config: dict[str, Any]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


@pytest.mark.parametrize("name", ["embedded", "sd15", "sdxl"])
def test_shipped_lists_are_those_of_the_modules(name: str) -> None:
    if name == "embedded":
        config = json.loads((EMBEDDED / "unet" / "config.json").read_text())
        denoiser = unet(config)
    else:
        config = SD15 if name == "sd15" else SDXL
        denoiser = on_meta(config)
    assert_shipped(denoiser, config)


def test_a_key_takes_in_what_shapes_the_layers_and_nothing_else() -> None:
    data = layers._shipped()["defaults"]["UNet2DConditionModel"]
    old = {key: value for key, value in SD15.items() if key != "layers_per_block"}  # configs of old versions are short

    def key(config: dict[str, Any]) -> str:
        return layers.identify("UNet2DConditionModel", config, data)

    assert key(old) == key(SD15) == key({**SD15, "_name_or_path": "x", "sample_size": 96, "no_longer_used": 1})
    for change in ({"layers_per_block": 1}, {"attention_head_dim": 4}, {"only_cross_attention": True}):
        assert key({**SD15, **change}) != key(SD15)


@pytest.mark.parametrize(
    "change",
    [
        {"sample_size": 7, "in_channels": 9, "out_channels": 3, "act_fn": "gelu", "dropout": 0.5, "norm_eps": 1e-3},
        {"norm_num_groups": 8, "center_input_sample": True, "flip_sin_to_cos": False, "freq_shift": 1},
        {"downsample_padding": 0, "mid_block_scale_factor": 2, "upcast_attention": True, "time_cond_proj_dim": 8},
        {"resnet_out_scale_factor": 2.0, "use_linear_projection": True},
    ],
)
def test_values_left_out_of_keys_change_no_layer(change: dict[str, Any]) -> None:
    assert set(change) <= layers.SHAPELESS
    for kind in ("cross_attention", "self_attention", "feed_forward", "block"):
        assert examine(unet({**TINY, **change}), "attention", kind).paths == examine(unet(TINY), kind=kind).paths
    assert examine(unet({**TINY, **change}), "head").paths == examine(unet(TINY), "head").paths


@pytest.fixture
def source(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setenv("LESION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(layers, "_memory", {})
    return resolve(ModelSpec("tiny", str(tiny_folder)))


def test_a_further_model_is_examined_once(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: loading.Model
) -> None:
    built: list[str] = []
    build = Source.skeleton
    monkeypatch.setattr(Source, "skeleton", lambda self, name: built.append(name) or build(self, name))

    def asked(by: str = "attention", kind: str = "cross_attention") -> tuple[str, ...]:
        layers._memory.clear()  # as a new process would
        return layers.layer_paths(source, by, kind)

    first = asked()
    assert first == tiny_model.anatomy.paths
    assert (asked(), len(built)) == (first, 1)
    with pytest.raises(RequestError, match=r"layers\.kind: UNet2DConditionModel has no joint-attention module") as one:
        asked(kind="joint_attention")
    with pytest.raises(RequestError) as two:
        asked(kind="joint_attention")
    assert (str(one.value), len(built)) == (str(two.value), 2)
    files = sorted((tmp_path / "cache").rglob("*.json"))
    assert len(files) == 2
    for file in files:  # damaged: not there
        file.write_text(file.read_text().replace("attentions.0", "attentions.7").replace("layers.kind", "model.id"))
    assert (asked(), len(built)) == (first, 3)
    layers.check(first, source, "attention", "cross_attention")
    with pytest.raises(RequestError, match=r"other layers than its config says; the list remembered in .* is removed"):
        layers.check(first[1:], source, "attention", "cross_attention")
    assert (asked(), len(built)) == (first, 4)


def test_a_cache_that_cannot_be_written_is_no_error(source: Source, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert layers.layer_paths(source, "attention", "cross_attention")


def test_facts_are_those_of_the_installed_diffusers() -> None:
    """Of another version nothing is told: it is asked itself."""
    import diffusers
    import open_clip

    data = facts._data()
    if data["diffusers"] != diffusers.__version__:
        assert facts.pipeline("StableDiffusionPipeline") is None
        pytest.skip("made for another diffusers: run scripts/known_models.py")
    for name, known in data["pipelines"].items():
        cls = pipeline_class(name)
        assert calling.call_arguments(name, tasks.of("txt2img")) == calling.takes(cls) == known["arguments"]
        assert calling.can(name, "img2img") == bool(tasks.of("img2img").counterpart(name))
        assert known["defaults"] == {name: default_of_class(cls, name) for name in known["defaults"]}
        assert known["single_file"] == hasattr(cls, "from_single_file")
    for name, known in data["denoisers"].items():
        assert known["repeated_blocks"] == bool(getattr(getattr(diffusers, name), "_repeated_blocks", None))
    for model, tag in data["clips"]:
        assert tag in open_clip.list_pretrained_tags_by_model(model)
    for name, known in data["schedulers"].items():
        assert known == schedulers.switches_of(name)
        assert {key: schedulers.defaults_of(name)[key] for key in known} == known
