"""A study with steering: requests and their refusals, the grid of layers that steer, its columns, and resuming."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lesion.generation.layout import Steering
from lesion.models import EMBEDDED

BOXES = [
    {"text": "a red circle", "boxes": [{"words": "red circle", "box": [0, 0, 0.5, 0.5]}]},
    {"text": "a blue star", "boxes": [{"words": "blue star", "box": [0.5, 0, 1, 1]}]},
]


def items(boxes):
    def one(entry):
        inner = ",".join(f"{{words:'{box['words']}',box:{box['box']}}}" for box in entry["boxes"])
        return f"{{text:'{entry['text']}',boxes:[{inner}]}}"

    return f"prompts.items=[{','.join(map(one, boxes))}]"


STUDY = (
    "steering=layout",
    "steering.step_size=noise_share",
    "steering.scale=1000",
    "steering.iterations=1",
    "steering.steps=2",
    "steering.mask=covered",
    "layers.include=[mid_block.*,up_blocks.1.attentions.0]",
    "selection=[leave_one_out,all]",
)


def test_layers_are_taken_out_of_the_loss_and_lesioned_in_one_grid(cli):
    code, _, err = cli(items(BOXES), *STUDY, "replacement=[zero,steering_off]")
    assert code == 0, err
    (frame,) = cli.frames()
    steers = "mid_block.attentions.0+up_blocks.0.attentions.0+up_blocks.0.attentions.1+up_blocks.1.attentions.0"
    assert set(frame["steering"]) == {"layout"} and frame["steering_settings"].nunique() == 1
    baseline = frame[frame["selection"] == "none"]
    assert baseline["steering_layers"].str.startswith(steers).all()
    off = frame[frame["replacement"] == "steering_off"]
    for _, line in off[off["selection"] == "leave_one_out"].iterrows():
        assert set(baseline["steering_layers"].iloc[0].split("+")) - set(line["steering_layers"].split("+")) == {
            line["layer"]
        }
    assert frame["box_mass"].between(0, 1).all() and frame["box_iou"].between(0, 1).all()
    assert frame["box_success"].isin([0, 1]).all()
    assert frame.groupby("prompt_id")["cell"].nunique().eq(len(frame) // 2).all()
    for _, line in frame.iterrows():
        (unsteered,) = cli.folder.rglob(f"images/{line['prompt_id']}/seed{line['seed']}-unsteered-*.png")
        pixels, others = (np.asarray(Image.open(path), float) for path in (cli.newest() / line["image"], unsteered))
        assert line["unsteered_distance"] == pytest.approx(np.abs(pixels - others).mean() / 255)
        assert (line["unsteered_distance"] > 0) == (line["steering_layers"] != "" or line["replacement"] == "zero")
    made = {path: path.stat().st_mtime_ns for path in cli.folder.rglob("cells/*/*.png")}
    assert cli(items(BOXES), *STUDY, "replacement=[zero,steering_off]", "hydra.run.dir=again")[0] == 0
    assert made == {path: path.stat().st_mtime_ns for path in cli.folder.rglob("cells/*/*.png")}
    again = pd.read_parquet(cli.folder / "again" / "results.parquet")
    assert np.array_equal(again["box_mass"], frame["box_mass"])


def test_unsteered_and_steered_images_are_settings_of_their_own(cli):
    assert cli(items(BOXES), "selection=none", "scorer.metrics=[clip_similarity]")[0] == 0
    plain = {path.stem for path in cli.folder.rglob("cells/*/*.png")}
    assert cli(items(BOXES), "selection=none", *STUDY[:-1], "scorer.metrics=[clip_similarity]")[0] == 0
    both = {frame["steering"].iloc[0]: frame for frame in cli.frames()}
    assert set(both) == {"", "layout"}
    assert both[""]["scorer_identity"].iloc[0] == both["layout"]["scorer_identity"].iloc[0]
    assert both[""]["box_mass"].isna().all() and both[""]["box_iou"].notna().all()
    assert not set(both[""]["cell"]) & set(both["layout"]["cell"])
    assert both[""]["unsteered_distance"].isna().all() and (both["layout"]["unsteered_distance"] > 0).all()
    # Steered images are compared with those that the study without steering has made.
    assert {path.stem for path in cli.folder.rglob("cells/*/*.png")} == plain | set(both["layout"]["cell"])


def test_out_of_memory_while_steering_halves_the_batch(cli, monkeypatch):
    gradient = Steering._gradient

    def crowded(self, run, call, others, latents, weights, rows):
        if len(rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return gradient(self, run, call, others, latents, weights, rows)

    asked = (items(BOXES), *STUDY[:-1], "selection=none", "scorer.metrics=[clip_similarity]")
    assert cli(*asked, "generation.batch_size=1", "store.dir=alone")[0] == 0
    monkeypatch.setattr(Steering, "_gradient", crowded)
    code, out, _ = cli(*asked, "hydra.run.dir=crowded", "store.dir=crowded_store")
    assert code == 0 and "out of memory with a batch of 2; continuing with 1" in out
    halved, alone = (
        {path.stem: np.asarray(Image.open(path)) for path in cli.folder.glob(f"{store}/cells/*/*.png")}
        for store in ("crowded_store", "alone")
    )
    steered = set(pd.read_parquet(cli.folder / "crowded" / "results.parquet")["cell"])
    assert len(steered) == 2 and all(np.array_equal(halved[key], alone[key]) for key in steered)


def test_wrong_requests_are_refused_before_a_model_loads(cli):
    for arguments, told in (
        (("steering=layout",), "steering=layout needs boxes"),
        (
            ("steering=layout", items([{**BOXES[0], "boxes": [{"words": "cat", "box": [0, 0, 1, 1]}]}])),
            "'cat' is not in",
        ),
        ((items(BOXES), "steering=layout", "steering.layers=[nowhere.*]"), "matches no layer; allowed: down_blocks.0"),
        (
            (items(BOXES), "steering=layout", "steering.iterations=-1"),
            "steering.iterations: must be a whole number from 0 to 1000",
        ),
        ((items(BOXES), "steering=layout", "steering.step_size=two"), "allowed: sigma_squared, noise_share"),
        ((items(BOXES), "steering=layout", "steering.strength=2"), "steering.strength"),
        (
            (items(BOXES), "steering=layout", f"model.id={EMBEDDED}", "generation.height=64", "generation.width=64"),
            "steering.step_size: sigma is infinite at the first step of DDIMScheduler",
        ),
        ((items(BOXES), "steering=layout", "replacement=steering_off", "branch=uncond"), "steering_off does nothing"),
        ((items(BOXES), "replacement=steering_off"), "steering_off needs steering; with it: steering=layout"),
    ):
        code, _, err = cli(*arguments)
        assert code == 2 and told in err and len(err.strip().splitlines()) == 1, err
    assert not list(cli.folder.rglob("*.png"))
