"""The audit of one run folder. It changes nothing in it or in the store: all is worked out in a folder of its own."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from lesion import models, scoring
from lesion.analysis.bootstrap import METHODS
from lesion.analysis.importance import importance_metric
from lesion.analysis.settings import BASELINE
from lesion.audit import tables as comparing
from lesion.audit.checks import Check
from lesion.config.compose import plain, with_own_keys
from lesion.config.parsing import Request, parse
from lesion.errors import RequestError, place_of
from lesion.report import OPTIONS as REPORT
from lesion.report import findings, write_report
from lesion.report.merging import Refused, put_together, read
from lesion.run import environment
from lesion.run import folder as folders
from lesion.run.capture import maps_of
from lesion.run.job import remembered, survey
from lesion.run.publish import Publisher
from lesion.run.score_queue import ScoreQueue
from lesion.store.images import Damaged, Store, Stored
from lesion.store.maps import beside_image
from lesion.store.tables import SUMS
from lesion.study.columns import PLACE, WHOLE
from lesion.study.grid import Cell, Study
from lesion.study.plan import batches

if TYPE_CHECKING:
    from lesion.report.merging import Run

PIXEL = 1  # of 255, by which pixels of other batches or machines may differ: docs/benchmarks.md, "Batch effect"
TABLES = ("results.parquet", "floor.parquet", "budget.parquet", "maps.parquet")


@dataclass(frozen=True)
class Sample:
    """What is made anew. share: of the images, in (0, 1]. seed: of the choice."""

    share: float = 0.01
    seed: int = 0


class RunAudit:
    """The checks of one run folder; `checks()` makes them all.

    beside: run folders, of which other shards of the same study have baselines that the noise floor compares with.
    tables: those worked out anew, for the paper.
    """

    def __init__(self, folder: Path, sample: Sample, work: Path, beside: Sequence[Path] = ()):
        self.folder, self.sample, self.work, self.beside = folder, sample, work, beside
        self.record = environment.read(folder)
        self.given: Run | None = None
        self.request: Request | None = None
        self.source: models.Source | None = None
        self.study: Study | None = None
        self.tables: list[Path] = []
        self.good: dict[str, Stored] = {}  # images of the folder that are what their files say, by key
        self.store = Store(work / "store")
        self.remembered_in = folder  # the study's own store

    def checks(self) -> list[Check]:
        """Every check; what one of them cannot do says why, and the others go on."""
        made = []
        for check, do in (
            (Check("files", "digests"), self.files),
            (Check("config", "keys"), self.config),
            (Check("pictures", "images"), self.pictures),
            (Check("scores", "rows"), self.scores),
            (Check("report", "tables, figures and pages"), self.report),
            (Check("remade", "images"), self.remade),
        ):
            try:
                do(check)
            except (RequestError, Refused, OSError) as error:
                check.undone = " ".join(str(error).split())
            except Exception as error:  # a folder that was changed can break anything
                check.undone = place_of(error)
            made.append(check)
        return made

    def files(self, check: Check) -> None:
        """SHA256SUMS and the digests of the record."""
        sums = self.folder / SUMS
        wanted: dict[str, str] = {}
        if sums.is_file():
            for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
                digest, _, name = line.partition("  ")
                wanted[name] = digest
            for name in (*TABLES, *folders.SEALED):
                if (self.folder / name).is_file() and name not in wanted:
                    check.differs.append(f"{name} has no digest in {SUMS}")
        elif self.record is None:
            check.notes.append(f"no {SUMS}: the run is of a version that wrote none")
        else:
            check.differs.append(f"{SUMS} is not there")
        if self.record is None:
            check.notes.append(f"no {environment.RECORD}: versions, machine and config were not recorded")
        elif not self.record:
            check.differs.append(f"{environment.RECORD} cannot be read")
        else:
            if not self.record.get("runs"):
                check.differs.append(f"{environment.RECORD} names no process that made the study")
            if not (self.folder / folders.RECORD).is_file():
                check.differs.append(f"{folders.RECORD} is not there")
        wanted |= (self.record or {}).get("files", {})
        for name, digest in wanted.items():
            check.looked += 1
            if environment.sha256(self.folder / name) != digest:
                there = (self.folder / name).is_file()
                check.differs.append(f"{name} is not the file that was written" if there else f"{name} is not there")

    def config(self, check: Check) -> None:
        """The config against the records of what was asked, key by key; then what it asks for is laid out."""
        if not (self.folder / ".hydra" / "config.yaml").is_file():
            raise Refused(".hydra/config.yaml is not there")
        config = OmegaConf.load(self.folder / ".hydra" / "config.yaml")
        assert isinstance(config, DictConfig)
        start = Path((self.record or {}).get("folder", Path.cwd()))
        hydra = self.folder / ".hydra" / "hydra.yaml"
        if hydra.is_file():
            details: Any = OmegaConf.load(hydra).hydra
            with_own_keys(config, details.runtime.choices.model, alone=False)
            start = Path(details.runtime.cwd)
        data = plain(config)
        kept = (self.record or {}).get("config")
        if kept is not None:
            found = json.loads(json.dumps(dict(environment.leaves(data)), default=str))
            for key in sorted({*found, *kept}):
                check.looked += 1
                if found.get(key) != kept.get(key) or (key in found) != (key in kept):
                    was, now = (repr(of[key]) if key in of else "not there" for of in (kept, found))
                    check.differs.append(f".hydra/config.yaml: {key} is {now}, was {was} when the study ran")
        asked = folders.recorded_request(self.folder)
        for key, value in json.loads(json.dumps(folders.by_key(data), default=str)).items():
            check.looked += key in asked
            if key in asked and asked[key] != value and not check.differs:
                check.differs.append(f".hydra/config.yaml: {key} is {value!r}, was asked as {asked[key]!r}")
        self.given = self._results()
        device = self.given.frame["device"].iloc[0] if "device" in self.given.frame else "cpu"
        OmegaConf.update(config, "tracker", {"name": "none"}, merge=False)
        OmegaConf.update(config, "device", str(device))
        request = parse(config, start)
        self.remembered_in = request.store
        # Nothing is written to the study's own store, and it need not be there.
        self.request = replace(request, dry_run=True, store=self.work / "store")
        self.source, self.study = survey(self.request)
        now = json.loads(json.dumps(folders.asked(data, self.study), default=str))
        for key in (key for key in now if key.endswith("(content)") and key in asked):
            check.looked += 1
            if now[key] != asked[key]:
                check.differs.append(f"{key.removesuffix(' (content)')}: its content is not what was studied")
        self._plan(check, self.request)

    def _plan(self, check: Check, request: Request) -> None:
        """The plan of a confirmatory study, which follows from the config."""
        path = self.folder / folders.PLAN
        if request.confirm is None:
            if path.exists():
                check.differs.append(f"{folders.PLAN} is there, and the config plans nothing")
            return
        check.looked += 1
        wanted = json.loads(json.dumps(request.confirm.written([prompt.id for prompt in request.prompts])))
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = None
        if kept != wanted:
            check.differs.append(f"{folders.PLAN} is not the plan that the config gives")

    def _results(self) -> Run:
        """The run's tables, read whatever their digests say: `files` compares these."""
        place = self.work / "given"
        place.mkdir(exist_ok=True)
        for name in TABLES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, place / name)
        return read(place, place)

    def pictures(self, check: Check) -> None:
        """Each picture of the results: whose it is, and that its pixels are those that were made."""
        frame = self._given().frame
        for place, key, image in zip(range(len(frame)), frame["cell"], frame["image"]):
            if not image:
                continue
            check.looked += 1
            if key in self.good:
                continue
            try:
                self.good[str(key)] = self._taken(str(key), self.folder / image)
            except Damaged as error:
                why = "it is not there" if not (self.folder / image).is_file() else str(error).partition(": ")[2]
                check.differs.append(f"{image} (row {place}): {why}")
        for cell in self.study.cells() if self.study else ():
            if said := _misread(self.store.path(cell.key), cell) if cell.key in self.good else "":
                check.differs.append(f"the picture of cell {cell.key} {said}")
        known = {*map(str, frame["image"]), *self._link_unsteered()}
        known |= {beside_image(image) for image in known}
        for kind in ("images", "maps"):
            for path in sorted((self.folder / kind).rglob("*")):
                name = path.relative_to(self.folder).as_posix()
                if name not in known and not path.is_dir():
                    check.differs.append(f"{name} is of no row of the results")

    def _taken(self, key: str, picture: Path) -> Stored:
        """Give this audit's store a picture; raise Damaged for one that is not as it was made."""
        path = self.store.path(key)
        path.unlink(missing_ok=True)
        _link(path, picture)
        try:
            return self.store.get(key)
        except Damaged:
            path.unlink()
            raise

    def _link_unsteered(self) -> list[str]:
        """Give this audit's store the unsteered pictures that the steered ones are compared with; their places."""
        found: list[str] = []
        if self.study is None or self.study.unsteered is None:
            return found
        places = Publisher(self.store, self.folder, steered=True)
        for cell in self.study.unsteered.cells():
            place = places.place(cell)
            path, picture = self.store.path(cell.key), self.folder / place
            if picture.is_file() and not path.is_symlink():
                _link(path, picture)
            found.append(place)
        return found

    def _given(self) -> Run:
        if self.given is None:
            raise Refused("the results cannot be read")
        return self.given

    def _asked(self) -> tuple[Request, models.Source, Study]:
        if self.request is None or self.source is None or self.study is None:
            raise Refused("what the config asks for cannot be laid out")
        return self.request, self.source, self.study

    def scores(self, check: Check) -> None:
        """Every column of the results and the noise floor, worked out anew from the config and the pictures."""
        given = self._given()
        request, source, study = self._asked()
        self._link_maps(request, source, given.frame)
        self._link_baselines()
        found = remembered(request, (source, study), self.folder)
        anew = found["results"].reset_index(drop=True)
        check.looked = len(anew)
        failed = given.frame["status"].astype(str) == "failed"
        alike = len(anew) == len(given.frame)
        out: set[int] = set()
        if alike:
            other = (anew["status"] != given.frame["status"]) & ~self._all_there()
            out = set(map(int, np.flatnonzero(other | (failed & ~self._all_there()))))
        older = {name: scoring.metric_class(name).earlier_error for name in scoring.known_metrics() if name in anew}
        check.differs += comparing.frames("results.parquet", given.frame, anew, out, older, check.notes)
        older["similarity"] = older.get(importance_metric(anew), 0.0)  # of two baselines, in the floor
        for name in TABLES[1:]:
            more = found.get(name.removesuffix(".parquet"))
            if more is None or out:
                continue
            if not (self.work / "given" / name).is_file():
                check.differs.append(f"{name} is not there")
                continue
            table = pd.read_parquet(self.work / "given" / name)
            if PLACE in table and name == "floor.parquet":
                table, more = self._pairs_of_shard(table, more, check)
            check.looked += len(table)
            check.differs += comparing.frames(name, table, more.reset_index(drop=True), (), older, check.notes)
        if out:
            check.notes.append(f"{len(out)} rows of images that failed, or that are not as made, are not scored")
        if not alike:
            return
        kept = self._kept_scores(study, given.frame)
        if kept is None:
            check.notes.append(f"the store is not here: scores are compared to {comparing.SCORE:g} only")
        else:
            check.differs += comparing.exactly(given.frame, kept)

    def _pairs_of_shard(
        self, given: pd.DataFrame, anew: pd.DataFrame, check: Check
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The rows of both floors that can be compared: which of two shards has their common pairs is not determined.

        Pairs with a shard that is not beside this one cannot be worked out; a note counts them.
        """
        ours = set(self._given().frame[["prompt_id", "seed"]].itertuples(index=False, name=None))

        def inside(frame: pd.DataFrame) -> pd.Series:
            ends = zip(frame["prompt_id_a"], frame["seed_a"], frame["prompt_id_b"], frame["seed_b"])
            both = [(a, one) in ours and (b, other) in ours for a, one, b, other in ends]
            return pd.Series(both, index=frame.index, dtype=bool)

        known = given[PLACE].isin(anew[PLACE]) | inside(given)
        if not known.all():
            absent = f"{int((~known).sum())} pairs with baselines of shards that are not here"
            check.notes.append(f"floor.parquet: {absent} are not compared")
        return given[known].reset_index(drop=True), anew[anew[PLACE].isin(given[PLACE]) | inside(anew)]

    def _link_baselines(self) -> None:
        """Give this audit's store the baselines of the other shards of the same study."""
        frame = self._given().frame
        for folder in self.beside if WHOLE in frame else ():
            try:
                other = read(folder, folder).frame
            except Refused:
                continue
            if WHOLE not in other or not set(other[WHOLE]) & set(frame[WHOLE]):
                continue
            for key, image in other.loc[other["selection"] == BASELINE, ["cell", "image"]].itertuples(index=False):
                if image and not self.store.path(str(key)).is_symlink():
                    with suppress(Damaged):
                        self._taken(str(key), folder / image)

    def _link_maps(self, request: Request, source: models.Source, frame: pd.DataFrame) -> None:
        """Give the images in this audit's store the attention maps that the run folder has of them."""
        maps = maps_of(request, source)
        for key, image in zip(frame["cell"], frame["image"]) if maps else ():
            path = self.folder / beside_image(str(image))
            if maps and image and path.is_file() and not (place := maps.path(str(key))).is_symlink():
                _link(place, path)

    def _all_there(self) -> pd.Series:
        """Whether the picture of each row, and the baseline's, is as made."""
        _, _, study = self._asked()
        return pd.Series([cell.key in self.good and cell.baseline.key in self.good for cell in study.cells()])

    def _kept_scores(self, study: Study, frame: pd.DataFrame) -> dict[tuple[int, str], float] | None:
        """What the study's own store remembers; a copy is read, since reading may merge or remove parts."""
        request, _, _ = self._asked()
        name = f"{study.context[:16]}"
        if not (self.remembered_in / "scores" / name).is_dir():
            return None
        copy = Store(self.work / "remembered")
        shutil.copytree(self.remembered_in / "scores" / name, copy.scores / name, dirs_exist_ok=True)
        queue = ScoreQueue(study.context, copy, request.scorer, request.device, prompts=request.prompts)
        found: dict[tuple[int, str], float] = {}
        for row, cell in enumerate(study.cells()):
            if str(frame["status"].iloc[row]) == "ok":
                found |= {(row, column): value for column, value in queue.values(cell).items() if column in frame}
        return found or None

    def report(self, check: Check) -> None:
        """Every table, figure and page of the report, made anew from results.parquet."""
        if not (self.folder / "report.html").is_file():
            if PLACE in self._given().frame:
                check.notes.append("a shard has no report of its own; that over all shards is checked with them")
                return
            check.differs.append("report.html is not there")
        place = self.work / "report"
        place.mkdir()
        for name in ("images", "maps"):
            if (self.folder / name).is_dir():
                (place / name).symlink_to((self.folder / name).absolute())
        for name in TABLES:
            if (self.work / "given" / name).is_file():
                shutil.copyfile(self.work / "given" / name, place / name)
        frame, floor, maps, _ = put_together([place], place)
        options: dict[str, Any] = {}
        if (self.folder / REPORT).is_file():
            options = json.loads((self.folder / REPORT).read_text(encoding="utf-8"))
        elif self.record is not None:
            check.differs.append(f"{REPORT} is not there: how the report was asked for is not known")
        options["known"] = findings(frame, floor, options.get("interval", METHODS[0]))
        made = [path for path in write_report(place, frame, floor, maps=maps, **options) if path.name != REPORT]
        self.tables = [path for path in made if path.parent.name == "tables"]
        compare(check, self.folder, place, made, [self.record])

    def remade(self, check: Check) -> None:
        """A share of the images, made anew: bit for bit where that can be, else within the batch effect."""
        request, source, study = self._asked()
        keys = sorted(key for key, stored in self.good.items() if not stored.reason)
        if not keys:
            raise Refused("no picture is there to compare with")
        wanted = {*study.keys()}
        foreign, keys = [key for key in keys if key not in wanted], [key for key in keys if key in wanted]
        if foreign:
            check.differs.append(f"{len(foreign)} pictures are none that the config asks for, so cannot be made again")
        if not keys:
            return
        self._made_with(check)
        number = math.ceil(self.sample.share * len(keys))
        chosen = set(random.Random(self.sample.seed).sample(keys, number))
        size, why = self._batch_size(len(wanted), request)
        exact: set[str] = set()
        if size and not why:
            planned = list(batches(study, size, lambda key: False))
            chosen |= {cell.key for batch in planned if chosen & {one.key for one in batch} for cell in batch}
            exact = {
                cell.key
                for batch in planned
                for cell in batch
                if cell.key in chosen and (cell.lesion is None or cell.lesion.window[0] == 0)
            }
        anew, failures, here = remake(request, source, study, chosen, size, self.work / "remade")
        if not why and not self._same_machine(here):
            why, exact = "made on another machine or with other versions", set()
        if why:
            check.notes.append(f"compared to {PIXEL}/255, the batch effect, not bit for bit: {why}")
        elif exact < chosen:
            check.notes.append(f"late windows are compared to {PIXEL}/255: snapshots that they start from are new")
        for key in sorted(chosen & self.good.keys()):
            check.looked += 1
            if key not in anew:
                check.differs.append(f"cell {key} cannot be made again: {failures.get(key, 'it did not come')}")
                continue
            change = np.abs(anew[key].astype(int) - self.good[key].pixels.astype(int))
            most = int(change.max())
            if most > (0 if key in exact else PIXEL):
                count = int((change > 0).any(axis=2).sum())
                check.differs.append(f"cell {key}: made anew, {count} pixels differ, by up to {most}/255")

    def _made_with(self, check: Check) -> None:
        """The versions, commit and device that the record says images were made with, against what the images say."""
        runs = [run for run in (self.record or {}).get("runs", []) if run.get("images")]
        frame = self._given().frame
        told = {
            "torch": {str(run.get("torch")) for run in runs},
            "diffusers": {str(run.get("packages", {}).get("diffusers")) for run in runs},
            "commit": {environment.short(str(run.get("commit", ""))) for run in runs} - {""},
            "device": {str(run.get("device")).partition(":")[0] for run in runs},
        }
        by_pictures = {
            name: {str(one) for one in frame.get(name, ()) if one} for name in ("torch", "diffusers", "device")
        }
        by_pictures["commit"] = {str(one).partition("(")[2].rstrip(")") for one in frame.get("lesion", ())} - {""}
        for name, found in by_pictures.items():
            if found and (strange := sorted(told[name] - found)):
                said = f"{name} is {', '.join(strange)}, by the pictures {', '.join(sorted(found))}"
                check.differs.append(f"{environment.RECORD}: {said}")

    def _batch_size(self, images: int, request: Request) -> tuple[int | None, str]:
        """The size of batches the images were made in, and why pixels need not be exactly equal; "" if they must."""
        runs = [run for run in (self.record or {}).get("runs", []) if run.get("images")]
        if self.record is None:
            return None, "it is not recorded where they were made"
        if request.budget is not None:
            return None, "a study with a budget has batches of other kinds"
        if len(runs) != 1 or runs[0]["images"] != images or len(runs[0]["batch_sizes"]) != 1:
            return None, "they were made by several runs or in batches of several sizes"
        return int(runs[0]["batch_sizes"][0]), ""

    def _same_machine(self, here: dict[str, Any]) -> bool:
        (run,) = (run for run in (self.record or {}).get("runs", []) if run.get("images"))
        same = (
            "torch",
            "python",
            "packages",
            "system",
            "processor",
            "threads",
            "instructions",
            "device",
            "gpu",
            "cuda",
        )
        return all(run.get(name) == here.get(name) for name in same)


def _link(place: Path, target: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target.absolute())


def _misread(path: Path, cell: Cell) -> str:
    """What a picture shows a reader otherwise than it was made; "" if nothing. path: of one whose pixels are good."""
    with Image.open(path) as image:
        mode, record = image.mode, json.loads(getattr(image, "text", {})["lesion"])
    if "made" in record and not record.get("pixels"):  # only version 0.1 wrote neither
        return "has no digest of its pixels"
    told = json.loads(json.dumps(cell.identity()))
    other = [name for name in told if record.get(name) != told[name]]
    if other:
        return f"says another {', '.join(other)} than it was made with"
    return "" if mode == "RGB" else f"is of mode {mode}, not RGB"


def compare(
    check: Check, folder: Path, anew: Path, made: Collection[Path], records: Sequence[dict[str, Any] | None]
) -> None:
    """Note what differs between the report of a folder and the same made anew.

    records: of the runs; figures are compared only where the last process of each had the versions that are here.
    """
    now = environment.here("cpu")["packages"]
    then = [((record or {}).get("runs") or [{}])[-1].get("packages", {}) for record in records]
    drawn = all(one.get(name) == now.get(name) for one in then for name in ("matplotlib", "pillow", "numpy"))
    if not drawn:
        check.notes.append("figures are not compared: they were drawn with other versions, or it is not known which")
    for _, differs in comparing.files(folder, anew, made, drawn):
        check.looked += 1
        check.differs += [differs] if differs else []


def remake(
    request: Request, source: models.Source, study: Study, keys: set[str], size: int | None, folder: Path
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Make these cells in a store of their own: pixels by key, why others failed, and where it was done.

    size: of batches; None: as asked.
    """
    from lesion.generation.generate import make_deterministic
    from lesion.run.job import examined
    from lesion.run.maker import Maker
    from lesion.store.images import Known

    class Others(Known):
        def __contains__(self, key: str) -> bool:
            return key not in keys or super().__contains__(key)

    class Chosen(Store):
        def known(self) -> Known:
            known = Others(self)
            known._checked = super().known()._checked
            return known

        def has(self, key: str) -> bool:
            return key not in keys or super().has(key)

    make_deterministic(tf32=source.spec.tf32)
    model = examined(models.load(source, request.device), source, request.layers)
    if size:
        study = replace(study, settings=replace(study.settings, batch_size=size))
    if type(study) is Study:  # a replacement that no chosen cell has need not be made ready
        used = {cell.lesion.replacement.name for cell in study.in_plan_order() if cell.key in keys and cell.lesion}
        study = replace(study, replacements=tuple(one for one in study.replacements if one.name in used))
    found: dict[str, Any] = {}

    def made(cell: Cell, pixels: Any, picture: object) -> None:
        found[cell.key] = np.array(pixels)

    maker = Maker(replace(request, store=folder), model, study, Chosen(folder), made)
    maker.run(lambda more: None)
    return found, maker.failures, environment.here(request.device)
