"""`scripts/gpu_check.py` where there is no GPU: every part works, and what a cut leaves is whole."""

from __future__ import annotations

import json
import platform
import sys
import time
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import benchmark
import gpu_check
from bench.report import Row
from gpu import lesions, parts
from gpu.common import Check

PROOFS = ("plain", "upcast", "lesions", "window", "batch", "memory", "auto", "offload", "store", "studies", "compile")


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs it on a CPU at the smallest sizes; exit code, record and document."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments: str):
        given = ["--device", "cpu", "--tiny", "--out", "benchmarks.md", *arguments]
        code = gpu_check.main(given)
        return code, json.loads(Path("gpu-check.json").read_text()), Path("benchmarks.md")

    return run


def statuses(record):
    return {part["name"]: part["status"] for part in record["parts"]}


@pytest.mark.slow
def test_lesions_and_late_windows_are_checked_against_plain_hooks(check, monkeypatch):
    code, record, out = check("--only", "window", "offload")
    assert (code, statuses(record)) == (0, {"window": "passed", "offload": "skipped"})
    assert record["versions"]["torch"] and record["machine"] and record["tiny"]

    def halved(self, module, args, kwargs, output):
        return self.with_image(output, self.image(output) * 0.5)

    monkeypatch.setattr(lesions._Class, "zeros", halved)
    code, record, out = check("--only", "lesions")
    assert (code, statuses(record)) == (1, {"lesions": "failed"})
    failed = [one["name"] for one in record["parts"][0]["checks"] if one["status"] == "failed"]
    assert failed == [
        "zero, cross_attention, sd",
        "zero, self_attention, sd",
        "zero, every layer, sd",
        "zero, joint_attention, flux",
        "zero, feed_forward, flux",
    ]
    assert "| lesions: donor_prompt, sd | exactly equal |  | passed |  |" in out.read_text()
    assert "| window: sd float32 | exactly equal" in out.read_text()  # of the run before


@pytest.mark.slow
def test_every_part_works(check):
    code, record, out = check("--seconds", "3000")
    assert code == 0
    assert statuses(record) == {
        name: "skipped" if name == "offload" else "passed" if name in PROOFS else "measured" for name in parts.PARTS
    }
    assert out.read_text().count("\nMachine: ") == len(parts.PARTS) - len(PROOFS) + 1


def test_parts_that_fail_are_cut_or_have_no_time_left_are_told_apart(check, monkeypatch):
    def broken(context):
        raise ValueError("planted fault")

    def slow(context):
        time.sleep(30)

    def lost(context):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    section = parts.Section(benchmark.FLUX, "A note.", [Row("a", "b", [2.0], "x")])
    planted = {
        "fine": parts.Part("", lambda context: [Check.of("a", True, "so")], 1),
        "broken": parts.Part("", broken, 1),
        "slow": parts.Part("", slow, 1, most=0.2),
        "measured": parts.Part("", lambda context: section, 1),
        "lost": parts.Part("", lost, 1),
        "after": parts.Part("", broken, 1),
    }
    seen = []
    monkeypatch.setattr(parts, "PARTS", planted)
    write = parts._write
    monkeypatch.setattr(parts, "_write", lambda path, text: seen.append(json.loads(text)) or write(path, text))
    code, record, out = check()
    assert code == 1
    expected = dict(zip(planted, ("passed", "failed", "cut", "measured", "failed", "skipped"), strict=True))
    assert statuses(record) == expected
    assert record["parts"][1]["said"] == "ValueError: planted fault"
    assert "the card was lost in lost" in record["parts"][5]["said"]
    assert [list(statuses(one).values()).count("not run") for one in seen] == [5, 4, 3, 2, 1, 0]  # after every part
    assert "| a | b |  | 2x |  |" in out.read_text() and "| fine: a | so |  | passed |  |" in out.read_text()
    assert gpu_check.main(["--write", "gpu-check.json", "--out", "elsewhere.md"]) == 0
    assert Path("elsewhere.md").read_text() == out.read_text()
    code, record, _ = check("--only", "fine", "--seconds", "0.1")
    assert (code, statuses(record)) == (0, {"fine": "skipped"}) and "are left" in record["parts"][0]["said"]


def test_it_says_what_is_missing(check, tmp_path, monkeypatch, capsys):
    assert gpu_check.lacking() == []
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.4")
    monkeypatch.setattr(gpu_check.metadata, "version", lambda name: {"torch": "2.4.1+cu121"}.get(name) or _absent())
    with pytest.raises(FileNotFoundError):
        check()
    err = capsys.readouterr().err
    assert "Python >=3.11,<3.14; this is 3.10.4" in err and "torch>=2.5: 2.4.1+cu121 is installed" in err
    assert "diffusers>=0.35: missing" in err and "wandb" not in err
    assert gpu_check.within("1.3.5", ">=1.3,<1.4") and not gpu_check.within("1.4", ">=1.3,<1.4")
    monkeypatch.undo()
    assert gpu_check.main(["--device", "cpu", "--tiny", "--only", "nothing"]) == 2
    with zipfile.ZipFile(tmp_path / "brought-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought.py", "value = 7")
    monkeypatch.setattr(sys, "path", list(sys.path))
    gpu_check.unpack(tmp_path, tmp_path / "place")
    import brought

    assert brought.value == 7


def _absent():
    raise gpu_check.metadata.PackageNotFoundError
