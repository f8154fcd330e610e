"""Which of many estimated lesions rank highest, with some of them lesioned on some prompts.

Pure: imports nothing of torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
PRIOR = 1.0  # prompts' worth of what all candidates show together


def steadied(estimates: Floats, mean: str = "root") -> Floats:
    """Scale each lesion's estimates so that their mean over prompts is another mean of them, (lesions, prompts).

    mean: `root`, the squared mean of their roots, or `geometric`.

    Estimates are squares, each with an error of its own that may be many times what it estimates; few prompts then
    decide their mean. Half the squared mean of |J| over prompts orders lesions better than the mean of half its square
    (docs/attribution.md).
    """
    means = estimates.mean(axis=1, keepdims=True)
    if mean == "geometric":
        with np.errstate(divide="ignore"):
            wanted = np.exp(np.log(estimates).mean(axis=1, keepdims=True))  # 0 where one of them is
    else:
        wanted = np.sqrt(estimates).mean(axis=1, keepdims=True) ** 2
    found: Floats = wanted / np.where(means > 0, means, 1.0) * estimates
    return found


def adjusted(estimates: Floats, real: Floats) -> Floats:
    """Importance of each lesion on each prompt, by what is known of it, (lesions, prompts).

    estimates: of the same. real: importance, NaN where a lesion was not made.

    A lesion that was made on a prompt has its importance there, and on the other prompts its estimates times the ratio
    of importance to estimate where it was made (Cochran, Sampling Techniques, chapter 6). Few prompts say little of a
    ratio: it is drawn towards that of all lesions together as if `PRIOR` further prompts showed that one. Lesions that
    were not made have the ratio of all. Where nothing was made these are the estimates.
    """
    known = np.isfinite(real)
    if not known.any():
        return estimates
    pairs = np.where(known, real, 0.0), np.where(known, estimates, 0.0)
    shown, expected = (one.sum(axis=1) for one in pairs)
    of_all = float(shown.sum() / expected.sum()) if expected.sum() > 0 else 1.0
    prior = PRIOR * estimates.mean(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(expected + prior > 0, (shown + of_all * prior) / (expected + prior), of_all)
    found: Floats = np.where(known, real, estimates * ratio[:, None])
    return found
