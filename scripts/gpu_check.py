"""Proves and measures `lesion` on a GPU in ten minutes, the most important first.

    python scripts/gpu_check.py                        every part that fits in the time (`make gpu-check`)
    python scripts/gpu_check.py --only plain lesions   some parts
    python scripts/gpu_check.py --write gpu-check.json the sections of a record that was brought from a lent machine
    python scripts/gpu_check.py --device cpu --tiny    whether every part works at all, on any machine

It needs no network and no installation of `lesion`: a Python with the packages below is enough, and it says which are
missing. Wheels of those that a machine lacks can be brought along in a folder (--wheels, made by `make gpu-wheels`).
After every part it writes what is known so far to --json, and the GPU rows of docs/benchmarks.md.
Exit code 0: nothing failed; 1: something failed, or did not end in its time; 2: the machine or the request does not do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 560.0  # in all; a lent machine is often cut after 600
UNUSED = ("wandb",)  # tracker=none


def numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: 2.11.0+cu130 is (2, 11, 0)."""
    return tuple(map(int, re.match(r"\d+(\.\d+)*", version).group().split(".")))  # type: ignore[union-attr]


def within(version: str, wanted: str) -> bool:
    """Whether a version is in a range like `>=2.5,<3`; "" is any."""
    have = numbers(version)
    for one in filter(None, wanted.split(",")):
        sign, bound = re.fullmatch(r"(>=|<)\s*([\d.]+)", one.strip()).groups()  # type: ignore[union-attr]
        if (have >= numbers(bound)) != (sign == ">="):
            return False
    return True


def lacking() -> list[str]:
    """What this Python lacks of what pyproject.toml asks for, a line each."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = []
    if not within(platform.python_version(), project["requires-python"]):
        found.append(f"Python {project['requires-python']}; this is {platform.python_version()}")
    for item in project["dependencies"]:
        name, wanted = re.fullmatch(r"([\w-]+)(.*)", item).groups()  # type: ignore[union-attr]
        if name in UNUSED:
            continue
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(f"{name}{wanted}: missing")
            continue
        if not within(version, wanted):
            found.append(f"{name}{wanted}: {version} is installed")
    return found


def unpack(wheels: Path, place: Path) -> None:
    """Put what is in the wheels of a folder on the path, behind what is installed. They are of plain Python."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(place)
    sys.path.append(str(place))


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="PART", default=[], help="these parts, in this order (default: all)"
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: does everything work?")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together (default %(default)g)")
    parser.add_argument("--json", type=Path, default=Path("gpu-check.json"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="document to write (default docs/benchmarks.md; none with --tiny)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of packages that are missing here")
    parser.add_argument(
        "--write", type=Path, nargs="+", metavar="JSON", default=[], help="run nothing: write what these records say"
    )
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    args = parser.parse_args(given)
    if args.out is None and not args.tiny:
        args.out = ROOT / "docs" / "benchmarks.md"
    return args


def main(given: list[str] | None = None) -> int:
    began = time.monotonic()
    args = arguments(given)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        if args.wheels:
            unpack(args.wheels, Path(scratch) / "wheels")
        if missing := lacking():
            print("gpu-check: this Python does not do:\n  " + "\n  ".join(missing), file=sys.stderr)
            print("install them, or bring wheels of plain Python along: --wheels FOLDER", file=sys.stderr)
            return 2
        os.environ |= {"HF_HUB_OFFLINE": "1", "LESION_CACHE_DIR": str(Path(scratch) / "cache")}
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
        sys.path[:0] = [str(ROOT / "src"), str(ROOT / "scripts"), str(ROOT / "tests" / "support")]
        from gpu.parts import PARTS, run, write

        if args.write:
            write(args.write, args.out or ROOT / "docs" / "benchmarks.md")
            return 0

        unknown = [name for name in args.only if name not in PARTS]
        if unknown:
            print(f"gpu-check: unknown part {unknown[0]!r}; allowed: {', '.join(PARTS)}", file=sys.stderr)
            return 2
        if args.list:
            print("\n".join(f"{name:18} {part.what}" for name, part in PARTS.items()))
            return 0
        import torch

        if args.device.startswith("cuda") and not torch.cuda.is_available():
            print(f"gpu-check: torch {torch.__version__} finds no GPU; --device cpu --tiny works", file=sys.stderr)
            return 2
        record = run(args, Path(scratch), began)
    worst = {part["status"] for part in record["parts"]}
    print(json.dumps({part["name"]: part["status"] for part in record["parts"]}, indent=1))
    return int(bool(worst & {"failed", "cut"}))


if __name__ == "__main__":
    sys.exit(main())
