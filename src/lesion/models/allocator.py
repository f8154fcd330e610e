"""The C library's allocator: what tensors on a CPU free is kept for the next ones.

By itself glibc gives large freed blocks back to the kernel, which clears and maps each page of the next one anew:
thousands in a denoiser call on a batch. PyTorch's pages of 2 MB (THP_MEM_ALLOC_ENABLE, see its tuning guide) are fewer
to map. Neither changes a bit of what is computed, nor how much memory a job takes at most.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h
_OWN = {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}


def keep_freed() -> None:
    """Keep freed memory in this process, and use large pages where PyTorch has not allocated anything yet.

    Nothing is changed under another C library, or where the environment has glibc's own variables for that.
    """
    if (library := _glibc()) is None or not _OWN.isdisjoint(os.environ):
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, -1)  # never by itself


def give_back() -> None:
    """Give what is free back to the kernel."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        known = (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError):  # Windows; another C library
        return None
    return ctypes.CDLL(None) if known else None
