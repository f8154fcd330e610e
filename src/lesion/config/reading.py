"""The first look at a composed config: no unknown key, no value that cannot be written; paths are made absolute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lesion.config.schema import LesionConf
from lesion.errors import RequestError, no_such_key
from lesion.study.prompt_files import STDIN
from lesion.study.prompts import LONGEST_TEXT

NAMED = ("selection", "replacement")  # names and their options; these are checked where they are used
FREE = ("tracker", "model.arguments", "models")  # so are the keys of these
CALIBRATION = ("prompts", "seeds")
WHOLE = 2**63  # tables hold whole numbers of 64 bits
PATHS = ("store.dir", "generation.init", "prompts.path", "calibration.prompts.path")
MAYBE_PATHS = ("model.id", "model.config", "model.vae", "scorer.clip_pretrained", "scorer.dino_model")  # or hub names
LOCAL = "local-dir:"
TRUTHS = {
    **dict.fromkeys(["1", "true", "yes", "y", "on"], True),
    **dict.fromkeys(["0", "false", "no", "n", "off"], False),
}


def first_read(config: DictConfig, start: Path | None = None) -> dict[str, Any]:
    """The config as plain data, its paths absolute.

    start: the folder that relative paths are relative to; None: the one in which the process is. Raises RequestError
    for a key that there is not, one that is taken out or without a value, and text or a number that no table can hold.
    """
    _check_keys(config, _schema(), "")
    for key in sorted(OmegaConf.missing_keys(config)):
        raise RequestError(key, "has no value; give one")
    data: Any = OmegaConf.to_container(config, resolve=True)
    _read_truths(data, _schema(), "")
    for key, value in _leaves(data, ""):
        check_value(key, value)
    return _absolute(data, start or Path.cwd())


@cache
def _schema() -> DictConfig:
    schema: DictConfig = OmegaConf.structured(LesionConf)
    OmegaConf.set_readonly(schema, True)
    return schema


def _check_keys(config: DictConfig, schema: DictConfig, above: str) -> None:
    known, given = (list(map(str, mapping.keys())) for mapping in (schema, config))
    if absent := [key for key in known if key not in given]:
        raise RequestError(f"{above}{absent[0]}", "is taken out; it is needed")
    for key in given:
        name = f"{above}{key}"
        if key not in known:
            raise no_such_key(name, names_below(schema, above), (f"{above}{one}" for one in known))
        inner = None if OmegaConf.is_missing(schema, key) else schema[key]
        if not isinstance(inner, DictConfig):
            continue
        value = config[key]
        if not isinstance(value, DictConfig):
            raise RequestError(name, f"must be a mapping; got {value!r}")
        if name == "calibration":
            if unknown := set(value) - set(CALIBRATION):
                raise RequestError(f"{name}.{min(unknown)}", f"there is no such key; allowed: {', '.join(CALIBRATION)}")
        elif name in NAMED:
            for one in map(str, value.keys()):
                options = value[one]
                if options is not None and not isinstance(options, DictConfig):
                    raise RequestError(f"{name}.{one}", f"must be a mapping of its options; got {options!r}")
        elif name not in FREE:
            _check_keys(value, inner, f"{name}.")


def _read_truths(data: Any, schema: DictConfig, above: str) -> None:
    """Changes `data`: true or false where the schema's default is one of them. Raises RequestError for other values."""
    for key in map(str, schema):
        default = None if OmegaConf.is_missing(schema, key) else schema[key]
        if isinstance(default, DictConfig) and isinstance(data.get(key), dict):
            _read_truths(data[key], default, f"{above}{key}.")
        elif isinstance(default, bool) and (value := data[key]) is not True and value is not False:
            truth = TRUTHS.get(str(value).lower())
            if truth is None:
                raise RequestError(f"{above}{key}", f"must be true or false; got {str(value)[:80]}")
            data[key] = truth


def names_below(schema: DictConfig, above: str = "") -> Iterator[str]:
    """Full names of all keys of a schema. above: the name of the schema's own key and a dot."""
    for key in map(str, schema.keys()):
        yield f"{above}{key}"
        if not OmegaConf.is_missing(schema, key) and isinstance(schema[key], DictConfig):
            yield from names_below(schema[key], f"{above}{key}.")


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            below = f"{key}.{name}" if key else str(name)
            yield below, name
            yield from _leaves(inner, below)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, value


def check_value(key: str, value: Any) -> None:
    """Raises RequestError for text and numbers that no table, and no name of a file, can hold."""
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise RequestError(key, f"{value[:40]!r} has a lone surrogate, which is no text")
        if "\0" in value:
            raise RequestError(key, f"{value[:40]!r} has a NUL character")
        if len(value) > LONGEST_TEXT:
            raise RequestError(key, f"{value[:40]!r}… has {len(value)} characters; allowed: up to {LONGEST_TEXT}")
    elif isinstance(value, bytes):
        raise RequestError(key, f"must be text or a number; got {value[:40]!r}")
    elif isinstance(value, int) and not -WHOLE <= value < WHOLE and key != "seeds":  # seeds have a line of their own
        raise RequestError(key, f"is a whole number beyond 64 bits; allowed: below 2^63; got {str(value)[:40]}")


def _absolute(data: dict[str, Any], start: Path) -> dict[str, Any]:
    """Changes `data`: paths that are relative become absolute, names on the hub stay."""
    if not data["store"]["dir"]:  # which would be the working directory
        raise RequestError("store.dir", "must name a folder; got ''")
    for key in (*PATHS, *MAYBE_PATHS):
        *above, last = key.split(".")
        inner: Any = data
        for name in above:
            inner = inner.get(name) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and isinstance(value := inner.get(last), str) and value:
            if key == "store.dir" and "://" in value:
                raise RequestError(key, f"{value!r} is no folder; allowed: a folder of a file system, docs/scale.md")
            inner[last] = value if value == STDIN else _path(value, start, always=key in PATHS)
    for lora in data["model"].get("loras") or []:
        if isinstance(lora, dict) and isinstance(lora.get("path"), str):
            lora["path"] = _path(lora["path"], start)
    data["model"]["loras"] = [
        _path(lora, start) if isinstance(lora, str) else lora for lora in data["model"].get("loras") or []
    ]
    clip = data["scorer"].get("clip_model")
    if isinstance(clip, str) and clip.startswith(LOCAL):
        data["scorer"]["clip_model"] = LOCAL + _path(clip.removeprefix(LOCAL), start, always=True)
    sets = [data["prompts"], data["calibration"].get("prompts")]
    for options in data["replacement"].values():
        calibration = options.get("calibration") if isinstance(options, dict) else None
        if isinstance(calibration, dict) and isinstance(prompts := calibration.get("prompts"), dict):
            sets.append(prompts)
            if isinstance(prompts.get("path"), str) and prompts["path"] != STDIN:
                prompts["path"] = _path(prompts["path"], start, always=True)
    for given in sets:
        items = given.get("items") if isinstance(given, dict) else None
        for item in items if isinstance(items, list) else []:
            if isinstance(item, dict) and isinstance(item.get("image"), str) and item["image"]:
                item["image"] = _path(item["image"], start, always=True)
    return data


def _path(value: str, start: Path, always: bool = False) -> str:
    path = Path(value)
    with suppress(RuntimeError):  # of a user that there is not: the name as it stands
        path = path.expanduser()
    path = start / path
    there = False
    with suppress(OSError):  # a name too long: whoever opens it says so
        there = value != "embedded" and path.exists()
    return str(path) if always or there else value
