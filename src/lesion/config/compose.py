"""From overrides to a composed config without a command line: for Python, and what both ways share.

Hydra keeps its state in singletons of the process. A notebook may have an application of its own, so that all of it is
put back.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from os import PathLike, fspath
from typing import Any

from hydra import compose as _compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.errors import HydraException, MissingConfigException
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lesion.config.overrides import CHOSEN, prepared, quoted
from lesion.config.reading import names_below
from lesion.config.schema import LesionConf, conf_dir, register
from lesion.errors import RequestError, no_such_key


def one_line(error: BaseException) -> str:
    """The message of an error of ours, Hydra's or OmegaConf's, with the key and what is allowed."""
    if isinstance(error, RequestError):
        return str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return str(_refusal(str(cause.full_key), cause))
        if isinstance(cause, MissingConfigException) and cause.options and cause.missing_cfg_file:
            group, _, name = cause.missing_cfg_file.rpartition("/")
            what = "set or file" if group == "prompts" else "choice"
            names = [one for one in cause.options if not one.startswith("_")]
            return str(RequestError(group, f"there is no {what} {name!r}; allowed: {', '.join(names)}"))
        cause = cause.__cause__
    return " ".join(str(error).split())


_KINDS = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "String": "text"}
_Reason = Callable[[re.Match[str]], str]
_REASONS: tuple[tuple[str, _Reason], ...] = (  # what OmegaConf says, and what we say
    (
        r"Value '(.*)' of type '\w+' could not be converted to (\w+)",
        lambda m: f"must be {_KINDS.get(m[2], m[2])}; got {m[1]!r}",
    ),
    (r"Cannot convert '\w+' to string: '(.*)'", lambda m: f"must be text; got {m[1][:80]}"),
    (r"field '.*' is not Optional", lambda m: "must have a value; got null"),
    (r"Invalid type assigned: \w+ is not a subclass of \w+\. value: (.*)", lambda m: f"must be a mapping; got {m[1]}"),
    (r"Invalid value assigned: (\w+) is not a ListConfig, list or tuple", lambda m: f"must be a list; got {m[1]}"),
)


def _refusal(key: str, error: OmegaConfBaseException) -> RequestError:
    """What is wrong with the value of that key, or that there is no such key."""
    parent = getattr(error, "parent_node", None)
    if isinstance(error, ConfigAttributeError | ConfigKeyError) and isinstance(parent, DictConfig):
        above = key.rpartition(".")[0]
        beside = [f"{above}.{one}" if above else one for one in map(str, parent)]
        return no_such_key(key, [*names_below(OmegaConf.structured(LesionConf)), *beside], beside)
    said = str(error).split("\n")[0]
    for pattern, reason in _REASONS:
        if match := re.match(pattern, said):
            return RequestError(key, reason(match))
    return RequestError(key, said)


def plain(config: DictConfig) -> dict[str, Any]:
    """The config as plain dicts and lists."""
    data = OmegaConf.to_container(config, resolve=True)
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def with_own_keys(config: DictConfig, choice: Any, alone: bool = True) -> None:
    """Move what `models` has for the chosen model to `model`; config is changed, and has no `models` left.

    choice: the name of the model's file in conf/model. alone: whether no other job may be meant by other names.
    Raises RequestError for a name that is no model or not chosen; OmegaConf's errors for keys a model does not have.
    """
    own = config.get("models") or {}
    known = sorted(path.stem for path in (conf_dir() / "model").glob("[!_]*.yaml"))
    if not isinstance(own, DictConfig | dict):
        raise RequestError("models", f"must be a mapping of names of models to their keys; got {own!r}")
    for name, keys in ((str(name), own[name]) for name in own):
        if name not in known and name != choice:
            raise RequestError(f"models.{name}", f"there is no such model; allowed: {', '.join(known)}")
        if alone and name != choice:
            raise RequestError(f"models.{name}", f"is for model={name}; the model of this job is {choice}")
        if not isinstance(keys, DictConfig):
            raise RequestError(f"models.{name}", f"must be a mapping of the model's keys; got {keys!r}")
    with read_write(config):
        for key, value in own[choice].items_ex(resolve=False) if choice in own else ():
            OmegaConf.update(config, f"model.{key}", value)
        config.models = {}


def with_hydras(config: DictConfig, hydra: DictConfig) -> None:
    """Put in what values name of Hydra's own, as `cuda:${hydra.job.num}`; a job's config no longer has it.

    config: is changed; without `hydra`. Raises OmegaConf's errors for what Hydra does not have.
    """
    texts = [
        (key, text) for key, text in _texts(OmegaConf.to_container(config, resolve=False), "") if "${hydra" in text
    ]
    if not texts:
        return
    whole = copy.deepcopy(config)
    with read_write(whole), open_dict(whole), read_write(config):
        whole.hydra = hydra
        for key, text in texts:
            OmegaConf.update(whole, key, re.sub(r"\$\{hydra:", "${hydra.", text))
            OmegaConf.update(config, key, OmegaConf.select(whole, key, throw_on_missing=True))


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str):
        yield key, value


def compose(overrides: Sequence[str]) -> DictConfig:
    """The config of one job, with Hydra's own part under `hydra`. Raises RequestError in the command line's words."""
    try:
        with _hydra_put_back():
            register(conf_dir())
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                config: DictConfig = _compose("lesion", prepared(overrides), return_hydra_config=True)
                with_own_keys(config, config.hydra.runtime.choices.model)
                return config
    except (HydraException, OmegaConfBaseException) as error:
        raise RequestError("", one_line(error)) from None


@contextmanager
def _hydra_put_back() -> Iterator[None]:
    """Whatever is done to Hydra's state inside, afterwards it is as before."""
    Plugins.instance()  # their configs are registered once a process, so before anything is put aside
    kept = dict(Singleton._instances)
    Singleton._instances.pop(GlobalHydra, None)
    for kind in (ConfigStore, VersionBase):
        Singleton._instances[kind] = copy.deepcopy(kind.instance())  # type: ignore[attr-defined]
    try:
        yield
    finally:
        Singleton._instances.clear()
        Singleton._instances.update(kept)


def overrides_of(keys: Mapping[str, Any]) -> list[str]:
    """Keys with values of Python as overrides; texts reach the config letter by letter.

    A dict stands for its keys below this one; of `selection` and `replacement` it names what is chosen, each with its
    options. Raises RequestError for a value that a config cannot hold.
    """
    found: list[str] = []
    for key, value in keys.items():
        if key == "scorer.metrics" and isinstance(value, Mapping):  # a list in the config, with options as mappings
            value = [{name: dict(options)} if options else name for name, options in value.items()]
        if not isinstance(value, Mapping) or not value:
            found.append(f"{key}={_text(key, value)}")
            continue
        if key in CHOSEN:
            found.append(f"{key}={_text(key, list(value))}")
            value = {name: options for name, options in value.items() if options}
        found += overrides_of({f"{key}.{name}": part for name, part in value.items()})
    return found


def _text(key: str, value: Any) -> str:
    """A value in Hydra's grammar of overrides."""
    if hasattr(value, "tolist"):  # numpy's numbers and arrays, without importing it
        value = value.tolist()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Real):
        number = float(value)
        return repr(number) if math.isfinite(number) else str(number)
    if isinstance(value, PathLike):
        value = fspath(value)
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_name(key, name)}:{_text(key, part)}" for name, part in value.items()) + "}"
    if isinstance(value, Sequence | range | set | frozenset) and not isinstance(value, bytes | bytearray):
        return "[" + ",".join(_text(key, part) for part in value) + "]"
    raise RequestError(key, f"got {value!r}; allowed: text, numbers, true, false, null, lists and dicts of them")


def _name(key: str, name: Any) -> str:
    """The key of a dict inside a list: the grammar has no quotes there, but escapes."""
    if not isinstance(name, str) or not name:
        raise RequestError(key, f"has a dict with the key {name!r}; allowed: texts")
    return re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", name)
