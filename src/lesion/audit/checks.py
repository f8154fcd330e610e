"""What an audit looked at and found, and its summary as JSON and Markdown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lesion.errors import visible
from lesion.store.files import atomically

SHOWN = 20  # differences of one check that a summary names


@dataclass
class Check:
    """One check of one run folder.

    looked: how many things (`of` what) were compared. differs: what is not as it was made, each with its name.
    undone: why it could not be checked, or could not be in full; "" if it was.
    notes: what was compared less strictly than it can be, and why.
    """

    name: str
    of: str
    looked: int = 0
    differs: list[str] = field(default_factory=list)
    undone: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """differs | not checked | as made"""
        return "differs" if self.differs else "not checked" if self.undone else "as made"


@dataclass(frozen=True)
class Audit:
    """Of one or several run folders. facts: how it was done, and digests of what it was done to."""

    facts: Mapping[str, Any]
    checks: Mapping[str, Sequence[Check]]

    @property
    def sound(self) -> bool:
        """Whether everything was checked and is as it was made."""
        return all(one.verdict == "as made" for checks in self.checks.values() for one in checks)

    def lines(self) -> list[str]:
        """For the terminal: one line a check, then what differs."""
        found = []
        for folder, checks in self.checks.items():
            found.append(visible(folder))
            for one in checks:
                found.append(f"  {one.name:10} {one.verdict:12} {one.looked} {one.of}")
                found += [f"    {visible(text)}" for text in _shown(one)]
        return [*found, "signed off" if self.sound else "not signed off"]

    def data(self) -> dict[str, Any]:
        """As JSON data; `digest` is the SHA-256 of all else, written as by `canonical`."""
        checks = {
            folder: [asdict(one) | {"verdict": one.verdict} for one in checks] for folder, checks in self.checks.items()
        }
        found = {"signed_off": self.sound, **self.facts, "checks": checks}
        return found | {"digest": hashlib.sha256(canonical(found).encode()).hexdigest()}

    def markdown(self) -> str:
        """The summary for people."""
        data = self.data()
        lines = [
            f"# Audit: {'signed off' if self.sound else 'not signed off'}",
            "",
            f"{data['ended']}, lesion {data['environment']['lesion']}, share {data['share']:g}, seed {data['seed']}. "
            f"SHA-256 of the summary in audit.json: `{data['digest']}`.",
        ]
        for folder, checks in self.checks.items():
            lines += ["", f"## {folder}", "", "| check | verdict | compared |", "| --- | --- | --- |"]
            lines += [f"| {one.name} | {one.verdict} | {one.looked} {one.of} |" for one in checks]
            said = [f"- {one.name}: {text}" for one in checks for text in _shown(one)]
            lines += ["", *said] if said else []
        return visible("\n".join(lines), keep="\n") + "\n"

    def write(self, folder: Path) -> list[Path]:
        """audit.json and audit.md. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            "audit.json": json.dumps(self.data(), indent=1, ensure_ascii=False) + "\n",
            "audit.md": self.markdown(),
        }
        for name, text in texts.items():
            with atomically(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8", errors="replace")
        return [folder / name for name in texts]


def canonical(data: Mapping[str, Any]) -> str:
    """JSON with sorted keys and without spaces."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _shown(check: Check) -> list[str]:
    more = len(check.differs) - SHOWN
    found = [*check.differs[:SHOWN], *([f"… and {more} more, all in audit.json"] if more > 0 else [])]
    return found + ([f"not checked: {check.undone}"] if check.undone else []) + [f"note: {one}" for one in check.notes]
