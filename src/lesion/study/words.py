"""The words of a prompt, by names that tell two occurrences apart."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lesion.study.checks import digits

_WORD = re.compile(r"\w+(?:[-'’]\w+)*")


@dataclass(frozen=True)
class Word:
    """A word of a prompt.

    name: in lower case; "circle#2" where "circle" occurs for the second time.
    start, end: its characters in the prompt, end excluded.
    """

    name: str
    start: int
    end: int

    @property
    def plain(self) -> str:
        """The word without its number."""
        return self.name.partition("#")[0]


def words_in(text: str) -> tuple[Word, ...]:
    """Return the words of a text in their order: runs of letters and digits, with hyphens and apostrophes inside."""
    found: list[Word] = []
    seen: dict[str, int] = {}
    for match in _WORD.finditer(text):
        plain = match[0].lower()
        seen[plain] = seen.get(plain, 0) + 1
        found.append(Word(plain if seen[plain] == 1 else f"{plain}#{seen[plain]}", match.start(), match.end()))
    return tuple(found)


def named(text: str, phrase: str) -> tuple[str, ...]:
    """Return the names of the words that a phrase means in a text.

    phrase: one word or several that follow one another, as "red circle"; "red circle#2" is its second occurrence.

    Raises KeyError, with a sentence that names the phrase and the words there are, where the text lacks it.
    """
    plain, _, number = phrase.lower().partition("#")
    wanted = [word.plain for word in words_in(plain)]
    there = words_in(text)
    starts = [
        start
        for start in range(len(there) - len(wanted) + 1)
        if wanted and [word.plain for word in there[start : start + len(wanted)]] == wanted
    ]
    which = digits(number) if number else 1
    if which is None or not 1 <= which <= len(starts):
        raise KeyError(f"{phrase!r} is not in {text!r}; its words: {', '.join(word.name for word in there)}")
    return tuple(word.name for word in there[starts[which - 1] :][: len(wanted)])
