"""Files of a hub repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lesion.errors import RequestError


def snapshot(name: str, files: Sequence[str], key: str, what: str = "folder", revision: str | None = None) -> Path:
    """Folder with those files (patterns) of a hub repository. what: what `name` could have been instead.

    Raises RequestError naming the config key where the hub does not give it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises many kinds, all meaning: not to be had
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(key, f"{name!r} is no local {what}, and the hub did not give it: {reason}") from None
