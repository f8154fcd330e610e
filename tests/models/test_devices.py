"""The number of CUDA devices that the driver tells, against torch's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lesion.errors import RequestError
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


@pytest.mark.parametrize(
    ("asked", "there", "place", "device"),
    [
        ("cpu", 0, devices.HERE, "cpu"),
        ("auto", 0, devices.HERE, "cpu"),
        ("auto", 1, devices.HERE, "cuda"),
        ("auto", 8, devices.HERE, "cuda"),
        ("auto", 8, devices.Place(job=11), "cuda:3"),  # jobs of a launcher that all see the same GPUs
        ("auto", 1, devices.Place(job=11), "cuda"),  # one that gives each job its own
        ("cuda:2", 3, devices.HERE, "cuda:2"),
        ("cuda:2", 0, devices.ELSEWHERE, "cuda:2"),
        ("cuda", 0, devices.ELSEWHERE, "cuda"),
        ("auto", 0, devices.ELSEWHERE, "auto"),
    ],
)
def test_devices_are_those_of_the_jobs_machine(monkeypatch, asked, there, place, device) -> None:
    monkeypatch.setattr(devices, "cuda_devices", lambda: there)
    assert devices.resolve_device(asked, place) == device


def test_devices_that_there_are_not_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(devices, "cuda_devices", lambda: 3)
    with pytest.raises(RequestError, match=r"^device: 'cuda:3' is not here: this machine has 3; allowed: auto, cpu$"):
        devices.resolve_device("cuda:3")
    for place in (devices.HERE, devices.ELSEWHERE):
        for odd in ("cuda:x", "cuda:²", "cuda:" + "1" * 5000):
            with pytest.raises(RequestError, match=r"allowed: auto, cpu, cuda, cuda:N, all$"):
                devices.resolve_device(odd, place)


def test_auto_does_not_fall_back_silently_where_gpus_are_hidden(monkeypatch, tmp_path, caplog) -> None:
    """As by Ray without `num_gpus`, which empties CUDA_VISIBLE_DEVICES."""
    monkeypatch.setattr(devices, "cuda_devices", lambda: 0)
    monkeypatch.setattr(devices, "KERNEL", tmp_path)
    monkeypatch.setenv(devices.MASK, "")
    assert devices.resolve_device("auto", devices.Place(job=0)) == "cpu"  # a machine without GPUs
    (tmp_path / "0000:01:00.0").mkdir()
    with pytest.raises(RequestError, match=r"^device: auto: .* none of the 1 GPUs .*num_gpus=1, .*\); allowed: cpu$"):
        devices.resolve_device("auto", devices.Place(job=0))
    assert devices.resolve_device("cpu", devices.Place(job=0)) == "cpu"
    assert devices.resolve_device("auto") == "cpu"
    assert "auto is the CPU" in caplog.text
    monkeypatch.delenv(devices.MASK)
    caplog.clear()
    assert devices.resolve_device("auto") == "cpu" and not caplog.text
