"""How often nominal 95 % intervals cover a planted nested mean, and how wide they are. No model, no image.

    python scripts/interval_coverage.py            prints a table, one line a case; some minutes

Prompts deviate from the mean 0 as a normal, a gamma of some skewness, or a lump (nine prompts of ten exactly alike, one
far off); seeds within prompts are normal. ICC: share of the variance that lies between prompts.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd

from lesion.analysis import bootstrap

CASES = (
    *((prompts, 2, "normal", 0.7) for prompts in (5, 6, 8, 10)),
    (10, 2, "normal", 0.1),
    (12, 3, "normal", 0.7),
    (20, 4, "normal", 0.7),
    (7, 4, "gamma 1.4", 0.9),
    (10, 2, "gamma 1.4", 1.0),
    (20, 4, "gamma 2", 1.0),
    (49, 4, "gamma 2", 1.0),
    (20, 4, "lump", 1.0),
    (49, 4, "lump", 1.0),
)


def cells(prompts: int, seeds: int, kind: str, share: float, rng: np.random.Generator) -> np.ndarray:
    """(prompts, seeds) of mean 0."""
    if kind == "lump":
        unit = (rng.random(prompts) < 0.1) * rng.exponential(3, prompts) - 0.3
    elif kind == "normal":
        unit = rng.normal(size=prompts)
    else:
        shape = 4 / float(kind.split()[1]) ** 2
        unit = (rng.gamma(shape, size=prompts) - shape) / np.sqrt(shape)
    return np.sqrt(share) * unit[:, None] + np.sqrt(1 - share) * rng.normal(size=(prompts, seeds))


def line(prompts: int, seeds: int, kind: str, share: float, times: int) -> dict[str, object]:
    rng, names = np.random.default_rng(1), ("t", "bca", "raw bootstrap-t", "bootstrap-t")
    covered, widths, stood_in = dict.fromkeys(names, 0), {name: [] for name in names}, 0
    for _ in range(times):
        values = cells(prompts, seeds, kind, share, rng)
        found = {name: bootstrap.interval(values, name) for name in bootstrap.METHODS}
        limits = {name: (one.low, one.high) for name, one in found.items()}
        means = values.mean(axis=1)
        star = bootstrap.prompt_means(values, bootstrap.draws(bootstrap.seed_counts(values)))
        error = float(means.std(ddof=1)) / np.sqrt(prompts)
        limits["raw bootstrap-t"] = (error and bootstrap._student(star, means, error, 0.025)) or limits["t"]
        stood_in += found["bootstrap-t"].method != "bootstrap-t"
        for name in names:
            covered[name] += limits[name][0] <= 0 <= limits[name][1]
            widths[name].append(limits[name][1] - limits[name][0])
    # 95 % of so many data sets lie within this of the truth, if that is 95.
    error = 100 * 1.96 * np.sqrt(0.05 * 0.95 / times)
    return {
        "prompts x seeds": f"{prompts} x {seeds}",
        "prompts": kind,
        "ICC": share,
        **{f"{name}, %": f"{100 * covered[name] / times:.1f}" for name in names},
        "+-": f"{error:.1f}",
        **{f"{name}, width": f"{np.nanmean(widths[name]):.2f}" for name in names},
        "stood in, %": f"{100 * stood_in / times:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1000, help="data sets of each case (default 1000)")
    times = parser.parse_args().times
    print(pd.DataFrame([line(*case, times) for case in CASES]).to_markdown(index=False))


if __name__ == "__main__":
    main()
