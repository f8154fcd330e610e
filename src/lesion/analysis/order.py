"""The order of layers: ranks with their intervals, how stable the top is, and whether prompts agree.

All figures are of images that are valid for every layer of the setting, so that layers are compared on the same images;
the others are counted as n_left_out. A layer without any valid image has no rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lesion.analysis.bootstrap import REPLICATES, Floats, draws
from lesion.analysis.cells import MEASURES, cube, groups, images, lesioned_rows, matched, prompt_averages, shared_noise
from lesion.analysis.importance import LEAVE_ONE_OUT, ONLY_ONE
from lesion.analysis.paired import comparisons, wins, without_noise

RANKS = ("rank", "rank_low", "rank_high", "typical_rank", "typical_low", "typical_high")


def replicated(cells: Floats, shared: bool = False, replicates: int = REPLICATES, seed: int = 0) -> Floats:
    """Means of every layer (L, P, S) under the same resampled prompts; result: (L, B)

    shared: seeds, the same noise for every prompt, are resampled too, independently (Owen, "The pigeonhole bootstrap",
    Ann. Appl. Stat. 1, 2007); not where images are missing.
    """
    layers, prompts, seeds = cells.shape
    if not prompts:
        return np.empty((layers, 0))
    drawn = draws(prompts, replicates, seed) / prompts
    if not shared or seeds < 2 or not np.isfinite(cells).all():
        found: Floats = prompt_averages(cells) @ drawn.T
        return found
    of_seeds = draws(seeds, replicates, seed + 1) / seeds
    by_seed = np.tensordot(drawn, cells, axes=(1, 1))  # (B, L, S)
    found = np.einsum("bls,bs->lb", by_seed, of_seeds)
    return found


def _ranks(means: Floats, method: str) -> Floats:
    """1 = largest. Layers whose values agree to 1e-6 tie. means: (L, ...)"""
    from scipy import stats

    found: Floats = stats.rankdata(-np.round(means, 6), method=method, axis=0)
    return found


def ranks(
    frame: pd.DataFrame,
    metric: str | None = None,
    top: Sequence[int] = (1, 3),
    confidence: float = 0.95,
    replicates: int = REPLICATES,
    seed: int = 0,
    compared: pd.DataFrame | None = None,
    won: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Rank of every layer by importance, one row a setting and layer in depth order.

    Columns: the setting's; layer; importance (over the shared images); rank (1 = most important, ties share the better
    rank); rank_low, rank_high; typical_rank, typical_low, typical_high; top_K for each of `top`; n_prompts; n_left_out.
    rank_low - 1 layers are significantly more important, n - rank_high less, by `paired.comparisons` of every two
    layers, Holm-corrected over all of them: so the true ranks of all layers lie within their limits together at least
    `confidence` of the time even where layers tie (Mogstad, Romano, Shaikh & Wilhelm, Rev. Econ. Stud. 91, 2024, who
    resample for that); resampled ranks do not (Xie, Singh & Zhang, JASA 104, 2009). typical_rank: one place behind the
    layers that change the image more on most prompts where the two differ, with limits by `paired.wins` in the same
    way. compared, won: such comparisons ready made, where p_holm is corrected for more than these. top_K: share of
    bootstrap replicates in which the layer is among the first K, ties by their mean rank. With one prompt all of these
    are missing.
    """
    if compared is None:
        compared = comparisons(frame, metric)
    if won is None:
        won = wins(frame, metric)
    part, keys = lesioned_rows(frame, metric)
    part = part[part["selection"] == LEAVE_ONE_OUT]
    shares = [f"top_{k}" for k in top]
    tables = []
    for setting, whole in groups(part, keys):
        wide = matched(whole)
        cells = without_noise(cube(wide))
        if not cells.size:
            continue
        by_prompt = prompt_averages(cells)
        means = by_prompt.mean(axis=1)
        table = pd.DataFrame({"layer": list(wide.columns), "importance": means}).assign(**setting)
        table["rank"] = _ranks(means, "min")
        known = by_prompt.shape[1] > 1
        beaten = _of(won, setting)
        above = beaten.loc[beaten["n_more"] > beaten["n_less"], "other"].value_counts()
        table["typical_rank"] = 1 + table["layer"].map(above).fillna(0)
        for name, pairs in (("rank", _of(compared, setting)), ("typical", beaten)):
            pairs = pairs[pairs["p_holm"] <= 1 - confidence]
            above, below = (table["layer"].map(pairs[side].value_counts()).fillna(0) for side in ("other", "layer"))
            table[f"{name}_low"] = (1 + above) if known else np.nan
            table[f"{name}_high"] = (len(table) - below) if known else np.nan
        star = (
            _ranks(replicated(cells, shared_noise(whole), replicates, seed), "average")
            if by_prompt.shape[1] > 1
            else None
        )
        for k, name in zip(top, shares, strict=True):
            table[name] = np.nan if star is None else (star <= k).mean(axis=1)
        table["n_prompts"], table["n_left_out"] = by_prompt.shape[1], images(whole) - len(wide)
        tables.append(table.astype(dict.fromkeys(RANKS, "Int64")))
    names = [*keys, "layer", "importance", *RANKS, *shares, "n_prompts", "n_left_out"]
    return pd.concat(tables, ignore_index=True)[names] if tables else pd.DataFrame(columns=names)


def _of(compared: pd.DataFrame, setting: dict[str, Any]) -> pd.DataFrame:
    """The rows of one setting."""
    for name, value in setting.items():
        compared = compared[compared[name].isna() if pd.isna(value) else compared[name] == value]
    return compared


def top_stability(
    frame: pd.DataFrame,
    metric: str | None = None,
    top: Sequence[int] = (1, 3),
    replicates: int = REPLICATES,
    seed: int = 0,
) -> pd.DataFrame:
    """How far the set of the k most important layers survives resampling; one row a setting and k.

    Columns: the setting's; k; layers (joined by '+', most important first); overlap (mean share of them among the first
    k of a replicate, 0 to 1, ties by their mean rank); same (share of replicates with exactly this set); n_prompts.
    NaN for one prompt. k beyond the number of layers is left out.
    """
    part, keys = lesioned_rows(frame, metric)
    part = part[part["selection"] == LEAVE_ONE_OUT]
    records = []
    for setting, whole in groups(part, keys):
        wide = matched(whole)
        cells = without_noise(cube(wide))
        if not cells.size:
            continue
        order = np.argsort(-prompt_averages(cells).mean(axis=1), kind="stable")
        star = _ranks(replicated(cells, shared_noise(whole), replicates, seed), "average")
        for k in (k for k in top if k <= len(order)):
            shared = (star[order[:k]] <= k).mean(axis=0)
            known = cells.shape[1] > 1
            record = {"k": k, "layers": "+".join(wide.columns[order[:k]]), "n_prompts": cells.shape[1]}
            record |= {"overlap": shared.mean() if known else np.nan, "same": (shared == 1).mean() if known else np.nan}
            records.append({**setting, **record})
    return pd.DataFrame(records, columns=[*keys, "k", "layers", "overlap", "same", "n_prompts"])


def kendalls_w(frame: pd.DataFrame, metric: str | None = None) -> pd.DataFrame:
    """Do prompts agree on the order of layers? One row a setting and measure (importance, sufficiency).

    W = chi2 / (m (n - 1)) from Friedman's tie-corrected chi2, with m prompts as judges of n layers: 0 no agreement, 1
    the same order everywhere (Kendall & Babington Smith, Ann. Math. Stat. 10, 1939). Columns: the setting's; measure;
    W, chi2, p (chi2 with n - 1 degrees of freedom, rough for few prompts), n_layers, n_prompts, n_left_out. NaN for
    fewer than 2 prompts or 3 layers, or if all layers tie.
    """
    part, keys = lesioned_rows(frame, metric)
    records = []
    for setting, whole in groups(part, keys):
        for selection in (LEAVE_ONE_OUT, ONLY_ONE):
            selected = whole[whole["selection"] == selection]
            if selected.empty:
                continue
            wide = matched(selected)
            # Similarities that differ by rounding only are ties.
            by_prompt = np.round(prompt_averages(cube(wide)), 6)
            record: dict[str, Any] = {**setting, "measure": MEASURES[selection], **concordance(by_prompt)}
            records.append({**record, "n_left_out": images(selected) - len(wide)})
    names = ["measure", "W", "chi2", "p", "n_layers", "n_prompts", "n_left_out"]
    return pd.DataFrame(records, columns=[*keys, *names])


def concordance(values: Floats) -> dict[str, Any]:
    """W, chi2, p, n_layers, n_prompts of values (layers, prompts)."""
    from scipy import stats

    layers, prompts = values.shape
    chi2 = p = np.nan
    if layers >= 3 and prompts >= 2 and bool((values != values[0]).any()):
        chi2, p = map(float, stats.friedmanchisquare(*values))
    share = chi2 / (prompts * (layers - 1)) if np.isfinite(chi2) else np.nan
    return {"W": share, "chi2": chi2, "p": p, "n_layers": layers, "n_prompts": prompts}
