"""Does an image show just the colours that its caption asks for? Read from pixels by rule; values: see `_reader`."""

from __future__ import annotations

from lesion.scoring import ScorerSpec
from lesion.scoring._reader import VERSION, Read
from lesion.scoring._reader import asks as _asks


def asks(prompt: str) -> bool:
    return _asks(prompt, "colour")


def identity(spec: ScorerSpec) -> str:
    return f"read_colour/{VERSION}"


def build(spec: ScorerSpec, device: str) -> Read:
    return Read("colour")
