"""Rows, sections and the document: what a measurement says, and how it takes its place among those of other runs."""

from __future__ import annotations

import os
import platform
import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

NOT_MEASURED = "not measured yet"
HEADER = (
    "# Benchmarks\n\n"
    "Written by `make bench` (`python scripts/benchmark.py`); every section names its machine and its command, and\n"
    "can be measured again alone. Machines are noisy: ratios are taken within one run, pair by pair of alternating\n"
    "repeats, and given as their median (and range). Seconds of two runs or machines do not compare.\n"
)
AT_LEAST = {
    "speed": {"embedded": 3.3, "sd15": 4.0, "sdxl": 2.5},
    "share": {"sdxl": 45.0},
    "steering": dict.fromkeys(("embedded", "sd15", "sdxl"), 2.0),
}  # by part and model
AT_MOST = {
    "overhead": 1.03,
    "capture": 1.25,
    "only-one": 0.88,
    "leave-one-out": 0.99,
    "window": 0.6,
    "planning": 10.0,
    "reopening": 5.0,
    "memory": 1.05,
    "report": 1.06,
}
UNITS = {"share": "%", "planning": " s", "reopening": " s"}  # of what has a target; the others are ratios


@dataclass(frozen=True)
class Row:
    """One measurement. values: one a repeat, in `unit`; target: bound of their median, from below or from above.

    text stands in the place of the values where these are not repeats of one number.
    """

    name: str
    what: str
    values: Sequence[float] = ()
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    text: str = ""

    @property
    def verdict(self) -> str:
        """pass or short; "" where there is no target or no measurement."""
        if not self.values or (self.at_least is None and self.at_most is None):
            return ""
        middle = statistics.median(self.values)
        short = (self.at_least is not None and middle < self.at_least) or (
            self.at_most is not None and middle > self.at_most
        )
        return "**short**" if short else "pass"

    @property
    def target(self) -> str:
        bounds = {"at least": self.at_least, "at most": self.at_most}
        return ", ".join(f"{side} {number(value)}{self.unit}" for side, value in bounds.items() if value is not None)

    def line(self) -> str:
        said = self.text or (spread(self.values, self.unit) if self.values else NOT_MEASURED)
        return f"| {self.name} | {self.what} | {self.target} | {said} | {self.verdict} |"


def aimed(part: str, model: str, name: str, what: str, values: Sequence[float] = ()) -> Row:
    """The row of a part that has its target."""
    least, most = AT_LEAST.get(part, {}).get(model), AT_MOST.get(part)
    return Row(name, what, values, UNITS.get(part, "x"), at_least=least, at_most=most)


def number(value: float) -> str:
    """Four significant digits, never in powers of ten for ordinary sizes."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def spread(values: Sequence[float], unit: str = "") -> str:
    """Median and range."""
    middle = f"{number(statistics.median(values))}{unit}"
    return middle if len(values) == 1 else f"{middle} ({number(min(values))} to {number(max(values))})"


def alternate(repeats: int, sides: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each side returns, `repeats` times; the sides take turns, in reverse order every other time."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in reversed(sides) if repeat % 2 else sides:
            found[name].append(sides[name]())
    return found


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def machine(device: str) -> str:
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"^model name\s*:\s*(.*)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        cpu = names[0] if names else cpu
    threads = torch.get_num_threads()
    parts = [f"{os.cpu_count()} CPU cores ({cpu}), {threads} thread{'s' * (threads > 1)}", f"torch {torch.__version__}"]
    return ", ".join(([torch.cuda.get_device_name(device)] if device.startswith("cuda") else []) + parts)


def section(title: str, note: str, where: str, command: str, rows: Sequence[Row]) -> str:
    """A section's text, from its heading to its last row; where: the machine, "" if it was not run."""
    place = f"Machine: {where}. Command: `{command}`." if where else f"Not measured yet: run `{command}`."
    table = ["| row | what was measured | target | median (range) | |", "| --- | --- | --- | --- | --- |"]
    notes = [textwrap.fill(note, 120), ""] if note else []
    return "\n".join([f"## {title}", "", *notes, place, "", *table, *(row.line() for row in rows), ""])


def merge(old: str, pending: dict[str, str], new: dict[str, str]) -> str:
    """The document with sections `new`; those of `old` that were measured, and any others in it, stay as they are.

    pending: title -> text, of every section in its order, for those never measured.
    """
    kept = {part.split("\n", 1)[0]: f"## {part}".rstrip() + "\n" for part in re.split(r"^## ", old, flags=re.M)[1:]}
    kept = {title: text for title, text in kept.items() if "\nMachine: " in text or title not in pending}
    texts = {**pending, **kept, **new}
    return "\n".join([HEADER, *texts.values()])
