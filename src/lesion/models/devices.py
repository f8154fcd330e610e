"""How many CUDA devices PyTorch would find, told by the driver: importing torch for it takes two seconds."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from pathlib import Path

DRIVER = "libcuda.so.1"


def cuda_devices() -> int:
    """What `torch.cuda.device_count()` says, CUDA_VISIBLE_DEVICES honoured; 0 where torch is no CUDA build.

    Asks torch itself where its kind of build cannot be told (other systems than Linux, builds for AMD).
    """
    build = _build()
    if build == "":
        return 0
    if build is None or sys.platform != "linux":
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    return _by_driver(int(build.partition(".")[0]))


def _build() -> str | None:
    """The CUDA version that torch is built for, from its own file; "" for a CPU build, None where it is unclear."""
    found = importlib.util.find_spec("torch")
    try:
        text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8") if found and found.origin else ""
    except OSError:
        return None
    lines = re.findall(r"^(cuda|hip)\b[^=\n]*=\s*(?:None|['\"]([^'\"]*)['\"])", text, re.M)
    named: dict[str, str] = dict(lines)
    if "cuda" not in named or named.get("hip"):
        return None
    return named["cuda"]


def _by_driver(major: int) -> int:
    """Devices that the driver lists, 0 if it is absent or older than CUDA `major`, as the CUDA runtime has it."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return 0
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    calls = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDriverGetVersion(ctypes.byref(version)),
        lambda: driver.cuDeviceGetCount(ctypes.byref(count)),
    )
    if any(call() != 0 for call in calls) or version.value // 1000 < major:
        return 0
    return count.value
