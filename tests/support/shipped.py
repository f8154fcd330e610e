"""What ships of a model's layers, against the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lesion.models import layers
from lesion.study.layers import GRANULARITIES, KINDS


def assert_shipped(denoiser: Any, config: Mapping[str, Any]) -> None:
    """The lists that ship for this config are those of the built denoiser, for every granularity and kind."""
    data, name = layers._shipped(), type(denoiser).__name__
    known = data["models"][layers.identify(name, config, data["defaults"][name])]
    for by in GRANULARITIES:
        for kind in KINDS:
            found = known[by][kind]
            found = layers.unfolded(data["lists"][found]) if isinstance(found, int) else found
            assert found == layers.examined(denoiser, by, kind), (by, kind)
