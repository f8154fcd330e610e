"""Gives every stored picture a readable place in the run folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lesion.store.files import atomically
from lesion.store.images import Store
from lesion.study.grid import Cell


class Publisher:
    """Links pictures of the store into a run folder, or copies them where the disk has no links.

    folder: the run folder; without one, pictures stay where they are.
    """

    def __init__(self, store: Store, folder: Path | None):
        self.store, self.folder = store, folder
        self._made: set[str] = set()  # folders of prompts

    def place(self, cell: Cell) -> str:
        """Its path relative to the run folder; without one, relative to the store."""
        if self.folder is None:
            return self.store.path(cell.key).relative_to(self.store.folder).as_posix()
        parts = (
            [cell.lesion.selection, cell.lesion.replacement.name, cell.lesion.layer] if cell.lesion else ["baseline"]
        )
        name = "-".join([f"seed{cell.seed}", *(part for part in parts if part), cell.key[:8]]) + ".png"
        return f"images/{cell.prompt.id}/{name}"

    def publish(self, cell: Cell) -> None:
        """Put the picture at its place; without a run folder it has it already. Raises OSError."""
        if self.folder is None:
            return
        source, target = self.store.path(cell.key), self.folder / self.place(cell)
        if cell.prompt.id not in self._made:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._made.add(cell.prompt.id)
        try:
            os.link(source, target)
        except OSError:  # an older picture of the cell is there, or the disk has no links
            with atomically(target) as temporary:
                try:
                    os.link(source, temporary)
                except OSError:
                    shutil.copyfile(source, temporary)
