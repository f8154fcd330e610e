"""How many images fit in memory at once, and telling that they did not."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from lesion.models import allocator

log = logging.getLogger(__name__)
SHARE = 0.85  # of the memory that is free; the rest is left to fragmentation and to the scorer
MOST = {"cpu": 32, "cuda": 64}  # larger batches no longer pay
UNKNOWN = 4  # where memory cannot be measured
_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "alloc_failed",
    # cuDNN's convolutions: PyTorch tries one plan after another, swallows what each raises, an out-of-memory of its
    # workspace among it, and says only this at the end (aten/src/ATen/native/cudnn/Conv_v8.cpp, pytorch#108645). Where
    # memory was not the reason, a smaller batch fails alike, and `Maker` gives up once single images do.
    "unable to find an engine",
)
# After these the context of the card is lost: every further call of this process fails with the same error.
_LOST = ("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address",
         "illegal instruction", "hardware stack error", "uncorrectable ecc", "uncorrectable nvlink",
         "invalid program counter", "global/shared address space", "launch timed out", "peer gpu memory",
         "busy or unavailable", "no cuda-capable device", "cuda error: unknown error")  # fmt: skip


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory, of the accelerator or the machine, did not suffice."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def lost(error: BaseException) -> bool:
    """Whether it is an error of CUDA after which nothing works any more in this process."""
    said = str(error).lower() if isinstance(error, RuntimeError) else ""
    return "cuda" in said and any(sign in said for sign in _LOST)


def raise_if_lost(error: BaseException) -> None:
    """Raise an error after which nothing works any more in this process; what is finished stays finished."""
    if lost(error):
        raise error


def fitting(make: Callable[[int], object], device: str) -> int:
    """The largest power of two, up to MOST, of images that fit in free memory, from what two and four of them take.

    make: makes that many images and drops them. 1 or 2 where memory runs out on the way; any other error is raised.
    """
    peaks: list[int | None] = []
    done = crowded = False
    try:
        make(1)  # what is needed once: kernels, workspaces, the weights' first touch
        make(2)  # a single row takes other kernels than several; compiled code is made anew for several
        done = True
        peaks += [_peak(lambda number=number: make(number), device) for number in (2, 4)]  # type: ignore[misc]
    except Exception as error:
        if not ran_out(error):
            raise
        crowded = True
    if crowded:
        release(device)
        size = 2 if done else 1
        log.info("batch_size=auto: %d, since %d images do not fit in memory", size, 2 * size)
        return size
    two, four = peaks
    free = _free(device)
    if two is None or four is None or free is None:
        return UNKNOWN
    each = max((four - two) // 2, two // 16, 1)
    fits = max(1, int((SHARE * free - (two - 2 * each)) // each))
    size = min(1 << (fits.bit_length() - 1), MOST["cuda" if device.startswith("cuda") else "cpu"])
    log.info("batch_size=auto: %d (about %.0f MiB an image, %.0f MiB free)", size, each / 2**20, free / 2**20)
    return size


def usable() -> bool:
    """Whether there is a CUDA device, whose memory can be given back."""
    return torch.cuda.is_available()


class Spare(Protocol):
    """What only saves work, and can be made again."""

    def clear(self) -> None: ...


_spare: weakref.WeakSet[Spare] = weakref.WeakSet()


def gives_back(spare: Spare) -> None:
    """Have it cleared where memory runs out."""
    _spare.add(spare)


def release(device: str) -> None:
    """Give back what nobody uses any more, after running out: what only saves work, objects in cycles, then what the
    allocator keeps.

    Not from within an `except`: there the error's traceback still holds the tensors of the call that failed.
    """
    for spare in list(_spare):
        spare.clear()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    else:
        allocator.give_back()


def _peak(work: Callable[[], object], device: str) -> int | None:
    """Bytes that `work` takes at its peak above what is taken before; None where that cannot be measured."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return int(torch.cuda.max_memory_allocated(device) - before)
    allocator.give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets the peak back to what is resident now
        before = _resident("VmRSS")
        work()
        return max(0, _resident("VmHWM") - before)
    except OSError:
        return None


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _free(device: str) -> int | None:
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    allocator.give_back()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:  # a container's own limit
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="utf-8").strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        pass
    return free
