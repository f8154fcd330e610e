"""The device of a job, and how many CUDA devices PyTorch would find, told by the driver: importing torch takes 2 s."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from lesion.errors import RequestError
from lesion.study.checks import digits

log = logging.getLogger(__name__)

DRIVER = "libcuda.so.1"
KERNEL = Path("/proc/driver/nvidia/gpus")  # a folder a GPU, whatever this process may use of them
MASK = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Place:
    """Where a job runs, which decides what `device` means.

    here: in this process. Else a launcher starts it elsewhere, where other devices are: only the form is checked.
    job: its number, if a launcher started it, beside others.
    """

    here: bool = True
    job: int | None = None


MOST = 64  # workers a device

HERE, ELSEWHERE = Place(), Place(here=False)


def devices(asked: str, workers: int, place: Place = HERE) -> tuple[str, ...]:
    """Return the device of each process that makes images: `workers` of them on one, or with `all` on each GPU.

    Raises RequestError as `resolve_device` does, for `all` where there is no GPU, and for `workers` out of range.
    """
    if not 1 <= workers <= MOST:
        raise RequestError("workers", f"must be a whole number from 1 to {MOST}; got {workers}")
    if asked != "all":
        return (resolve_device(asked, place),) * workers
    if not place.here:
        return ("cuda",) * workers
    if not (there := cuda_devices()):
        raise RequestError(
            "device", "all: this machine has no GPU that CUDA finds; allowed: auto, cpu (with workers=N)"
        )
    return tuple(f"cuda:{number}" for number in range(there)) * workers


def resolve_device(asked: str, place: Place = HERE) -> str:
    """Return cpu, cuda or cuda:N for `device`; what is asked for where the job runs elsewhere.

    `auto` is a CUDA device where there is one; of several, a launcher's jobs take theirs in turn. Raises RequestError
    for a device that there is not, and for `auto` in a launcher's job from which the GPUs of its machine are hidden.
    """
    kind, _, number = asked.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (":" in asked and (kind != "cuda" or digits(number) is None)):
        raise RequestError("device", f"got {asked[:80]!r}; allowed: auto, cpu, cuda, cuda:N, all")
    if kind == "cpu" or not place.here:
        return asked
    there = cuda_devices()
    if kind == "cuda":
        if int(number or 0) >= there:
            raise RequestError("device", f"{asked!r} is not here: this machine has {there}; allowed: auto, cpu")
        return asked
    if there:
        return f"cuda:{place.job % there}" if place.job is not None and there > 1 else "cuda"
    if hidden := _hidden():
        why = f"this process may use none of the {hidden} GPUs of its machine ({MASK}={os.environ[MASK]!r})"
        if place.job is not None:
            raise RequestError(
                "device",
                f"auto: {why}; ask the launcher for one (of Ray: hydra.launcher.ray.remote.num_gpus=1, of submitit: "
                "hydra.launcher.gpus_per_node=N); allowed: cpu",
            )
        log.warning("device: auto is the CPU, since %s", why)
    return "cpu"


def _hidden() -> int:
    """GPUs of this machine that the environment hides from this process."""
    try:
        return len(list(KERNEL.iterdir())) if MASK in os.environ else 0
    except OSError:
        return 0


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
