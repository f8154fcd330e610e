"""Files of a hub repository."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from threading import Thread

from huggingface_hub import constants

from lesion.errors import RequestError

PATIENCE, REMEMBERED = 5.0, 60.0  # seconds for an answer, and for which it holds


def snapshot(name: str, files: Sequence[str], key: str, what: str = "folder", revision: str | None = None) -> Path:
    """Folder with those files (patterns) of a hub repository, from its cache where the hub does not answer.

    what: what `name` could have been instead.

    Raises RequestError naming the config key where neither has it.
    """
    from huggingface_hub import snapshot_download

    offline = not answers()
    try:
        found = snapshot_download(name, revision=revision, allow_patterns=list(files), local_files_only=offline)
        return Path(found)
    except Exception as error:  # the hub's client raises many kinds, all meaning: not to be had
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if offline:
            reason = "it does not answer, and nothing of it is in its cache; download it once where there is network"
        raise RequestError(key, f"{name!r} is no local {what}, and the hub did not give it: {reason}") from None


def answers() -> bool:
    """Whether the hub can be reached at all; without it each file would be retried for minutes, cached ones too."""
    return not constants.HF_HUB_OFFLINE and _reached(constants.ENDPOINT, time.monotonic() // REMEMBERED)


@lru_cache(maxsize=1)
def _reached(address: str, when: float) -> bool:
    """when: of the question; within it the answer is remembered. A thread asks: to look a name up has no time limit."""
    answer: Future[bool] = Future()
    Thread(target=lambda: answer.set_result(_head(address)), name="lesion-hub", daemon=True).start()
    try:
        return answer.result(PATIENCE)
    except TimeoutError:
        return False


def _head(address: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        return True  # an answer, if not a welcoming one
    except urllib.error.URLError as error:
        return "CERTIFICATE" in str(error.reason)  # somebody is there; the hub's client may trust them
    except (OSError, ValueError):  # a ValueError for an HF_ENDPOINT that is no address
        return False
    return True
