"""Every command line, key and example in README, docs and conf is taken by the command line."""

from __future__ import annotations

import itertools
import re
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lesion.config.overrides import prepared
from lesion.config.reading import first_read
from lesion.config.schema import conf_dir, register

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
CONF = {path: yaml.safe_load(path.read_text(encoding="utf-8")) or {} for path in sorted(conf_dir().rglob("*.yaml"))}
GROUPS = ("model", "prompts", "selection", "replacement", "capture", "scorer", "tracker")
EXAMPLES = [
    ["model.arguments={max_sequence_length: 256}"],
    ["model.arguments.max_sequence_length=256"],
    ["model.loras=[{path: my_lora, weight: 0.8}]"],
    ["layers.include=[up_blocks.*]"],
    ["selection=custom", "selection.custom.groups=[[down_blocks.*], [mid_block.*, up_blocks.1.*]]"],
    ["window=[[0,0.5],[0.5,1]]"],
    ["prompts=inline", "prompts.items=[{text: a red circle, aspects: [colour], id: one}]"],
]


def commands() -> list[list[str]]:
    """Of `lesion`: indented or fenced lines, and what stands in backticks."""
    lines = re.findall(r"^(?: {4})?lesion (.*?)(?:\s+#.*)?$", TEXT, re.M)
    inline = re.findall(r"`lesion ([^`\n]+)`", TEXT)
    found = [shlex.split(line) for line in (*lines, *inline)]
    return [words for words in found if any("=" in word for word in words)]


@lru_cache
def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("lesion", list(overrides))
    for key in OmegaConf.missing_keys(config):
        OmegaConf.update(config, key, "1")  # text, or a number
    return first_read(config)


@pytest.fixture(scope="module", autouse=True)
def schema():
    register(conf_dir())


def test_every_command_line():
    assert len(commands()) > 15
    for words in commands():
        words = [word for word in words if not word.startswith("-") and "NAME" not in word]
        given, taken = prepared(words), set()
        for jobs in BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(given), None):
            for job in jobs:
                if not taken.issuperset(job):  # of a sweep each value, not each with each
                    composed(*job)
                    taken.update(job)


@pytest.mark.parametrize("overrides", EXAMPLES, ids=lambda words: words[-1].partition("=")[0])
def test_every_example_of_a_value(overrides):
    key, _, value = overrides[-1].partition("=")
    data: Any = composed(*overrides)
    for name in key.split("."):
        data = data[name]
    assert re.sub(r"\W", "", str(data)) == re.sub(r"\W", "", value) or key == "model.loras"


def spelled(value: Any) -> str:
    """A value in Hydra's grammar of overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{spelled(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(spelled, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("'", "\\'") + "'"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def settable(data: dict[str, Any], above: str) -> list[str]:
    """Each key with the value that its file gives it, as an override; not those that follow others."""
    found = []
    for key, value in data.items():
        if key in ("defaults", "hydra") or (isinstance(value, str) and (value == "???" or "${" in value)):
            continue
        if isinstance(value, dict) and value:
            found += settable(value, f"{above}{key}.")
        else:
            found.append(f"{above}{key}={spelled(value)}")
    return found


def test_every_key_of_conf_can_be_set():
    files = {group: [path for path in CONF if path.parent.name == group and path.stem[0] != "_"] for group in GROUPS}
    for paths in itertools.zip_longest(*files.values()):
        chosen = [path for path in paths if path]
        keys = [line for path in chosen for line in settable(CONF[path], f"{path.parent.name}.")]
        composed(*(f"{path.parent.name}={path.stem}" for path in chosen), *keys)
    overlays = [path for path in CONF if path.parent.name in ("experiment", "debug")]
    for path in overlays:
        composed(f"{path.parent.name}={path.stem}", *settable(CONF[path], ""))
    composed(*settable(CONF[conf_dir() / "lesion.yaml"], ""))


def test_every_key_that_the_pages_name_is_there():
    roots = "|".join(composed())
    named = set(re.findall(rf"`((?:{roots})(?:\.[a-z_]+)+)(?:=[^`]*)?`", TEXT))
    named = {key for key in named if not key.endswith((".parquet", ".html", ".md"))}
    assert len(named) > 15
    for key in named:
        group, name, *_ = key.split(".")
        data: Any = composed(f"{group}={name}") if group in ("selection", "replacement") else composed()
        for part in key.split("."):
            assert part in data, key
            data = data[part]
