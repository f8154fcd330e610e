"""The presets say what the published studies did, and importance is computed from the metric that was chosen."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, UNet2DConditionModel

from lesion import scoring
from lesion.analysis.importance import importance_metric, layer_table
from lesion.config.parsing import parse
from lesion.study.lesions import choices, covers
from lesion.surgery.anatomy import examine
from test_configs import CONF, FILES, composed

OWN = ("demo", "lora", "shards", "study", "attribution", "components", "tokens")  # of no publication
PRESETS = [name for group, name in FILES if group == "experiment" and name not in OWN]
DOCS = CONF.parent / "docs" / "presets.md"
SD15 = {"sample_size": 64, "cross_attention_dim": 768}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}


def anatomy_of(config: dict[str, object]):
    with torch.device("meta"):
        return examine(UNet2DConditionModel(**config))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_states_its_protocol_and_is_in_the_table(name):
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    for word in ("Question:", "Stud", "Protocol", "Metric:", "Size:"):
        assert re.search(rf"^# {word}", text, re.MULTILINE), word
    numbers = set(re.findall(r"arXiv:(\d{4}\.\d{5})", text))
    assert numbers
    (row,) = [line for line in DOCS.read_text().splitlines() if f"experiment={name}`" in line]
    assert all(number in row for number in numbers)
    request = parse(composed(f"experiment={name}"))
    (size,) = re.findall(r"^# Size: (\d+) images a ", text, re.MULTILINE)
    assert f"| {int(size) * len(request.prompts) * len(request.seeds)} |" in row


def test_vital_layers_are_scored_by_dino():
    for name in ("flux_vital_layers", "sd3_vital_layers"):
        data = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())
        asked = {key.removeprefix("override /"): value for item in data["defaults"] for key, value in item.items()}
        assert (asked["scorer"], asked["selection"], asked["replacement"]) == ("dino", "leave_one_out", "zero")
        assert data["layers"]["kind"] == "block"
    assert parse(composed("scorer=dino")).scorer.importance == "dino_similarity"


def test_windows_are_prospects_stages_and_then_switches_for_good():
    """ProSpect's sampler takes prompt int(t * 10 / 1000) at timestep t: computed here from diffusers' own timesteps."""
    request = parse(composed("experiment=prompt_swap_windows"))
    scheduler = DDIMScheduler(steps_offset=1)
    scheduler.set_timesteps(request.settings.steps)
    stages = [9 - int(t * 10 / 1000) for t in scheduler.timesteps.tolist()]
    ours = [[covers(window, step, 50) for window in request.axes.windows[:10]] for step in range(50)]
    assert [row.index(True) for row in ours] == stages
    assert all(sum(row) == 1 for row in ours)
    assert all(end == 1.0 for _, end in request.axes.windows[10:])
    assert (request.axes.branches, request.settings.guidance, request.model.scheduler) == (("cond",), 10.0, "ddim")


def test_style_and_layout_layers_are_the_six_inner_ones_of_sdxl():
    request = parse(composed("experiment=sdxl_style_layout"))
    anatomy = anatomy_of(SDXL)
    chosen = request.layers.chosen(anatomy.paths)
    assert len(anatomy.paths) == 11
    assert set(chosen) == {path for path, sites in anatomy.sites.items() if len(sites) == 10}  # B-LoRA's W1 to W6
    content, style = chosen.index("up_blocks.0.attentions.0"), chosen.index("up_blocks.0.attentions.1")
    assert (content, style, chosen[1]) == (3, 4, "down_blocks.2.attentions.1")
    assert request.axes.branches == ("cond",)


def test_groups_of_per_layer_prompts_divide_the_layers_by_resolution():
    request = parse(composed("experiment=sd15_per_layer_prompts"))
    anatomy = anatomy_of(SD15)
    inner, outer = (choice.lesioned for choice in choices("custom", request.axes.selections["custom"], anatomy.paths))
    sides = {layer.path: layer.resolution for layer in anatomy.layers}
    assert {sides[path] for path in inner} == {16, 8}
    assert {sides[path] for path in outer} == {64, 32}
    assert sorted([*inner, *outer]) == sorted(anatomy.paths)
    assert len(anatomy.paths) == 16


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("lpips", "scorer.importance: cannot be lpips: it is a distance"),
        ("psnr", "scorer.importance: cannot be psnr: it has no finite value for identical images"),
        ("clip_text", "scorer.importance: cannot be clip_text: it compares an image with its prompt"),
        ("dino_similarity", "scorer.importance: got 'dino_similarity'; allowed: clip_similarity, clip_text, ssim"),
        ("sim", "scorer.importance: got 'sim'; allowed:"),
    ],
)
def test_metrics_that_say_nothing_of_importance_are_refused_by_name(cli, metric, says):
    metrics = "[clip_similarity, clip_text, ssim, psnr, lpips]"
    code, _, err = cli(f"scorer.metrics={metrics}", f"scorer.importance={metric}")
    assert code == 2
    (line,) = err.strip().splitlines()
    assert says in line
    assert not list(cli.folder.rglob("*.parquet"))


def test_metrics_with_options_replace_those_of_the_preset(cli):
    """A mapping on the command line, though the preset has a list; a sweep over both forms gives the same scores."""
    metrics = "{clip_similarity: {model: embedded}, psnr: {}}"
    code, _, err = cli("-m", f"scorer.metrics={metrics},[clip_similarity, psnr]", "selection=none")
    assert code == 0, err
    one, other = (frame[[name for name in scoring.known_metrics() if name in frame]] for frame in cli.frames())
    assert list(one) == ["clip_similarity", "psnr"]
    pd.testing.assert_frame_equal(one, other)
    code, _, err = cli("scorer.metrics={clip_similarity: {}, lpips: {nett: vgg}}")
    assert code == 2
    assert err == "lesion: scorer.metrics.lpips: unknown option 'nett'; allowed: net\n"


def test_a_missing_dino_is_refused_before_any_model_loads(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("lesion.models.load", lambda *arguments: pytest.fail("a model was loaded"))
    code, _, err = cli("scorer.metrics=[clip_similarity, dino_similarity]", f"scorer.dino_model={tmp_path / 'none'}")
    assert code == 2
    (line,) = err.strip().splitlines()
    assert line.startswith("lesion: scorer.dino_model: ")
    assert "no such folder" in line
    assert not list(cli.folder.rglob("*.parquet"))


def test_importance_follows_the_choice_from_the_command_line_to_the_tables(cli):
    code, _, err = cli("scorer.metrics=[clip_similarity, ssim]", "scorer.importance=ssim", "selection=leave_one_out")
    assert code == 0, err
    (frame,) = cli.frames()
    assert importance_metric(frame) == "ssim"
    found = layer_table(frame).set_index("layer")["importance"]
    lesioned = frame[frame.selection == "leave_one_out"]
    expected = 1 - lesioned.groupby("layer")["ssim"].mean()
    assert found.to_dict() == pytest.approx(expected.to_dict())
    assert found.max() > 1e-3
    assert found.to_dict() != pytest.approx((1 - lesioned.groupby("layer")["clip_similarity"].mean()).to_dict())


def test_the_choice_of_metric_makes_no_new_images(cli):
    """It is no part of a cell, and the scores of a metric are the same whichever is chosen."""
    arguments = ["scorer.metrics=[clip_similarity, ssim]", "selection=leave_one_out"]
    assert cli(*arguments)[0] == 0
    images = {path: path.stat().st_mtime_ns for path in cli.folder.rglob("store/**/*.png")}
    assert cli(*arguments, "scorer.importance=ssim", "hydra.run.dir=again")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in cli.folder.rglob("store/**/*.png")} == images
    first, second = (frame.drop(columns=["importance_metric", "image"]) for frame in cli.frames())
    assert json.loads(first.to_json()) == json.loads(second.to_json())
