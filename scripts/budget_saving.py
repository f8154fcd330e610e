"""What a budget saves, and what it costs in coverage: rounds on planted effects of known truth. No model, no image.

    python scripts/budget_saving.py            prints a table, one line a grid and width

Layers have true importances, prompts deviate from them, and seeds within prompts (`PLANTED`), as with noise of each
prompt's own; or most prompts are untouched (`SPARSE`); or prompts of the kept study (docs/study) are drawn anew, its 49
being the population. Each repetition draws new prompts and seeds, lets the rounds choose, and compares with the whole
grid: images made, whether the layers come in the same order, how often the 95 % interval at the stop holds the truth,
and by how much the means of layers that were stopped as good enough are off on average, as a share of the truth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from lesion.analysis import bootstrap
from lesion.analysis.bootstrap import interval
from lesion.analysis.cells import cube, lesioned_rows, matched
from lesion.analysis.importance import LEAVE_ONE_OUT
from lesion.rounds import NO_CHANGE, TIGHT, Rounds
from lesion.study.budget import Budget
from lesion.study.grid import Cell, ModelIdentity, Study
from lesion.study.lesions import Replacement
from lesion.study.prompts import Prompt
from lesion.study.settings import Settings

# True importance, standard deviation over prompts, and over seeds within prompts, of each layer: a few layers matter
# and vary much, most matter little and vary little, as layers of diffusion models tend to.
PLANTED = (
    (0.005, 0.01, 0.01),
    (0.01, 0.01, 0.01),
    (0.02, 0.02, 0.02),
    (0.03, 0.02, 0.02),
    (0.05, 0.03, 0.03),
    (0.08, 0.05, 0.04),
    (0.13, 0.08, 0.06),
    (0.25, 0.12, 0.08),
)


SPARSE = (0.003, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08)  # true importance where 80 % of prompts have none
UNTOUCHED = 0.8
RESULTS = Path(__file__).resolve().parent.parent / "docs" / "study" / "results.parquet"
SEED = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.008, 0.013, 0.025)  # sd of a seed's effect where prompts share it


def study(prompts: int, seeds: int, layers: int = len(PLANTED), noise: str = "own") -> Study:
    """leave_one_out of the planted layers."""
    return Study(
        model=ModelIdentity("planted", "", "float32"),
        settings=Settings("txt2img", 1, 1.0, 8, 8, "", noise=noise),
        prompts=tuple(Prompt(f"prompt {number}", id=str(number)) for number in range(prompts)),
        seeds=tuple(range(seeds)),
        layers=tuple(f"layer {number}" for number in range(layers)),
        selections={"leave_one_out": {}},
        replacements=(Replacement("zero"),),
    )


@cache
def population() -> np.ndarray:
    """Importance in the kept study, zero replacement, of the layers with an effect: (15, 49, 4)."""
    part, _ = lesioned_rows(pd.read_parquet(RESULTS))
    part = part[(part["selection"] == LEAVE_ONE_OUT) & (part["replacement"] == "zero")]
    found = cube(matched(part))
    return found[found.max(axis=(1, 2)) > 1e-4]


def draw(prompts: int, seeds: int, rng: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """True means (layers,) and effects (layers, prompts, seeds).

    kind: `normal`; `skewed`: prompts deviate as a shifted gamma of skewness 1.4; `shared`: normal, and a seed is worth
    the same to all prompts; `untouched`: most prompts are; `study`: its prompts, each with its seeds in any order.
    """
    if kind == "study":
        whole = population()
        drawn = whole[:, rng.integers(whole.shape[1], size=prompts)]
        order = rng.permuted(np.tile(np.arange(whole.shape[2]), (prompts, 1)), axis=1)[:, :seeds]
        return whole.mean(axis=(1, 2)), np.take_along_axis(drawn, order[None], axis=2)
    if kind == "untouched":
        truth = np.array(SPARSE)
        sizes = rng.beta(1.5, 1.5 / (truth[:, None] / (1 - UNTOUCHED)) - 1.5, (len(truth), prompts))
        by_prompt = np.where(rng.random((len(truth), prompts)) < UNTOUCHED, 0.0, sizes)
        return truth, np.repeat(by_prompt[..., None], seeds, axis=2)
    skewed = kind == "skewed"
    unit = rng.gamma(2, size=(len(PLANTED), prompts)) - 2 if skewed else rng.normal(size=(len(PLANTED), prompts))
    mean, between, within = (np.array(column) for column in zip(*PLANTED, strict=True))
    by_prompt = mean[:, None] + between[:, None] * unit / (np.sqrt(2) if skewed else 1)
    effects = by_prompt[..., None] + within[:, None, None] * rng.normal(size=(len(PLANTED), prompts, seeds))
    if kind == "shared":
        effects = effects + np.array(SEED)[:, None, None] * rng.normal(size=(len(PLANTED), 1, seeds))
    return mean, effects


def scorer(effects: np.ndarray) -> Callable[[Cell], float]:
    def score(cell: Cell) -> float:
        assert cell.lesion
        return 1.0 - float(effects[int(cell.lesion.layer.split()[1]), int(cell.prompt.id), cell.seed])

    return score


def repeat(prompts: int, seeds: int, budget: Budget, times: int, kind: str) -> dict[str, object]:
    shares, order, same, covered, full, off = [], [], [], [], [], []
    for number in range(times):
        truth, effects = draw(prompts, seeds, np.random.default_rng(number), kind)
        grid = study(prompts, seeds, len(truth), "shared" if kind == "shared" else "own")
        rounds = Rounds(grid, budget)
        while rounds.look(scorer(effects)):
            pass
        table = rounds.table()
        bounds = (0.0, 1.0)  # as in a report
        whole = [interval(layer, shared=kind == "shared", bounds=bounds) for layer in effects]
        shares.append(len(rounds.whole) / len(grid))
        means = np.array([one.mean for one in whole])
        order.append(stats.kendalltau(table["mean"], means).statistic)
        same.append(set(np.argsort(-table["mean"].to_numpy())[:3]) == set(np.argsort(-means)[:3]))
        covered.append((table["low"] <= truth) & (truth <= table["high"]))
        full.append([one.low <= true <= one.high for one, true in zip(whole, truth, strict=True)])
        stopped = table["reason"].isin((TIGHT, NO_CHANGE)).to_numpy()
        off.append(np.where(stopped, table["mean"] - truth, np.nan))
    found = np.array(off)
    often = (~np.isnan(found)).sum(axis=0)
    bias = np.nansum(found) / max((often * truth).sum(), 1e-12)  # every stopped layer of every study alike
    return {
        "grid": f"{prompts} x {seeds}",
        "effects": "80 % untouched" if kind == "untouched" else kind,
        "+-": budget.ci_halfwidth,
        "images of the grid": f"{100 * np.mean(shares):.0f} %",
        "Kendall's tau": f"{np.mean(order):.3f}",
        "same top 3": f"{100 * np.mean(same):.0f} %",
        "covered at the stop": f"{100 * np.mean(covered):.1f} %",
        "worst layer": f"{100 * np.mean(covered, axis=0).min():.0f} %",
        "covered by the grid": f"{100 * np.mean(full):.1f} %",
        "bias of stopped": f"{100 * bias:+.1f} %",
    }


CASES = (
    *((48, 4, kind, Budget(width)) for kind in ("normal", "skewed", "shared") for width in (0.02, 0.01)),
    *((400, 1, kind, Budget(width, None, 24, 24)) for kind in ("untouched", "study") for width in (0.02, 0.01)),
)  # where prompts are many, larger rounds: each look takes time


def main() -> None:
    # Every repetition has the same numbers of prompts: their resamples are drawn once.
    bootstrap.draws = lru_cache(maxsize=None)(bootstrap.draws.__wrapped__)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50, help="repetitions of each line (default 50)")
    parser.add_argument("--case", type=int, choices=range(len(CASES)), help="one line alone, by its place from 0")
    given = parser.parse_args()
    cases, times = CASES if given.case is None else CASES[given.case : given.case + 1], given.times
    lines = [repeat(prompts, seeds, budget, times, kind) for prompts, seeds, kind, budget in cases]
    print(pd.DataFrame(lines).to_markdown(index=False))


if __name__ == "__main__":
    main()
