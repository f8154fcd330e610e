"""Puts a function in the place of one object's method for a while. Nothing stays behind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn


@contextmanager
def method_replaced(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """The method `name` of this one object is `make(what it was)` within the block."""
    own, method = vars(owner).get(name), getattr(owner, name)  # own: set by an enclosing block, or by nobody
    setattr(owner, name, functools.wraps(method)(make(method)))  # some pipelines read its signature
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def forward_replaced(
    module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> AbstractContextManager[None]:
    """`module.forward` is `make(its forward)` within the block; hooks on the module run as ever."""
    return method_replaced(module, "forward", make)
