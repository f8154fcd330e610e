"""What an offline log of W&B holds, read from its bytes."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path


def records(log: Path) -> list:
    """The records of a finished run's log.

    `run.finish()` may return some 10 ms before wandb's helper process has written the last block: wait for it.
    """
    deadline = time.monotonic() + 20
    while not (found := parsed(log)) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, f"no end of the run in {log}"
        time.sleep(0.02)
    return found


def parsed(log: Path) -> list:
    """The records of a `run-*.wandb` file: a 7-byte file header, then LevelDB log blocks of 32 KiB.

    Source: the LevelDB log format (checksum 4, length 2, type 1; types full 1, first 2, middle 3, last 4).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts, found = log.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if (rest := 32768 - position % 32768) < 7:
            position += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):
            break
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(parts))
            parts = b""
    return found


def merged(items) -> dict:
    """Protobuf items that carry JSON, as nested dicts."""
    found: dict = {}
    for item in items:
        *parents, last = [item.key] if item.key else item.nested_key
        inside = found
        for parent in parents:
            inside = inside.setdefault(parent, {})
        inside[last] = json.loads(item.value_json)
    return found
