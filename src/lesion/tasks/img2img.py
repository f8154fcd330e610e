"""Images that begin with an init image of the prompt, noised as far as `generation.strength` says."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from lesion.errors import RequestError
from lesion.study.inits import read_init, with_inits
from lesion.study.prompts import Prompt
from lesion.study.settings import Settings
from lesion.tasks import Task


class ImageToImage(Task):
    own = False
    settings = ("noising",)
    init = True
    implied = frozenset({"height", "width"})  # the init images say it

    def prompts(self, prompts: Sequence[Prompt], init: str | None) -> tuple[Prompt, ...]:
        return with_inits(prompts, init, "generation.init")

    def steps(self, settings: Settings) -> int:
        """The last int(steps * strength) of the scheduler's steps, as diffusers counts."""
        assert settings.noising is not None
        made = int(settings.steps * settings.noising)
        if made < 1:
            raise RequestError(
                "generation.strength",
                f"{settings.noising} of {settings.steps} steps is none; make one of them larger",
            )
        return made

    def shortest(self, settings: Settings) -> Settings:
        return replace(super().shortest(settings), noising=1.0)

    def inputs(self, prompts: Sequence[Prompt], settings: Settings) -> dict[str, Any]:
        return {"image": [_picture(one.image, one.digest, settings.width, settings.height) for one in prompts]}

    def counterpart(self, pipeline: str) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, for what diffusers does at its import
            from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, _get_task_class

        found = _get_task_class(AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, pipeline, throw_error_if_not_exist=False)
        # Others, as FLUX.2's, look at a picture instead of setting out from it.
        return found if found and "strength" in inspect.signature(found.__call__).parameters else None

    def made_from(self, pipe: Any) -> Any:
        import diffusers

        return diffusers.AutoPipelineForImage2Image.from_pipe(pipe)


TASK = ImageToImage()


@lru_cache(maxsize=64)
def _picture(path: str, digest: str, width: int, height: int) -> Image.Image:
    """An init image as RGB at the size of the study, resampled by Lanczos if it has another.

    digest: its identity when the study was read. Raises ValueError if the file has changed since.
    """
    picture, found = read_init(Path(path))
    if found != digest:
        raise ValueError(f"the init image {path} has changed since the study began")
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.LANCZOS)
