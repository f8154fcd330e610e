"""The console scripts, one file each: `lesion` (study), `lesion-inspect` (structure), `lesion-report` (report)."""

from __future__ import annotations

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lesion.errors import RequestError


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
