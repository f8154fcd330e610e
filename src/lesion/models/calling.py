"""What a pipeline's call takes, and how the settings of a study are told to it.

Pipelines differ in their arguments and in what they do to the prompt and the size behind the caller's back. Here every
setting means what it says: the text as it stands, the size in pixels as asked, guidance only where it has branches.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from lesion.models import facts
from lesion.models.source import pipeline_class
from lesion.study.settings import Settings

# Arguments under which a pipeline takes text and size as they are, where it has them.
AS_ASKED: Mapping[str, Any] = {
    "use_resolution_binning": False,  # PixArt, Sana, Hunyuan-DiT: make another size and resize it
    "clean_caption": False,  # PixArt, Sana: rewrite the prompt, if an HTML parser happens to be installed
    "complex_human_instruction": None,  # Sana: put a page of instructions in front of the prompt
}


@lru_cache(maxsize=32)
def takes(cls: Any) -> frozenset[str]:
    """Names of the arguments of a pipeline class's call."""
    return frozenset(inspect.signature(cls.__call__).parameters)


def call_arguments(pipeline: str) -> frozenset[str]:
    """Names of the arguments of a pipeline's call, by its class name. Raises RequestError for what is no pipeline."""
    known = facts.pipeline(pipeline)
    return frozenset(known["arguments"]) if known else takes(pipeline_class(pipeline))


def has_img2img(pipeline: str) -> bool:
    """Whether diffusers has an img2img pipeline of the same parts as the pipeline of this class name."""
    if known := facts.pipeline(pipeline):
        return bool(known["img2img"])
    return img2img_of(pipeline) is not None


def img2img_of(pipeline: str) -> Any:
    """The class of diffusers that does img2img with the parts of the pipeline of this class name, or None."""
    from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, _get_task_class

    return _get_task_class(AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, pipeline, throw_error_if_not_exist=False)


def arguments(
    pipe: Any,
    settings: Settings,
    texts: Sequence[str],
    generators: Sequence[Any],
    inits: Sequence[Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Keyword arguments of `pipe(...)` for a batch. inits: of img2img, a picture each. more: from `model.arguments`."""
    cls: Any = type(pipe)
    known = takes(cls)
    found: dict[str, Any] = {
        "prompt": list(texts),
        "generator": list(generators),
        "output_type": "np",
        **settings.arguments(len(texts)),
    }
    if inits is not None:
        found["image"] = list(inits)
        for side in {"height", "width"} - known:  # of these pipelines the init images say it
            del found[side]
    found |= {name: value for name, value in AS_ASKED.items() if name in known}
    return {**found, **(more or {})}
