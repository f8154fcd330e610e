"""Tables of a run folder that show a changed bit.

Format: <name>.parquet, Parquet whose pages carry checksums, and SHA256SUMS, the SHA-256 of each in the form that
`sha256sum -c SHA256SUMS` reads. Tables of version 0.1 have neither and are read as they are.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lesion.store.files import atomically

if TYPE_CHECKING:
    import pandas as pd

SUMS = "SHA256SUMS"


def write(folder: Path, tables: Mapping[str, pd.DataFrame]) -> list[Path]:
    """Write tables by name, each in one step, then their digests. Raises OSError with the path that cannot be."""
    (folder / SUMS).unlink(missing_ok=True)  # killed in between, tables have no digest rather than a wrong one
    written, lines = [], []
    for name, table in tables.items():
        path = folder / f"{name}.parquet"
        sink = io.BytesIO()
        table.to_parquet(sink, index=False, write_page_checksum=True)
        try:
            with atomically(path) as temporary:
                temporary.write_bytes(sink.getbuffer())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        written.append(path)
        lines.append(f"{hashlib.sha256(sink.getbuffer()).hexdigest()}  {path.name}\n")
    with atomically(folder / SUMS) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return written


def read(path: Path) -> pd.DataFrame:
    """Read a table and compare its checksums, and its digest if SHA256SUMS beside it has one.

    Raises OSError, ValueError for another digest, and what pyarrow raises.
    """
    import pandas as pd

    content = path.read_bytes()
    sums = path.with_name(SUMS)
    lines = sums.read_text(encoding="utf-8", errors="replace").splitlines() if sums.is_file() else []
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if digests.get(path.name, found := hashlib.sha256(content).hexdigest()) != found:
        raise ValueError(f"its content has changed: {SUMS} has another digest; remove that file to read it as it is")
    frame: pd.DataFrame = pd.read_parquet(io.BytesIO(content), page_checksum_verification=True)
    return frame
