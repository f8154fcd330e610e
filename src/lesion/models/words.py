"""Which columns of an attention map belong to which word of the prompt, as the model's tokenizers cut it."""

from __future__ import annotations

import inspect
import itertools
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lesion.models.source import TEMPLATED
from lesion.study.words import Word, named, words_in

SPECIAL = 4  # tokens that may stand around a text, at most


@dataclass(frozen=True)
class Words:
    """The text tokens of a prompt.

    text: the prompt.
    length: how many columns a map has.
    columns: those of each word, by its name ("circle#2" is the second circle), in the order of the prompt. A word's
        pieces are together; where a denoiser reads several encoders one after the other, those of all of them.
    special: of start, end and padding; begin, end and padding: each of them alone.
    unseen: words that come after the limits of all encoders, at least in part.
    truncated: how many tokens come after the limit of the encoder that reads most of the prompt; 0 where one reads all.
    starts: the first column of each encoder.

    Columns of punctuation are in none of these.
    """

    text: str
    length: int
    columns: Mapping[str, tuple[int, ...]]
    special: tuple[int, ...]
    unseen: tuple[str, ...]
    truncated: int = 0
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    starts: tuple[int, ...] = (0,)

    def pieces(self, word: str, piece: int | None) -> tuple[int, ...]:
        """Return the columns of a word's piece of this number, from 0, in each encoder that has it; of all for None."""
        columns = self.columns[word]
        if piece is None:
            return columns
        limits = (*self.starts, self.length)
        of_encoders = [
            [column for column in columns if low <= column < high] for low, high in itertools.pairwise(limits)
        ]
        return tuple(own[piece] for own in of_encoders if piece < len(own))

    def find(self, phrase: str) -> tuple[int, ...]:
        """Return the columns of a word or of several that follow one another, as "red circle" or "red circle#2".

        Raises KeyError, with a sentence that says why, where the prompt lacks it or no encoder sees it.
        """
        names = named(self.text, phrase)
        if unseen := [name for name in names if name in self.unseen]:
            raise KeyError(f"{', '.join(unseen)} of {self.text!r}: beyond the limit of the text encoders")
        return tuple(column for name in names for column in self.columns[name])


def words_of(pipe: Any, text: str, arguments: Mapping[str, Any] = MappingProxyType({})) -> Words:
    """Find the words of a prompt among the text tokens that a pipeline's denoiser reads.

    arguments: of the pipeline's call, of which `max_sequence_length` counts.

    Raises ValueError for a pipeline without a tokenizer, or with a template around its prompts.
    """
    return in_parts(encoders(pipe, arguments), text)


def words_of_encoder(
    pipe: Any, component: str, text: str, arguments: Mapping[str, Any] = MappingProxyType({})
) -> Words:
    """Find the words of a prompt among the tokens of one text encoder, as `text_encoder_2`; see `words_of`."""
    tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"))
    lengths = [length for one, length in encoders(pipe, arguments) if one is tokenizer]
    return in_parts([(tokenizer, lengths[0] if lengths else tokenizer.model_max_length)], text)


def truncated(
    pipe: Any, text: str, arguments: Mapping[str, Any] = MappingProxyType({})
) -> tuple[int | None, tuple[str, ...]]:
    """How many tokens of a prompt no text encoder sees, and the words that they belong to.

    arguments: as of `words_of`. The number is None where it cannot be told (`encoders`).
    """
    try:
        parts = encoders(pipe, arguments)
    except ValueError:
        return None, ()
    room = max((length for tokenizer, length in parts if tokenizer is not None), default=0)
    # Most prompts need not be cut into tokens: each is at least a byte of the text as tokenizers normalise it.
    if len(unicodedata.normalize("NFKC", text).lower().encode()) + SPECIAL <= room:
        return 0, ()
    words = in_parts(parts, text)
    return words.truncated, words.unseen


def encoders(pipe: Any, arguments: Mapping[str, Any] = MappingProxyType({})) -> list[tuple[Any, int]]:
    """Return the tokenizers whose tokens the denoiser's text has in a row, each with its number of tokens.

    Encoders that stand beside the first, as the second of SDXL, or that give one vector only, as FLUX's CLIP, are left
    out. Read in the source of diffusers 0.42.
    """
    name = type(pipe).__name__
    parameter = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    limit: Any = arguments.get("max_sequence_length") or (parameter.default if parameter else None)
    if name.startswith(TEMPLATED):
        raise ValueError(f"{name} puts a template around its prompts, so their words cannot be told apart")
    if name.startswith("StableDiffusion3"):
        third = pipe.tokenizer_3 if pipe.text_encoder_3 is not None else None  # without it its tokens are zeros
        return [(pipe.tokenizer, pipe.tokenizer_max_length), (third, limit)]
    if name.startswith("Flux"):
        return [(pipe.tokenizer_2, limit)]
    if name.startswith("Hunyuan"):
        return [(pipe.tokenizer, 77), (pipe.tokenizer_2, 256)]
    tokenizer = getattr(pipe, "tokenizer", None) or getattr(pipe, "tokenizer_2", None)  # SDXL's refiner has the second
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, so the words of its prompts cannot be told apart")
    return [(tokenizer, limit or tokenizer.model_max_length)]


def in_parts(parts: Sequence[tuple[Any, int]], text: str) -> Words:
    """Find the words of a text in the tokens of several tokenizers, one after the other.

    parts: each tokenizer, None where its tokens are empty, and its number of tokens, padding included.
    """
    there = words_in(text)
    columns: dict[str, list[int]] = {}
    begin: list[int] = []
    ends: list[int] = []
    padding: list[int] = []
    starts: list[int] = []
    cut: list[int] = []
    before = 0
    for tokenizer, length in parts:
        starts.append(before)
        if tokenizer is None:
            padding += range(before, before + length)
        else:
            first, last, pieces = _pieces(tokenizer, text, there)
            fits = length - first - last  # pieces of text that are not cut off
            cut.append(max(0, pieces.total - fits))
            end = first + min(fits, pieces.total)
            begin += range(before, before + first)
            ends += range(before + end, before + min(end + last, length))
            padding += range(before + end + last, before + length)
            for word, own in zip(there, pieces.of_word, strict=True):
                if own and own[-1] < fits:
                    columns.setdefault(word.name, []).extend(before + first + piece for piece in own)
        before += length
    return Words(
        text,
        before,
        {word.name: tuple(columns[word.name]) for word in there if word.name in columns},
        tuple(sorted((*begin, *ends, *padding))),
        tuple(word.name for word in there if word.name not in columns),
        min(cut, default=0),
        tuple(begin),
        tuple(ends),
        tuple(padding),
        tuple(starts),
    )


@dataclass(frozen=True)
class _Pieces:
    """total: pieces of a text, special ones not counted. of_word: numbers of each word's pieces, from 0."""

    total: int
    of_word: list[list[int]]


def _pieces(tokenizer: Any, text: str, words: Sequence[Word]) -> tuple[int, int, _Pieces]:
    """Special tokens in front of a text and behind it, and its pieces."""
    offsets = getattr(tokenizer, "is_fast", False)
    found = tokenizer(text, return_special_tokens_mask=True, return_offsets_mapping=offsets, verbose=False)
    mask = list(found["special_tokens_mask"])
    first = mask.index(0) if 0 in mask else len(mask)
    total = mask.count(0)
    last = len(mask) - first - total
    if offsets:
        spans = found["offset_mapping"][first : first + total]
        of_word = [
            [piece for piece, (start, end) in enumerate(spans) if start < word.end and end > word.start]
            for word in words
        ]
    else:  # how many pieces there are up to a word's start and its end

        def count(upto: int) -> int:
            return len(tokenizer(text[:upto].rstrip(), add_special_tokens=False, verbose=False)["input_ids"])

        of_word = [list(range(count(word.start), count(word.end))) for word in words]
    return first, last, _Pieces(total, of_word)
