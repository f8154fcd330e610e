"""Studies from Python: the same keys, cells and numbers as the command line; see docs/python.md."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lesion.config.compose import compose, one_line, overrides_of, plain
from lesion.config.parsing import parse
from lesion.errors import RequestError

if TYPE_CHECKING:
    import pandas as pd

    from lesion.report.results import Results

__all__ = ["StatedStudy", "lesioned", "open", "study"]


def study(*overrides: str, **keys: Any) -> StatedStudy:
    """State a study with the keys of the command line, and check it; nothing is loaded or made.

    overrides: as on the command line, say "experiment=demo" or "generation.steps=8". keys: with values of Python, which
    need no quoting: seeds=[0, 1], prompts="colour", **{"generation.steps": 8}; a dict stands for the keys below:
    generation={"steps": 8}. No tracker unless one is named. Raises RequestError, the command line's one line.
    """
    for override in overrides:
        if not isinstance(override, str):
            raise RequestError("study", f"takes overrides as texts, 'key=value', and keys by name; got {override!r}")
    given = [*overrides, *overrides_of(keys)]
    if not any(override.lstrip("+~").partition("=")[0] == "tracker" for override in given):
        given.insert(0, "tracker=none")
    return StatedStudy(compose(given))


def open(*paths: str | os.PathLike[str], mix: bool = False) -> Results:
    """The results of run folders, or of all below folders such as a multirun, in one object.

    They are put together as `lesion-report` does. mix: runs that cannot be compared stand side by side, never averaged.
    Raises RequestError where there are none, or where they cannot be compared.
    """
    from lesion.report.results import Results

    if not paths:
        raise RequestError("open", "needs a run folder, or a folder of run folders")
    return Results.read([Path(path).expanduser() for path in paths], mix)


class StatedStudy:
    """A study that is checked and not yet made."""

    def __init__(self, config: DictConfig):
        from lesion.run.job import survey

        self._hydra = OmegaConf.masked_copy(config, ["hydra"])
        with open_dict(config):
            del config["hydra"]
        self._config = config
        try:
            self._request = parse(config)
        except OmegaConfBaseException as error:  # of ${…} that leads nowhere
            raise RequestError("", one_line(error)) from None
        self._source, self._study = survey(self._request)

    @property
    def config(self) -> dict[str, Any]:
        """Every key with its value."""
        return plain(self._config)

    def plan(self) -> pd.DataFrame:
        """What would be made: images a mode, how many of them are still to be made, and MiB on disk of these (a guess).

        `to_make` counts an image that two modes share once; a study with a budget makes at most that.
        """
        import pandas as pd

        from lesion.run.attribution import part_of
        from lesion.run.capture import in_store, maps_of
        from lesion.run.job import mebibytes
        from lesion.store.images import Store

        store = Store(self._request.store)
        part = part_of(self._request, self._study, store)
        counts = in_store(part, store, maps_of(self._request, self._source))
        modes = list(counts.by_mode)
        table = pd.DataFrame(
            {
                "images": [counts.by_mode[mode] for mode in modes],
                "to_make": [counts.missing_by_mode.get(mode, 0) for mode in modes],
            },
            index=pd.Index(modes, name="mode"),
        )
        table.loc["in all"] = table.sum()
        table.insert(1, "in_store", table["images"] - table["to_make"])
        table["MiB"] = [round(mebibytes(self._study, number), 1) for number in table["to_make"]]
        return table

    def run(self, folder: str | os.PathLike[str] | None = None, report: bool = False) -> Results:
        """Make and score what the store lacks, and write a run folder; at once where the store has everything.

        folder: the run folder, by default outputs/DATE/TIME, as on the command line. report: write the page, tables and
        figures too (`Results.report` does so later). Images that fail are named in `Results.failures` and a warning;
        the rest is complete. An interrupted study is resumed when it is run again.
        """
        from lesion.report.results import Results
        from lesion.run import folder as folders
        from lesion.run.job import JobContext, complete, survey

        if self._request.dry_run:
            raise RequestError("dry_run", "makes nothing; allowed with run(): false. The plan is plan()")
        hydra = copy.deepcopy(self._hydra).hydra  # resolved anew, or the time of an earlier run would be this one's
        surveyed = survey(self._request)  # anew: the model or a prompt file may have changed since it was stated
        asked = folders.asked(self.config, surveyed[1])
        own = Path(hydra.run.dir).absolute()
        out = folders.fresh(own) if folder is None else Path(folder).expanduser().absolute()
        folders.claim(out, asked, "folder")
        name = f"{hydra.job.name}-{hydra.job.override_dirname or 'defaults'}"[:120]
        OmegaConf.save(self._config, out / ".hydra" / "config.yaml")
        OmegaConf.save(hydra.overrides.task, out / ".hydra" / "overrides.yaml")
        outcome = complete(self._request, JobContext(out, name, None, self.config), surveyed, report)
        if outcome.trouble:
            warnings.warn(f"{outcome.trouble}; see .failures", stacklevel=2)
        return Results.read([out])

    def _facts(self) -> dict[str, Any]:
        request = self._study
        return {
            "model": request.model.name,
            "images": len(request),
            "prompts": len(request.prompts),
            "seeds": len(request.seeds),
            "layers": len(request.layers),
            "selections": ", ".join(request.selections),
            "replacements": ", ".join(one.name for one in request.replacements),
            "store": self._request.store,
        }

    def __repr__(self) -> str:
        return f"<lesion study: {', '.join(f'{name} {value}' for name, value in self._facts().items())}>"

    def _repr_html_(self) -> str:
        from lesion.report.text import as_html

        return as_html("Study, not made yet: .plan(), .run()", self._facts())


def lesioned(
    pipe: Any, layers: str | Sequence[str], replacement: str = "zero", **options: Any
) -> AbstractContextManager[None]:
    """Lesion layers of your own diffusers pipeline within a block: see `lesion.run.quick.lesioned`."""
    from lesion.run.quick import lesioned

    return lesioned(pipe, layers, replacement, **options)
