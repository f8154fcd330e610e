"""The two ways a study can end badly, and how errors are shown."""

from __future__ import annotations

import difflib
import traceback
import unicodedata
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).parent
_REORDER = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # they turn what follows
_SHOWN = 1000  # characters of a line


def visible(text: str, keep: str = "") -> str:
    """Text for a terminal or a table: characters that control it are spelled out, as \\x1b, but those of `keep`."""
    return "".join(
        letter
        if letter in keep or not (unicodedata.category(letter) in ("Cc", "Cs") or letter in _REORDER)
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


def counted(number: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def place_of(error: BaseException) -> str:
    """Kind and message of an error, and the module and line of ours in which it arose, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    where = ""
    if ours:
        module = ".".join(Path(ours[-1].filename).relative_to(PACKAGE.parent).with_suffix("").parts)
        where = f" at {module}:{ours[-1].lineno}"
    message = " ".join(str(error).split())
    return f"{type(error).__name__}{where}{': ' if message else ''}{message[:_SHOWN]}"


class RequestError(Exception):
    """The request is wrong: says which key, and what is allowed. One line; raised before any model loads."""

    def __init__(self, key: str, message: str):
        """key: "" where the message names it already, as Hydra's do."""
        self.key = key
        text = " ".join(message.split())
        if len(text) > 2 * _SHOWN:  # whoever sees it needs its two ends
            text = f"{text[:_SHOWN]} […] {text[-_SHOWN:]}"
        super().__init__(visible(f"{key}: {text}" if key else text))

    def __reduce__(self) -> tuple[object, ...]:  # jobs may run in other processes
        return RequestError, (self.key, str(self).removeprefix(f"{self.key}: "))


def no_such_key(key: str, known: Iterable[str], beside: Iterable[str]) -> RequestError:
    """The refusal of a key that there is not.

    key: its full name, dotted.
    known: full names of which the nearest are named.
    beside: full names that are all named where none is near.
    """
    near = difflib.get_close_matches(key, list(dict.fromkeys(known)), n=3, cutoff=0.5)
    return RequestError(
        key, f"there is no such key; {'near' if near else 'allowed'}: {', '.join(near or sorted(beside))}"
    )


class StudyFailed(Exception):
    """Some cells failed; everything else is complete and on disk."""
