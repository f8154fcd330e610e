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

    def publish(self, cell: Cell) -> str:
        """Its path relative to the run folder; without one, relative to the store. Raises OSError."""
        source = self.store.path(cell.key)
        if self.folder is None:
            return source.relative_to(self.store.folder).as_posix()
        parts = (
            [cell.lesion.selection, cell.lesion.replacement.name, cell.lesion.layer] if cell.lesion else ["baseline"]
        )
        name = "-".join([f"seed{cell.seed}", *(part for part in parts if part), cell.key[:8]]) + ".png"
        place = f"images/{cell.prompt.id}/{name}"
        target = self.folder / place
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
        return place
