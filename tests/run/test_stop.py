"""A study whose every image fails for one reason stops after a few; any other fault costs only its own images."""

from __future__ import annotations

import pytest

from conftest import settings, tiny_spec
from lesion import models
from lesion.generation.generate import generate
from lesion.models import resolve
from lesion.study.grid import Cell
from lesion.study.prompts import Prompt

PROMPTS = "prompts.items=[a red circle, two stars, a cat]"


@pytest.fixture
def broken(cli, monkeypatch):
    """Runs a study in which `why(cell)` says what generating that cell raises; returns code, frame and batches made."""

    def run(why, *given):
        batches = []

        def failing(model, cells, *rest):
            batches.append(len(cells))
            for cell in cells:
                if reason := why(cell):
                    raise ValueError(reason)
            return generate(model, cells, *rest)

        monkeypatch.setattr("lesion.run.maker.generate", failing)
        code, _, err = cli(PROMPTS, *given)
        (frame,) = cli.frames()
        assert code == (1 if (frame.status != "ok").any() else 0), err
        return err, frame, batches

    return run


@pytest.mark.parametrize(("size", "tried"), [("4", [3, 1, 1, 1]), ("auto", [1, 1, 1, 1]), ("1", [1, 1, 1])])
def test_a_fault_of_the_model_stops_the_study(broken, size, tried):
    """A first batch as a whole, two images by themselves, and the one of the last prompt; `auto` tries one before."""
    err, frame, batches = broken(lambda cell: "no such input", f"generation.batch_size={size}")
    assert batches == tried
    assert len(frame) == 3 + 18 and (frame.status == "failed").all()
    assert set(frame.reason) == {"ValueError: no such input"}
    assert err.strip().splitlines()[-1].count("no such input") == 1


def test_a_study_with_a_budget_begins_no_further_round(broken):
    budget = ["budget.ci_halfwidth=0.1", "budget.start=5", "budget.round=1", "selection=leave_one_out"]
    prompts = "prompts.items=[a, b, c, d, e, f]"
    _, frame, batches = broken(lambda cell: "no such input", prompts, *budget, "generation.batch_size=1")
    assert batches == [1, 1, 1] and (frame.status == "failed").all()


@pytest.mark.parametrize(
    ("why", "failed"),
    [
        (lambda cell: "bad text" if cell.prompt.text != "a cat" else "", 14),
        (lambda cell: f"bad {cell.prompt.text}", 21),
        (lambda cell: "bad lesion" if cell.lesion else "", 18),
    ],
    ids=["prompts", "reasons", "lesions"],
)
def test_a_fault_of_cells_costs_only_these(broken, why, failed):
    _, frame, batches = broken(why, "generation.batch_size=4")
    assert (frame.status == "failed").sum() == failed
    assert sum(size == 1 for size in batches) >= failed  # each of these was tried by itself


@pytest.mark.parametrize(
    "said",
    ["an illegal memory access was encountered", pytest.param("unknown error", marks=pytest.mark.slow)],
)
def test_a_lost_card_stops_the_job_and_what_is_finished_stays(cli, monkeypatch, said):
    """After it every further call of this process would fail: nothing is tried once more, cell by cell."""
    batches = []

    def losing(model, cells, *rest):
        batches.append(len(cells))
        if len(batches) > 2:
            raise RuntimeError(f"CUDA error: {said}")
        return generate(model, cells, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("lesion.run.maker.generate", losing)
        code, _, err = cli(PROMPTS, "generation.batch_size=4")
    assert code == 1 and said in err and "Traceback" not in err
    assert batches == [3, 4, 4]
    (frame,) = cli.frames()
    assert (frame.status == "ok").sum() == 7 and frame.clip_similarity.notna().sum() == 7
    assert cli(PROMPTS, "generation.batch_size=4")[0] == 0
    assert len(list((cli.folder / "store" / "cells").rglob("*.png"))) == 3 + 18


def test_an_image_of_another_size_fails(folder_of):
    """FLUX packs 2 x 2 latents into a token: of another size it makes the next smaller one."""
    model = models.load(resolve(tiny_spec(folder_of("flux"))), "cpu")
    cell = Cell(model.identity, Prompt("a"), 0, settings(height=22, width=16, steps=1), None)
    with pytest.raises(ValueError, match="FluxPipeline made 20 x 16 pixels instead of 22 x 16"):
        generate(model, [cell], {})
