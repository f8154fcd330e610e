"""The console scripts, one file each: `lesion` (study), `lesion-inspect` (structure), `lesion-report` (report)."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lesion.errors import RequestError, place_of, visible

TRACEBACK = "LESION_TRACEBACK"  # environment variable: the file for the traceback of an error that nobody foresaw


def one_line(error: BaseException) -> str:
    """The message of an error of ours, Hydra's or OmegaConf's, with the key and what is allowed."""
    if isinstance(error, RequestError):
        return str(error)
    text = " ".join(str(error).split())
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException):
            detail = " ".join(str(cause.msg or cause).split())
            if detail and detail not in text:
                text += f" ({detail})"
            if cause.full_key and cause.full_key not in text:
                text += f" (key: {cause.full_key})"
            parent = getattr(cause, "parent_node", None)
            if isinstance(parent, DictConfig) and "not in" in text:
                text += f"; allowed: {', '.join(sorted(str(key) for key in parent))}"
                break
        cause = cause.__cause__
    return text


def say(program: str, text: str) -> None:
    """Print one line on standard error."""
    print(visible(f"{program}: {text}"), file=sys.stderr)


def unforeseen(program: str, error: Exception, code: int) -> int:
    """Say in one line that an error was not foreseen and where it arose; its traceback goes to a file if asked for."""
    say(program, f"unforeseen {place_of(error)} ({keep_traceback(error)})")
    return code


def keep_traceback(error: BaseException) -> str:
    """Write the traceback to the file that `LESION_TRACEBACK` names; says where it is, or how to get it."""
    where = os.environ.get(TRACEBACK)
    if not where:
        return f"{TRACEBACK}=FILE keeps the traceback"
    try:
        Path(where).write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="replace")
    except OSError as why:
        return f"{where} cannot be written: {why.strerror}"
    return f"the traceback is in {where}"


def is_from(error: BaseException, *packages: str) -> bool:
    """Whether an error arose in one of these packages."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and bool({*packages} & {*Path(frames[-1].filename).parts})
