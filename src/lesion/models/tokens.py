"""Which text tokens of a prompt a set of `lesion.study.tokens` has, in the order in which a denoiser reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lesion.errors import RequestError
from lesion.study import layer_patterns
from lesion.study.tokens import ASPECT, KEY, POSITION, REGEX, WORD, of_text, word_and_piece
from lesion.study.words import named, words_in
from lesion.toy_world.masks import spoken

if TYPE_CHECKING:
    from lesion.models.words import Words

MOST = 3  # prompts that a refusal names
SHOWN = 100  # letters of a prompt in a message


def words_meant(text: str, name: str) -> tuple[str, ...]:
    """The names of the words of a text that a set by words means, in their order.

    `aspect:` knows what the words of a toy-world caption speak of. Raises KeyError, with a sentence that says why,
    where the text has none.
    """
    if name.startswith(WORD):
        return named(text, word_and_piece(name)[0])
    there = words_in(text)
    if name.startswith(REGEX):
        found = tuple(word.name for word in there if layer_patterns.matches(word.plain, name, KEY))
    else:
        found = tuple(word.name for word in spoken(text) if word.aspect == name.removeprefix(ASPECT))
    if not found:
        what = "no caption of the toy world, whose words are known" if _unknown(text, name) else "no such word"
        raise KeyError(
            f"{name}: {_brief(text)} has {what}; its words: {', '.join(word.name for word in there)[:SHOWN]}"
        )
    return found


def _brief(text: str) -> str:
    """The beginning of a text, in quotes."""
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")


def _unknown(text: str, name: str) -> bool:
    return name.startswith(ASPECT) and not spoken(text)


def check_texts(texts: Iterable[str], names: Sequence[str], key: str = KEY) -> None:
    """Raise RequestError where some of these texts lack a set by words: their images would show nothing lesioned.

    key: of the request.
    """
    texts = list(dict.fromkeys(texts))
    for name in filter(of_text, names):
        lacking = []
        for text in texts:
            try:
                words_meant(text, name)
            except KeyError as error:
                lacking.append((text, error.args[0]))
        if lacking:
            more = ""
            if len(lacking) > 1:
                others = ", ".join(repr(text[:60]) for text, _ in lacking[1:MOST])
                more = f"; so of {len(lacking)} of {len(texts)} prompts, also {others}"
            raise RequestError(key, f"{lacking[0][1]}{more}; each prompt must have each set")


def columns_of(words: Words, name: str) -> tuple[int, ...]:
    """The places, among a prompt's text tokens, of those of a set, rising.

    Raises KeyError, with a sentence that says why, where the prompt has none that an encoder sees.
    """
    if name in ("begin", "end", "padding"):
        found: Sequence[int] = getattr(words, name)
    elif name == "words":
        found = [column for columns in words.columns.values() for column in columns]
    elif name == "rest":
        taken = {*words.special, *(column for columns in words.columns.values() for column in columns)}
        found = [column for column in range(words.length) if column not in taken]
    elif name.startswith(POSITION):
        found = [place for place in [int(name.removeprefix(POSITION))] if place < words.length]
    else:
        meant = words_meant(words.text, name)
        if unseen := [word for word in meant if word in words.unseen]:
            raise KeyError(f"{', '.join(unseen)} of {_brief(words.text)}: beyond the limit of the text encoders")
        piece = word_and_piece(name)[1] if name.startswith(WORD) else None
        found = [column for word in meant for column in words.pieces(word, piece)]
    if not found:
        raise KeyError(f"{name}: {_brief(words.text)} has no such tokens among its {words.length}")
    return tuple(sorted(set(found)))
