"""Sets of text tokens by name, and layers that are what one such set brings to a layer. Imports nothing of torch.

With `layers.by=token` each set in all layers of a component is a layer under study, `denoiser.tokens.word:red`; with
`attention_token` each set in each layer by `attention`, `up_blocks.2.attentions.2.tokens.word:red`. Which tokens of a
prompt a set has is for `lesion.models.tokens`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lesion.errors import RequestError
from lesion.study import layer_patterns
from lesion.study.checks import digits, distinct
from lesion.study.words import words_in

EVERYWHERE, EACH = "token", "attention_token"
BY = (EVERYWHERE, EACH)  # values of `layers.by`
KEY = "layers.tokens"
KINDS = ("cross_attention", "text_to_image")  # of sites that tokens can be told apart in
GROUPS = ("begin", "words", "rest", "end", "padding")
DEFAULT = ("words", "padding")  # T5 has no begin, Gemma no end
WORD, ASPECT, REGEX, POSITION = "word:", "aspect:", layer_patterns.REGEX, "position:"
ASPECTS = ("colour", "shape", "size", "count", "relation", "background")
ALLOWED = f"{', '.join(GROUPS)}, word:PHRASE, word:WORD/PIECE, aspect:{'|'.join(ASPECTS)}, re:REGEX, position:NUMBER"
MARK = ".tokens."  # between a layer and a set
_PIECE = re.compile(r"(?P<phrase>[^/]+)(?:/(?P<piece>[0-9]{1,18}))?")


def parse_tokens(value: Any) -> tuple[str, ...]:
    """The sets of a request, a name or a list of names; None for `DEFAULT`.

    Raises RequestError naming the key and what is allowed.
    """
    names = [_name(given) for given in distinct(KEY, list(DEFAULT) if value is None else value)]
    return tuple(distinct(KEY, names))


def _name(given: Any) -> str:
    name = given.strip() if isinstance(given, str) else ""
    if name in GROUPS:
        return name
    if name.startswith(ASPECT) and name.removeprefix(ASPECT) in ASPECTS:
        return name
    if name.startswith(POSITION) and (place := digits(name.removeprefix(POSITION))) is not None:
        return f"{POSITION}{place}"
    if name.startswith(WORD):
        phrase, piece = word_and_piece(name.lower())
        words = words_in(phrase.partition("#")[0])
        if words and (piece is None or len(words) == 1):
            spoken = " ".join(word.plain for word in words) + "".join(phrase.partition("#")[1:])
            return f"{WORD}{spoken}" if piece is None else f"{WORD}{spoken}/{piece}"
    if name.startswith(REGEX):
        layer_patterns.check(name, KEY)
        if "+" in name:  # joins the names of several layers
            raise RequestError(KEY, f"{name[:80]!r} has a +, which joins names of layers; write {{1,}}")
        return name
    raise RequestError(KEY, f"got {str(given)[:80]!r}; allowed: {ALLOWED}")


def word_and_piece(name: str) -> tuple[str, int | None]:
    """The phrase of `word:PHRASE/PIECE`, and the number of the piece, from 0; None for all pieces."""
    match = _PIECE.fullmatch(name.removeprefix(WORD))
    if match is None:
        return "", None
    return match["phrase"], None if match["piece"] is None else int(match["piece"])


def of_text(name: str) -> bool:
    """Whether a prompt may lack the set by what it says; others are had wherever there is room for them."""
    return name.startswith((WORD, ASPECT, REGEX))


def expanded(paths: Sequence[str], names: Sequence[str], whole: str = "") -> tuple[str, ...]:
    """The layers by token: each of these layers with each set; all as they are where no set is named.

    whole: the component, where each set in all of its layers is one.
    """
    return tuple(f"{path}{MARK}{name}" for path in ([whole] if whole else paths) for name in names) or tuple(paths)


def layer_and_set(path: str) -> tuple[str, str]:
    """A layer's or site's path without its set, and the set; "" where it has none."""
    layer, _, name = path.partition(MARK)
    return layer, name
