"""What is looked at and changed in command-line overrides before Hydra reads them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from lesion.config.schema import conf_dir
from lesion.errors import RequestError
from lesion.study.prompt_files import STDIN, has_ending

CHOSEN = ("selection", "replacement")  # groups of which several are chosen, each with options of its own
OVERLAYS = ("experiment", "debug")  # several may be laid over each other
DEEPEST = 20
PROMPTS = {"prompts": "prompts", "prompts@calibration.prompts": "calibration.prompts"}  # key of the group -> its place


def prepared(overrides: Sequence[str]) -> list[str]:
    """Return the overrides as Hydra is to read them.

    Raises RequestError for what is no override, naming the right quoting, and for a choice of a group that is no name.
    """
    found = []
    for given in overrides:
        for one in _with_prompt_files(given):
            override = _read(one)
            _check_verbose(override)
            found.append(_group(_listed(one, override), override))
    return found


def _check_verbose(override: Override) -> None:
    """Hydra sets up its log by this key before it calls anyone who could check it."""
    if override.key_or_group != "hydra.verbose" or override.is_delete():
        return
    for value in _values(override):
        names = value if isinstance(value, list) else [value]
        if not isinstance(value, bool) and not all(isinstance(name, str | QuotedString) for name in names):
            told = "must be true, false, the name of a logger or a list of such"
            raise RequestError("hydra.verbose", f"{told}; got {str(value)[:80]}")


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of a command line with their values, and its overrides, which may stand in any order.

    Raises RequestError for flags that there are not.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise RequestError("command line", f"{message}; see lesion --help")

    options = {name: action for action in parser._actions for name in action.option_strings}
    flags: list[str] = []
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("-") or argument == "-":
            rest.append(argument)
            continue
        flags.append(argument)
        action = options.get(argument)
        if action is None or action.nargs == 0:
            continue
        if waiting and (action.nargs is None or waiting[0] in (action.choices or ())):
            flags.append(waiting.pop(0))
        elif action.nargs == "?":  # or it would take an override for its value
            flags.append(str(action.const))
    parser.error = refuse  # type: ignore[method-assign]  # its own prints several lines
    if "--version" not in flags:
        parser.parse_args([*flags, *rest])
    return flags, rest


def _read(override: str) -> Override:
    """Raises RequestError in the place of Hydra's lexer, which names a character of its grammar."""
    try:
        read = OverridesParser.create().parse_override(override)
        if _deep(read.value(), DEEPEST):
            raise RecursionError
        return read
    except RecursionError:
        raise RequestError(
            override.partition("=")[0][:80], f"is nested too deep; allowed: {DEEPEST} lists or mappings in each other"
        ) from None
    except ValueError as error:  # of Python, for a number of some thousand digits
        raise RequestError(override.partition("=")[0][:80], f"cannot be read: {error}") from None
    except HydraException:
        key, given, value = override.partition("=")
        advice = f"{key}={_requoted(value)}"
        if not given or not _readable(advice):
            raise RequestError("command line", f"{override[:80]!r} is no override; give KEY=VALUE") from None
        raise RequestError(
            key, f"{value[:80]!r} cannot be read without quotes; write {shlex.quote(advice)[:300]}"
        ) from None


def _deep(value: Any, left: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left < 0 or any(_deep(one, left - 1) for one in inner)


def _readable(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except (HydraException, RecursionError):
        return False
    return True


def _values(override: Override) -> list[Any]:
    """Its value, or those of a sweep over single values."""
    value = override.value()
    return value.list if isinstance(value, ChoiceSweep) else [value]


def _requoted(value: str) -> str:
    """A text in quotes of Hydra's grammar; of a list only those items that need them."""
    if value.startswith("[") and value.endswith("]"):
        items = [item.strip() for item in value[1:-1].split(",")]
        items = [item if _readable(f"key=[{item}]") else quoted(item, Quote.double) for item in items]
        return f"[{', '.join(items)}]"
    return quoted(value, Quote.double)


def quoted(text: str, quote: Quote = Quote.single) -> str:
    """A text in Hydra's grammar, letter by letter: in it nothing is an interpolation."""
    return str(QuotedString(text=text.replace("${", "\\${"), quote=quote).with_quotes())


def _with_prompt_files(override: str) -> list[str]:
    """`prompts=my.csv` is short for `prompts=file prompts.path=my.csv`, whatever letters the name of the file has."""
    key, given, value = override.partition("=")
    place = PROMPTS.get(key.lstrip("+"))
    if not place or not given:
        return [override]
    files = _prompt_files(value, key)
    return [f"{key}=file", f"{place}.path={','.join(map(quoted, files))}"] if files else [override]


def _prompt_files(value: str, key: str) -> list[str]:
    """The files that a choice of prompts names, several in a sweep; none if it names sets of conf/prompts."""
    known = {path.stem for path in (conf_dir() / "prompts").glob("*.yaml")}
    if value in known:
        return []
    if value == STDIN or _exists(value):
        return [value]
    names = [value]
    if _readable(f"prompts={value}"):
        read = OverridesParser.create().parse_override(f"prompts={value}").value()
        names = read.list if isinstance(read, ChoiceSweep) else [read]
    names = [name.text if isinstance(name, QuotedString) else name for name in names]
    names = [name.replace("\\${", "${") if isinstance(name, str) else name for name in names]  # as `quoted` writes it
    if not all(isinstance(name, str) for name in names):
        return []
    files = [name for name in names if name not in known and (name == STDIN or _exists(name) or _like_a_file(name))]
    if files and len(files) < len(names):
        others = ", ".join(name for name in names if name not in files)
        raise RequestError(
            key, f"a sweep is over files or over sets, not both; sets: {others}; files: {', '.join(files)}"
        )
    if not files and any(re.search(r"\W", name) for name in names) and not known.intersection(names):
        text = shlex.quote(f"prompts.items=[{quoted(value if len(names) > 1 else names[0], Quote.double)}]")
        raise RequestError(key, f"there is no set or file {value[:80]!r}; as a prompt: prompts=inline {text[:300]}")
    return files


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, with a NUL character, of a user that there is not
        return False


def _like_a_file(name: str) -> bool:
    return has_ending(name) or name.startswith(("/", "./", "../", "~")) or bool(re.search(r"^[^\s,]*\.\w{1,8}$", name))


def _listed(argument: str, override: Override) -> str:
    """Turns `scorer.metrics={a: {}, b: {…}}` into `scorer.metrics=[{a: {}}, {b: {…}}]`, in sweeps too.

    Hydra merges a mapping into the value below it, and cannot merge it into a list: a list is replaced.
    """
    if not argument.lstrip("+").startswith("scorer.metrics="):
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


def _group(argument: str, override: Override) -> str:
    """The override, whose value is checked if its key is a group: names, and several only where they are no mixture.

    Hydra lays the choices of a list over each other: of `model=[a,b]` a model with the name of one and the weights of
    the other would be left.
    """
    key = str(override.key_or_group)
    folder = conf_dir() / key
    if not re.fullmatch(r"\w+", key) or not folder.is_dir():
        return argument
    allowed = ", ".join(sorted(path.stem for path in folder.glob("[!_]*.yaml")))
    if override.is_delete():
        if key in OVERLAYS or not allowed:
            return argument
        raise RequestError(key, f"is taken out; it is needed; allowed: {allowed}")
    value = override.value()
    swept = isinstance(value, ChoiceSweep)
    if override.is_sweep_override() and not swept:
        return argument
    for one in _values(override):
        names = one if isinstance(one, list) else [one]
        if len(names) > 1 and key not in CHOSEN + OVERLAYS:
            shown = ",".join(map(str, names))
            raise RequestError(key, f"takes one name, {str(names)[:80]} would be mixed; one job each: -m {key}={shown}")
        for name in names:
            optional = name is None and not isinstance(one, list) and key in OVERLAYS
            if not isinstance(name, str | QuotedString) and not optional:
                raise RequestError(key, f"must be a name or a list of names; got {name!r}; allowed: {allowed}")
    if isinstance(value, list) and key not in CHOSEN + OVERLAYS and value:
        return f"{override.get_key_element()}={value[0]}"
    return argument
