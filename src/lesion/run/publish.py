"""Gives every stored picture a readable place in the run folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lesion.store.files import atomically
from lesion.store.images import Store
from lesion.store.maps import Maps, beside_image
from lesion.study.grid import Cell


class Publisher:
    """Links pictures of the store into a run folder, or copies them where the disk has no links.

    folder: the run folder; without one, pictures stay where they are.
    steered: whether the study steers; images that are not are then those of `Study.unsteered`.
    maps: the store of the attention maps that go beside the pictures.
    """

    def __init__(self, store: Store, folder: Path | None, steered: bool = False, maps: Maps | None = None):
        self.store, self.folder, self.steered, self.maps = store, folder, steered, maps
        self._made: set[Path] = set()  # folders of prompts

    def place(self, cell: Cell) -> str:
        """Its path relative to the run folder; without one, relative to the store."""
        if self.folder is None:
            return self.store.path(cell.key).relative_to(self.store.folder).as_posix()
        alone = "unsteered" if self.steered and cell.settings.steering is None else "baseline"
        parts = [cell.lesion.selection, cell.lesion.replacement.name, cell.lesion.layer] if cell.lesion else [alone]
        name = "-".join([f"seed{cell.seed}", *(part for part in parts if part), cell.key[:8]]) + ".png"
        return f"images/{cell.prompt.id}/{name}"

    def publish(self, cell: Cell) -> None:
        """Put the picture at its place; without a run folder it has it already. Raises OSError."""
        if self.folder is None:
            return
        place = self.place(cell)
        self._link(self.store.path(cell.key), self.folder / place)
        if self.maps and self.maps.has(cell.key):
            self._link(self.maps.path(cell.key), self.folder / beside_image(place))

    def _link(self, source: Path, target: Path) -> None:
        if target.parent not in self._made:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._made.add(target.parent)
        try:
            os.link(source, target)
        except OSError:  # it is there already, or an older picture of the cell is, or the disk has no links
            if target.is_file() and target.samefile(source):
                return
            with atomically(target) as temporary:
                try:
                    os.link(source, temporary)
                except OSError:
                    shutil.copyfile(source, temporary)
