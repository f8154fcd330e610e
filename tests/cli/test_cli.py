"""The whole flow through the command line, on a tiny model: results, sweeps, refusals, faults, interruption."""

from __future__ import annotations

import json
import re
import shlex

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import open_dict
from PIL import Image

import lesion
from lesion import models
from lesion.generation.generate import generate
from lesion.run import environment
from lesion.run import maker as making

CONTRACT = [
    "model",
    "prompt_id",
    "prompt",
    "seed",
    "selection",
    "replacement",
    "layer",
    "window_start",
    "window_end",
    "branch",
    "strength",
    "task",
    "steps",
    "guidance",
    "scheduler",
    "status",
    "image",
    "cell",
    "clip_similarity",
]
LAYERS = ["down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.1"]


def test_a_study_from_command_to_run_folder(cli, drawn):
    code, out, _ = cli()
    assert code == 0
    folder = cli.newest()
    frame = pd.read_parquet(folder / "results.parquet")
    assert set(CONTRACT) <= set(frame.columns)
    assert {"clip_text", "ssim", "psnr"} <= set(frame.columns)
    assert len(frame) == 2 * (1 + 3 + 3)
    baselines = frame[frame.selection == "none"]
    assert (baselines.clip_similarity == 1.0).all()
    assert (baselines.layer == "").all()
    assert len(baselines) == 2
    assert list(frame[frame.selection == "only_one"].layer.unique()) == LAYERS
    assert (frame.status == "ok").all()
    for name in frame.image:
        with Image.open(folder / name) as image:
            assert image.size == (16, 16)
            assert "lesion" in image.text
    for name in ("grids", "tables", "figures", "images", ".hydra"):
        assert list((folder / name).iterdir()), name
    assert (folder / "report.html").stat().st_size > 1000
    assert all(layer in out for layer in LAYERS)
    assert str(folder) in out


def test_a_second_run_makes_nothing_and_an_amended_one_only_what_is_new(cli, monkeypatch):
    made = []

    def counting(model, cells, *rest):
        made.extend(cell.key for cell in cells)
        return generate(model, cells, *rest)

    monkeypatch.setattr(making, "generate", counting)
    assert cli()[0] == 0
    assert len(made) == 14
    first = pd.read_parquet(cli.newest() / "results.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(models, "load", lambda *args: pytest.fail("loaded a model for nothing"))
        assert cli()[0] == 0
    pd.testing.assert_frame_equal(first, pd.read_parquet(cli.newest() / "results.parquet"))
    assert cli("seeds=[0,1]")[0] == 0
    assert len(made) == 28
    assert len(set(made)) == 28


@pytest.mark.slow  # five jobs
def test_lists_in_a_job_and_a_sweep_over_jobs_are_the_same(cli, monkeypatch):
    loads = []
    monkeypatch.setattr(models, "load", lambda *args, load=models.load: loads.append(load(*args)) or loads[-1])
    grid = {"selection": ["leave_one_out", "only_one"], "replacement": ["zero", "mean"]}
    calibration = "calibration.seeds=[5]"
    lists = [f"{key}=[{','.join(names)}]" for key, names in grid.items()]
    assert cli(*lists, calibration, "store.dir=a", "hydra.run.dir=lists")[0] == 0
    one = pd.read_parquet(cli.folder / "lists" / "results.parquet")
    sweeps = [f"{key}={','.join(names)}" for key, names in grid.items()]
    assert cli("-m", *sweeps, calibration, "store.dir=b", "hydra.sweep.dir=swept", defaults=True)[0] == 0
    frames = [pd.read_parquet(path) for path in (cli.folder / "swept").glob("*/results.parquet")]
    assert len(frames) == 4
    assert len({id(model) for model in loads}) == 1  # loaded once for all five jobs
    keys = ["cell", "selection"]
    swept = pd.concat(frames)
    found = swept.drop_duplicates(keys)
    columns = [name for name in one.columns if name != "image"]
    pd.testing.assert_frame_equal(
        one[columns].sort_values(keys).reset_index(drop=True),
        found[columns].sort_values(keys).reset_index(drop=True),
    )


def test_dry_run_counts_and_makes_nothing(cli, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("loaded a model"))
    code, out, _ = cli("dry_run=true", "seeds=[0,1]")
    assert code == 0
    assert "baseline                                4 images" in out
    assert "leave_one_out / zero                   12 images" in out
    assert "to make: 28" in out
    assert "already in the store store: 0" in out
    assert not (cli.folder / "store").exists()


def test_dry_run_leaves_no_folder_of_its_own(cli):
    (cli.folder / "mine" / "empty").mkdir(parents=True)
    for arguments in (
        ["hydra.run.dir=${now:%Y}/${now:%H-%M-%S}"],
        ["hydra.run.dir=mine/new/deep"],
        ["hydra.run.dir=new"],
        ["-m", "replacement=zero,null_prompt", "hydra.sweep.dir=${now:%Y}/${now:%H-%M-%S}"],
        ["-m", "replacement=zero,null_prompt", "hydra.sweep.dir=mine/swept"],
    ):
        assert cli("dry_run=true", *arguments)[0] == 0
        assert sorted(cli.folder.rglob("*")) == [cli.folder / "mine", cli.folder / "mine" / "empty"], arguments
    assert cli("dry_run=true", "hydra.run.dir=mine/empty")[0] == 0
    assert (cli.folder / "mine" / "empty").is_dir()  # it was there before
    (cli.folder / "mine" / "notes.txt").write_text("mine")
    assert cli("dry_run=true", "hydra.run.dir=mine")[0] == 0
    assert (cli.folder / "mine" / "notes.txt").read_text() == "mine"


REFUSALS = [
    (["generation.step=3"], ["step", "steps"]),
    (["generation.steps=many"], ["generation.steps", "whole number"]),
    (["generation.steps=0"], ["generation.steps", "in [1, 10000]"]),
    (["generation.height=17"], ["generation.height", "multiple of 8"]),
    (["generation.guidance=-1"], ["generation.guidance", "in [0, 10000]"]),
    (["generation.guidance=nan"], ["generation.guidance", "in [0, 10000]"]),
    (["generation.task=video"], ["generation.task", "txt2img"]),
    (["generation.batch_size=0"], ["generation.batch_size", "in [1, 10000]"]),
    (["layers.include=[nonesuch.*]"], ["layers.include", "nonesuch", "mid_block.attentions.0"]),
    (["layers.include=[mid_block.*]"], ["selection", "only_one", "two layers"]),
    (["layers.by=neuron"], ["layers.by", "attention"]),
    (["layers.kind=hat"], ["layers.kind", "cross_attention"]),
    (["layers.by=stage", "model.id=/nonesuch"], ["model.id", "/nonesuch"]),
    (["layers.include=['re:(']"], ["layers.include", "regular expression"]),
    (["layers.exclude=[nonesuch]"], ["layers.exclude", "nonesuch"]),
    (["layers.exclude=['*']"], ["layers.exclude", "no layer"]),
    (["layers.kind=text_stream", "performance.compile=true"], ["performance.compile", "text_stream"]),
    (
        ["performance.shared_rows=true", "performance.compile=true"],
        ["performance.shared_rows", "only"],
    ),
    (["performance.dtype=int8"], ["performance.dtype", "bfloat16"]),
    (["selection=neighbours", "selection.neighbours.size=9"], ["selection.neighbours.size", "from 1 to 3"]),
    (
        ["selection=coalitions", "selection.coalitions.permutations=1000000000000"],
        ["selection.coalitions.permutations", "1 to 10000"],
    ),
    (["prompts.items=[]"], ["prompts", "empty"]),
    (["prompts.items=[a, a]"], ["prompts", "twice"]),
    (["prompts=nonesuch.txt"], ["prompts.path", "nonesuch.txt"]),
    (["prompts=nonesuch"], ["prompts: there is no", "'nonesuch'", "demo"]),
    (["prompts=a red circle"], ["prompts", "prompts=inline", "a red circle"]),
    (["seeds=[0,0]"], ["seeds", "twice"]),
    (["seeds=[]"], ["seeds", "empty"]),
    (["seeds=-1"], ["seeds", "0 to"]),
    (["seeds=1.5"], ["seeds", "1.5"]),
    (["selection=most"], ["selection: there is no choice 'most'", "leave_one_out"]),
    (["replacement=noise"], ["replacement: there is no choice 'noise'", "zero"]),
    (["replacement=mean", "calibration.seeds=[]"], ["calibration.seeds"]),
    (["window=[0.5,0.5]"], ["window", "start < end"]),
    (["window=[0,2]"], ["window", "[0, 1]"]),
    (["window=[0.4,0.5]"], ["window", "none of the 3 steps"]),
    (["scorer.clip_model=ViT-B-33"], ["scorer.clip_model", "ViT-B-32"]),
    (["scorer.clip_model=local-dir:/nonesuch"], ["scorer.clip_model", "/nonesuch"]),
    (["scorer.clip_model=ViT-B-32", "scorer.clip_pretrained=nonesuch"], ["scorer.clip_pretrained", "openai"]),
    (["store.dir=/etc/hostname/store"], ["store.dir", "/etc/hostname"]),
    (["prompts.items=[{text: a, aspects: 5}]"], ["prompts", "aspects"]),
    (["device=cuda:"], ["device", "cuda:N"]),
    (["strength=2"], ["strength", "[0, 1]"]),
    (["branch=left"], ["branch", "both, cond, uncond"]),
    (["branch=cond", "generation.guidance=1"], ["branch", "guidance"]),
    (["device=cuda:99"], ["device", "cuda:99", "cpu"]),
    (["device=abacus"], ["device", "abacus"]),
    (["model=nonesuch"], ["model: there is no choice 'nonesuch'", "embedded"]),
    (["model.id=/nonesuch"], ["model.id", "/nonesuch"]),
    (["model.id=org/nonesuch"], ["model.id", "org/nonesuch"]),
    (["model.dtype=int8"], ["model.dtype", "float16"]),
    (["model.scheduler=magic"], ["model.scheduler", "ddim"]),
    (["scorer=nonesuch"], ["scorer: there is no choice 'nonesuch'", "embedded"]),
    (["scorer.metrics=[clip_similarity,taste]"], ["scorer.metrics", "taste", "ssim"]),
    (["scorer.metrics=[ssim]"], ["scorer.metrics", "clip_similarity"]),
    (["tracker=nonesuch"], ["tracker: there is no choice 'nonesuch'", "wandb"]),
    (["colour=red"], ["colour"]),
    (["seeds"], ["seeds"]),
    (["seeds=[0"], ["[0"]),
    (["model=single_file", "model.id=x.safetensors"], ["model.id", "x.safetensors"]),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSALS, ids=lambda value: " ".join(value) if value else "")
@pytest.mark.parametrize("mode", [[], pytest.param(["-m"], marks=pytest.mark.slow)], ids=["run", "multirun"])
def test_a_wrong_request_is_one_line_and_leaves_no_trace(cli, monkeypatch, arguments, words, mode):
    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("loaded a model"))
    if arguments[0].startswith("model="):
        cli.defaults = [default for default in cli.defaults if not default.startswith("model.")]
    if arguments[0].startswith("prompts="):
        cli.defaults = [default for default in cli.defaults if not default.startswith("prompts.")]
    code, out, err = cli(*mode, *arguments)
    assert code == 2, err
    assert err.startswith("lesion: ")
    assert err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert out == ""
    assert list(cli.folder.iterdir()) == []


def test_one_wrong_job_of_a_sweep_stops_it_before_the_first(cli):
    code, _, err = cli("-m", "generation.steps=3,0")
    assert code == 2
    assert "generation.steps" in err
    assert list(cli.folder.iterdir()) == []


def test_a_failing_cell_is_named_and_the_others_go_on(cli, monkeypatch):
    def failing(model, cells, *rest):
        if any(cell.lesion and cell.lesion.layer == LAYERS[1] and cell.seed == 0 for cell in cells):
            raise RuntimeError("planted fault")
        return generate(model, cells, *rest)

    monkeypatch.setattr(making, "generate", failing)
    code, _, err = cli("seeds=[0,1]")
    assert code == 1
    assert "4 of 28 images failed" in err
    frame = pd.read_parquet(cli.newest() / "results.parquet")
    bad = frame[frame.status == "failed"]
    assert set(bad.layer) == {LAYERS[1]}
    assert len(bad) == 4
    assert bad.reason.str.contains("RuntimeError: planted fault").all()
    assert bad.clip_similarity.isna().all()
    assert frame[frame.status == "ok"].clip_similarity.notna().all()
    monkeypatch.setattr(making, "generate", generate)
    assert cli("seeds=[0,1]")[0] == 0


def test_invalid_images_are_marked_and_left_out(cli, drawn, no_figures, monkeypatch):
    def poisoned(model, cells, *rest):
        images = generate(model, cells, *rest[:-1])  # not as bytes, which cannot hold a NaN
        for image, cell in zip(images, cells):
            if cell.lesion and cell.lesion.layer == LAYERS[0] and cell.lesion.selection == "leave_one_out":
                image[0, 0, 0] = np.nan
            if cell.lesion and cell.lesion.layer == LAYERS[2] and cell.lesion.selection == "leave_one_out":
                image[:] = 0
        return images

    monkeypatch.setattr(making, "generate", poisoned)
    code, _, _ = cli()
    assert code == 1
    frame = pd.read_parquet(cli.newest() / "results.parquet")
    reasons = frame[frame.status == "invalid"].groupby("layer").reason.first().to_dict()
    assert reasons == {LAYERS[0]: "image has non-finite values", LAYERS[2]: "image is all black"}
    assert frame[frame.status == "invalid"].clip_similarity.isna().all()
    table = pd.read_csv(next((cli.newest() / "tables").glob("layers--*.csv"))).set_index("layer")
    assert table.n_invalid[LAYERS[0]] == 2
    assert np.isnan(table.importance[LAYERS[0]])


def test_what_made_an_image_is_said_and_a_mixture_is_warned_of(cli, monkeypatch, no_report):
    code, out, err = cli("selection=none")
    assert code == 0 and "several cards" not in out + err
    (frame,) = cli.frames()
    made = {"card": "cpu", "torch": torch.__version__, "diffusers": diffusers.__version__, "lesion": environment.code()}
    assert frame[["card", "torch", "diffusers", "lesion"]].drop_duplicates().to_dict("records") == [made]
    picture = Image.open(cli.newest() / frame.image[0])
    assert json.loads(picture.text["lesion"])["made"] == made | {"truncated_tokens": 0}
    monkeypatch.setattr(making, "_made_with", lambda device: {**made, "card": "another"})
    code, out, err = cli("selection=none", "seeds=[0,1]")
    assert code == 0 and "several cards or versions" in out + err and "another, torch" in out + err
    frame = pd.read_parquet(cli.newest() / "results.parquet")
    assert dict(zip(frame.seed, frame.card, strict=True)) == {0: "cpu", 1: "another"}
    monkeypatch.setattr(making, "_made_with", lambda device: {**made, "lesion": "0.0.9"})
    code, out, err = cli("selection=none", "seeds=[0,2]")
    assert code == 0 and "diffusers {}, lesion 0.0.9".format(made["diffusers"]) in out + err


def test_a_baseline_that_failed_spoils_only_its_own_comparisons(cli, monkeypatch):
    def failing(model, cells, *rest):
        if any(cell.lesion is None and cell.prompt.text == "two stars" for cell in cells):
            raise RuntimeError("planted fault")
        return generate(model, cells, *rest)

    monkeypatch.setattr(making, "generate", failing)
    assert cli()[0] == 1
    frame = pd.read_parquet(cli.newest() / "results.parquet")
    assert (frame[frame.prompt == "a red circle"].status == "ok").all()
    lesioned = frame[(frame.prompt == "two stars") & (frame.selection != "none")]
    assert (lesioned.status == "invalid").all()
    assert lesioned.reason.str.contains("baseline").all()


def test_an_interrupt_keeps_what_is_finished(cli, monkeypatch):
    calls = []

    def interrupted(model, cells, *rest):
        calls.append(len(cells))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(model, cells, *rest)

    monkeypatch.setattr(making, "generate", interrupted)
    code, _, err = cli()
    assert code == 130
    assert "same command again" in err
    kept = len(list((cli.folder / "store").rglob("*.png")))
    assert kept == sum(calls[:2])
    made = []
    monkeypatch.setattr(making, "generate", lambda m, cells, *rest: made.extend(cells) or generate(m, cells, *rest))
    assert cli()[0] == 0
    assert len(made) == 14 - kept


def test_a_damaged_image_is_noticed_and_made_again(cli):
    assert cli()[0] == 0
    victim = next((cli.folder / "store").rglob("*.png"))
    whole = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(whole[:60] + bytes(30) + whole[90:])
    first = cli.frames()[0]
    code, out, _ = cli()
    assert code == 0
    assert f"damaged and removed; it is made again ({victim.name}" in out
    assert victim.read_bytes() == whole
    pd.testing.assert_frame_equal(first, cli.frames()[-1])


def test_importance_of_a_planted_layer_is_exactly_zero(cli, tmp_path_factory):
    """A layer whose cross-attention output projection is zeroed: through the whole flow, to the table.

    One image a batch: in batches of several sizes float32 rounds differently, which the table calls no effect, too.
    """
    import torch

    from conftest import small_pipeline
    from lesion.analysis.importance import layer_table

    pipe = small_pipeline()
    with torch.no_grad():
        for path, module in pipe.unet.named_modules():
            if path.endswith("attn2"):
                module.to_out[0].weight.mul_(20)
                if path.startswith(LAYERS[1]):
                    module.to_out[0].weight.zero_()
                    module.to_out[0].bias.zero_()
    folder = tmp_path_factory.mktemp("planted") / "model"
    pipe.save_pretrained(folder)
    cli.defaults = [f"model.id={folder}" if d.startswith("model.id") else d for d in cli.defaults]
    for size in (1, 4):
        assert cli("selection=leave_one_out", f"generation.batch_size={size}", f"store.dir=store{size}")[0] == 0
        table = layer_table(pd.read_parquet(cli.newest() / "results.parquet")).set_index("layer")
        assert table.importance[LAYERS[1]] == pytest.approx(0, abs=0 if size == 1 else 1e-4)
        assert table.effect[LAYERS[1]] == "none"
        assert (table.importance.drop(LAYERS[1]) > 1e-4).all()


def test_other_layers_kinds_and_selections_from_command_to_table(cli):
    code, _, err = cli(
        "layers.by=block",
        "layers.kind=self_attention",
        "layers.include=['re:^(down|up)']",
        "layers.exclude=['*.0']",
        "selection=[leave_one_out,pairs,cumulative]",
    )
    assert code == 0, err
    (frame,) = cli.frames()
    lesioned = frame[frame.selection != "none"]
    assert set(lesioned.kind) == {"self_attention"}
    assert set(frame.kind) == {"self_attention", ""}
    layers = lesioned[lesioned.selection == "leave_one_out"].layer.unique().tolist()
    assert layers == ["down_blocks.1", "up_blocks.1"]
    assert lesioned.groupby("selection").size().to_dict() == {"cumulative": 4, "leave_one_out": 4, "pairs": 2}
    assert set(lesioned[lesioned.selection == "pairs"].lesioned) == {"down_blocks.1+up_blocks.1"}
    assert lesioned[lesioned.selection != "none"].clip_similarity.notna().all()


def test_several_windows_in_one_job_keep_their_own_rows_and_files(cli, drawn, no_pictures):
    assert (
        cli("window=[[0,0.4],[0.4,1]]", "selection=leave_one_out", "layers.include=[up_blocks.1.attentions.1]")[0] == 0
    )
    (frame,) = cli.frames()
    lesioned = frame[frame.selection != "none"]
    assert sorted(set(zip(lesioned.window_start, lesioned.window_end))) == [(0.0, 0.4), (0.4, 1.0)]
    assert lesioned.layer_index.unique().tolist() == [6]  # depth in the model, not among the layers under study
    assert len(list((cli.newest() / "tables").glob("layers--*.csv"))) == 2


def test_a_replacement_that_cannot_be_made_ready_costs_only_its_own_cells(cli, monkeypatch):
    from lesion.replacements import _means as means

    monkeypatch.setattr(means, "measure", lambda *args: (_ for _ in ()).throw(RuntimeError("planted fault")))
    code, _, _ = cli("replacement=[zero,mean]", "selection=leave_one_out")
    assert code == 1
    (frame,) = cli.frames()
    assert (frame[frame.replacement != "mean"].status == "ok").all()
    bad = frame[frame.replacement == "mean"]
    assert (bad.status == "failed").all()
    assert bad.reason.str.contains("planted fault").all()


def test_a_metric_that_fails_costs_only_its_own_column(cli, monkeypatch):
    from lesion.scoring import ssim

    monkeypatch.setattr(ssim.Ssim, "__call__", None)
    code, _, _ = cli()
    assert code == 0
    (frame,) = cli.frames()
    assert frame.ssim.isna().sum() == len(frame)
    assert frame.clip_similarity.notna().all()


def test_help_fits_a_screen_and_its_examples_are_understood(cli, tiny_folder):
    from lesion.config.compose import compose
    from lesion.config.parsing import parse

    code, out, _ = cli("--help", defaults=False)
    lines = out.rstrip().splitlines()
    assert code == 0 and len(lines) <= 30 and max(map(len, lines)) <= 125
    examples = [re.split(r"\s{2,}", line.strip())[0] for line in lines if re.match(r"  +lesion ", line)]
    assert len(examples) == 5
    (cli.folder / "my.csv").write_text("text\na red circle\n")
    for example in examples:
        _, *overrides = shlex.split(example.replace("FOLDER", str(tiny_folder)))
        overrides += [f"model.id={tiny_folder}"] if "model=sd15" in overrides else []  # no hub here
        if "-m" in overrides:
            overrides = [one.partition(",")[0] for one in overrides if one != "-m"]
        config = compose(overrides)
        with open_dict(config):
            del config["hydra"]
        request = parse(config)
        assert request.prompts and all(" " in prompt.text for prompt in request.prompts)
    code, out, _ = cli("--version", defaults=False)
    assert (code, out) == (0, f"lesion {lesion.__version__}\n")


def test_phases_are_named_and_pictures_appear_as_they_are_made(cli, monkeypatch, caplog):
    seen = []
    from lesion.run.score_queue import ScoreQueue

    complete = ScoreQueue.complete

    def looked(self, *arguments):
        seen.append(len(list(cli.folder.rglob("outputs/**/images/*/*.png"))))
        return complete(self, *arguments)

    monkeypatch.setattr(ScoreQueue, "complete", looked)
    code, _, err = cli()
    assert code == 0, err
    assert seen == [len(cli.frames()[0])]  # all are there before the first is scored
    said = caplog.text or err + (cli.newest() / "lesion.log").read_text()
    places = [
        said.index(word) for word in ("loading: the scorer", "loading: the model", "generating:", "scoring:", "report:")
    ]
    assert places == sorted(places)
    assert "Loading weights" not in err and "torch_dtype" not in err


def test_a_multirun_says_which_job_is_at_work(cli):
    code, _, err = cli("-m", "seeds=0,1", "selection=none")
    assert code == 0 and "job 1 of 2, tiny" in err.replace("local", "tiny") and "all jobs: 100%" in err
