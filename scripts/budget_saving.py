"""What a budget saves, and what it costs in coverage: rounds on planted effects of known truth. No model, no image.

    python scripts/budget_saving.py            prints a table, one line a grid and width

Layers have true importances, prompts deviate from them, and seeds within prompts (`PLANTED`), as in a nested model.
Each repetition draws new prompts and seeds, lets the rounds choose, and compares with the whole grid: images made,
whether the layers come in the same order, and how often the 95 % interval at the stop holds the truth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import stats

from lesion.analysis.bootstrap import interval
from lesion.rounds import Rounds
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


def study(prompts: int, seeds: int) -> Study:
    """leave_one_out of the planted layers."""
    return Study(
        model=ModelIdentity("planted", "", "float32"),
        settings=Settings("txt2img", 1, 1.0, 8, 8, ""),
        prompts=tuple(Prompt(f"prompt {number}", id=str(number)) for number in range(prompts)),
        seeds=tuple(range(seeds)),
        layers=tuple(f"layer {number}" for number in range(len(PLANTED))),
        selections={"leave_one_out": {}},
        replacements=(Replacement("zero"),),
    )


def draw(prompts: int, seeds: int, rng: np.random.Generator, skewed: bool) -> np.ndarray:
    """Effects, (layers, prompts, seeds). skewed: prompts deviate as a shifted gamma of skewness 1.4."""
    unit = rng.gamma(2, size=(len(PLANTED), prompts)) - 2 if skewed else rng.normal(size=(len(PLANTED), prompts))
    mean, between, within = (np.array(column) for column in zip(*PLANTED, strict=True))
    by_prompt = mean[:, None] + between[:, None] * unit / (np.sqrt(2) if skewed else 1)
    return by_prompt[..., None] + within[:, None, None] * rng.normal(size=(len(PLANTED), prompts, seeds))


def scorer(effects: np.ndarray) -> Callable[[Cell], float]:
    def score(cell: Cell) -> float:
        assert cell.lesion
        return 1.0 - float(effects[int(cell.lesion.layer.split()[1]), int(cell.prompt.id), cell.seed])

    return score


def repeat(prompts: int, seeds: int, budget: Budget, times: int, skewed: bool) -> dict[str, object]:
    grid, truth = study(prompts, seeds), np.array([mean for mean, _, _ in PLANTED])
    shares, order, same, covered, full, widths = [], [], [], [], [], []
    for number in range(times):
        effects = draw(prompts, seeds, np.random.default_rng(number), skewed)
        rounds = Rounds(grid, budget)
        while rounds.look(scorer(effects)):
            pass
        table, whole = rounds.table(), [interval(layer) for layer in effects]
        shares.append(len(rounds.whole) / len(grid))
        means = np.array([one.mean for one in whole])
        order.append(stats.kendalltau(table["mean"], means).statistic)
        same.append(set(np.argsort(-table["mean"].to_numpy())[:3]) == set(np.argsort(-means)[:3]))
        covered.append((table["low"] <= truth) & (truth <= table["high"]))
        full.append([one.low <= true <= one.high for one, true in zip(whole, truth, strict=True)])
        widths.append(table.loc[table["reason"] == "tight", "halfwidth"].max())
    return {
        "grid": f"{prompts} x {seeds}",
        "prompts": "skewed" if skewed else "normal",
        "+-": budget.ci_halfwidth,
        "images of the grid": f"{100 * np.mean(shares):.0f} %",
        "Kendall's tau": f"{np.mean(order):.3f}",
        "same top 3": f"{100 * np.mean(same):.0f} %",
        "widest at a stop": f"{np.nanmax(widths):.4f}",
        "covered at the stop": f"{100 * np.mean(covered):.1f} %",
        "covered by the grid": f"{100 * np.mean(full):.1f} %",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50, help="repetitions of each line (default 50)")
    times = parser.parse_args().times
    lines = [
        repeat(prompts, seeds, Budget(width), times, skewed)
        for skewed in (False, True)
        for prompts, seeds in ((48, 4), (96, 2))
        for width in (0.02, 0.01)
    ]
    print(pd.DataFrame(lines).to_markdown(index=False))


if __name__ == "__main__":
    main()
