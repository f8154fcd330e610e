"""Nothing is made twice and nothing is lost: killed runs, runs side by side, changed metrics, memory that runs out."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lesion import models, scoring
from lesion.generation.generate import generate
from lesion.models import memory
from lesion.run import job as runner
from lesion.run import maker as making
from lesion.run import table
from lesion.run.maker import Maker
from lesion.run.score_queue import ScoreQueue
from lesion.store.images import Store

NOTING = """
import lesion.report
from lesion.cli import study as cli
from lesion.run import maker as making
from lesion.generation.generate import generate
from lesion.store.images import Store

def noting(model, cells, *rest):
    images = generate(model, cells, *rest)
    with open(NOTES, "a") as file:
        file.writelines(f"{cell.key}\\n" for cell in cells)
    return images

making.generate = noting
lesion.report.write_report, lesion.report.findings = (lambda *args, **options: []), (lambda *args, **options: None)
cli.main()
"""


@pytest.fixture
def process(cli, tmp_path):
    """Starts `lesion` in a process of its own, in the folder of `cli`; it notes the keys of what it makes in a file."""
    started = []

    def start(notes: str, *overrides: str) -> subprocess.Popen[bytes]:
        given = {override.split("=")[0] for override in overrides}
        base = [default for default in cli.defaults if default.split("=")[0] not in given]
        code = NOTING.replace("NOTES", repr(str(tmp_path / notes)))
        command = [sys.executable, "-c", code, *base, *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (tmp_path / "log.txt").open("ab") as log:
            started.append(subprocess.Popen(command, cwd=cli.folder, env=environment, stdout=log, stderr=log))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()


def noted(folder: Path, name: str) -> list[str]:
    path = folder / name
    return path.read_text().split() if path.exists() else []


def images(store: Path) -> int:
    return len([path for path in store.rglob("*.png") if not path.name.startswith(".")])


@pytest.mark.slow  # the moments that matter are killed one by one in test_killed.py
@pytest.mark.timeout(300)
def test_killed_again_and_again_it_ends_with_the_results_of_an_undisturbed_run(cli, process, tmp_path):
    wanted = ["selection=[leave_one_out,only_one]", "seeds=[0,1]", "generation.batch_size=1"]
    rng = random.Random(5)
    for killed in range(3):
        before = images(cli.folder / "store")
        run = process("killed.txt", *wanted)
        while run.poll() is None and images(cli.folder / "store") < before + 1 + rng.randrange(6):
            time.sleep(0.01)
        time.sleep(rng.random() * 0.1)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, f"it had ended before kill {killed}"
    assert 0 < images(cli.folder / "store") < 28
    began = time.monotonic()
    assert process("killed.txt", *wanted).wait() == 0, (tmp_path / "log.txt").read_text()[-2000:]
    assert time.monotonic() - began < making.WAITING[0] * 60  # a dead process blocks nobody
    resumed = pd.read_parquet(cli.newest() / "results.parquet")
    assert len(noted(tmp_path, "killed.txt")) <= 28 + 3  # at most what was in the making at each kill
    assert cli(*wanted, "store.dir=undisturbed")[0] == 0
    # Scores add up in the company they are computed in, which rounds differently (see `scoring.Metric`): 1e-6.
    pd.testing.assert_frame_equal(resumed, pd.read_parquet(cli.newest() / "results.parquet"), atol=1e-6)


@pytest.mark.slow  # four starts; tests/store has each moment at which two may meet
@pytest.mark.timeout(300)
def test_four_processes_share_a_study_and_make_nothing_twice(cli, process, tmp_path):
    wanted = ["seeds=[0,1,2]", "generation.batch_size=2"]
    names = ["a", "b", "c", "d"]
    runs = [process(name, *wanted, f"hydra.run.dir={name}-run") for name in names]
    assert [run.wait() for run in runs] == [0] * len(runs), (tmp_path / "log.txt").read_text()[-2000:]
    made = [key for name in names for key in noted(tmp_path, name)]
    assert len(made) == len(set(made)) == 42
    first, *others = (pd.read_parquet(cli.folder / f"{name}-run" / "results.parquet") for name in names)
    assert (first.status == "ok").all()
    for other in others:
        pd.testing.assert_frame_equal(first, other, atol=1e-6)
    assert not [path for path in (cli.folder / "store" / "claims").rglob("*") if path.is_file()]


SUSPENDING = """
import functools
from lesion.run import maker
from lesion.store.claims import Claims
maker.Claims = functools.partial(Claims, expires=EXPIRES)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_process_suspended_past_its_claims_goes_on_beside_the_one_that_took_them(cli, process, tmp_path, monkeypatch):
    """It makes a second time what it was making, at most."""
    monkeypatch.setattr(sys.modules[__name__], "NOTING", SUSPENDING.replace("EXPIRES", "2.0") + NOTING)
    wanted = ["seeds=[0,1]", "generation.batch_size=2"]
    first = process("a", *wanted, "hydra.run.dir=a-run")
    while images(cli.folder / "store") < 3:
        assert first.poll() is None, (tmp_path / "log.txt").read_text()[-2000:]
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    assert process("b", *wanted, "hydra.run.dir=b-run").wait() == 0, (tmp_path / "log.txt").read_text()[-2000:]
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0, (tmp_path / "log.txt").read_text()[-2000:]
    said = (tmp_path / "log.txt").read_text()
    assert "Traceback" not in said
    frames = [pd.read_parquet(cli.folder / f"{name}-run" / "results.parquet") for name in "ab"]
    pd.testing.assert_frame_equal(*frames, atol=1e-6)
    assert (frames[0].status == "ok").all()
    made = noted(tmp_path, "a") + noted(tmp_path, "b")
    assert len(set(made)) == 28 and len(made) <= 28 + 2 * 3  # the batch in the making, and those that wait for a disk


def test_another_metric_scores_again_without_generating(cli, monkeypatch):
    assert cli("scorer.metrics=[clip_similarity,psnr]")[0] == 0
    (first,) = cli.frames()
    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("loaded a model for nothing"))
    asked = []
    score = scoring.Scorer.score
    monkeypatch.setattr(
        scoring.Scorer, "score", lambda self, shots, only=None: asked.append(only) or score(self, shots, only)
    )
    assert cli("scorer.metrics=[clip_similarity,psnr,ssim]")[0] == 0
    assert asked == [{"ssim"}]
    frame = pd.read_parquet(cli.newest() / "results.parquet")
    assert frame.ssim.notna().all()
    pd.testing.assert_series_equal(frame.clip_similarity, first.clip_similarity)


def test_a_finished_study_opens_without_model_and_scorer(cli, monkeypatch):
    assert cli()[0] == 0
    (first,) = cli.frames()
    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("loaded a model for nothing"))
    monkeypatch.setattr(scoring, "make_scorer", lambda *args: pytest.fail("loaded a scorer for nothing"))
    assert cli()[0] == 0
    pd.testing.assert_frame_equal(pd.read_parquet(cli.newest() / "results.parquet"), first)


def test_a_damaged_part_is_reported_and_scored_again(cli):
    assert cli()[0] == 0
    (first,) = cli.frames()
    part = next((cli.folder / "store" / "scores").rglob("clip_similarity*/*.parquet"))
    part.write_bytes(part.read_bytes()[:-40])
    code, out, _ = cli()
    assert code == 0
    assert "damaged" in out
    pd.testing.assert_frame_equal(pd.read_parquet(cli.newest() / "results.parquet"), first)


@pytest.mark.parametrize(
    ("device", "tf32", "meanwhile"), [("cpu", True, True), ("cuda:1", False, True), ("cuda", True, False)]
)
def test_under_tf32_on_a_gpu_images_are_scored_after_they_are_made(device, tf32, meanwhile):
    """A scorer sets full float32 for the whole process, also for what is generated in another thread."""
    told, published = [], []
    results = SimpleNamespace(made=lambda *_: told.append("scored"), note=lambda *facts: told.append(facts))
    request = SimpleNamespace(device=device, model=SimpleNamespace(tf32=tf32))
    cell, making = SimpleNamespace(key="c0ffee", settings="asked"), SimpleNamespace(images=0)
    study = SimpleNamespace(settings="asked")
    publisher = SimpleNamespace(publish=published.append)
    work = SimpleNamespace(request=request, study=study, scores=results, publisher=publisher, making=making)
    made = runner._when_made(work)
    made(cell, None, "its picture")
    assert told == ["scored" if meanwhile else ("c0ffee", "its picture")]
    assert published == [cell] and making.images == 1
    made(SimpleNamespace(key="beef", settings="unsteered"), None, "another")  # no row of the study
    assert told[1:] == [("beef", "another")]


def test_images_that_were_only_noted_are_scored_after(cli, monkeypatch):
    decide = runner._when_made
    gpu = SimpleNamespace(device="cuda", model=SimpleNamespace(tf32=True))
    monkeypatch.setattr(runner, "_when_made", lambda work, *rest: decide(replace(work, request=gpu), *rest))
    assert cli("selection=none")[0] == 0
    (frame,) = cli.frames()
    assert frame.clip_similarity.tolist() == [1.0, 1.0]


def crowded(most, sizes):
    """`generate` on a device that holds `most` images at once."""

    def make(model, cells, *rest):
        sizes.append(len(cells))
        if len(cells) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generate(model, cells, *rest)

    return make


def test_out_of_memory_halves_the_batch_and_remembers(cli, monkeypatch):
    sizes = []
    monkeypatch.setattr(making, "generate", crowded(2, sizes))
    code, out, _ = cli("generation.batch_size=8", "seeds=[0,1]")
    assert code == 0
    assert sizes.count(8) == 0  # four baselines come first
    assert sizes[:3] == [4, 2, 2]
    assert max(sizes[1:]) == 2
    assert "out of memory with a batch of 4; continuing with 2" in out
    (frame,) = cli.frames()
    assert (frame.status == "ok").all()


def test_one_image_that_does_not_fit_is_an_error_of_that_image(cli, monkeypatch):
    def make(model, cells, *rest):
        if any(cell.lesion is None and cell.prompt.text == "two stars" for cell in cells):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(model, cells, *rest)

    monkeypatch.setattr(making, "generate", make)
    code, _, err = cli("selection=none")
    assert code == 1
    (frame,) = cli.frames()
    assert frame.status.tolist() == ["ok", "failed"]
    assert "a single image does not fit in memory" in frame.reason[1]
    assert "1 of 2 images" in err


def test_auto_finds_a_batch_size_that_fits(cli, monkeypatch):
    tried, sizes = [], []
    monkeypatch.setattr(memory, "_free", lambda device: 1000 * 2**20)
    monkeypatch.setattr(memory, "_peak", lambda work, device: (work(), (40 + 100 * tried[-1]) * 2**20)[1])
    monkeypatch.setattr(
        making,
        "generate",
        lambda model, cells, *rest: (
            (sizes if rest[-1] is True else tried).append(len(cells)) or generate(model, cells, *rest)
        ),
    )
    assert cli("generation.batch_size=auto", "seeds=[0,1,2,3]")[0] == 0
    assert tried == [1, 2, 2, 4]
    assert max(sizes) == 8  # (0.85 * 1000 - 40) / 100 = 8.1


def test_memory_is_measured():
    held = []
    peak = memory._peak(lambda: held.append(bytearray(os.urandom(1) * (64 << 20))), "cpu")
    assert peak is not None
    assert 50 << 20 < peak < 200 << 20
    free = memory._free("cpu")
    assert free is not None
    assert free > 64 << 20


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 12 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error, expected):
    assert memory.ran_out(error) is expected


def test_batch_size_is_checked(cli):
    for value in ("0", "many", "2.5", "true"):
        code, _, err = cli(f"generation.batch_size={value}")
        assert code == 2
        assert "generation.batch_size" in err
        assert "auto" in err


def test_an_image_deleted_or_torn_is_made_again(cli):
    assert cli()[0] == 0
    (first,) = cli.frames()
    deleted, torn, *_ = sorted((cli.folder / "store" / "cells").rglob("*.png"))
    whole = torn.read_bytes()
    deleted.unlink()
    torn.unlink()
    torn.write_bytes(whole[:-20])
    code, out, _ = cli()
    assert code == 0
    assert "1 images to make, 13 already in the store" in out  # the torn one is seen when it is looked at
    assert torn.read_bytes() == whole
    assert out.count(f"a stored image is torn and made again ({torn.name})") == 1
    pd.testing.assert_frame_equal(pd.read_parquet(cli.newest() / "results.parquet"), first)


def flip(path: Path) -> None:
    """Change a byte of a picture's pixels, as a disk does: its file keeps its size and time."""
    content, facts = bytearray(path.read_bytes()), path.stat()
    content[content.index(b"IDAT") + 40] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_damage_that_shows_only_behind_other_damage_is_mended_too(cli):
    """A lesion is not read while its baseline is damaged, so its own damage shows once that is made again."""
    assert cli("scorer.metrics=[clip_similarity]")[0] == 0
    (first,) = cli.frames()
    store = Store(cli.folder / "store")
    baseline = first.cell[(first.selection == "none").idxmax()]
    lesions = first[(first.prompt_id == first.prompt_id[0]) & (first.selection != "none")].cell
    damaged = [store.path(key) for key in (baseline, *lesions)]
    whole = [path.read_bytes() for path in damaged]
    for path in damaged:
        flip(path)
    code, out, err = cli("scorer.metrics=[clip_similarity,psnr]")
    assert code == 0, err
    assert [path.read_bytes() for path in damaged] == whole
    assert out.count("is damaged and removed") == len(damaged)
    second = pd.read_parquet(cli.newest() / "results.parquet")
    assert second.psnr.notna().sum() == len(second) - 2 or second.psnr.notna().all()
    pd.testing.assert_series_equal(second.clip_similarity, first.clip_similarity)


def test_an_image_saved_again_with_other_pixels_is_not_scored_but_made_again(cli):
    """Its note still names the cell, and the file is a good PNG: only the digest that was noted tells."""
    asked = ("scorer.metrics=[clip_similarity]", "selection=only_one", "generation.batch_size=1")  # rounds alike again
    assert cli(*asked)[0] == 0
    (first,) = cli.frames()
    altered = [first.cell[0], first.cell[len(first) - 1]]  # a baseline and a lesion
    paths = [Store(cli.folder / "store").path(key) for key in altered]
    whole = [path.read_bytes() for path in paths]
    for path in paths:
        with Image.open(path) as image:
            notes = PngInfo()
            notes.add_itxt("lesion", image.text["lesion"])
            Image.fromarray(255 - np.asarray(image)).save(path, pnginfo=notes)
    code, out, err = cli(*asked)
    assert code == 0, err
    assert out.count("its pixels are not those that were made") == 2
    assert [path.read_bytes() for path in paths] == whole
    pd.testing.assert_frame_equal(pd.read_parquet(cli.newest() / "results.parquet"), first)


def test_an_image_that_is_damaged_again_is_given_up(cli, monkeypatch):
    """Each is made anew at most once, however often others show damage."""
    assert cli("selection=none", "scorer.metrics=[clip_similarity]")[0] == 0
    (first,) = cli.frames()
    store, made = Store(cli.folder / "store"), []
    put = Store.put

    def putting(self, cell, *rest):
        picture = put(self, cell, *rest)
        made.append(cell.key)
        self.path(cell.key).write_bytes(b"\x89PNG" + bytes(99) + b"\x00\x00\x00\x00IEND\xaeB`\x82")
        return picture

    flip(store.path(first.cell[0]))
    monkeypatch.setattr(Store, "put", putting)
    code, _, err = cli("selection=none", "scorer.metrics=[clip_similarity,psnr]")
    assert code == 1 and "1 of 2 images failed" in err
    assert made == [first.cell[0]]
    frame = pd.read_parquet(cli.newest() / "results.parquet")
    assert frame.status.tolist() == ["failed", "ok"]
    assert frame.reason[0] == "what is stored of it is damaged, also after it was made anew"


def test_what_another_process_has_scored_meanwhile_is_not_scored_again(cli, monkeypatch):
    make, score, scored = Maker.run, ScoreQueue._score, []

    def and_another_scores(self, progress):
        make(self, progress)
        ScoreQueue(self.study.context, self.store, self.request.scorer, "cpu").complete(self.study, {})
        assert sum(scored) == 8
        scored.clear()

    def counting(self, groups):
        scored.extend(len(self._queue[group]) for group in list(groups))
        score(self, groups)

    monkeypatch.setattr(Maker, "run", and_another_scores)
    monkeypatch.setattr(ScoreQueue, "_score", counting)
    assert cli("selection=leave_one_out")[0] == 0
    assert sum(scored) == 0
    assert cli.frames()[0].clip_similarity.notna().all()


def test_a_table_made_in_pieces_is_the_table(cli, monkeypatch):
    frames = []
    for rows in (10**6, 3, 14, 1):  # of 14: in one piece, in five, in one that is just full, each alone
        monkeypatch.setattr(table, "ROWS", rows)
        assert cli("selection=leave_one_out", "replacement=[zero,mean]")[0] == 0
        frames.append(pd.read_parquet(cli.newest() / "results.parquet"))
    assert len(frames[0]) == 14
    for other in frames[1:]:
        pd.testing.assert_frame_equal(other, frames[0])
