"""What a study is read from: comparison pictures, tables, figures and a page, made from the results frame."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, unquote

import pandas as pd
from PIL import Image

from lesion.analysis.bootstrap import METHODS
from lesion.analysis.settings import rows, settings
from lesion.processes import Processes
from lesion.report import attention, contents, crossing, examples, fonts, html, illustrations, pictures, tables
from lesion.report.data import inside, page_data
from lesion.report.figures import Look, looking
from lesion.report.findings import Findings, findings
from lesion.report.pictures import Drawn
from lesion.report.text import clean
from lesion.report.words import QUESTIONS, answer, answers, comparison, ranking_lines
from lesion.store import tables as stored_tables
from lesion.store.files import atomically

__all__ = ["OPTIONS", "findings", "ranking_lines", "write_report"]


MAPS = "maps.parquet"
OPTIONS = "report.json"
ALL = "lesion-report --all-grids draws all."
PAGED = 100_000  # rows that the page holds: a browser keeps all of them in memory


def _link(path: Path, root: Path) -> str:
    return quote(path.relative_to(root).as_posix())


def _shown(drawn: Sequence[tuple[Path, str]], root: Path) -> list[html.Picture]:
    found = []
    for path, text in drawn:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                found.append(html.Picture(_link(path, root), text, *picture.size))
    return found


def _left_out(kind: str, drawn: Drawn) -> list[str]:
    """A line that says so where not every picture is drawn."""
    done = len(drawn.calls)
    if done == drawn.possible:
        return []
    return [
        f"Only the first {done} of {drawn.possible} {kind} are drawn; {ALL} "
        "The heat map, the images below and every number cover the whole study."
    ]


def _texts(frame: pd.DataFrame) -> set[str]:
    """All that a frame says in words that may be drawn."""
    words = frame.select_dtypes(["object", "string"]).drop(columns=["cell", "image"], errors="ignore")
    return {value for column in words for value in words[column].unique() if isinstance(value, str)}


def _thumbnails(run_dir: Path, frame: pd.DataFrame) -> dict[str, str]:
    """Of the images that may be large: without recorded sizes each file is asked."""
    names = frame["image"].fillna("").astype(object).map(inside)
    large = names != ""
    if {"height", "width"} <= set(frame.columns):
        large &= ~(frame[["height", "width"]].max(axis=1) <= pictures.THUMB)
    return pictures.thumbnails(run_dir, names[large])


def write_report(
    run_dir: Path,
    frame: pd.DataFrame,
    floor: pd.DataFrame | None = None,
    maps: pd.DataFrame | None = None,
    *,
    all_grids: bool = False,
    clustered: bool = False,
    siunitx: bool = False,
    interval: str = METHODS[0],
    notes: Sequence[str] = (),
    known: Findings | None = None,
    styles: Sequence[str] = (),
    titles: bool = False,
    processes: Processes | None = None,
) -> list[Path]:
    """Write grids/, tables/, figures/, thumbs/, report.json and report.html below `run_dir`.

    Image paths are relative to it.

    floor: similarities between baselines (`lesion.analysis.floor`); without it all that needs a noise floor is n/a.
    maps: measures of attention maps; without, those of the folder's maps.parquet if it has one.
    Every setting (model, replacement, window, branch, strength) has files of its own. A large study gets its first
    comparison pictures only, and a line that says so, unless `all_grids`. clustered: heat maps with layers and prompts
    in clusters too. siunitx: LaTeX tables with S columns. interval: of means, one of
    `bootstrap.METHODS`. notes: lines for the top of the page. known: the findings of
    this frame and floor where they are worked out already. styles, titles: how figures look, see `figures.Look`.
    processes: that draw too, where they are started; the files are the same.
    Returns the paths, the page last. Raises OSError for a style that there is not.
    """
    with looking(Look(tuple(styles), titles)):
        several = processes or Processes(0)
        written = _write(run_dir, frame, floor, maps, all_grids, clustered, siunitx, interval, notes, known, several)
    options = {
        **{"all_grids": all_grids, "clustered": clustered, "siunitx": siunitx, "interval": interval},
        **{"notes": list(notes), "styles": [str(style) for style in styles], "titles": titles},
    }
    with atomically(run_dir / OPTIONS) as temporary:  # by them the same report can be made again
        temporary.write_text(json.dumps(options, indent=1), encoding="utf-8")
    return [*written[:-1], run_dir / OPTIONS, written[-1]]


def _write(
    run_dir: Path,
    frame: pd.DataFrame,
    floor: pd.DataFrame | None,
    maps: pd.DataFrame | None,
    all_grids: bool,
    clustered: bool,
    siunitx: bool,
    interval: str,
    notes: Sequence[str],
    known: Findings | None,
    processes: Processes,
) -> list[Path]:
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    frame = frame.reset_index(drop=True)
    fonts.families("".join(_texts(frame)))  # in one line, what cannot be drawn
    known = findings(frame, floor, interval) if known is None else replace(known, frame=frame)
    chosen = settings(frame)
    most, sheets = (
        None if all_grids else max(1, n // max(1, len(chosen))) for n in (pictures.COMPARISONS, pictures.SHEETS)
    )
    written: list[Path] = []
    sections = []
    begun = []
    for number, setting in enumerate(chosen):  # first what other processes may take over
        part = rows(frame, setting)
        short = number >= illustrations.SETTINGS and not all_grids
        layer_grids = pictures.layer_grids(run_dir, part, setting, known.metric, sheets, processes)  # at once there
        drawn = illustrations.of_setting(run_dir / "figures", known, setting, processes, clustered, short)
        comparisons = pictures.comparisons(run_dir, part, setting, known.metric, most, processes)  # small, so the last
        begun.append((setting, drawn, comparisons, layer_grids, short))
    drawn_over = illustrations.over_settings(run_dir / "figures", known, processes)
    tabled = []
    for setting in chosen:
        made = contents.of_setting(known, setting)
        listed = [path for table in made for path in tables.write(run_dir / "tables", table, siunitx)]
        tabled.append((made, listed, answer(known, setting), examples.pairs(known, setting), answers(known, setting)))
    over = _over_settings(run_dir, known, siunitx, drawn_over)
    for number, (one, (made, listed, said, pairs, told)) in enumerate(zip(begun, tabled, strict=True)):
        setting, drawn, comparisons, layer_grids, short = one
        figures_, beside, by_layer = drawn.pictures(), comparisons.pictures(), layer_grids.pictures()
        written += [path for path, _ in (*beside, *by_layer, *figures_)] + listed
        sections.append(
            html.Section(
                clean(setting.label),
                setting.slug,
                said,
                pairs,
                _parts(told, made, _shown(figures_, run_dir)),
                _shown(beside, run_dir),
                [_link(path, run_dir) for path in [*listed, *(path for path, _ in figures_)]],
                [
                    *_left_out("comparison pictures (one a prompt and seed)", comparisons),
                    *_left_out("pictures of layers by prompts", layer_grids),
                    *([f"Only the first {illustrations.SETTINGS} settings have every figure; {ALL}"] if short else []),
                ],
                number,
            )
        )
    if over is not None:
        sections.append(over)
        written += [run_dir / unquote(path) for path in over.files]
    looks = attention.pictures(run_dir, frame, known.metric, None if all_grids else attention.SUBJECTS)
    written += attention.files(looks)
    if (seen := _maps_section(run_dir, maps, siunitx)) is not None:
        sections.append(seen)
        written += [run_dir / unquote(path) for path in seen.files]
    written += tables.write(run_dir / "tables", contents.status(frame), siunitx)
    paged = frame if all_grids else _first_prompts(frame, PAGED)
    if len(paged) < len(frame):
        many, few = frame["prompt_id"].nunique(), paged["prompt_id"].nunique()
        notes = [
            *notes,
            f"The heat map by prompts and the images below are of the first {few} of {many} prompts; sentences, tables "
            f"and figures cover all. {ALL}",
        ]
    thumbs = _thumbnails(run_dir, paged)
    written += [run_dir / path for path in thumbs.values()]
    shown = {
        subject: [html.Word(one.word, _word_pictures(one, run_dir)) for one in words]
        for subject, words in attention.by_subject(looks).items()
    }
    data = page_data(paged, thumbs, known.metric, pictures.page_marks(run_dir, paged))
    return written + html.write(run_dir, frame, sections, data, known.metric, notes, shown)


def _first_prompts(frame: pd.DataFrame, most: int) -> pd.DataFrame:
    """The rows of the first prompts, so many that there are at most `most`, and of one at least."""
    if len(frame) <= most:
        return frame
    counts = frame.groupby("prompt_id", sort=False).size().cumsum()
    return frame[frame["prompt_id"].isin(counts.index[: max(1, int((counts <= most).sum()))])]


def _word_pictures(one: attention.WordPicture, root: Path) -> list[html.Picture]:
    texts = {kind: f"{one.word} in {one.subject}: {attention.CAPTIONS[kind]}" for kind in one.paths}
    return _shown([(path, texts[kind]) for kind, path in one.paths.items()], root)


def _maps_section(run_dir: Path, maps: pd.DataFrame | None, siunitx: bool) -> html.Section | None:
    """Measures of attention maps; None where the run kept none."""
    if maps is None and (path := run_dir / MAPS).is_file():
        maps = stored_tables.read(path)
    if maps is None or maps.empty:
        return None
    made = [table for table in attention.tables(maps) if table.cells]
    if not made:
        return None
    listed = [_link(path, run_dir) for table in made for path in tables.write(run_dir / "tables", table, siunitx)]
    part = html.Part("What does each layer look at?", tables=[*made])
    return html.Section("Attention maps: in detail", "attention-maps", parts=[part], files=listed)


_UNDER = {
    **{"layers": "layers", "order": "layers", "profile": "layers", "heatmap": "layers", "heatmap-clustered": "layers"},
    **{"modes": "alone", "aspects": "aspects", "aspects-clustered": "aspects", "reading": "aspects"},
    **{"alone": "aspects", "pairs": "together", "cumulative": "together", "shapley": "together"},
}  # the question under which a table or figure stands, by the first part of its file's name


def _parts(said: dict[str, list[str]], made: Sequence[tables.Table], drawn: Sequence[html.Picture]) -> list[html.Part]:
    """Sentences, tables and figures under the question that they answer; the page's heat map has layers by prompts."""
    parts = {name: html.Part(question, said[name]) for name, question in QUESTIONS.items()}
    for table in made:
        if (kind := table.stem.partition("--")[0]) not in ("prompts", "layers-compact"):
            parts[_UNDER.get(kind, "layers")].tables.append(table)
    for picture in drawn:
        kind = picture.path.rpartition("/")[2].partition("--")[0]
        parts[_UNDER.get(kind, "layers")].figures.append(picture)
    return [part for part in parts.values() if part.sentences or part.tables or part.figures]


AGREE = "Do settings agree, and how large is noise?"
BESIDE = ("side-by-side", "differences")  # files of layers side by side begin so


def _over_settings(run_dir: Path, known: Findings, siunitx: bool, drawn: Drawn) -> html.Section | None:
    """What is said of all settings together; None where there is nothing."""
    made = crossing.over_settings(known)
    sentences = comparison(known)
    if not made and not drawn.calls and not sentences:
        return None
    listed = [path for table in made for path in tables.write(run_dir / "tables", table, siunitx)]
    figures_ = drawn.pictures()
    files = [_link(path, run_dir) for path in [*listed, *(path for path, _ in figures_)]]
    parts = [html.Part("How do settings compare, layer by layer?"), html.Part(AGREE, sentences)]
    for table in made:
        parts[not table.stem.startswith(BESIDE)].tables.append(table)
    for picture in _shown(figures_, run_dir):
        parts[not picture.path.rpartition("/")[2].startswith(BESIDE)].figures.append(picture)
    parts = [part for part in parts if part.sentences or part.tables or part.figures]
    return html.Section("Settings compared", "over-settings", parts=parts, files=files)
