"""Checks that several keys of a request share. Each raises RequestError, which names the key and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lesion.errors import RequestError


def one_of(key: str, value: Any, allowed: Sequence[str]) -> str:
    """One of these names."""
    if value not in allowed:
        raise RequestError(key, f"got {value!r}; allowed: {', '.join(allowed)}")
    return str(value)


def share(key: str, value: Any, most: float = 1.0) -> float:
    """A number in [0, most]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise RequestError(key, f"must be a number in [0, {most:g}]; got {value!r}")
    return float(value)


def distinct(key: str, value: Any) -> list[Any]:
    """One value or a list of them, at least one and each once."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise RequestError(key, "is an empty list; give at least one value")
    if twice := [item for item in values if values.count(item) > 1]:
        raise RequestError(key, f"names {twice[0]!r} twice; give each value once")
    return values


def digits(text: str) -> int | None:
    """A whole number in up to 18 of the digits 0 to 9; None for any other text, such as ² or some thousand digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def shown(value: Any) -> str:
    """A value in a message: neither long nor too deep to be spelled."""
    try:
        return repr(value)[:80]
    except (RecursionError, ValueError):  # a ValueError for a number of some thousand digits
        return f"a deep {type(value).__name__}" if isinstance(value, list | dict) else f"a long {type(value).__name__}"
