"""Makes any value safe to hand to a tracker: plain types, valid UTF-8."""

from collections.abc import Mapping

import numpy as np


def text(value: object, limit: int | None = None) -> str:
    """`value` as valid UTF-8 text, at most `limit` characters.

    Lone surrogates, which protobuf messages and JSON files cannot hold, become '?'.
    """
    return str(value).encode("utf-8", "replace").decode("utf-8")[:limit]


def plain(value: object) -> object:
    """`value` as nested dicts, lists and scalars; anything else (paths, enums, dtypes) as text."""
    if isinstance(value, Mapping):
        return {text(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return text(value)
