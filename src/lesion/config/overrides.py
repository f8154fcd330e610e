"""What is changed in command-line overrides before Hydra reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException

from lesion.study.prompts import ENDINGS


def prepared(overrides: Sequence[str]) -> list[str]:
    """Return the overrides as Hydra is to read them."""
    return _metrics_as_lists(_with_prompt_files(overrides))


def _with_prompt_files(overrides: Sequence[str]) -> list[str]:
    """`prompts=my.csv` is short for `prompts=file prompts.path=my.csv`."""
    out = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "prompts" and all(part.strip("'\" ").endswith(ENDINGS) for part in value.split(",")):
            out += ["prompts=file", f"prompts.path={value}"]
        else:
            out.append(override)
    return out


def _metrics_as_lists(arguments: Sequence[str]) -> list[str]:
    """Turns `scorer.metrics={a: {}, b: {…}}` into `scorer.metrics=[{a: {}}, {b: {…}}]`, in sweeps too.

    Hydra merges a mapping into the value below it, and cannot merge it into a list: a list is replaced.
    """
    return [_listed(one) if one.lstrip("+").startswith("scorer.metrics=") else one for one in arguments]


def _listed(argument: str) -> str:
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:  # Hydra refuses it in its own words
        return argument
    value = override.value()
    if isinstance(value, dict):
        return f"{override.get_key_element()}={_text(value)}"
    if isinstance(value, ChoiceSweep) and any(isinstance(one, dict) for one in value.list):
        return f"{override.get_key_element()}={','.join(map(_text, value.list))}"
    return argument


def _text(value: Any) -> str:
    items = [{name: options} for name, options in value.items()] if isinstance(value, dict) else value
    return str(Override._get_value_element_as_str(items))
