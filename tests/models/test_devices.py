"""The number of CUDA devices that the driver tells, against torch's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lesion.models import devices

FAKE = """
int cuInit(unsigned int flags) {{ return {init}; }}
int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}
int cuDeviceGetCount(int *count) {{ *count = {count}; return 0; }}
"""


def test_torch_says_the_same() -> None:
    assert devices.cuda_devices() == torch.cuda.device_count()
    build = devices._build()
    assert build == (torch.version.cuda or "") or torch.version.hip


@pytest.mark.parametrize(
    ("driver", "found"),
    [
        ({"count": 3}, 3),
        ({"count": 0}, 0),
        ({"count": 2, "init": 100}, 0),  # CUDA_ERROR_NO_DEVICE
        ({"count": 2, "version": 11080}, 0),  # older than what torch is built for
    ],
)
def test_a_driver_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: dict[str, int], found: int) -> None:
    source, library = tmp_path / "cuda.c", tmp_path / "libcuda.so"
    source.write_text(FAKE.format(**{"init": 0, "version": 13000, **driver}))
    if subprocess.run(["cc", "-shared", "-o", library, source], check=False).returncode:
        pytest.skip("no C compiler")
    monkeypatch.setattr(devices, "DRIVER", str(library))
    monkeypatch.setattr(devices, "_build", lambda: "13.0")
    monkeypatch.setattr(sys, "platform", "linux")
    assert devices.cuda_devices() == found


def test_builds_without_cuda_have_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    version = package / "version.py"
    monkeypatch.setattr(devices, "DRIVER", str(tmp_path / "absent.so"))

    class Spec:
        origin = str(package / "__init__.py")

    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: Spec)
    for line, build in {
        "cuda: Optional[str] = None": "",
        "cuda: Optional[str] = '12.8'": "12.8",
        "cuda = '12.1'": "12.1",
        "cuda = None\nhip: Optional[str] = '6.4'": None,
        "something = else": None,
    }.items():
        version.write_text(line + "\n")
        assert devices._build() == build, line
