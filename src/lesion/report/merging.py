"""Run folders into one frame: every image once, and nothing put together that cannot be compared."""

from __future__ import annotations

import os
import posixpath
import shutil
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from lesion.analysis.cells import names_of
from lesion.analysis.settings import slug
from lesion.report.attribution import kept_notes
from lesion.report.data import inside
from lesion.store import tables
from lesion.store.files import atomically
from lesion.store.maps import beside_image
from lesion.study import prompts
from lesion.study.columns import (
    COMPONENT,
    EARLIER,
    GENERATION,
    IDENTITY,
    LESION,
    MADE,
    NEEDED,
    PLACE,
    SEVERAL,
    TEXTS,
    WHOLE,
)
from lesion.study.components import DENOISER
from lesion.study.tokens import layer_and_set

RESULTS, FLOOR, MAPS = "results.parquet", "floor.parquet", "maps.parquet"
BEST = {"ok": 0, "invalid": 1, "failed": 2}


class Refused(Exception):
    """The request is wrong; the message is one line for the user."""


@dataclass(frozen=True)
class Run:
    """A run folder's results, with image paths relative to where the report goes.

    floor, maps: its noise floor and the measures of its attention maps, if it has them.
    """

    folder: Path
    frame: pd.DataFrame
    floor: pd.DataFrame | None = None
    maps: pd.DataFrame | None = None


def put_together(
    runs: Sequence[Path], out: Path, mix: bool = False
) -> tuple[pd.DataFrame, pd.DataFrame | None, pd.DataFrame | None, list[str]]:
    """The results of these run folders in one frame, image paths relative to `out`; the noise floor; the measures of
    attention maps; what was done, and what certificates of attributions say.

    mix: runs that cannot be compared stand side by side, never averaged together; else Refused.
    """
    found = whole([read(run, out) for run in runs])
    notes: list[str] = []
    if mix:
        found, notes = apart(found)
    else:
        check(found)
    notes = [*certified(runs), *notes]
    frame, floor, maps = merge(found)
    if frame.empty:
        raise Refused(f"{', '.join(map(str, runs))}: no images in the results")
    if COMPONENT in frame:  # of some runs
        given = frame["selection"].map(lambda name: "" if name == "none" else DENOISER)
        frame[COMPONENT] = frame[COMPONENT].fillna(given)
    return frame, floor, maps, notes


def certified(runs: Sequence[Path]) -> list[str]:
    """What the certificates of attributions among the runs say."""
    return [f"{run.name}: {line}" if len(runs) > 1 else line for run in runs for line in kept_notes(run)]


def run_folders(folders: Sequence[Path]) -> list[Path]:
    """Every run folder among or below `folders`, each once. Refused when one holds no results."""
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise Refused(f"{folder}: no such folder")
        below = [folder] if (folder / RESULTS).is_file() else sorted(path.parent for path in folder.rglob(RESULTS))
        if not below:
            raise Refused(f"{folder}: no {RESULTS} in it or below it")
        for run in below:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def read(run: Path, out: Path) -> Run:
    """The run, with image paths relative to `out`. Refused when a file cannot be read or misses columns."""
    frame = _parquet(run / RESULTS)
    missing = [name for name in NEEDED if name not in frame]
    if missing:
        raise Refused(f"{run / RESULTS}: no column {', '.join(missing)}")
    try:
        frame["clip_similarity"] = frame["clip_similarity"].astype("float64")
    except (TypeError, ValueError) as error:
        raise Refused(f"{run / RESULTS}: column clip_similarity is not a number everywhere") from error
    for name, value in EARLIER.items():
        if name not in frame:
            frame[name] = value
    for name in TEXTS:
        text = frame[name] if isinstance(frame[name].dtype, pd.StringDtype) else frame[name].astype(object)
        frame[name] = text.fillna("")
    floor = _parquet(run / FLOOR) if (run / FLOOR).is_file() else None
    if new := _ids(frame):
        frame["prompt_id"] = frame["prompt_id"].replace(new)
        for name in ("prompt_id_a", "prompt_id_b"):
            if floor is not None and name in floor:
                floor[name] = floor[name].replace(new)
    maps = _parquet(run / MAPS) if (run / MAPS).is_file() else None
    if maps is not None and (maps.empty or not {"model", "prompt_id", "cell"} <= set(maps)):
        maps = None
    start = Path(os.path.relpath(run.resolve(), out.resolve())).as_posix()
    # A results file may come from anybody: what it names outside its own folder is no image of the run.
    before = "" if start == "." else f"{start}/"
    frame["image"] = [before + name if name else "" for name in frame["image"].astype(object).map(inside)]
    return Run(run, frame, floor, maps)


def whole(runs: Sequence[Run]) -> list[Run]:
    """Shards of one study as one run, its rows in the order in which one process writes them; other runs as they are.

    Shards that were made or scored in different ways stay apart, for `check` to say so.
    """
    shards: dict[Hashable, list[Run]] = {}
    for run in runs:
        made = tuple(
            tuple(sorted(run.frame[name].drop_duplicates().astype(str))) for name in IDENTITY if name in run.frame
        )
        key = (run.frame[WHOLE].iloc[0], made) if WHOLE in run.frame and len(run.frame) else run.folder
        shards.setdefault(key, []).append(run)
    return [_one(group) if WHOLE in group[0].frame else group[0] for group in shards.values()]


def _one(shards: Sequence[Run]) -> Run:
    floors = [run.floor for run in shards if run.floor is not None]
    floor = _in_order(floors).drop_duplicates(ignore_index=True) if floors else None
    return Run(shards[0].folder, _in_order([run.frame for run in shards]), floor, _maps_in_order(shards))


def _maps_in_order(shards: Sequence[Run]) -> pd.DataFrame | None:
    parts = []
    for run in shards:
        if run.maps is None:
            continue
        own = [name for name in ("prompt_id", "cell", "selection", "replacement", "layer") if name in run.maps]
        first = run.frame.drop_duplicates(own)
        places = dict(zip(map(tuple, first[own].to_numpy()), first[PLACE], strict=True))
        rows = [places.get(tuple(row), len(places)) for row in run.maps[own].to_numpy()]
        parts.append(run.maps.assign(**{WHOLE: "", PLACE: rows}))
    return _in_order(parts).drop_duplicates(ignore_index=True) if parts else None


def _in_order(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    frame = pd.concat(frames, ignore_index=True).sort_values(PLACE, kind="stable", ignore_index=True)
    return frame.drop(columns=[WHOLE, PLACE])


def _ids(frame: pd.DataFrame) -> dict[str, str]:
    """Ids that version 0.1 made of the prompts' texts, and what they are called now."""
    asked = frame[["prompt_id", "prompt"]].drop_duplicates().itertuples(index=False)
    return {str(name): prompts.slug(str(text)) for name, text in asked if name == prompts.slug_of_0_1(str(text))}


def _parquet(path: Path) -> pd.DataFrame:
    try:
        return tables.read(path)
    except Exception as error:  # pyarrow raises many kinds; each means that the file is not a results file
        raise Refused(f"{path}: cannot be read ({(str(error) or type(error).__name__).splitlines()[0]})") from error


def differences(runs: Sequence[Run], names: Sequence[str]) -> dict[tuple[str, str], dict[str, list[Path]]]:
    """Where runs of one model differ: (column, model) -> value -> the run folders with that value."""
    found: dict[tuple[str, str], dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for name in names:
            if name not in run.frame:
                continue
            rows, keys = run.frame, ["model"]
            if name == "protocol":  # of lesions, each compared with those in the same components and sets of tokens
                rows = rows[rows["selection"] != "none"]
                component = rows[COMPONENT].fillna(DENOISER) if COMPONENT in rows else DENOISER
                rows = rows.assign(_component=component, _tokens=_sets(rows))
                keys = ["model", "replacement", "_component", "_tokens"]
            for key, values in rows.groupby(keys, sort=False)[name]:
                what = name
                if name == "protocol":
                    where = " ".join(str(one) for one in key[2:] if one)
                    what = f"{name} of replacement {key[1]}" + (f" in {where}" if where != DENOISER else "")
                there = values.drop_duplicates()
                for value in there.astype(object).where(there.notna(), "").astype(str).unique():
                    found[what, str(key[0])][value].append(run.folder)
    return {key: dict(values) for key, values in found.items() if len(values) > 1}


def _sets(rows: pd.DataFrame) -> pd.Series:
    """Of each lesion the sets of text tokens in it, joined by "+"; "" where layers are lesioned as a whole."""
    named = rows["layer"].where(rows["lesioned"] == "", rows["lesioned"])
    known = {text: "+".join(sorted({layer_and_set(one)[1] for one in names_of(text)})) for text in named.unique()}
    return named.astype(object).map(known)


def check(runs: Sequence[Run]) -> None:
    """Refused where images of one model were made or scored in different ways; names what and where."""
    found = differences(runs, (*IDENTITY, *GENERATION))
    if not found:
        return
    named = []
    for (name, model), values in found.items():
        sides = [f"{_short(value) or 'none'} in {_folders(where)}" for value, where in values.items()]
        named.append(f"{name} of {_short(model)!r} is {', '.join(sides)}")
    raise Refused(
        f"these runs cannot be compared: {'; '.join(named)}. Report them apart, or side by side, never averaged "
        "together, with --mix"
    )


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def _folders(folders: Sequence[Path]) -> str:
    return f"{folders[0]}" + (f" and {len(folders) - 1} more" if len(folders) > 1 else "")


def apart(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Models under names of their own where weights, precision, device, scorer or protocol differ; and what was done.

    What differs in how images were generated (steps, guidance...) makes settings of their own without that.
    """
    found = differences(runs, IDENTITY)
    notes = [f"Runs of {_short(model)} differ in {name}; they are kept apart." for name, model in found]
    for name, model in differences(runs, GENERATION):
        notes.append(f"Runs of {_short(model)} differ in {name}; they are kept apart.")
    suffixes: dict[tuple[Path, str], list[str]] = defaultdict(list)
    for (name, model), values in found.items():
        for number, (value, folders) in enumerate(values.items(), 1):
            short = value if len(value) <= 16 else f"{number}"
            for folder in folders:
                suffixes[folder, model].append(f"{name} {short}")
    renamed = []
    for run in runs:
        names = {
            model: f"{model} ({', '.join(words)})"
            for (folder, model), words in suffixes.items()
            if folder == run.folder
        }
        frame = run.frame.assign(model=_renamed(run.frame["model"], names))
        floor, maps = (
            table if table is None or "model" not in table else table.assign(model=_renamed(table["model"], names))
            for table in (run.floor, run.maps)
        )
        renamed.append(replace(run, frame=frame, floor=floor, maps=maps))
    return renamed, notes


def _renamed(models: pd.Series, names: dict[str, str]) -> pd.Series:
    return models.map(lambda name: names.get(str(name), name))


def merge(runs: Sequence[Run]) -> tuple[pd.DataFrame, pd.DataFrame | None, pd.DataFrame | None]:
    """All rows, each image of a lesion once: an ok one rather than an invalid or failed one, then one with attention
    maps, then the first seen. The measures of its maps are those of the same run.

    A prompt_id that stands for different prompts (texts, or init images) gets a number for the second and later ones.
    The noise floors likewise, each pair once; None if no run has one.
    """
    frame = pd.concat([run.frame.assign(_run=number) for number, run in enumerate(runs)], ignore_index=True)
    new = _prompt_names(frame)
    floor = _floors(runs, frame.assign(_new=new))
    old = frame["prompt_id"]
    frame["prompt_id"] = new
    kept = frame if frame["cell"].is_unique else frame.loc[_once(runs, frame)]
    return kept.drop(columns="_run").reset_index(drop=True), floor, _maps(runs, old.loc[kept.index], kept)


def _once(runs: Sequence[Run], frame: pd.DataFrame) -> pd.Index:
    """Which rows are kept of those that stand for one image of a lesion."""
    own = ["model", "prompt_id", "seed", "selection", "layer", *(n for n in (*SEVERAL, *GENERATION) if n in frame)]
    lesion = frame[list(LESION)].astype(object).where(frame["selection"] != "none", "")  # a baseline has no lesion
    key = pd.concat([frame[["cell", *own]], lesion], axis=1)
    worth = pd.DataFrame({"status": frame["status"].map(BEST).fillna(len(BEST)), "bare": ~_with_maps(runs, frame)})
    better = worth.sort_values(["status", "bare"], kind="stable").index
    return key.loc[better].drop_duplicates().index.sort_values()


def _with_maps(runs: Sequence[Run], frame: pd.DataFrame) -> pd.Series:
    """Whether the run of each row has attention maps of its image."""
    there = pd.Series(False, index=frame.index)
    for number, run in enumerate(runs):
        if run.maps is not None:
            there |= (frame["_run"] == number) & frame["cell"].isin(run.maps["cell"])
    return there


def _maps(runs: Sequence[Run], old: pd.Series, kept: pd.DataFrame) -> pd.DataFrame | None:
    """Measures of the attention maps of these rows, each from its own run, under the prompts' new names.

    old: the prompt_id of each row in its run.
    """
    parts = []
    for number, run in enumerate(runs):
        own = kept["_run"] == number
        if run.maps is not None and own.any():
            new = dict(zip(old[own], kept.loc[own, "prompt_id"], strict=True))
            maps = run.maps[run.maps["cell"].isin(kept.loc[own, "cell"])]
            parts.append(maps.assign(prompt_id=maps["prompt_id"].map(new)).dropna(subset="prompt_id"))
    if not parts:
        return None
    maps = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)  # as in `_floors`
    return maps.drop_duplicates().reset_index(drop=True)


def _prompt_names(frame: pd.DataFrame) -> pd.Series:
    """A name of its own for each prompt: its id, with the first free number where that is another prompt's."""
    used: set[str] = set()
    taken = set(frame["prompt_id"])
    new = frame["prompt_id"].copy()
    asked = frame[["prompt_id", "prompt"]].assign(init=frame.get("init", ""), look=_looks(frame))
    if asked.drop_duplicates()["prompt_id"].is_unique:
        return new
    for (first, *_), part in asked.groupby(list(asked), sort=False):
        one = str(first)
        if one in used:
            number = 2
            while f"{one}-{number}" in taken:
                number += 1
            taken.add(f"{one}-{number}")
            new.loc[part.index] = f"{one}-{number}"
        used.add(one)
    return new


def _looks(frame: pd.DataFrame) -> pd.Series:
    """Tells apart init images that share a name, 0 for the first: results hold no digest of them, but a cell's key
    depends on it, so that baselines alike in all else have different cells.
    """
    looks = pd.Series(0, index=frame.index)
    if "init" not in frame or not (frame["init"] != "").any():
        return looks
    made = [name for name in ("model", *MADE, *GENERATION, "seed") if name in frame]
    asked = frame[frame["init"] != ""]
    known: dict[Hashable, list[dict[tuple[str, ...], str]]] = defaultdict(list)
    for (_, *prompt), part in asked.groupby(["_run", "prompt_id", "prompt", "init"], sort=False):
        plain = part[part["selection"] == "none"]
        cells = dict(zip(map(tuple, plain[made].astype(str).to_numpy()), plain["cell"], strict=True))
        others = known[tuple(prompt)]
        same = (n for n, other in enumerate(others) if all(other.get(k, cell) == cell for k, cell in cells.items()))
        number = next(same, len(others))
        if number == len(others):
            others.append({})
        others[number].update(cells)
        looks.loc[part.index] = number
    return looks


def _floors(runs: Sequence[Run], frame: pd.DataFrame) -> pd.DataFrame | None:
    """Pairs of baselines under the prompts' new names, each once."""
    parts = []
    for number, run in enumerate(runs):
        if run.floor is None or not {"prompt_id_a", "prompt_id_b"} <= set(run.floor):
            continue
        rows = frame[frame["_run"] == number].drop_duplicates("prompt_id")
        new = dict(zip(rows["prompt_id"], rows["_new"], strict=True))
        ids = {name: run.floor[name].map(new) for name in ("prompt_id_a", "prompt_id_b")}
        parts.append(run.floor.assign(**ids).dropna(subset=list(ids)))
    if not parts:
        return None
    floor = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)  # empty ones have no types
    return floor.drop_duplicates([name for name in floor if name != "similarity"]).reset_index(drop=True)


def alike(frame: pd.DataFrame) -> int:
    """Rows that differ from another only in what results do not show (weights, calibration, precision)."""
    key = ["model", "prompt_id", "seed", "selection", "layer", *LESION, *(name for name in GENERATION if name in frame)]
    return int(frame[key][frame["selection"].isin(("leave_one_out", "only_one", "all"))].duplicated().sum())


def gather(frame: pd.DataFrame, out: Path) -> pd.DataFrame:
    """Links (or copies) images that lie outside `out` into it, so that the folder can be sent as it is.

    They come to images/<run>/, where <run> tells the folders of the runs apart, and their attention maps to
    maps/<run>/. A file that is not there stays away.
    """
    places = _places(frame)
    for name, place in places.items():
        if place != name:
            _link(out / name, out / place)
            if beside := beside_image(name):
                _link(out / beside, out / beside_image(place))
    return frame.assign(image=frame["image"].map(places))


def gathered(frame: pd.DataFrame) -> pd.DataFrame:
    """The same frame with images where `gather` puts them."""
    return frame.assign(image=frame["image"].map(_places(frame)))


def _places(frame: pd.DataFrame) -> dict[str, str]:
    places = {name: name for name in frame["image"].unique()}
    roots: dict[str, str] = {}
    for name in places:
        if name.startswith("../"):
            root, _, rest = name.rpartition("/images/")
            rest = rest or posixpath.basename(name)
            if root not in roots:
                roots[root] = slug(root)  # its hash is that of the whole path
            places[name] = f"images/{roots[root]}/{rest}"
    return places


def _link(source: Path, target: Path) -> None:
    if not source.is_file() or (target.exists() and target.samefile(source)):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomically(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, temporary)
