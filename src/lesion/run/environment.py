"""environment.json of a run folder: by what and where its images were made, and the config they were asked by.

Format: `config` (every key with its value, by its full name), `folder` (in which the process was), `files` (SHA-256 of
what Hydra wrote), and `runs`: one entry for each process that made images here, and for the first that found them all
made. It is what `lesion-audit` compares with.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import lesion
from lesion.errors import PACKAGE
from lesion.store.files import atomically

RECORD = "environment.json"
PACKAGES = (
    *("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "safetensors", "open-clip-torch"),
    *("torchmetrics", "numpy", "scipy", "pandas", "pyarrow", "pillow", "matplotlib"),
)
HYDRA = (".hydra/config.yaml", ".hydra/overrides.yaml", ".hydra/hydra.yaml")


def here(device: str) -> dict[str, Any]:
    """What this process runs in: versions, commit, machine. Tells of torch only what is loaded already.

    device: cpu, cuda or cuda:N.
    """
    torch = sys.modules.get("torch")
    found = {
        "lesion": _version("lesion"),
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "system": platform.platform(),
        "processor": _processor(),
        "device": device,
    }
    if torch is not None:
        found |= {"torch": str(torch.__version__), "threads": torch.get_num_threads()}
        found["instructions"] = torch.backends.cpu.get_cpu_capability()
        if device.startswith("cuda"):
            found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


@dataclass
class Making:
    """What a process has made so far. batch_sizes: in the order of their use, a repeated one once."""

    images: int = 0
    batch_sizes: list[int] = field(default_factory=list)

    def used(self, sizes: Iterable[int]) -> None:
        """Note sizes of batches, in the order of their use."""
        self.batch_sizes = list(dict.fromkeys([*self.batch_sizes, *sizes]))


def record(folder: Path, config: Mapping[str, Any], device: str, making: Making) -> Path:
    """Note a run in the folder's record. Raises OSError."""
    known = read(folder) or {}
    runs = [one for one in known.get("runs", []) if isinstance(one, dict)]
    if making.images or not runs:
        runs.append({"ended": now(), **asdict(making), **here(device)})
    kept = {
        "config": json.loads(json.dumps(dict(leaves(config)), default=str)),
        "folder": os.getcwd(),
        "files": {name: digest for name in HYDRA if (digest := sha256(folder / name))},
        "runs": runs,
    }
    with atomically(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(kept, indent=1, ensure_ascii=False), encoding="utf-8", errors="replace")
    return folder / RECORD


def read(folder: Path) -> dict[str, Any] | None:
    """The record of a run folder; None where there is none (version 0.1), empty where it cannot be read."""
    try:
        kept = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def now() -> str:
    """UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def leaves(config: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config by its full name, with its value; an empty mapping is a value."""
    if isinstance(config, Mapping) and config:
        for key, value in config.items():
            yield from leaves(value, f"{above}.{key}" if above else str(key))
    else:
        yield above, config


def sha256(path: Path) -> str:
    """Of a file, in hex; "" where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


@cache
def commit() -> str:
    """Of this code, as it was when first asked: what changes in its checkout later is not what this process runs."""
    return _commit()


def code() -> str:
    """The version of this code: of a checkout with its commit, 12 digits, and "+" where files of it have changed."""
    return lesion.__version__ + (f" ({short(commit())})" if commit() else "")


def short(full: str) -> str:
    """A commit by 12 digits, and "+" where it has one."""
    return full[:12] + "+" * full.endswith("+")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Of the checkout that this package lies in, with "+" where files of it have changed; "" outside of one."""
    try:
        told = [
            subprocess.run(
                ["git", "--no-optional-locks", "-C", str(PACKAGE), *command],
                capture_output=True, text=True, timeout=10, check=True,
            ).stdout.strip()
            for command in (
                ["ls-files", "--error-unmatch", "errors.py"],  # else it is the checkout of something else
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", "."],
            )
        ]  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return told[1] + ("+" if told[2] else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
