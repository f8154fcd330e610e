"""What Hydra itself leaves unchecked of its own keys and of sweeps."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any

from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from lesion.config.reading import check_value
from lesion.errors import RequestError, no_such_key

MAPPINGS = ("sweeper", "launcher", "callbacks", "hydra_logging", "job_logging")  # of any keys
EXTRAS = {  # module of a launcher -> the package that it needs, and the extra that brings it
    "hydra_submitit_launcher": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "hydra_joblib_launcher": ("hydra_plugins.hydra_joblib_launcher", "joblib"),
    "lesion_ray": ("ray", "ray"),
}
LONGEST = 200  # bytes of a file's name, which gets endings
SAMPLED = 100  # values of a swept key that are tried before a sweep whose jobs are not known


def check_keys(config: Any, schema: Any = HydraConf, above: str = "hydra") -> None:
    """Raises RequestError for keys below `hydra` that Hydra does not know, and for values that are no mapping."""
    if not isinstance(config, DictConfig) or config._is_none():
        raise RequestError(above, f"must be a mapping; got {config!r}")
    known = {one.name: one.type for one in fields(schema)}
    if above == "hydra":
        known["env"] = dict  # a group of Hydra's that its own schema lacks
    for key in map(str, config):
        if key not in known:
            names = [f"{above}.{name}" for name in known]
            raise no_such_key(f"{above}.{key}", names, names)
        part = config._get_node(key)
        if is_dataclass(known[key]):
            check_keys(part, known[key], f"{above}.{key}")
        elif key in MAPPINGS and above == "hydra" and (not isinstance(part, DictConfig) or part._is_none()):
            raise RequestError(f"{above}.{key}", f"must be a mapping; got {config.get(key)!r}")


def check_files(hydra: Any) -> None:
    """Raises RequestError, or OmegaConf's errors, for what Hydra itself would find once it has made a run folder."""
    _ = hydra.job.chdir, hydra.job.env_set, hydra.job.env_copy  # interpolations that cannot be resolved
    for key, place in (("hydra.run.dir", hydra.run.dir), ("hydra.sweep.dir", hydra.sweep.dir)):
        check_value(key, place)
        if not place:  # which would be the working directory
            raise RequestError(key, "must name a folder; got ''")
    for key, name in (("hydra.job.name", hydra.job.name), ("hydra.output_subdir", hydra.output_subdir)):
        check_value(key, name)
        parts = PurePath(name or "").parts
        if any(part in ("..", "/") or len(part.encode()) > LONGEST for part in parts) or (
            key == "hydra.job.name" and len(parts) > 1
        ):
            raise RequestError(key, f"must be a name of up to {LONGEST} bytes within the run folder; got {name[:80]!r}")


def check_launcher(launcher: Any, choice: str) -> None:
    """Raises RequestError naming the extra of a launcher that is not installed. choice: its name."""
    module = "".join(str(launcher.get("_target_", "")).split(".")[1:2])
    if module not in EXTRAS:
        return
    package, extra = EXTRAS[module]
    if not _installed(package):
        raise RequestError("hydra/launcher", f"{choice} is not installed; pip install 'lesion[{extra}]' brings it")


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of hydra_plugins itself
        return False


def samples(params: Any, task: Sequence[str], loader: Any) -> Iterator[list[str]]:
    """Overrides of jobs that a sweep may have whose sweeper picks values as it goes.

    params: `hydra.sweeper.params`. task: the overrides of the command line. Each value of a key is tried once, beside
    the first values of the others; of an interval its start.
    """
    given = [f"{key}={value}" for key, value in (params or {}).items() if isinstance(value, str | int | float)]
    overrides = OverridesParser.create(config_loader=loader).parse_overrides([*given, *task])
    values = [_values(override) for override in overrides]
    yield [first for first, *_ in values]
    for place, (_, *others) in enumerate(values):
        for other in others[:SAMPLED]:
            yield [*(first for first, *_ in values[:place]), other, *(first for first, *_ in values[place + 1 :])]


def _values(override: Override) -> list[str]:
    """An override of one job for each value of a swept one."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key = override.get_key_element()
    if override.is_interval_sweep():
        return [f"{key}={override.value().start}"]
    found = [f"{key}={value}" for value in override.sweep_string_iterator()]
    if not found:
        raise RequestError(key.lstrip("+"), f"{str(override.input_line).partition('=')[2]} names no job")
    return found
