"""Every file in conf/ composes, means what its name says, and every experiment overlay runs (on a tiny stand-in)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from lesion import replacements, scoring
from lesion.config.parsing import parse
from lesion.config.schema import ModelConf, conf_dir, register
from lesion.models import EMBEDDED
from lesion.study.lesions import SELECTIONS
from lesion.study.prompts import parse_prompts
from lesion.toy_world import is_held_out, parse_caption
from lesion.tracking import tracker_names

CONF = conf_dir()
GROUPS = (
    "model",
    "prompts",
    "selection",
    "replacement",
    "capture",
    "attribution",
    "steering",
    "scorer",
    "tracker",
    "experiment",
    "debug",
)
FILES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("[!_]*.yaml"))]
LAUNCHERS = sorted((CONF / "hydra" / "launcher").glob("*.yaml"))  # test_launched.py
BASES = [CONF / "model" / "_base.yaml"]  # what the files of a group share
NEEDS = {
    "local": [f"model.id={EMBEDDED}"],
    "single_file": [
        "model.id=@FILE@.safetensors",
        "model.pipeline=StableDiffusionPipeline",
        f"model.config={EMBEDDED}",
    ],
    "file": ["prompts.path=@FILE@"],
    **{name: ["prompts.path=@FILE@"] for name in ("t2i_compbench", "dpg_bench")},
    **{  # with the columns of their published files: test_public_sets.py
        name: ["prompts.path=@FILE@", "prompts.column=null", "prompts.id_column=null", "prompts.aspects_column=null"]
        for name in ("parti", "drawbench", "geneval", "tifa")
    },
    "inline": ["prompts.items=[a red circle]"],
    "donor_prompt": ["replacement.donor_prompt.prompt=a blue square"],
    "resample": ["replacement.resample.prompt=a blue square"],
    "layout": ["prompts=boxes"],
    "identity": ["layers.kind=self_attention"],
    "mask": ["layers.by=token"],
    "steering_off": ["prompts=boxes", "steering=layout"],
    "lora_off": ["model.loras=[{path: my_lora}]"],
}


def composed(*overrides):
    register(CONF)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("lesion", list(overrides))


def test_there_is_no_folder_or_file_that_these_tests_do_not_know():
    assert {path.name for path in CONF.iterdir()} == {*GROUPS, "hydra", "lesion.yaml"}
    assert len(FILES) + len(BASES) + len(LAUNCHERS) == len(list(CONF.rglob("*.yaml"))) - 1


@pytest.mark.parametrize(("group", "name"), FILES, ids=lambda value: str(value))
def test_every_file_composes_and_is_accepted(group, name, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "p.txt.safetensors").touch()  # of which no byte is read
    needs = [need.replace("@FILE@", str(tmp_path / "p.txt")) for need in NEEDS.get(name, [])]
    request = parse(composed(f"{group}={name}", *needs))
    if group == "model":
        assert request.model.name == name
    if group == "selection":
        assert list(request.axes.selections) == [name]
    if group == "replacement":
        assert list(request.replacements) == [name]


@pytest.mark.parametrize(("group", "name"), FILES, ids=lambda value: str(value))
def test_every_knob_has_a_comment(group, name):
    """In the groups of knobs each line that sets one says what is allowed; a file says what it is for."""
    lines = (CONF / group / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("#")
    if group == "model":
        bare = {"defaults", "name", "id", "variant", "width", "steps", "guidance", "batch_size", "height"}
        assert [line for line in lines if ":" in line and "#" not in line and line.split(":")[0] not in bare] == []


def test_a_model_says_what_is_different_from_the_base():
    """Every knob of a model stands in the base with its comment; a model's file repeats one only to say more of it."""
    (base,) = BASES
    lines = base.read_text().splitlines()
    assert lines[0].startswith("#") and all(" # " in line for line in lines[1:])
    shared = yaml.safe_load(base.read_text())
    assert {*shared, "name", "id", "config"} == set(ModelConf.__dataclass_fields__)
    comments = {line.split(":")[0]: line.partition(" # ")[2] for line in lines[1:]}
    for path in [CONF / "model" / f"{name}.yaml" for group, name in FILES if group == "model"]:
        own = yaml.safe_load(path.read_text())
        assert own.pop("defaults") == ["_base", "_self_"]
        said = {line.split(":")[0]: line.partition(" # ")[2] for line in path.read_text().splitlines()}
        for key in [key for key in own if key in shared and own[key] == shared[key]]:
            assert said[key] not in ("", comments[key]), f"{path.name} repeats {key}"


def test_names_in_code_and_in_conf_agree():
    assert {name for group, name in FILES if group == "selection"} == set(SELECTIONS)
    assert {name for group, name in FILES if group == "replacement"} == set(replacements.known())
    assert {name for group, name in FILES if group == "tracker"} == set(tracker_names())
    assert "clip_similarity" in scoring.known_metrics()


@pytest.mark.parametrize("name", [name for group, name in FILES if group == "prompts" and name not in NEEDS])
def test_prompt_sets(name):
    data = yaml.safe_load((CONF / "prompts" / f"{name}.yaml").read_text())
    label, prompts, _ = parse_prompts(data)
    assert label == name
    assert name == "calibration" or all(prompt.aspects for prompt in prompts)
    if name != "natural":
        assert [prompt.text for prompt in prompts if parse_caption(prompt.text) is None] == []


def test_the_calibration_set_shares_no_caption_with_a_study():
    sets = {name: yaml.safe_load((CONF / "prompts" / f"{name}.yaml").read_text()) for group, name in FILES
            if group == "prompts" and name not in NEEDS}  # fmt: skip
    texts = {name: {prompt.text for prompt in parse_prompts(data)[1]} for name, data in sets.items()}
    calibration = texts.pop("calibration")
    assert len(calibration) == 32
    assert all(not calibration & others for others in texts.values())


def test_the_demo_is_as_large_as_it_says():
    request = parse(composed("experiment=demo"))
    assert (len(request.prompts), request.seeds, request.model.id) == (16, (0,), "embedded")
    assert list(request.axes.selections) == ["leave_one_out", "only_one"]
    assert {aspect for prompt in request.prompts for aspect in prompt.aspects} >= {
        "colour", "shape", "size", "count", "relation", "background"
    }  # fmt: skip


def stand_in(model: str, folder: Path, folder_of: Callable[[str], Path]) -> Path:
    """A tiny model of the same class, and of the same layers where it is a UNet."""
    import layouts

    if model == "sd15":
        return layouts.sd15_layout(folder)
    if model == "sdxl":
        return layouts.sdxl_layout(folder)
    return folder_of({"embedded": "sd", "flux_dev": "flux", "sd3_medium": "sd3", "sd35_large": "sd3"}[model])


def small(pipeline_folder: Path, clip: Path, dino: Path, steps: int = 2) -> list[str]:
    """Overrides that put a tiny stand-in in the place of an experiment's model and scorer."""
    return [
        f"model.id={pipeline_folder}",
        "model.variant=null",
        "model.dtype=float32",
        f"scorer.clip_model=local-dir:{clip}",
        "scorer.clip_pretrained=null",
        f"scorer.dino_model={dino}",
        f"generation.steps={steps}",
        "generation.height=16",
        "generation.width=16",
        "tracker=none",
        "prompts=inline",
        "prompts.items=[a red circle]",
        "seeds=0",
    ]


SIZES = {
    "demo": 1 + 7 + 7,
    "study": 1 + 2 * (7 + 7 + 1),
    "tokens": 1 + 12,
    "sdxl_layers": 1 + 11 + 11 + 1,
    "sdxl_style_layout": 1 + 6 + 1,
    "sd15_per_layer_prompts": 1 + 2 + 16,
    "prompt_swap_windows": 1 + 10 + 4,
    "flux_vital_layers": 1 + 2 + 3,  # the stand-in has 2 double and 3 single blocks
    "sd3_vital_layers": 1 + 3,
    "layout": 1 + 2 + 2 + 1,  # the stand-in has two layers in its last up block
    "sd15_layout": 1 + 4 + 4 + 1,
}  # images of one prompt and seed on the stand-in


BOXED = "prompts.items=[{text:a red circle,boxes:[{words:red circle,box:[0,0,0.5,1]}]}]"
LOUD = (BOXED, "steering.scale=1e4", "steering.mask=covered")  # random weights look everywhere alike
BESIDE = {
    "layout": (*LOUD, "layers.include=[up_blocks.1.*]", "steering.layers=[up_blocks.1.*]"),
    "sd15_layout": LOUD,
}


LONG = ("prompt_swap_windows", "sd15_layout", "sdxl_style_layout", "sd15_per_layer_prompts")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LONG else [])
        for group, name in FILES
        if group == "experiment" and name not in ("lora", "shards")
    ],
)
def test_every_experiment_runs(cli, name, folder_of, tiny_clip, tmp_path):
    """On a tiny model of the same class: few steps, one prompt, one seed.

    `lora` needs a LoRA: see test_lora_off.py. `shards` is a multirun: see test_sharded.py.
    """
    from test_scoring import write_dino

    cli.defaults = []
    request = parse(composed(f"experiment={name}"))
    model = request.model.name
    folder = stand_in(model, tmp_path / "stand_in", folder_of)
    dino = write_dino(tmp_path / "dino")
    steps = 10 if len(request.axes.windows) > 1 else 2
    code, _, err = cli(f"experiment={name}", *small(folder, tiny_clip, dino, steps), *BESIDE.get(name, ()))
    assert code == 0, err
    (frame,) = cli.frames()
    assert (frame.status == "ok").all()
    assert len(frame) == SIZES.get(name, len(frame))
    lesioned = frame[frame.selection != "none"]
    assert (lesioned[request.scorer.importance] < 1).any()  # the lesions reach the images
    assert set(frame.importance_metric) == {request.scorer.importance}
    if name == "sdxl_layers":
        assert set(frame.selection) == {"none", "only_one", "leave_one_out", "all"}
        assert frame.scheduler.unique().tolist() == ["EulerDiscreteScheduler"]


def test_debug_smoke_runs(cli, tiny_clip):
    cli.defaults = []
    code, _, err = cli("debug=smoke", f"scorer.clip_model=local-dir:{tiny_clip}")
    assert code == 0, err
    (frame,) = cli.frames()
    assert len(frame) == 1 + 3 + 3


def test_sdxl_baseline_is_plain_diffusers_to_the_bit(tiny_sdxl_folder):
    import numpy as np
    import torch
    from diffusers import StableDiffusionXLPipeline

    from conftest import settings, tiny_spec
    from lesion import models
    from lesion.generation.generate import generate
    from lesion.study.grid import Cell
    from lesion.study.prompts import Prompt

    model = models.load(models.resolve(tiny_spec(tiny_sdxl_folder)), "cpu")
    for guidance in (5.0, 0.0):
        cells = [Cell(model.identity, Prompt(t), s, settings(guidance=guidance), None) for t, s in (("a", 1), ("b", 2))]
        pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_folder, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        plain = pipe(
            ["a", "b"],
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in (1, 2)],
            num_inference_steps=4,
            guidance_scale=guidance,
            height=16,
            width=16,
            output_type="np",
        ).images
        assert np.array_equal(generate(model, cells, {}), plain)


def test_the_worked_examples_prompts_are_captions_the_model_never_saw_evenly_over_the_aspects():
    prompts = parse_prompts(yaml.safe_load((CONF / "prompts" / "study.yaml").read_text()))[1]
    assert all(is_held_out(prompt.text) and parse_caption(prompt.text) for prompt in prompts)
    tags = Counter(tag for prompt in prompts for tag in prompt.aspects)
    assert tags == dict.fromkeys(("colour", "shape", "background", "size", "count", "relation", "binding"), 7)
