"""Which layer carries which aspect of a prompt (colour, shape, count...): means by tag, and the interaction test."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lesion.analysis.bootstrap import FLAT, Floats
from lesion.analysis.cells import cube, groups, images, lesioned_rows, matched, prompt_averages
from lesion.analysis.estimates import measured
from lesion.analysis.importance import LEAVE_ONE_OUT


def tags(aspects: Any) -> list[str]:
    """Of an `aspects` cell, tags joined by commas: each once, in order; none for a missing cell."""
    text = "" if aspects is None or pd.isna(aspects) else str(aspects)
    return list(dict.fromkeys(tag.strip() for tag in text.split(",") if tag.strip()))


def aspect_estimates(frame: pd.DataFrame, metric: str | None = None, **options: Any) -> pd.DataFrame:
    """`layer_estimates` (see there), one row an aspect tag too (column aspect).

    A prompt with several tags counts under each; prompts without tags are in none. An aspect of one prompt has no
    interval. ValueError without a column `aspects`.
    """
    part, keys = lesioned_rows(_tagged(frame), metric)
    part = part.assign(aspect=part["aspects"].map(tags)).explode("aspect").dropna(subset=["aspect"])
    return measured(part, keys, ["aspect"], **options)


def aspect_table(estimates: pd.DataFrame, measure: str = "importance", value: str = "mean") -> pd.DataFrame:
    """Layers in depth order (index) x aspects (columns) of one setting's `aspect_estimates`.

    ValueError if they mix settings: a layer and aspect would have two values.
    """
    part = estimates[estimates["measure"] == measure]
    table = part.pivot(index="layer", columns="aspect", values=value)
    return table.reindex(index=list(dict.fromkeys(part["layer"])))


def _tagged(frame: pd.DataFrame) -> pd.DataFrame:
    if "aspects" not in frame:
        raise ValueError("these results have no column aspects")
    return frame


def aspect_interaction(
    frame: pd.DataFrame, metric: str | None = None, permutations: int = 9999, seed: int = 0
) -> pd.DataFrame:
    """Do layers matter differently for different aspects? One row a setting.

    A permutation test. A prompt's profile is its importance by layer less its mean over layers: what is left is which
    layers it needs more than others. The profiles are regressed on the tags of their prompts; the statistic is the
    share R2 (0 to 1) of their squared deviations that the tags explain, and its null distribution comes from dealing
    the prompts' tags anew among the prompts (Anderson, Austral Ecology 26, 2001; McArdle & Anderson, Ecology 82,
    2001). A prompt's layers stay together, so nothing is assumed on how they correlate, whereas a two-way ANOVA would
    take layers of one prompt as independent or spherical; several tags a prompt are no obstacle. Two limits: aspects
    that differ in spread only can also be found different, and since effects are differences, not ratios, an aspect
    with all effects twice as large has another profile.

    Columns: the setting's; r2, p (>= 1 / (permutations + 1)), method (`permutation`, or `n/a (reason)`), n_layers,
    n_aspects, n_prompts (with tags), n_untagged (prompts), n_left_out (images not valid for every layer).
    ValueError without a column `aspects`.
    """
    part, keys = lesioned_rows(_tagged(frame), metric)
    part = part[part["selection"] == LEAVE_ONE_OUT]
    records = []
    for setting, whole in groups(part, keys):
        of = whole.groupby("prompt_id", sort=False)["aspects"].first().map(tags)
        untagged = int((of.map(len) == 0).sum())
        whole = whole[whole["prompt_id"].map(of.map(len)) > 0]
        wide = matched(whole) if len(whole) else pd.DataFrame()
        record: dict[str, Any] = {**setting, "r2": np.nan, "p": np.nan, "method": "n/a (no data)"}
        record |= {"n_layers": wide.shape[1], "n_aspects": 0, "n_prompts": 0, "n_untagged": untagged}
        if len(wide):
            by_prompt = prompt_averages(cube(wide)).T  # (P, L)
            prompts = list(dict.fromkeys(wide.index.get_level_values("prompt_id")))
            names = list(dict.fromkeys(tag for prompt in prompts for tag in of[prompt]))
            member = np.array([[float(name in of[prompt]) for name in names] for prompt in prompts])  # (P, A)
            r2, p, method = interaction(by_prompt, member, permutations, seed)
            record |= {"r2": r2, "p": p, "method": method, "n_aspects": len(names), "n_prompts": len(prompts)}
        records.append({**record, "n_left_out": images(whole) - len(wide)})
    names_ = ["r2", "p", "method", "n_layers", "n_aspects", "n_prompts", "n_untagged", "n_left_out"]
    return pd.DataFrame(records, columns=[*keys, *names_])


def interaction(profiles: Floats, member: Floats, permutations: int = 9999, seed: int = 0) -> tuple[float, float, str]:
    """R2, p and method of the test above. profiles: (P, L) importance; member: (P, A) 0 or 1."""
    prompts, layers = profiles.shape
    centred = profiles - profiles.mean(axis=1, keepdims=True)
    centred = centred - centred.mean(axis=0)
    design = member - member.mean(axis=0)
    basis, sizes, _ = np.linalg.svd(design, full_matrices=False)
    basis = basis[:, sizes > 1e-9]  # (P, rank)
    total = float((centred**2).sum())
    if layers < 2:
        return np.nan, np.nan, "n/a (one layer)"
    if not basis.shape[1]:
        return np.nan, np.nan, "n/a (all prompts have the same aspects)"
    if basis.shape[1] >= prompts - 1:
        return np.nan, np.nan, "n/a (too few prompts)"
    if total <= (FLAT * np.abs(profiles).max()) ** 2 * profiles.size:
        return np.nan, np.nan, "n/a (constant)"
    rng = np.random.default_rng(seed)
    observed = float(((basis.T @ centred) ** 2).sum())
    at_least = 0
    for start in range(0, permutations, 500):
        dealt = np.tile(np.arange(prompts), (min(500, permutations - start), 1))
        fitted = np.einsum("bpa,pl->bal", basis[rng.permuted(dealt, axis=1)], centred, optimize=True)
        # The tolerance lets deals that only rename the tags count as equal.
        at_least += int(((fitted**2).sum(axis=(1, 2)) >= observed * (1 - 1e-9)).sum())
    return observed / total, float((at_least + 1) / (permutations + 1)), "permutation"
