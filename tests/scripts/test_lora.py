"""`scripts/train_lora.py`: folders, the arithmetic of a step against plain diffusers, resuming, what comes out."""

from __future__ import annotations

import csv
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

SCRIPTS = Path(__file__).parents[2] / "scripts"
CAPTIONS = ["a red circle", "a blue square", "two stars", "a green cross", "a ring"]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The scripts importable; neither a loaded model nor accelerate's global state goes from test to test."""
    from accelerate.state import AcceleratorState

    from lesion.models import loading

    monkeypatch.syspath_prepend(str(SCRIPTS))
    loading.forget()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    loading.forget()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0)
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for index, caption in enumerate(CAPTIONS):
            pixels = noise.integers(0, 255, (20, 24 + 4 * index, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
            table.writerow([f"{index}.png", caption])
    return folder


def run(model, data, out, until=float("inf"), show_every=0, prompts=(), save_every=100, **changes):
    from lora.data import digest, read_folder
    from lora.recipe import Recipe
    from lora.training import Watch, train

    examples = read_folder(data)
    base = {"rank": 2, "alpha": 3.0, "steps": 4, "batch": 2, "rate": 1e-2, "seed": 5, "side": 16}
    recipe = Recipe(model=str(model), data=digest(examples), **{**base, **changes})
    watch = Watch(until=until, show_every=show_every, prompts=prompts, save_every=save_every, steps=2, guidance=3.0)
    return train(recipe, examples, out, watch, cpu=True)


def matrices(out):
    return load_file(out / "pytorch_lora_weights.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def opened(folder):
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_v_folder(tiny_folder, tmp_path_factory):
    """The tiny pipeline with SD 2.1's kind of prediction."""
    folder = tmp_path_factory.mktemp("models") / "tiny_v"
    shutil.copytree(tiny_folder, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "v_prediction"}))
    return folder


# Folders


def test_the_three_ways_to_give_captions(pictures, tmp_path):
    from lora.data import read_folder

    by_csv = [(example.path.name, example.caption) for example in read_folder(pictures)]
    assert by_csv == [(f"{index}.png", caption) for index, caption in enumerate(CAPTIONS)]
    lines, texts = tmp_path / "lines", tmp_path / "texts"
    for folder in (lines, texts):
        shutil.copytree(pictures, folder)
        (folder / "metadata.csv").unlink()
    rows = [json.dumps({"file_name": name, "caption": caption}) for name, caption in by_csv]
    (lines / "metadata.jsonl").write_text("\n".join(rows))
    for name, caption in by_csv:
        (texts / name).with_suffix(".txt").write_text(f"{caption}\n")
    for folder in (lines, texts):
        assert [(example.path.name, example.caption) for example in read_folder(folder)] == by_csv


def spoil(folder: Path, how: str) -> None:
    if how == "no captions":
        (folder / "metadata.csv").unlink()
    elif how == "missing image":
        (folder / "2.png").unlink()
    elif how == "unreadable image":
        (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])
    elif how == "no image at all":
        (folder / "1.png").write_text("hello")
    elif how == "no caption column":
        (folder / "metadata.csv").write_text("file_name,words\n0.png,a cat\n")
    elif how == "no file_name":
        (folder / "metadata.csv").write_text("file,text\n0.png,a cat\n")
    elif how == "empty caption":
        (folder / "metadata.csv").write_text("file_name,text\n0.png,\n")
    elif how == "bad json":
        (folder / "metadata.csv").rename(folder / "metadata.jsonl")
    elif how == "one text missing":
        (folder / "metadata.csv").unlink()
        (folder / "0.txt").write_text("a cat")
    elif how == "no folder":
        shutil.rmtree(folder)


SPOILT = [
    ("no captions", "no captioned image"),
    ("missing image", "2.png"),
    ("unreadable image", "1.png is no readable image"),
    ("no image at all", "1.png is no readable image"),
    ("no caption column", "text, caption, prompt"),
    ("no file_name", "row 1: no file_name"),
    ("empty caption", "0.png"),
    ("bad json", "metadata.jsonl cannot be read"),
    ("one text missing", "1.png has no caption"),
    ("no folder", "no folder"),
]


@pytest.mark.parametrize(("how", "words"), SPOILT, ids=[how for how, _ in SPOILT])
def test_a_bad_folder_is_one_line(pictures, tmp_path, capsys, how, words):
    import train_lora

    shutil.copytree(pictures, tmp_path / "data")
    spoil(tmp_path / "data", how)
    with pytest.raises(SystemExit) as end:
        train_lora.main([str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2
    assert words in last and "error: argument folder" in last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nowhere/at/all"], "model.id"),
        (["--targets", "to_nothing"], "targets"),
        (["--mixed-precision", "fp16", "--device", "cpu"], "--mixed-precision"),
        (["--rank", "0"], "--rank"),
        (["--resolution", "10"], "multiple of 4"),
    ],
)
def test_a_bad_option_is_one_line(tiny_folder, pictures, tmp_path, capsys, arguments, words):
    import train_lora

    model = [] if "--model" in arguments else ["--model", str(tiny_folder)]
    with pytest.raises(SystemExit) as end:
        train_lora.main([str(pictures), "--out", str(tmp_path / "out"), *model, *arguments])
    assert end.value.code == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_order_of_the_images_is_a_new_permutation_each_epoch():
    from lora.data import rows_of

    drawn = [row for index in range(10) for row in rows_of(5, 3, index, seed=2)]
    epochs = [drawn[start : start + 5] for start in range(0, 30, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert rows_of(5, 3, 7, seed=2) == drawn[21:24]


def test_pixels_are_resized_and_cut_in_the_middle(tmp_path):
    from lora.data import read_pixels

    image = np.zeros((8, 24, 3), np.uint8)
    image[:, 8:16] = 255  # the middle third
    Image.fromarray(image).save(tmp_path / "wide.png")
    pixels = read_pixels(tmp_path / "wide.png", 8)
    assert pixels.values.shape == (3, 8, 8) and (pixels.values == 1).all()
    assert (pixels.original, pixels.corner) == ((8, 24), (0, 8))


# One step


@pytest.mark.parametrize("which", ["tiny_folder", "tiny_v_folder", "tiny_sdxl_folder"])
def test_the_loss_is_that_of_plain_diffusers(request, pictures, which):
    """Text, noise, target and SDXL's conditions written out by hand."""
    from lora.data import digest, read_folder
    from lora.denoising import Denoising
    from lora.recipe import Recipe

    pipe = opened(request.getfixturevalue(which))
    examples = read_folder(pictures)
    recipe = Recipe(model="", data=digest(examples), batch=3, side=16, seed=4)

    def encode(texts):
        return pipe.encode_prompt(
            prompt=texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )

    task = Denoising(pipe, encode, recipe, examples)
    task.prepare(show=False)
    batch = task.batch(1)
    ids = pipe.tokenizer(batch.texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        share = schedule.alphas_cumprod[batch.times].reshape(-1, 1, 1, 1)
        noisy = share.sqrt() * batch.clean + (1 - share).sqrt() * batch.noise
        target, extra = batch.noise, {}
        if which == "tiny_v_folder":
            target = share.sqrt() * batch.noise - (1 - share).sqrt() * batch.clean
        if which == "tiny_sdxl_folder":
            first = pipe.text_encoder(ids, output_hidden_states=True)
            second = pipe.text_encoder_2(ids, output_hidden_states=True)
            hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
            known = {f"{example.caption}": Image.open(example.path).size for example in examples}
            sizes = [known[text] for text in batch.texts]
            lists = [[h, w, 0, (round(w * 16 / h) - 16) // 2, 16, 16] for w, h in sizes]
            extra = {"added_cond_kwargs": {"text_embeds": second[0], "time_ids": torch.tensor(lists).float()}}
        else:
            hidden = pipe.text_encoder(ids)[0]
        guess = pipe.unet(noisy, batch.times, hidden, **extra).sample
        expected = F.mse_loss(guess, target)
        assert float(task.loss(pipe.unet, batch)) == pytest.approx(float(expected), rel=1e-5)


def test_latents_are_the_images_encoded(tiny_folder, pictures):
    """The cached moments, sampled: their mean over many draws is the encoder's mean, times the scaling factor."""
    from lora.data import digest, read_folder, read_pixels
    from lora.denoising import Denoising
    from lora.recipe import Recipe

    pipe, examples = opened(tiny_folder), read_folder(pictures)[:1]
    task = Denoising(pipe, None, Recipe(model="", data=digest(examples), batch=1, side=16), examples)
    task.prepare(show=False)
    drawn = torch.cat([task.batch(index).clean for index in range(400)])
    with torch.no_grad():
        found = pipe.vae.encode(read_pixels(examples[0].path, 16).values[None]).latent_dist
    scale = pipe.vae.config.scaling_factor
    assert torch.allclose(drawn.mean(0), found.mean[0] * scale, atol=5 * scale * float(found.std.max()) / 20)
    assert torch.allclose(drawn.std(0), found.std[0] * scale, rtol=0.2)


def test_only_the_low_rank_matrices_are_trained(tiny_folder, pictures):
    from lora.recipe import TARGETS, Recipe
    from lora.training import add_adapter

    pipe = opened(tiny_folder)
    linear = {name: part for name, part in pipe.unet.named_modules() if name.endswith(TARGETS)}
    matrices = add_adapter(pipe.unet, Recipe(model="", data="", rank=3))
    assert len(linear) == 7 * 2 * 4  # layers, self- and cross-attention, projections
    assert len(matrices) == 2 * len(linear)
    assert sum(m.numel() for m in matrices) == sum(3 * (p.in_features + p.out_features) for p in linear.values())
    trained = [name for name, parameter in pipe.unet.named_parameters() if parameter.requires_grad]
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    assert all((p == 0).all() == ("lora_B" in name) for name, p in pipe.unet.named_parameters() if "lora_" in name)


# Runs


@pytest.mark.parametrize(
    "which",
    ["tiny_folder", *(pytest.param(f"tiny_{kind}_folder", marks=pytest.mark.slow) for kind in ("v", "sdxl"))],
)
def test_a_run_learns_and_its_file_loads(request, pictures, tmp_path, which):
    """A LoRA whose alpha is not its rank; the base stays as it was; the loss on fixed batches falls."""
    from lora.data import digest, read_folder
    from lora.denoising import Denoising
    from lora.recipe import Recipe

    folder = request.getfixturevalue(which)
    losses = run(folder, pictures, tmp_path, steps=30, batch=4)
    assert len(losses) == 30
    pipe = opened(folder)
    examples = read_folder(pictures)
    task = Denoising(
        pipe,
        lambda texts: pipe.encode_prompt(
            prompt=texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        ),
        Recipe(model="", data=digest(examples), batch=8, side=16, seed=99),
        examples,
    )
    task.prepare(show=False)

    def error():
        with torch.no_grad():
            return float(np.mean([float(task.loss(pipe.unet, task.batch(index))) for index in range(4)]))

    before = error()
    frozen = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(str(tmp_path))
    assert pipe.unet.peft_config[pipe.get_active_adapters()[0]].lora_alpha == 3.0
    assert error() < before
    pipe.unload_lora_weights()
    assert same(pipe.unet.state_dict(), frozen)


def test_the_file_is_the_adapter_that_was_trained(tiny_folder, pictures, tmp_path, monkeypatch):
    from lora import training

    kept = {}
    save = training._Training._save

    def saving(self):
        save(self)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            kept["out"] = self.pipe.unet.eval()(x, 10, torch.ones(1, 77, 16)).sample

    monkeypatch.setattr(training._Training, "_save", saving)
    run(tiny_folder, pictures, tmp_path)
    pipe = opened(tiny_folder)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bare = pipe.unet(x, 10, torch.ones(1, 77, 16)).sample
        pipe.load_lora_weights(str(tmp_path))
        loaded = pipe.unet(x, 10, torch.ones(1, 77, 16)).sample
    assert torch.equal(loaded, kept["out"])
    assert not torch.equal(loaded, bare)


def test_a_resumed_run_is_an_uninterrupted_one(tiny_folder, pictures, tmp_path):
    """Paused after every step, with everything on that draws at random; validation images change nothing."""
    from lora.training import Paused

    options = {"steps": 5, "accumulate": 2, "flip": True, "dropout": 0.5, "warmup": 2, "schedule": "cosine"}
    whole = run(tiny_folder, pictures, tmp_path / "whole", **options)
    for count in range(1, 5):
        torch.manual_seed(count)  # the run depends on no global generator
        with pytest.raises(Paused, match=f"after step {count} of 5"):
            run(tiny_folder, pictures, tmp_path / "parts", until=time.monotonic(), show_every=2,
                prompts=("a ring", "two stars"), **options)  # fmt: skip
    parts = run(tiny_folder, pictures, tmp_path / "parts", **options)
    assert parts == whole
    assert same(matrices(tmp_path / "whole"), matrices(tmp_path / "parts"))
    shown = sorted((tmp_path / "parts" / "validation").iterdir())
    assert [path.name for path in shown] == ["step-000002.png", "step-000004.png"]
    assert Image.open(shown[0]).size == (32, 16)
    assert run(tiny_folder, pictures, tmp_path / "parts", **options) == whole  # complete: nothing is done again


def test_a_killed_run_goes_on_from_its_last_checkpoint(tiny_folder, pictures, tmp_path, monkeypatch):
    from lora import training

    whole = run(tiny_folder, pictures, tmp_path / "whole", steps=5)
    step = training._Training._step

    def dies(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training._Training, "_step", dies)
        run(tiny_folder, pictures, tmp_path / "killed", steps=5, save_every=2)
    assert run(tiny_folder, pictures, tmp_path / "killed", steps=5, save_every=2) == whole
    assert same(matrices(tmp_path / "whole"), matrices(tmp_path / "killed"))


def test_another_recipe_in_the_same_folder_is_refused(tiny_folder, pictures, tmp_path):
    from lora.recipe import Refused

    run(tiny_folder, pictures, tmp_path / "out", steps=1)
    with pytest.raises(Refused, match="rank=2, not 4"):
        run(tiny_folder, pictures, tmp_path / "out", steps=1, rank=4)
    assert len(run(tiny_folder, pictures, tmp_path / "out", steps=3)) == 3  # longer is fine
    with pytest.raises(Refused, match="3 steps already"):
        run(tiny_folder, pictures, tmp_path / "out", steps=2)


def test_a_run_is_a_plain_loop(tiny_folder, pictures, tmp_path):
    """Three steps of two batches each against PyTorch's own AdamW, clipping and a hand-made warm-up."""
    from peft import get_peft_model_state_dict

    from lora.data import digest, read_folder
    from lora.denoising import Denoising
    from lora.recipe import Recipe
    from lora.training import add_adapter

    losses = run(tiny_folder, pictures, tmp_path, steps=3, accumulate=2, warmup=2, clip=0.01)
    pipe, examples = opened(tiny_folder), read_folder(pictures)
    recipe = Recipe(model="", data=digest(examples), rank=2, alpha=3.0, batch=2, side=16, seed=5)

    def encode(texts):
        return pipe.encode_prompt(
            prompt=texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )

    task = Denoising(pipe, encode, recipe, examples)
    task.prepare(show=False)
    parameters = add_adapter(pipe.unet, recipe)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-2)
    for step, rate in enumerate((5e-3, 1e-2, 1e-2)):
        optimizer.param_groups[0]["lr"] = rate
        loss = (task.loss(pipe.unet, task.batch(2 * step)) + task.loss(pipe.unet, task.batch(2 * step + 1))) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.01)
        optimizer.step()
        assert losses[step] == pytest.approx(float(loss.detach()), rel=1e-5)
    made = matrices(tmp_path)
    plain = get_peft_model_state_dict(pipe.unet)
    assert len(made) == len(plain) == 2 * 56
    for name, value in plain.items():
        (found,) = [matrix for key, matrix in made.items() if key.endswith(_in_diffusers_words(name))]
        assert torch.allclose(found, value.detach(), atol=1e-5), name


def _in_diffusers_words(name):
    return name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")


def test_bfloat16_and_gradient_checkpointing(tiny_folder, pictures, tmp_path):
    import train_lora

    arguments = [str(pictures), "--model", str(tiny_folder), "--out", str(tmp_path), "--steps", "2", "--batch", "2"]
    arguments += ["--resolution", "16", "--device", "cpu", "--mixed-precision", "bf16", "--gradient-checkpointing"]
    train_lora.main([*arguments, "--validation-prompt", "a ring", "--validate-every", "1", "--validation-steps", "2"])
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in matrices(tmp_path).values())
    assert len(list((tmp_path / "validation").iterdir())) == 2


# The demonstration


def test_the_demonstration_shares_no_caption_with_its_evaluation(tmp_path, monkeypatch):
    import random

    import lora_demo
    from lesion.toy_world import COLOURS, is_held_out

    monkeypatch.setitem(COLOURS, lora_demo.NAME, lora_demo.RGB)
    lora_demo.write_data(tmp_path, 40)
    trained = {row["text"] for row in csv.DictReader((tmp_path / "metadata.csv").open())}
    new = lora_demo.scenes(18, True, random.Random(1), held_out=True)
    old = lora_demo.scenes(20, False, random.Random(2), held_out=True)
    asked = {scene.caption() for scene in [*new, *old]}
    assert not asked & trained and all(map(is_held_out, asked)) and not any(map(is_held_out, trained))
    assert all(lora_demo.NAME in scene.caption() and len(scene.things) == 1 for scene in new)
    assert not any(lora_demo.NAME in scene.caption() for scene in old)
    assert sum(lora_demo.NAME in caption for caption in trained) >= 20
    drawn = lora_demo.figures([lora_demo.render(scene, random.Random(3)) for scene in new], new)
    assert drawn == {"colour": 1.0, "shape": 1.0, "everything": 1.0, "new_colour": 1.0}
    old_drawn = lora_demo.figures([lora_demo.render(scene, random.Random(3)) for scene in old], old)
    assert old_drawn["new_colour"] == 0.0 and old_drawn["colour"] == 1.0
