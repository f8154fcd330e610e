"""Every picture of a report: comparison pictures, layers x prompts, thumbnails, made in processes or threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pandas as pd
from PIL import Image

from lesion.analysis.importance import LEAVE_ONE_OUT, ONLY_ONE
from lesion.analysis.settings import BASELINE, Setting, in_order, slug
from lesion.processes import MOST, Call, Processes, cores
from lesion.report import grids
from lesion.report.boxes import COLOURS, marks
from lesion.report.canvas import load
from lesion.report.data import inside
from lesion.report.figures import COMPRESSION
from lesion.report.text import clean
from lesion.store.files import atomically

COMPARISONS, SHEETS = 64, 12  # pictures of each kind a report holds unless all are asked for
READ = 2000  # images in which a page shows what the pixel reader sees
THUMB = 256  # px, longest side; smaller images are their own thumbnail
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class Drawn:
    """Pictures of one kind in the making, each call with a text for those who cannot see what it draws.

    possible: how many there could be.
    """

    calls: list[tuple[Call[list[Path]], str]]
    possible: int

    def pictures(self) -> list[tuple[Path, str]]:
        """Path and text of each, once all are drawn."""
        return [(path, text) for call, text in self.calls for path in call.result()]


@dataclass(frozen=True)
class Pasted(Drawn):
    """Pictures by Pillow, of which threads can draw several."""

    def pictures(self) -> list[tuple[Path, str]]:
        """Path and text of each, once all are drawn."""
        if self.calls and self.calls[0][0].owner.alone:
            in_threads(lambda one: one[0].result(), self.calls)
        return super().pictures()


def in_threads(work: Callable[[_In], _Out], items: Iterable[_In]) -> list[_Out]:
    """`work` of every item, in order. Pillow decodes, resizes and encodes without the interpreter's lock."""
    waiting = list(items)
    threads = min(MOST, cores())
    size = max(1, min(256, len(waiting) // (4 * threads)))  # handing over takes longer than looking for a small file

    def several(start: int) -> list[_Out]:
        return [work(one) for one in waiting[start : start + size]]

    with ThreadPoolExecutor(threads) as pool:
        return [one for part in pool.map(several, range(0, len(waiting), size)) for one in part]


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=COMPRESSION)


def comparisons(
    run_dir: Path, part: pd.DataFrame, setting: Setting, metric: str, most: int | None, processes: Processes
) -> Drawn:
    """One comparison picture a prompt and seed of one setting, the first `most` of them (None: all)."""
    scope = grids.Scope.of(part, setting)
    by_subject = part.groupby(["prompt_id", "seed"], sort=False)
    subjects = list(part[["prompt_id", "seed"]].drop_duplicates().itertuples(index=False, name=None))

    calls = []
    for subject in subjects[:most]:
        prompt_id, seed = subject
        path = run_dir / "grids" / f"comparison--{setting.slug}--{slug(str(prompt_id))}--seed{seed}.png"
        draw = partial(grids.compare, by_subject.get_group(subject), scope, run_dir, prompt_id, seed, metric=metric)
        text = f"Comparison for prompt {clean(prompt_id, 100)}, seed {seed}"
        calls.append((processes.call(partial(_drawn, draw, path)), text))
    return Pasted(calls, len(subjects))


def _drawn(draw: Callable[[], Image.Image], path: Path) -> list[Path]:
    _save(draw(), path)
    return [path]


def layer_grids(
    run_dir: Path, part: pd.DataFrame, setting: Setting, metric: str, most: int | None, processes: Processes
) -> Drawn:
    """Layers x prompts, one picture a selection and seed, more where the prompts do not fit side by side."""
    room = grids.prompts_a_picture(part, run_dir)
    ids = in_order(part["prompt_id"])
    pages = [ids[start : start + room] for start in range(0, len(ids), room)]
    present = [name for name in (LEAVE_ONE_OUT, ONLY_ONE) if (part["selection"] == name).any()]
    jobs = [
        (name, seed, index)
        for seed in in_order(part["seed"])
        for index in range(len(pages))
        for name in present  # both kinds of one page before the next page: the first few then hold both
    ]

    calls = []
    for selection, seed, index in jobs[:most]:
        suffix = f"--page{index + 1}" if len(pages) > 1 else ""
        path = run_dir / "grids" / f"layers-by-prompts--{selection}--{setting.slug}--seed{seed}{suffix}.png"
        shown = part[(part["seed"] == seed) & part["selection"].isin((BASELINE, selection))]
        draw = partial(
            grids.layer_grid, shown, setting, run_dir, seed, selection, prompt_ids=pages[index], metric=metric
        )
        text = f"Layers by prompts, {selection.replace('_', '-')}, seed {seed}"
        calls.append((processes.call(partial(_drawn, draw, path)), text))
    return Pasted(calls, len(jobs))


def thumbnail_path(image: str) -> str:
    """Where the thumbnail of an image lies; both paths are relative to the run folder."""
    path = PurePosixPath(image)
    inner = path.relative_to("images") if path.is_relative_to("images") else path
    return f"thumbs/{inner.with_suffix('.jpg')}"


def _thumbnail(run_dir: Path, image: str) -> str:
    source, target = run_dir / image, run_dir / thumbnail_path(image)
    try:
        with Image.open(source) as picture:
            if max(picture.size) <= THUMB:
                return ""
            if target.is_file() and target.stat().st_mtime_ns >= source.stat().st_mtime_ns:
                return thumbnail_path(image)
            target.parent.mkdir(parents=True, exist_ok=True)
            small = picture.convert("RGB")
            small.thumbnail((THUMB, THUMB), Image.Resampling.BOX, reducing_gap=2.0)
            with atomically(target) as temporary:
                small.save(temporary, format="JPEG", quality=85)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""  # the page says so where it cannot show an image
    return thumbnail_path(image)


def thumbnails(run_dir: Path, images: Iterable[str]) -> dict[str, str]:
    """Write thumbs/ for images larger than THUMB that have no newer one; image path -> thumbnail path."""
    names = list(dict.fromkeys(images))
    made = in_threads(partial(_thumbnail, run_dir), names)
    return {name: thumb for name, thumb in zip(names, made, strict=True) if thumb}


def page_marks(run_dir: Path, frame: pd.DataFrame) -> list[list[dict[str, Any]]]:
    """Return the boxes of every row as JSON data for the page; nothing where no prompt has any.

    Objects are looked for in the first READ images: reading one takes about 10 ms.
    """
    if "boxes" not in frame or not (frame["boxes"].fillna("") != "").any():
        return []
    out = []
    for number, record in enumerate(frame.to_dict("records")):
        name = inside(record["image"]) if record["status"] == "ok" and number < READ else ""
        found = marks(record, load(run_dir / name) if name else None)
        out.append([{**vars(mark), "colour": COLOURS[mark.colour]} for mark in found])
    return out
