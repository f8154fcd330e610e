"""Frames in, frames out: what the results of a study say. No disk, no torch."""

from lesion.analysis.importance import (
    controls,
    importance_metric,
    layer_by_prompt,
    layer_table,
    similarity,
    status_counts,
)
from lesion.analysis.settings import Setting, only_setting, rows, settings

__all__ = [
    "Setting",
    "controls",
    "importance_metric",
    "layer_by_prompt",
    "layer_table",
    "only_setting",
    "rows",
    "settings",
    "similarity",
    "status_counts",
]
