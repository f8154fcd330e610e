"""The two ways a study can end badly."""

from __future__ import annotations


class RequestError(Exception):
    """The request is wrong: says which key, and what is allowed. One line; raised before any model loads."""

    def __init__(self, key: str, message: str):
        self.key = key
        super().__init__(f"{key}: {' '.join(message.split())}")

    def __reduce__(self) -> tuple[object, ...]:  # jobs may run in other processes
        return _rebuild, (str(self),)


class StudyFailed(Exception):
    """Some cells failed; everything else is complete and on disk."""


def _rebuild(text: str) -> RequestError:
    key, _, message = text.partition(": ")
    return RequestError(key, message)
