"""Killed by SIGKILL at chosen moments, most of them after the last image: the same pixels as undisturbed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lesion.store.images import Store, digest_of

# One process imports everything and forks one child a run, so that a run costs little more than its work. It starts no
# thread and computes nothing itself: neither outlives a fork.
DRIVER = """
import itertools, json, os, signal, sys, time
import diffusers, lesion.analysis.importance, lesion.analysis.settings, lesion.report, pandas, pyarrow.parquet
import torchmetrics.image, open_clip
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer
from lesion.cli import study as cli
from lesion.store import scores as parts
from lesion.run import publish, score_queue
from lesion.run import job as runner
from lesion.store import images as store

score_queue.FLUSH, score_queue.CHUNK = 5, 3
lesion.report.write_report = lambda *args, **options: []
PLACES = {
    "image": (store.Store, "put"),  # stored, not yet noted
    "rename": (os, "replace"),  # its content is written, its name is not given
    "score": (score_queue.ScoreQueue, "_score"),
    "flush": (parts.Scores, "flush"),
    "publish": (publish.Publisher, "publish"),
    "report": (lesion.report, "write_report"),
}

def deadly(place, number, late):
    owner, name = PLACES[place]
    method, calls = getattr(owner, name), itertools.count(1)

    def call(*args, **kwargs):
        mine = next(calls)  # several threads store a batch's images
        found = method(*args, **kwargs) if late or mine < number else None
        if mine == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, call)

def run(number, arguments):
    sys.argv = ["lesion", *arguments, f"hydra.run.dir=run{number}"]
    cli.main()

for number, (kill, arguments) in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if not child:
        if isinstance(kill, float):  # of what the last run took that came to its end
            signal.setitimer(signal.ITIMER_REAL, kill * usual)
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        elif kill:
            deadly(*kill)
        run(number, arguments)
        os._exit(0)
    began = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, flush=True)
    usual = time.monotonic() - began if code == 0 else usual
"""
IMAGES = 8
# A place, the number of its call in that run, and whether the call is done when the kill comes.
AFTER_THE_LAST_IMAGE = [
    ("score", 2, False),
    ("rename", 1, False),
    ("flush", 2, True),
    ("publish", 5, True),
    ("report", 1, False),
]


def pixels(store: Path) -> dict[str, np.ndarray]:
    """By key; everything in it that is not an image of the study fails."""
    found = {path.stem: Store(store).get(path.stem).pixels for path in (store / "cells").rglob("*.png")}
    assert len(found) == IMAGES
    return found


def driven(folder: Path, runs: list[object]) -> tuple[list[int], str]:
    """The exit code of each run, and what they said on standard error at last."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, json.dumps(runs)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return [int(code) for code in re.findall(r"^-?\d+$", done.stdout, re.M)], done.stderr[-3000:]


@pytest.mark.slow  # a process of its own, which imports everything
@pytest.mark.timeout(600)
def test_a_study_killed_anywhere_ends_with_the_pixels_of_an_undisturbed_one(cli):
    kills = [("image", 3, True), ("rename", 3, False), *AFTER_THE_LAST_IMAGE]

    def run(store, batch, kill=None):
        base = [default for default in cli.defaults if not default.startswith("generation.batch_size")]
        return kill, [*base, "selection=leave_one_out", f"generation.batch_size={batch}", f"store.dir={store}"]

    runs = [run("undisturbed", 1), *(run("killed", 1, kill) for kill in kills), run("killed", 1)]
    runs += [run("together", 4, ("image", 4, True)), run("together", 4)]
    codes, said = driven(cli.folder, runs)
    assert codes == [-signal.SIGKILL if kill else 0 for kill, _ in runs], said

    wanted, killed = pixels(cli.folder / "undisturbed"), pixels(cli.folder / "killed")
    assert {key: digest_of(image) for key, image in killed.items()} == {
        key: digest_of(image) for key, image in wanted.items()
    }
    first, last = (pd.read_parquet(cli.folder / f"run{number}" / "results.parquet") for number in (0, 1 + len(kills)))
    # Scores add up in the company they are computed in, which rounds differently (see `scoring.Metric`): 1e-6.
    pd.testing.assert_frame_equal(first, last, atol=1e-6)
    # In batches an image's company depends on where the kills came, and company rounds differently: 1 of 255.
    together = pixels(cli.folder / "together")
    assert together.keys() == wanted.keys()
    assert max(np.abs(together[key].astype(int) - wanted[key]).max() for key in wanted) <= 1


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_killed_at_fifty_random_moments_it_loses_nothing(cli):
    """Ten kills a store, at random moments of what the last run took that came to its end; so in every phase."""
    base = [default for default in cli.defaults if not default.startswith("generation.batch_size")]
    asked = [*base, "selection=leave_one_out", "generation.batch_size=1"]
    rng, runs = random.Random(3), [[None, [*asked, "store.dir=undisturbed"]]]
    for store in range(5):
        place = [*asked, f"store.dir=store{store}"]
        runs += [[rng.uniform(0.05, 1), place] for _ in range(10)] + [[None, place]]
    codes, said = driven(cli.folder, runs)
    assert len(codes) == len(runs) and set(codes) <= {0, -signal.SIGKILL}, said
    assert all(code == 0 for code, (kill, _) in zip(codes, runs, strict=True) if kill is None), said
    assert codes.count(-signal.SIGKILL) >= 25  # others had ended before, since the store had all
    wanted = {key: digest_of(image) for key, image in pixels(cli.folder / "undisturbed").items()}
    first = pd.read_parquet(cli.folder / "run0" / "results.parquet")
    for store in range(5):
        found = {key: digest_of(image) for key, image in pixels(cli.folder / f"store{store}").items()}
        assert found == wanted
        last = pd.read_parquet(cli.folder / f"run{11 * (store + 1)}" / "results.parquet")
        pd.testing.assert_frame_equal(first, last, atol=1e-6)
