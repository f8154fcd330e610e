"""Tables of a run folder that show a changed bit.

Format: <name>.parquet, Parquet whose metadata say `lesion-sha256:` and the SHA-256 of the file with 64 zeros in the
place of that digest; and SHA256SUMS, the SHA-256 of each, and of what else is `noted`, in the form that
`sha256sum -c SHA256SUMS` reads. Tables of earlier versions may lack either or both.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lesion.store.files import atomically

if TYPE_CHECKING:
    import pandas as pd

SUMS = "SHA256SUMS"
_OWN = b"lesion-sha256:"  # before a table's digest of itself
_ZEROS = b"0" * 64


def write(folder: Path, tables: Mapping[str, pd.DataFrame]) -> list[Path]:
    """Write tables by name, each in one step, then their digests. Raises OSError with the path that cannot be."""
    (folder / SUMS).unlink(missing_ok=True)  # killed in between, tables have no digest rather than a wrong one
    written, lines = [], []
    for name, table in tables.items():
        path = folder / f"{name}.parquet"
        content = _encoded(table)
        try:
            with atomically(path) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        written.append(path)
        lines.append(f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")
    with atomically(folder / SUMS) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return written


def noted(folder: Path, names: Iterable[str]) -> None:
    """Add the digests of further files, those of them that are there, to SHA256SUMS. Raises OSError."""
    sums = folder / SUMS
    lines = sums.read_text(encoding="utf-8").splitlines(keepends=True)
    for name in names:
        if (folder / name).is_file():
            lines.append(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n")
    with atomically(sums) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _encoded(table: pd.DataFrame) -> bytearray:
    """A table as Parquet with its digest of itself."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    encoded = pa.Table.from_pandas(table, preserve_index=False)
    encoded = encoded.replace_schema_metadata({**(encoded.schema.metadata or {}), b"digest": _OWN + _ZEROS})
    sink = io.BytesIO()
    pq.write_table(encoded, sink, write_page_checksum=True)
    content = bytearray(sink.getbuffer())
    start = content.rindex(_OWN + _ZEROS) + len(_OWN)
    content[start : start + len(_ZEROS)] = hashlib.sha256(content).hexdigest().encode()
    return content


def _changed(content: bytes) -> bool:
    """Whether a table's digest of itself is another than that of its content; no for one that has none."""
    start = content.rfind(_OWN) + len(_OWN)
    if start < len(_OWN):
        return False
    end = start + len(_ZEROS)
    digest = hashlib.sha256(content[:start])
    digest.update(_ZEROS)
    digest.update(content[end:])
    return digest.hexdigest().encode() != content[start:end]


def read(path: Path) -> pd.DataFrame:
    """Read a table and compare its digests: its own, and that of SHA256SUMS beside it, where there are.

    Raises OSError, ValueError for another digest, and what pyarrow raises.
    """
    import pandas as pd

    content = path.read_bytes()
    sums = path.with_name(SUMS)
    lines = sums.read_text(encoding="utf-8", errors="replace").splitlines() if sums.is_file() else []
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if digests.get(path.name, found := hashlib.sha256(content).hexdigest()) != found:
        raise ValueError(f"its content has changed: {SUMS} has another digest; remove that file to read it as it is")
    if _changed(content):
        raise ValueError("its content has changed: it is not what its own digest is of")
    frame: pd.DataFrame = pd.read_parquet(io.BytesIO(content), page_checksum_verification=True)
    return frame
