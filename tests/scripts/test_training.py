"""The training script, every stage in a few steps, and that a resumed run sees what an uninterrupted one sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.slow
def test_every_stage_runs_and_the_result_loads(tmp_path):
    command = [sys.executable, SCRIPTS / "train_embedded.py", "--quick", "--run", tmp_path / "run"]
    command += ["--into", tmp_path / "model", "--device", "cpu"]
    subprocess.run(command, check=True)
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.float32)
    image = pipe("a red circle", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert out.count("already complete") == 6
    again = [*command[:2], "--quick", "--run", tmp_path / "more", "--into", tmp_path / "further", "--device", "cpu"]
    out = subprocess.run(
        [*again, "--start-from", tmp_path / "model"], check=True, capture_output=True, text=True
    ).stdout
    assert out.count("already complete") == 3  # vae, tokenizer, clip; the text encoder and the UNet go on
    assert (tmp_path / "further" / "unet" / "config.json").is_file()
    evaluate = [sys.executable, SCRIPTS / "evaluate_embedded.py", "--folder", tmp_path / "model"]
    out = subprocess.run(
        [*evaluate, "--captions", "16", "--steps", "2"], check=True, capture_output=True, text=True
    ).stdout
    assert "ceiling, CLIP" in out
    assert "everything" in out


def test_a_resumed_run_is_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from embedded.common import Average, Paused, Run, backward, loop

    def train(folder, stop_after=None):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        average = Average(model, 0.9)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        seen = []

        def step_fn(step, generator):
            x = torch.randn(8, 3, generator=generator)
            seen.append(step)
            backward((model(x) - x.sum(1, keepdim=True)).pow(2).mean(), optimizer)
            return {}

        run = Run(folder, folder, torch.device("cpu"), 0.0 if stop_after else float("inf"))
        try:
            loop(run, "toy", 12, {"model": model}, optimizer, step_fn, {"model": average}, warmup=2)
        except Paused:
            assert len(seen) == stop_after
        return [*model.parameters(), *average.module.parameters()]

    whole = train(tmp_path / "whole")
    for _ in range(3):  # three calls of one step each, then the rest
        train(tmp_path / "parts", stop_after=1)
    parts = train(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
