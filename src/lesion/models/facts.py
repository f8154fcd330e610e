"""What is asked of diffusers' classes and of open_clip before a model is loaded, without importing them.

`facts.json` holds it for one version of each and for what conf/ uses (scripts/known_models.py writes it). Of another
installed version, or another class, nothing is known here, and the package itself has to be asked.
"""

from __future__ import annotations

import importlib.metadata
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("facts.json")


def pipeline(name: str) -> dict[str, Any] | None:
    """Of a pipeline class: arguments (`calling.takes`), defaults (of some), img2img (whether it has a counterpart),
    single_file (whether it loads from one), parts (components that it cannot do without)."""
    return _known("pipelines", name)


def denoiser(name: str) -> dict[str, Any] | None:
    """Of a denoiser class: repeated_blocks (whether it names them, for `compile_repeated_blocks`)."""
    return _known("denoisers", name)


def scheduler(name: str) -> dict[str, Any] | None:
    """Of a scheduler class: the defaults of those options that tell its variants apart, by name."""
    return _known("schedulers", name)


def clip(model: str, pretrained: str | None) -> bool:
    """Whether the installed open_clip has these weights, of those that conf/scorer names."""
    data = _data()
    return [model, pretrained] in data["clips"] and importlib.metadata.version("open_clip_torch") == data["open_clip"]


def _known(group: str, name: str) -> dict[str, Any] | None:
    data = _data()
    if name not in data[group] or importlib.metadata.version("diffusers") != data["diffusers"]:
        return None
    found: dict[str, Any] = data[group][name]
    return found


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return data
