"""Several processes on one store: each image and each pair of baselines is scored by one of them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from lesion import scoring
from lesion.run import score_queue
from lesion.run.score_queue import ScoreQueue
from lesion.store.claims import Claims
from lesion.store.images import Store
from lesion.study.grid import ModelIdentity, Study
from lesion.study.lesions import Replacement
from lesion.study.prompts import Prompt
from lesion.study.settings import Settings

METRIC = "clip_similarity"
SPEC = SimpleNamespace(name="made up", importance=METRIC, described=[])


def value(shot) -> float:
    return (int(shot.image[0, 0, 0]) - int(shot.baseline[0, 0, 0])) / 1000


class Noting:
    """A scorer that is slow, and notes what it scores."""

    def __init__(self, scored: Counter):
        self.scored = scored

    def score(self, shots, only):
        time.sleep(0.001 * len(shots))
        self.scored.update((shot.key, shot.baseline_key) for shot in shots)
        return {METRIC: [value(shot) for shot in shots]}


@pytest.fixture
def study(tmp_path):
    study = Study(
        model=ModelIdentity("model", "f" * 32, "float32", "cpu"),
        settings=Settings("txt2img", 1, 1.0, 8, 8, "DDIMScheduler"),
        prompts=tuple(Prompt(f"prompt {i}", id=f"p{i}") for i in range(8)),
        seeds=tuple(range(4)),
        layers=tuple(f"layer.{i}" for i in range(6)),
        selections={"leave_one_out": {}},
        replacements=(Replacement("zero"),),
    )
    for number, cell in enumerate(study.cells()):
        Store(tmp_path).put(cell, np.full((8, 8, 3), number % 251, np.uint8))
    return study


@pytest.fixture
def queue(study, tmp_path, monkeypatch):
    """Makes queues as processes of their own have them, and counts what they score."""
    scored: Counter = Counter()
    monkeypatch.setattr(scoring, "identities", lambda spec: {METRIC: "made up"})
    monkeypatch.setattr(scoring, "columns_for", lambda *asked: frozenset({METRIC}))
    monkeypatch.setattr(scoring, "make_scorer", lambda spec, device: Noting(scored))
    monkeypatch.setattr(score_queue, "BLOCK", 8)
    monkeypatch.setattr(score_queue, "CHUNK", 16)

    def made(device: str = "cpu") -> ScoreQueue:
        return ScoreQueue(study.context, Store(tmp_path), SPEC, device)

    made.scored = scored
    return made


def claims(tmp_path) -> list:
    return [path for path in (tmp_path / "claims").rglob("*") if path.is_file()]


def side_by_side(work, count: int) -> None:
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


def test_four_score_each_image_and_each_pair_once(study, queue, tmp_path):
    queues = [queue() for _ in range(4)]
    cells = list(study.cells())
    baselines = [cell for cell in cells if cell.lesion is None]
    values = {cell.key: (n % 251 - cells.index(cell.baseline) % 251) / 1000 for n, cell in enumerate(cells)}
    floors = [[] for _ in queues]

    def work(number: int) -> None:
        assert queues[number].complete(study, {}) == set()
        floors[number] = queues[number].pairs(METRIC, list(pairwise(baselines)))

    side_by_side(work, len(queues))
    assert set(queue.scored.values()) == {1}
    assert len(queue.scored) == len(cells) + len(baselines) - 1
    for one in queues:
        assert {cell.key: one.value(cell) for cell in cells} == values
    assert all(floor == floors[0] and np.isfinite(floor).all() for floor in floors)
    assert not claims(tmp_path)


def test_what_is_scored_while_it_is_made_is_left_to_who_makes_it(study, queue, tmp_path):
    """On a GPU: it is claimed until it is written down."""
    making, other = queue("cuda"), queue()
    cells = list(study.cells())[:40]
    store = Store(tmp_path)
    for number, cell in enumerate(cells):
        pixels = np.full((8, 8, 3), number % 251, np.uint8)
        store.discard(cell.key)
        making.made(cell, pixels, store.put(cell, pixels))
    before = sum(queue.scored.values())
    ended = threading.Timer(0.5, making.flush)
    ended.start()
    other.complete(study, {})
    ended.join()
    assert before > 0 and set(queue.scored.values()) == {1}
    making.close()
    assert not claims(tmp_path)


@pytest.mark.parametrize("patience", [0.3, 60.0])
def test_nobody_waits_for_ever_for_scores_that_another_has_claimed(study, queue, tmp_path, monkeypatch, patience):
    """Who holds them is suspended, or has given them back without a score."""
    monkeypatch.setattr(score_queue, "PATIENCE", patience)
    one, other = queue(), Claims(tmp_path / "claims")
    assert len(other.take(one._claim(cell.key) for cell in study.cells())) == len(study)
    if patience > 1:
        threading.Timer(0.3, other.close).start()
    began = time.monotonic()
    one.complete(study, {})
    assert 0.3 <= time.monotonic() - began < 20
    assert set(queue.scored.values()) == {1} and len(queue.scored) == len(study)
    other.close()
    assert not claims(tmp_path)
