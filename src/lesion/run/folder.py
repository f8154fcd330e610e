"""The run folder: it holds the results of one request, and no other request's run writes over them."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from lesion.errors import RequestError
from lesion.study.grid import Study
from lesion.study.lesions import digest_of

RECORD = Path(".hydra") / "request.json"
PLAN = "confirmation.json"
MADE = ("images", "maps", "grids", "figures", "tables", "thumbs")  # folders whose every file a run writes
FILES = (
    "results.parquet",
    "floor.parquet",
    "budget.parquet",
    "SHA256SUMS",
    "report.html",
    "environment.json",
    "report.json",
    PLAN,
    "attribution.parquet",
    "certificate.json",
)
SEALED = ("environment.json", PLAN, "certificate.json", RECORD.as_posix())  # with a digest, as tables
HYDRAS = ("lesion.log", *(f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")))
TABLE_BYTES, ROW_BYTES = 64 << 10, 256  # of all tables of a run folder: those of a few images, and more for each one
ALONE = ("selection", "replacement", "calibration")  # compared as one value: what they hold is up to the request
# What says how, where or whether images are made, not which.
NEUTRAL = frozenset(
    ("dry_run", "tracker", "store", "workers", "generation.batch_size", "model.batch_size", "scorer.batch_size")
)


def asked(config: Mapping[str, Any], study: Study) -> dict[str, Any]:
    """What a request asks for, by key: `config`, and what lies in the files that it names, by digest."""
    contents = {
        "prompts": digest_of(
            [[p.text, p.id, list(p.aspects), p.digest, *((b.words, b.box) for b in p.boxes)] for p in study.prompts]
        ),
        "model.id": study.model.fingerprint,
        "calibration": dict(study.protocol),
    }
    found = {f"{key} (content)": value for key, value in contents.items()} | by_key(config)
    data: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return data


def by_key(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that say which images a study has, each with its value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        inner = value.items() if isinstance(value, Mapping) and key not in ALONE else ()
        found |= {f"{key}.{name}": one for name, one in inner} or {key: value}
    return {key: value for key, value in found.items() if not {key, key.partition(".")[0]} & NEUTRAL}


def fresh(folder: Path) -> Path:
    """Make a folder that was not there: `folder`, or with -2, -3, … behind its name. No two processes get one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        name = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            name.mkdir()
        except FileExistsError:
            continue
        return name
    raise AssertionError


def check(folder: Path, request: Mapping[str, Any], key: str) -> None:
    """Raises RequestError naming `key` where the folder holds results of another request, or can be none."""
    try:
        record = _recorded(folder)
        for name, directory in {**dict.fromkeys(MADE, True), **dict.fromkeys((*FILES, *HYDRAS), False)}.items():
            path = folder / name
            if os.path.lexists(path) and path.is_dir() != directory:
                wanted = "a folder" if directory else "a file"
                raise RequestError(key, f"{str(path)!r} is in the way of {wanted} of the run; remove it")
    except OSError as error:
        raise RequestError(key, f"{str(folder)!r} cannot be a folder: {error.strerror}") from None
    if record is None:
        return
    other = sorted(name for name in record.keys() & request.keys() if record[name] != request[name])
    if other or not record:
        why = f"{', '.join(other[:5])} differ" if other else "it is not said which"
        raise RequestError(
            key, f"{str(folder)!r} holds the results of another request ({why}); take another folder, or remove it"
        )


def claim(folder: Path, request: Mapping[str, Any], key: str) -> None:
    """Make the folder this request's. Raises RequestError naming `key` where it is another's, or cannot be made."""
    check(folder, request, key)
    record = folder / RECORD
    temporary = record.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(request, indent=1, sort_keys=True), encoding="utf-8")
        try:
            os.link(temporary, record)  # one of several processes gets it
        except FileExistsError:
            check(folder, request, key)
        except OSError:  # a disk without links
            if not record.exists():
                os.replace(temporary, record)
            time.sleep(0.05)
            check(folder, request, key)
    except OSError as error:
        raise RequestError(key, f"{str(folder)!r} cannot be written to: {error.strerror}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def emptied(folder: Path, log: str, new: Collection[Path]) -> None:
    """Remove a run folder that has nothing but what Hydra and `claim` write at the start; another is left alone.

    new: folders that this run made, the innermost first; no folder that was there before is removed.
    """
    with suppress(OSError):
        made = any(folder.is_relative_to(one) for one in new)
        if made and {path.name for path in folder.iterdir()} <= {RECORD.parts[0], log}:
            shutil.rmtree(folder)
            for parent in folder.parents:  # outputs/DATE, if it was the first of all
                if parent in new:
                    parent.rmdir()


def planned(folder: Path, plan: Mapping[str, Any]) -> None:
    """Write the plan of a confirmatory study, before anything is made."""
    (folder / PLAN).write_text(json.dumps(plan, indent=1), encoding="utf-8")


def reserved(folder: Path, rows: int) -> ExitStack:
    """Take the room on disk that the tables of a study will need, before its images fill the disk.

    The room is free again when the stack is closed, also by the end of the process: it is held by files without names.
    rows: of the results.
    """
    room = ExitStack()
    with suppress(OSError, AttributeError):  # the disk is full, or the system has no such call
        files = [room.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in FILES]  # noqa: SIM115
        os.posix_fallocate(files[0].fileno(), 0, TABLE_BYTES + ROW_BYTES * rows)
    return room


def _recorded(folder: Path) -> dict[str, Any] | None:
    """What the results in a folder were asked by; None where it holds none, empty where nothing says it."""
    if (folder / RECORD).is_file() and (record := recorded_request(folder)):
        return record
    if not (folder / "results.parquet").exists() and not (folder / "images").exists():
        return None
    from omegaconf import OmegaConf

    try:  # of version 0.1, which left no record
        config = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "config.yaml"), resolve=True)
    except Exception:  # whatever is wrong with the file, it says nothing
        return {}
    return by_key({str(key): value for key, value in config.items()}) if isinstance(config, dict) else {}


def recorded_request(folder: Path) -> dict[str, Any]:
    """What the results in a folder were asked by, as its record says; empty where it has none."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def prune(folder: Path, kept: Collection[Path]) -> None:
    """Remove what an earlier state of the same request left in the folders that a run fills."""
    paths = {path.absolute() for path in kept}
    for name in MADE:
        for path in (folder / name).rglob("*"):
            if path.is_file() and path.absolute() not in paths:
                path.unlink()
