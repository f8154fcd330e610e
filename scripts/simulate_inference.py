"""How often nominal 95 % statements hold where the truth is planted or known. No model, no image.

    python scripts/simulate_inference.py                   every table below, about half an hour
    python scripts/simulate_inference.py seeds --times 400

- `seeds`: means over prompts and seeds that share their noise (crossed) or do not (nested), with the standard
  deviations of prompts, seeds and rest that the study of docs/study.md has.
- `sparse`: importance where few prompts are affected; prompts of that study drawn anew with replacement (its 49 are the
  population), and planted distributions.
- `ranks`: rank intervals of all layers together, by means and on most prompts; that study's prompts drawn anew, and
  planted populations.
- `claims`: how often a report, and a confirmatory study, claims anything (family-wise) where nothing is true.
- `ratios`: importance divided by what another seed or prompt changes, of a dense and a sparse layer, and these floors.
- `floors`: the floor of other prompts alone, in more data sets.
- `shapley`: Shapley limits where orders are drawn anew, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lesion.analysis import shapley
from lesion.analysis.bootstrap import interval
from lesion.analysis.cells import cube, lesioned_rows, matched
from lesion.analysis.confirm import confirmed
from lesion.analysis.floor import noise_floor, normalised_importance
from lesion.analysis.importance import LEAVE_ONE_OUT, NO_EFFECT
from lesion.analysis.order import ranks
from lesion.analysis.paired import against_floor, holm
from lesion.analysis.reading import reading_drops
from lesion.study.confirmation import Confirmation

STUDY = Path(__file__).resolve().parent.parent / "docs" / "study" / "results.parquet"
REPLICATES = 1999  # a report takes 9,999
Row = dict[str, Any]


def percent(hits: float, times: int) -> str:
    return f"{100 * hits / times:.1f}"


def error(times: int) -> str:
    """95 % of so many data sets lie within this of 95 %, if that is the truth."""
    return f"{100 * 1.96 * np.sqrt(0.05 * 0.95 / times):.1f}"


def effects() -> np.ndarray:
    """Importance in the kept study by replacement and layer, prompt, seed: (32, 49, 4)."""
    part, _ = lesioned_rows(pd.read_parquet(STUDY))
    part = part[part["selection"] == LEAVE_ONE_OUT]
    return np.concatenate([cube(matched(whole)) for _, whole in part.groupby("replacement", sort=False)])


def seeds(times: int) -> Iterator[Row]:
    """Prompts and seeds with the components of up_blocks.2.attentions.2 under zero, and without an effect of seeds."""
    for name, (of_prompts, of_seeds, of_rest) in {
        "sufficiency": (0.109, 0.092, 0.243),
        "importance": (0.157, 0.016, 0.082),
        "no seed effect": (0.15, 0.0, 0.15),
    }.items():
        for prompts, number in ((12, 2), (12, 4), (49, 2), (49, 3), (49, 4), (200, 4), (49, 8)):
            rng, kinds = np.random.default_rng([prompts, number]), ("taken as nested", "shared", "own")
            covered, widths = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0.0)
            for _ in range(times):
                shared, own = rng.normal(0, of_seeds, number), rng.normal(0, of_seeds, (prompts, number))
                rest = rng.normal(0, of_prompts, (prompts, 1)) + rng.normal(0, of_rest, (prompts, number))
                for kind, noise in (("taken as nested", shared), ("shared", shared), ("own", own)):
                    found = interval(rest + noise, shared=kind == "shared", replicates=REPLICATES)
                    covered[kind] += found.low <= 0 <= found.high
                    widths[kind] += (found.high - found.low) / times
            row = {"components of": name, "prompts x seeds": f"{prompts} x {number}"}
            row |= {f"{kind}, %": percent(covered[kind], times) for kind in kinds} | {"+-": error(times)}
            yield row | {f"{kind}, width": f"{widths[kind]:.3f}" for kind in kinds}


def _planted() -> dict[str, Callable[[np.random.Generator, int], np.ndarray]]:
    """Effects of prompts (n,), and how they are called."""

    def touched(share: float, rng: np.random.Generator, n: int) -> np.ndarray:
        return np.where(rng.random(n) < share, rng.beta(1.5, 6, n), 0.0)

    return {
        "log-normal": lambda rng, n: np.minimum(rng.lognormal(-4, 1.2, n), 1.0),
        "70 % untouched": lambda rng, n: touched(0.3, rng, n),
        "92 % untouched": lambda rng, n: touched(0.08, rng, n),
        "98 % untouched": lambda rng, n: touched(0.02, rng, n),
    }


def sparse(times: int) -> Iterator[Row]:
    """One seed a prompt: what seeds do is the first table."""
    population = effects().mean(axis=2)
    touched = population[population.max(axis=1) > 1e-4]
    for prompts in (8, 12, 24, 49):
        rng = np.random.default_rng(prompts)
        hits = np.zeros((2, len(touched)))
        for _ in range(max(times // 10, 1)):  # of 30 layers each
            drawn = rng.integers(touched.shape[1], size=prompts)
            for number, layer in enumerate(touched):
                for kind, bounds in enumerate((None, (0.0, 1.0))):
                    found = interval(layer[drawn][:, None], bounds=bounds, replicates=REPLICATES)
                    hits[kind, number] += found.low <= layer.mean() <= found.high
        shares = 100 * hits / max(times // 10, 1)
        yield {
            "effects": f"{len(touched)} layers of the study",
            "prompts": prompts,
            "sample alone, %": f"{shares[0].mean():.1f}",
            "as reported, %": f"{shares[1].mean():.1f}",
            "worst layer, %": f"{shares[1].min():.1f}",
        }
    for name, draw in _planted().items():
        truth = float(draw(np.random.default_rng(0), 4_000_000).mean())
        for prompts in (8, 12, 24, 49, 100, 200):
            rng, kept = np.random.default_rng(prompts), np.zeros(2)
            for _ in range(times):
                values = draw(rng, prompts)[:, None]
                for kind, bounds in enumerate((None, (0.0, 1.0))):
                    found = interval(values, bounds=bounds, replicates=REPLICATES)
                    kept[kind] += found.low <= truth <= found.high
            shares = 100 * kept / times
            yield {
                "effects": name,
                "prompts": prompts,
                "sample alone, %": f"{shares[0]:.1f}",
                "as reported, %": f"{shares[1]:.1f}",
                "worst layer, %": "",
            }


def _frame(cells: np.ndarray, noise: str = "own") -> pd.DataFrame:
    """Results of leave_one_out with these effects (layers, prompts, seeds), and of their baselines."""
    _, prompts, number = cells.shape
    layer, prompt, seed = (one.ravel() for one in np.indices(cells.shape))
    lesioned = pd.DataFrame({"layer_index": layer, "prompt_id": prompt, "seed": seed, "effect": cells.ravel()})
    plain = pd.DataFrame({"prompt_id": np.repeat(range(prompts), number), "seed": np.tile(range(number), prompts)})
    plain = plain.assign(layer_index=-1, effect=0.0)
    frame = pd.concat([plain, lesioned], ignore_index=True)
    is_plain = frame["layer_index"] < 0
    frame["layer"] = ("layer " + frame["layer_index"].astype(str)).mask(is_plain, "")
    frame["prompt_id"] = "p" + frame["prompt_id"].astype(str)
    frame["clip_similarity"] = 1.0 - frame.pop("effect")
    fixed = {"model": "m", "kind": "cross_attention", "window_start": 0.0, "window_end": 1.0, "branch": "both"}
    frame = frame.assign(**fixed, status="ok", noise=noise)
    frame["selection"] = np.where(is_plain, "none", LEAVE_ONE_OUT)
    return frame.assign(replacement=np.where(is_plain, "", "zero"), strength=np.where(is_plain, 0.0, 1.0))


def _held(table: pd.DataFrame, above: np.ndarray, name: str) -> np.ndarray:
    """Whether each layer's limits hold its true rank; any of the ranks that it shares will do.

    above: whether layer j is truly above layer i, [j, i].
    """
    best, worst = above.sum(axis=0) + 1, len(above) - above.sum(axis=1)
    table = table.set_index("layer").loc[[f"layer {number}" for number in range(len(above))]]
    low, high = (table[f"{name}_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
    found: np.ndarray = (low <= worst) & (high >= best)
    return found


def _above(population: np.ndarray) -> dict[str, np.ndarray]:
    """Which layer is above which, by means and on most prompts where the two differ. population: (layers, prompts)"""
    means = np.round(population.mean(axis=1), 6)
    apart = population[:, None] - population[None]
    more = (apart > NO_EFFECT).sum(axis=2)
    return {"rank": means[:, None] > means[None], "typical": more > more.T}


def _layers() -> dict[str, np.ndarray]:
    """Populations of 16 layers (layers, prompts, seeds) that prompts are drawn from."""
    rng = np.random.default_rng(1)
    dense = rng.gamma(4, 0.02, (4, 2000))
    rare = np.where(rng.random((12, 2000)) < 0.08, rng.gamma(2, 0.05, (12, 2000)), 0.0)
    mixed = np.clip(np.concatenate([dense, rare]), 0, 1)
    mixed[:4] *= 0.08 / mixed[:4].mean(axis=1, keepdims=True)
    mixed[4:] *= 0.01 / mixed[4:].mean(axis=1, keepdims=True)
    # Means fall while medians rise: each layer has its own share of prompts with a large effect, and a small one else.
    share, small = np.linspace(0.4, 0.05, 16)[:, None], np.linspace(0.005, 0.02, 16)[:, None]
    crossed = np.where(
        rng.random((16, 2000)) < share, rng.beta(4, 8, (16, 2000)), small * rng.gamma(9, 1 / 9, (16, 2000))
    )
    return {
        "of the study": effects()[:16].mean(axis=2),
        "4 dense, 12 sparse": mixed,
        "16 alike": np.clip(rng.lognormal(-4, 1, (16, 2000)), 0, 1),
        "means fall, medians rise": crossed,
    }


def rank_intervals(times: int) -> Iterator[Row]:
    """Prompts of the study drawn anew, and of planted populations of 16 layers; limits of all layers together."""
    for name, layers in _layers().items():
        above = _above(layers)
        for prompts in (8, 16, 49):
            rng = np.random.default_rng(prompts)
            held: dict[str, list[np.ndarray]] = {"rank": [], "typical": []}
            widths: dict[str, list[float]] = {"rank": [], "typical": []}
            for _ in range(times):
                drawn = rng.integers(layers.shape[1], size=prompts)
                table = ranks(_frame(layers[:, drawn, None]), replicates=99)
                for kind in held:
                    held[kind].append(_held(table, above[kind], kind))
                    widths[kind].append(float((table[f"{kind}_high"] - table[f"{kind}_low"]).mean()))
            row: Row = {"layers": name, "prompts": prompts}
            for kind, words in (("rank", "by mean"), ("typical", "on most prompts")):
                each = np.array(held[kind])
                row[f"{words}, all together, %"] = percent(each.all(axis=1).sum(), times)
                row[f"{words}, worst layer, %"] = percent(each.mean(axis=0).min() * times, times)
                row[f"{words}, width"] = f"{np.mean(widths[kind]):.1f}"
            yield row | {"studies": times}


def claims(times: int) -> Iterator[Row]:
    """A study in which nothing is true, in two ways."""
    times = max(times // 4, 1)
    # Ten layers of which each affects a tenth of the prompts, by as much on average as another seed changes them all.
    rng, once, plain = np.random.default_rng(2), 0, 0
    for _ in range(times):
        sizes = np.where(rng.random((10, 49)) < 0.1, rng.beta(2, 6, (10, 49)), 0.0)
        floor = 0.1 * 0.25  # the true mean of each
        pairs = pd.DataFrame({"prompt_id_a": [f"p{n}" for n in range(49)]})
        pairs = pairs.assign(prompt_id_b=pairs["prompt_id_a"], seed_a=0, seed_b=1)
        pairs["similarity"] = 1 - floor * rng.gamma(20, 1 / 20, 49)
        table = against_floor(_frame(sizes[..., None]), pairs)
        once += bool((table["p_holm"] <= 0.05).any())
        means, spread = sizes - (1 - pairs["similarity"].to_numpy()), np.sqrt(49)
        t = means.mean(axis=1) / (means.std(axis=1, ddof=1) / spread)
        plain += bool((np.abs(t) > 3.0).any())  # p < 0.005: a t test, Bonferroni over ten
    yield {
        "nothing is true of": "more or less than another seed, 10 layers",
        "studies with a claim, %": percent(once, times),
        "by Student's t alone, %": percent(plain, times),
        "studies": times,
    }
    # Sixteen layers that change what seven aspects show as often for the better as for the worse, in a tenth of images.
    rng, once, plain, later = np.random.default_rng(3), 0, 0, 0
    plan = Confirmation("clip_similarity", ("breaks",))
    for _ in range(times):
        frame = _frame(np.full((16, 49, 2), 0.1) + rng.normal(0, 0.01, (16, 49, 2)))
        for aspect in range(7):
            right = rng.random(49 * 2) < 0.5
            flips = rng.random((16, 49 * 2)) < 0.1
            frame[f"read_a{aspect}"] = np.concatenate([right, (right[None] ^ flips).ravel()]).astype(float)
        drops = reading_drops(frame, method="t")
        once += bool((holm(drops["p"]) <= 0.05).any())  # a report corrects over its other tests, too
        reach = 2.01 * drops["sd_prompts"] / 7
        plain += bool((drops["drop"].abs() > reach).any())
        later += bool((confirmed(frame, pd.DataFrame(), plan, method="t")["verdict"] == "confirmed").any())
    yield {
        "nothing is true of": "what a layer's absence breaks, 16 layers x 7 aspects",
        "studies with a claim, %": percent(once, times),
        "by Student's t alone, %": f"{percent(plain, times)} (an interval excludes 0)",
        "studies": times,
    }
    yield {
        "nothing is true of": "the same, confirmatory: chosen on half of the prompts, tested on the other",
        "studies with a claim, %": percent(later, times),
        "by Student's t alone, %": "",
        "studies": times,
    }


def shapley_values(times: int) -> Iterator[Row]:
    """A game of five layers: its single worths, and a bonus for some pairs; prompts scale it, orders are shared."""
    layers, single = tuple("abcde"), dict(zip("abcde", (0.05, 0.1, 0.02, 0.2, 0.08), strict=True))
    bonus = {frozenset("ad"): 0.2, frozenset("be"): -0.1, frozenset("cd"): 0.15}
    truth = {one: single[one] + sum(worth / 2 for pair, worth in bonus.items() if one in pair) for one in layers}

    def worth(names: tuple[str, ...]) -> float:
        return sum(single[one] for one in names) + sum(value for pair, value in bonus.items() if pair <= set(names))

    times = max(times // 4, 1)
    for prompts, orders in ((12, 8), (12, 16), (49, 8), (49, 24)):
        rng, hits, plain = np.random.default_rng([prompts, orders]), 0, 0
        for _ in range(times):
            scale, rows = rng.normal(1, 0.3, prompts), []
            for number in range(orders):
                order = tuple(rng.permutation(layers))
                for k in range(1, 6):
                    rows.append({"permutation": number, "lesioned": "+".join(order[:k]), "worth": worth(order[:k])})
            chain = pd.DataFrame(rows)
            frame = pd.concat([chain.assign(prompt_id=f"p{n}", worth=chain["worth"] * s) for n, s in enumerate(scale)])
            fixed = {"model": "m", "kind": "k", "replacement": "zero", "window_start": 0.0, "window_end": 1.0}
            fixed |= {"branch": "both", "strength": 1.0, "selection": "coalitions", "status": "ok", "seed": 0}
            frame = frame.assign(**fixed, noise="own", layer="", layer_index=-1, clip_similarity=1 - frame["worth"])
            table = shapley.shapley_values(frame.reset_index(drop=True)).set_index("layer")
            for one in layers:
                hits += table.loc[one, "low"] <= truth[one] <= table.loc[one, "high"]
                reach = 1.96 * table.loc[one, "sd_prompts"] / np.sqrt(prompts)
                plain += abs(table.loc[one, "shapley"] - truth[one]) <= reach
        yield {
            "prompts": prompts,
            "orders": orders,
            "prompts alone, %": percent(plain, 5 * times),
            "as reported, %": percent(hits, 5 * times),
            "studies": times,
        }


def _pairs(rng: np.random.Generator, headroom: np.ndarray, factor: np.ndarray, of_seeds: np.ndarray) -> pd.DataFrame:
    """Similarities of baselines; factor: (prompts, seeds), of_seeds: (seeds,).

    Of two seeds: 1 - headroom (prompts,) x the mean of both seeds' factors. Of two prompts: five
    partners each, at the seeds in turn; 0.5, less what each prompt and the seed add.
    """
    prompts, number = factor.shape
    ids = np.array([f"p{n}" for n in range(prompts)])
    one, other = np.triu_indices(number, 1)
    near = 1 - headroom[:, None] * (factor[:, one] + factor[:, other]) / 2
    place = np.repeat(np.arange(prompts), len(one))
    same = pd.DataFrame({"prompt_id_a": ids[place], "prompt_id_b": ids[place], "similarity": near.ravel()})
    same = same.assign(seed_a=np.tile(one, prompts), seed_b=np.tile(other, prompts))
    place, own = np.repeat(np.arange(prompts), 5), rng.normal(0, 0.1, prompts)
    partner, seed = (place + np.tile(np.arange(1, 6), prompts)) % prompts, np.arange(5 * prompts) % number
    far = 0.5 - own[place] - own[partner] - of_seeds[seed] - rng.normal(0, 0.05, len(place))
    across = pd.DataFrame({"prompt_id_a": ids[place], "prompt_id_b": ids[partner], "seed_a": seed, "seed_b": seed})
    return pd.concat([same, across.assign(similarity=far)])


def ratios(times: int) -> Iterator[Row]:
    """Importance by what another seed or prompt changes, of a dense layer and of one that affects a tenth of prompts.

    And these floors. What a prompt changes under the dense lesion and under another seed goes together. Where prompts
    share seeds, each seed has a factor for all, and adds to the similarity of other prompts. Shares are of the data
    sets in which there are limits.
    """

    def of_prompts(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        change = rng.gamma(4, 0.03, n)
        return change, 0.2 * np.sqrt(change / 0.12) * rng.gamma(10, 0.1, n)

    headrooms = of_prompts(np.random.default_rng(0), 4_000_000)[1]
    truths = {"seeds": float(headrooms.mean()), "prompts": 0.5}
    layers = {"dense": 0.12, "sparse": 0.1 * 0.25}  # the true means
    for noise in ("own", "shared"):
        for prompts in (12, 24, 49):
            rng, hits, made = np.random.default_rng([prompts, len(noise)]), np.zeros((3, 2)), np.zeros((3, 2))
            rows = 1 if noise == "shared" else prompts
            for _ in range(times):
                change, headroom = of_prompts(rng, prompts)
                rare = np.where(rng.random(prompts) < 0.1, rng.beta(2, 6, prompts), 0.0)
                factor = 1 + 0.1 * rng.normal(size=(rows, 4)) + 0.1 * rng.normal(size=(prompts, 4))
                cells = np.stack([change, rare])[:, :, None] * (1 + 0.1 * rng.normal(size=(rows, 4)))
                cells[0] += rng.normal(0, 0.02, (prompts, 4))
                of_seeds = rng.normal(0, 0.03, 4) if noise == "shared" else np.zeros(4)
                pairs = _pairs(rng, headroom, factor, of_seeds)
                found = normalised_importance(_frame(cells, noise), pairs, replicates=REPLICATES)
                floors = noise_floor(pairs, shared=noise == "shared").set_index("floor")
                for place, name in enumerate(("seeds", "prompts")):
                    limits = found[[f"normalised_other_{name}_{end}" for end in ("low", "high")]].to_numpy()
                    limits = np.vstack([limits, floors.loc[f"other_{name}", ["low", "high"]]]).astype(float)
                    truth = np.array([*(mean / truths[name] for mean in layers.values()), 1 - truths[name]])
                    hits[:, place] += (limits[:, 0] <= truth) & (truth <= limits[:, 1])
                    made[:, place] += np.isfinite(limits).all(axis=1)
            row: Row = {"noise": noise, "prompts": prompts, "seeds": 4}
            for what, hit, number in zip(("dense layer by", "sparse layer by", "floor of"), hits, made, strict=True):
                row |= {f"{what} other seeds, %": percent(hit[0], number[0])}
                row |= {f"{what} other prompts, %": percent(hit[1], number[1])}
            yield row | {"+-": error(times)}


def floors(times: int) -> Iterator[Row]:
    """The floor of other prompts alone, own noise: many data sets in little time."""
    for prompts in (12, 24, 49):
        rng, hits = np.random.default_rng([prompts, 4]), 0
        for _ in range(times):
            pairs = _pairs(rng, np.ones(prompts), np.zeros((prompts, 4)), np.zeros(4))
            one = noise_floor(pairs[pairs["prompt_id_a"] != pairs["prompt_id_b"]]).set_index("floor")
            hits += one.loc["other_prompts", "low"] <= 0.5 <= one.loc["other_prompts", "high"]
        yield {"prompts": prompts, "floor of other prompts, %": percent(hits, times), "+-": error(times)}


TABLES = {
    "ratios": ratios,
    "floors": floors,
    "seeds": seeds,
    "sparse": sparse,
    "ranks": rank_intervals,
    "claims": claims,
    "shapley": shapley_values,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="which (default all)")
    parser.add_argument("--times", type=int, default=400, help="data sets of a case (default 400)")
    given = parser.parse_args()
    for name in given.tables or TABLES:
        print(f"\n{name}\n")
        print(pd.DataFrame(list(TABLES[name](given.times))).to_markdown(index=False), flush=True)


if __name__ == "__main__":
    main()
