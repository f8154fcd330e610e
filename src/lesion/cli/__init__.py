"""The console scripts, one file each: `lesion`, `lesion-inspect` (structure), `lesion-report` and `lesion-audit`."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from lesion.errors import place_of, visible

TRACEBACK = "LESION_TRACEBACK"  # environment variable: the file for the traceback of an error that nobody foresaw


def in_utf8() -> None:
    """Start this process over in Python's UTF-8 mode where the locale is another one.

    Arguments, file names of prompts and what is printed would otherwise fail on letters that the locale lacks.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


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
