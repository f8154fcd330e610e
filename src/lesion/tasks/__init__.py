"""What a pipeline makes an image of: one module a task, found by its name, with an instance of `Task` named TASK.

A module imports diffusers inside of functions only, since a request is checked without it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lesion.errors import RequestError
from lesion.study.prompts import Prompt
from lesion.study.settings import Settings, without_task


class Task:
    """Text to image, and what another task does otherwise.

    own: whether the model's own pipeline does it; else another one of the same parts does, see `counterpart`.
    settings: names of those settings, declared `of_task`, that this task has.
    init: whether `generation.init` is for it.
    implied: arguments of the call that some of its pipelines do not have, since its inputs tell them.
    """

    own: bool = True
    settings: tuple[str, ...] = ()
    init: bool = False
    implied: frozenset[str] = frozenset()

    def prompts(self, prompts: Sequence[Prompt], init: str | None) -> tuple[Prompt, ...]:
        """The prompts with what else an image is made of, which becomes part of a cell's identity.

        init: the request's `generation.init`. Raises RequestError where an input is missing, or is not for this task.
        """
        if init is not None:
            others = " or ".join(name for name in known() if of(name).init)
            raise RequestError("generation.init", f"is for generation.task={others} only; allowed here: null")
        return tuple(prompts)

    def steps(self, settings: Settings) -> int:
        """Denoising steps that are made. Raises RequestError if that is none."""
        return settings.steps

    def shortest(self, settings: Settings) -> Settings:
        """Settings of as few denoising steps as take the memory of many: two."""
        return replace(settings, steps=min(settings.steps, 2))

    def inputs(self, prompts: Sequence[Prompt], settings: Settings) -> dict[str, Any]:
        """Arguments of the pipeline's call beside text and settings, for a batch."""
        return {}

    def counterpart(self, pipeline: str) -> Any:
        """The class of diffusers that does the task with the parts of a pipeline of this class name; None if none."""
        raise NotImplementedError

    def made_from(self, pipe: Any) -> Any:
        """A pipeline for this task of the same parts. Raises ValueError if there is none."""
        return pipe


def known() -> tuple[str, ...]:
    """Names of the tasks there are, the default first."""
    return tuple(sorted((info.name for info in pkgutil.iter_modules(__path__)), key=lambda name: name != "txt2img"))


def of(name: str) -> Task:
    """The task of this name."""
    task: Task = importlib.import_module(f"{__name__}.{name}").TASK
    return task


def asked(generation: Mapping[str, Any]) -> Task:
    """The task of a request. Raises RequestError if there is none of this name."""
    if generation["task"] not in known():
        raise RequestError("generation.task", f"got {generation['task']!r}; allowed: {', '.join(known())}")
    return of(generation["task"])


def text_alone(settings: Settings) -> Settings:
    """The same settings for images of nothing but text."""
    return replace(settings, task="txt2img", **without_task())
