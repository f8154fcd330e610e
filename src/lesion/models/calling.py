"""What a pipeline's call takes, and how the settings of a study are told to it.

Pipelines differ in their arguments and in what they do to the prompt and the size behind the caller's back. Here every
setting means what it says: the text as it stands, the size in pixels as asked, guidance only where it has branches.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from lesion import tasks
from lesion.models import facts
from lesion.models.defaults import OF_CALL, argument_of
from lesion.models.source import pipeline_class
from lesion.study.settings import Settings
from lesion.tasks import Task

# Arguments under which a pipeline takes text and size as they are, where it has them.
AS_ASKED: Mapping[str, Any] = {
    "use_resolution_binning": False,  # PixArt, Sana, Hunyuan-DiT: make another size and resize it
    "clean_caption": False,  # PixArt, Sana: rewrite the prompt, if an HTML parser happens to be installed
    "complex_human_instruction": None,  # Sana: put a page of instructions in front of the prompt
}


FORMS: Mapping[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "list": (list,),
    "dict": (dict,),
    "null": (type(None),),
}


@lru_cache(maxsize=32)
def takes(cls: Any) -> Mapping[str, str]:
    """The arguments of a pipeline class's call: name -> forms of JSON values (`FORMS`), with `|` between them.

    Of one whose annotation names something else, or which has none, nothing is known: "".
    """
    return {name: _forms(one) for name, one in inspect.signature(cls.__call__).parameters.items()}


_BRACKETS = re.compile(r"(\w+)\[([^\[\]]*)\]")


def _outside(found: re.Match[str]) -> str:
    """Of `list[X]` list, of `Optional[X]` and `Union[X, Y]` all of it."""
    return f"{found[1]} {found[2]}" if found[1] in ("Optional", "Union") else found[1]


def _forms(parameter: inspect.Parameter) -> str:
    said = parameter.annotation
    text = said if isinstance(said, str) else said.__name__ if isinstance(said, type) else repr(said)
    text = text.replace("typing.", "")
    while (inner := _BRACKETS.sub(_outside, text)) != text:
        text = inner
    named = {word.lower() for word in re.findall(r"[A-Za-z_][\w.]*", text)} - {"optional", "union"}
    if {"none", "nonetype"} & named or "Optional" in text or parameter.default is None:
        named = (named - {"none", "nonetype"}) | {"null"}
    if "tuple" in named:  # JSON has lists for them
        named = (named - {"tuple"}) | {"list"}
    return "|".join(sorted(named)) if named - {"null"} and named <= FORMS.keys() else ""


def fits(value: Any, forms: str) -> bool:
    """Whether a JSON value has one of these forms, or nothing is known of them."""
    if not forms:
        return True
    of = type(value)
    return any(of in FORMS[form] for form in forms.split("|"))


def call_arguments(pipeline: str, task: Task) -> Mapping[str, str]:
    """`takes` of the call that does a task with a pipeline of this class name.

    Raises RequestError for what is no pipeline.
    """
    if not task.own:
        return takes(task.counterpart(pipeline))
    known = facts.pipeline(pipeline)
    return known["arguments"] if known else takes(pipeline_class(pipeline))


def can(pipeline: str, name: str) -> bool:
    """Whether the task of this name can be done with the parts of a pipeline of this class name."""
    task, known = tasks.of(name), facts.pipeline(pipeline) or {}
    return task.own or bool(known[name] if name in known else task.counterpart(pipeline))


def arguments(
    pipe: Any,
    settings: Settings,
    texts: Sequence[str],
    generators: Sequence[Any],
    inputs: Mapping[str, Any] = MappingProxyType({}),
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Keyword arguments of `pipe(...)` for a batch. inputs: `Task.inputs`. more: from `model.arguments`."""
    cls: Any = type(pipe)
    known = takes(cls).keys()
    found: dict[str, Any] = {
        "prompt": list(texts),
        "generator": list(generators),
        "output_type": "pt",
        **settings.arguments(len(texts)),
        **inputs,
    }
    for name in tasks.of(settings.task).implied - known:
        del found[name]
    if (guidance := argument_of(cls.__name__, "guidance")) not in found:
        found[guidance] = found.pop(OF_CALL["guidance"])
        if settings.guided:  # without a negative prompt there is none; their model card's blank one
            found.setdefault("negative_prompt", [" "] * len(texts))
    found |= {name: value for name, value in AS_ASKED.items() if name in known}
    return {**found, **(more or {})}
