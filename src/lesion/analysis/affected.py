"""How many prompts a layer affects at all, and how much: what a mean over mostly untouched prompts hides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lesion.analysis.bootstrap import effective_number
from lesion.analysis.cells import groups, lesioned_rows, nested
from lesion.analysis.importance import LEAVE_ONE_OUT, NO_EFFECT
from lesion.analysis.settings import layers_in_order

AFFECTED = ("n_affected", "n_prompts", "affected", "affected_low", "affected_high", "mean_affected", "n_effective")


def clopper_pearson(hits: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact limits of a share (Clopper & Pearson, Biometrika 26, 1934); NaN for no trials.

    One-sided where none or all are hits, as no share lies beyond: 0 of 12 still allows 22 %.
    """
    from scipy.special import betaincinv

    if not total:
        return float("nan"), float("nan")
    tail = (1 - confidence) / (2 if 0 < hits < total else 1)
    low = float(betaincinv(hits, total - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, total - hits, 1 - tail)) if hits < total else 1.0
    return low, high


def affected_prompts(frame: pd.DataFrame, metric: str | None = None, confidence: float = 0.95) -> pd.DataFrame:
    """One row a setting and layer under leave_one_out, in depth order.

    A prompt is affected if an image of it changes by more than 1e-4. Columns: the setting's; layer; n_affected,
    n_prompts; affected (their share), affected_low, affected_high (`clopper_pearson`); mean_affected (mean importance
    of the affected, NaN without any); n_effective (`bootstrap.effective_number`); images_affected, n_images.
    """
    part, keys = lesioned_rows(frame, metric)
    part = part[part["selection"] == LEAVE_ONE_OUT]
    records: list[dict[str, Any]] = []
    for setting, whole in groups(part, keys):
        for layer in layers_in_order(whole):
            cells = nested(whole[whole["layer"] == layer])
            means = np.nanmean(cells, axis=1) if cells.size else np.empty(0)
            changed = np.abs(np.nan_to_num(cells)) > NO_EFFECT
            hit = changed.any(axis=1)
            low, high = clopper_pearson(int(hit.sum()), len(means), confidence)
            record = {**setting, "layer": layer, "n_affected": int(hit.sum()), "n_prompts": len(means)}
            record |= {"affected": hit.mean() if len(means) else np.nan, "affected_low": low, "affected_high": high}
            record |= {"mean_affected": means[hit].mean() if hit.any() else np.nan}
            record |= {"n_effective": effective_number(means), "images_affected": int(changed.sum())}
            records.append({**record, "n_images": int(np.isfinite(cells).sum())})
    return pd.DataFrame(records, columns=[*keys, "layer", *AFFECTED, "images_affected", "n_images"])
