"""Patterns of layer paths: globs, or `re:` and a regular expression."""

from __future__ import annotations

import fnmatch

from lesion.errors import RequestError

REGEX = "re:"
LIMIT = 1.0  # seconds for one path: some expressions try more ways than anyone can wait for


def check(pattern: str, key: str) -> None:
    """Raises RequestError for what is no regular expression; a glob may be any text."""
    if pattern.startswith(REGEX):
        import regex  # like `re`, but with a time limit

        try:
            regex.compile(pattern.removeprefix(REGEX))
        except (regex.error, RecursionError) as error:
            raise RequestError(key, f"{pattern[:80]!r} is no regular expression: {error}") from None


def matches(path: str, pattern: str, key: str) -> bool:
    """Whether a glob matches the whole path, or a regular expression is found in it.

    Raises RequestError naming `key` for an expression that takes longer than `LIMIT`.
    """
    if not pattern.startswith(REGEX):
        return fnmatch.fnmatchcase(path, pattern)
    import regex

    try:
        return regex.search(pattern.removeprefix(REGEX), path, timeout=LIMIT) is not None
    except TimeoutError:
        raise RequestError(
            key, f"{pattern[:80]!r} takes more than {LIMIT:g} s on {path!r}; write it without nested repetitions"
        ) from None
