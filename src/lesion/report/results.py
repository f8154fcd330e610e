"""The results of one or several runs as an object: frames, images and figures, all of them the report's own."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from lesion.analysis.aspects import aspect_table
from lesion.analysis.bootstrap import METHODS
from lesion.analysis.cells import names_of
from lesion.analysis.confirm import confirmed
from lesion.analysis.importance import LEAVE_ONE_OUT, ONLY_ONE, importance_metric, layer_by_prompt, status_counts
from lesion.analysis.reading import adherence_lost
from lesion.analysis.settings import BASELINE, Setting, in_order, only_setting, rows, settings
from lesion.errors import RequestError
from lesion.report import beside, contents, crossing, figures, grids, maps, write_report
from lesion.report.canvas import load
from lesion.report.findings import Findings, bounded_estimates, findings, slim
from lesion.report.merging import Refused, gather, put_together, run_folders
from lesion.report.text import as_html, clean, short_names
from lesion.study.columns import GENERATION, LESION, TEXTS
from lesion.study.confirmation import Confirmation

DPI = 120  # of figures as a notebook shows them
SHOWN = 12  # names that a refusal lists


class Results:
    """What one run, or several that may stand in one table, came to.

    folder: of the run, or one above all of them; paths of images are relative to it. frame: one row per image, as in
    results.parquet. floor: similarities between baselines, one row a pair; None if the run has none. notes: which runs
    are kept apart, with `mix`. maps: measures of attention maps, one row per image, layer that looks, and word; None
    without `capture=maps`.
    """

    def __init__(
        self,
        folder: Path,
        frame: pd.DataFrame,
        floor: pd.DataFrame | None,
        notes: Sequence[str] = (),
        maps: pd.DataFrame | None = None,
    ):
        self.folder, self.frame, self.floor, self.notes, self.maps = folder, frame, floor, list(notes), maps
        self.plot = Plots(self)

    @classmethod
    def read(cls, paths: Sequence[Path], mix: bool = False) -> Results:
        """Of every run folder among or below `paths`, merged as `lesion-report` does.

        Raises RequestError where there is none, one cannot be read, or they cannot be compared (without `mix`).
        """
        try:
            runs = run_folders(paths)
            folder = Path(os.path.commonpath([path.absolute() for path in paths]))
            frame, floor, measures, notes = put_together(runs, folder, mix)
        except (Refused, OSError) as error:
            raise RequestError("open", str(error)) from None
        texts: dict[Any, str] = {name: "str" for name in TEXTS if name in frame}
        return cls(folder, frame.astype(texts), floor, notes, measures)

    @property
    def failures(self) -> pd.DataFrame:
        """The images that failed or are invalid, with the reason; no mean takes them in."""
        names = ["model", "prompt_id", "seed", "selection", "replacement", "layer", "status", "reason"]
        return self.frame.loc[self.frame["status"] != "ok", names].reset_index(drop=True)

    @property
    def settings(self) -> pd.DataFrame:
        """What is never averaged together (model, replacement, window, …), one row each: what `**where` can name."""
        return pd.DataFrame([one.columns() for one in settings(self.frame)])

    @cached_property
    def findings(self) -> Findings:
        """All that the analysis says, worked out once; the report reads the same."""
        return findings(self.frame, self.floor)

    def importance(self) -> pd.DataFrame:
        """1 - similarity to the baseline with this layer lesioned: one row a setting and layer, in depth order.

        Columns: layer; mean (over seeds, then prompts); low, high (95 %), method; n_prompts, n_images and how many
        images are left out; the setting's.
        """
        return self._of_layers("importance")

    def sufficiency(self) -> pd.DataFrame:
        """Similarity to the baseline with every other layer lesioned; columns as of `importance`."""
        return self._of_layers("sufficiency")

    def adherence(self, selection: str = "leave_one_out") -> pd.DataFrame:
        """How much less images show of their prompts under a lesion, by every text-image metric and reader.

        One row a setting, metric and layer: baseline, lesioned, lost (baseline minus lesioned, signed) with its
        interval, and a verdict: loses, gains, not settled, no interval. With `importance` it tells which layers change
        much and lose little. Columns as of `analysis.reading.adherence_lost`; empty without such a metric.
        """
        return adherence_lost(self.frame, selection)

    def by_aspect(self, measure: str = "importance") -> pd.DataFrame:
        """`importance`, or `sufficiency`, one row an aspect of the prompts too; empty where prompts have no aspects."""
        if measure not in ("importance", "sufficiency"):
            raise RequestError("measure", f"got {measure!r}; allowed: importance, sufficiency")
        return self._estimates("aspects", measure)

    @cached_property
    def _layers(self) -> pd.DataFrame:
        """`Findings.layers`, without the rest, which takes many times as long for a large study."""
        metric = importance_metric(self.frame)
        return bounded_estimates(slim(self.frame, metric), metric, method=METHODS[0])

    def _of_layers(self, measure: str) -> pd.DataFrame:
        if "findings" in vars(self):
            return self._estimates("layers", measure)
        try:
            return self._measured(self._layers, measure)
        except ValueError as error:
            raise RequestError(measure, str(error)) from None

    def _estimates(self, name: str, measure: str) -> pd.DataFrame:
        if trouble := next((one for one in self.findings.troubles if one.startswith(f"{name}: ")), ""):
            raise RequestError(measure, trouble.removeprefix(f"{name}: "))
        return self._measured(getattr(self.findings, name), measure)

    def _measured(self, table: pd.DataFrame, measure: str) -> pd.DataFrame:
        if table.empty:
            return pd.DataFrame(columns=["layer", "mean", "low", "high", "method", "n_prompts", "n_images"])
        first = table.columns.get_loc("measure")
        table = table[[*table.columns[first:], *table.columns[:first]]]
        found: pd.DataFrame = table[table["measure"] == measure].drop(columns="measure").reset_index(drop=True)
        return found

    def side_by_side(self, **where: Any) -> pd.DataFrame:
        """Layers (index, in depth order) by models, kinds of lesion and replacements: the table of the report.

        Columns: for each measure and what tells the settings apart, "importance sd15, zero" say, with " low" and
        " high" (95 %); of models with different layers "depth MODEL", from 0 for the first layer to 1 for the last.
        where: values of what the settings share (window, strength, …), if there are several groups of them. Empty where
        no settings stand side by side. Raises RequestError where no group or several fit.
        """
        every = beside.side_by_side(self.findings)
        if not every:
            return pd.DataFrame(index=pd.Index([], name="layer"))
        asked = _columns(where)
        fitting = [one for one in every if all(one.shared.get(name) == value for name, value in asked.items())]
        if len(fitting) != 1:
            named = "; ".join(one.alike or "the defaults" for one in every)
            raise RequestError("where", f"must fit one of these groups of settings: {named}")
        return fitting[0].table.set_index("layer")

    def differences(self) -> pd.DataFrame:
        """Paired differences of layers between settings that differ in model, kind or replacement alone.

        One row a pair, measure and layer that both have: difference (other minus one, over the same prompts and seeds)
        with low, high (95 %), method, n_prompts, n_images; columns as of `side_by_side.paired_differences`.
        """
        return self.findings.differences

    def confirmed(self) -> pd.DataFrame:
        """The tests of a confirmatory study (`confirm.hypotheses`), by the plan that its run folder has.

        Columns as of `analysis.confirm.confirmed`. Raises RequestError without such a plan, where runs have several,
        and where it is not what its hash says.
        """
        paths = [folder / "confirmation.json" for folder in run_folders([self.folder])]
        plans = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
        if len(plans) != len(paths) or any(one != plans[0] for one in plans):
            raise RequestError("confirm", "every run folder must have one plan, confirmation.json, the same in all")
        plan = Confirmation.read(plans[0])
        if plan.sha256 != plans[0]["sha256"]:
            raise RequestError("confirm", "confirmation.json was changed: its hash is that of another plan")
        return confirmed(self.frame, self.findings.pairs, plan)

    def layers(self) -> pd.DataFrame:
        """All that is said of each layer, as in the report's layer table: `Findings.summary` of every setting."""
        tables = [table for one in settings(self.frame) if len(table := self.findings.summary(one))]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def by_prompt(self, selection: str = LEAVE_ONE_OUT, **where: Any) -> pd.DataFrame:
        """Layers in depth order (index) x prompts (columns) of one setting: importance, of only_one sufficiency."""
        return layer_by_prompt(rows(self.frame, self._setting(where)), self.findings.metric, selection)

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the report by the name of its file, as its CSV has it."""
        one_by_one = [table for one in settings(self.frame) for table in contents.of_setting(self.findings, one)]
        made = [*one_by_one, *crossing.over_settings(self.findings), contents.status(self.frame)]
        return {table.stem: table.raw for table in made}

    def report(self, folder: str | os.PathLike[str] | None = None, **options: Any) -> Path:
        """Write the report (page, tables, figures, grids) into the folder of the results, or another; the page's path.

        options: of `lesion.report.write_report`, say all_grids=True.
        """
        out = self.folder if folder is None else Path(folder).expanduser()
        out.mkdir(parents=True, exist_ok=True)
        start = Path(os.path.relpath(self.folder.resolve(), out.resolve()))
        images = [(start / name).as_posix() if name else "" for name in self.frame["image"]]
        frame = gather(self.frame.assign(image=images), out)
        return write_report(out, frame, self.floor, self.maps, notes=self.notes, **options)[-1]

    def image(
        self,
        layer: str | Sequence[str] | None = None,
        selection: str | None = None,
        *,
        prompt: int | str | None = None,
        seed: int | None = None,
        **where: Any,
    ) -> Image.Image:
        """One picture; without layer and selection, the baseline.

        layer: a module path, or several that are lesioned together. prompt: its place (from 0), id or text. where: any
        column (replacement="mean", strength=0.5, window=(0, 0.5), …). What is not named must have one value.
        Raises RequestError, naming what there is, where none or several fit; where the image could not be made.
        """
        row = self._row(layer, selection, prompt, seed, where)
        picture = load(self.folder / row["image"]) if row["image"] else None
        if picture is None:
            why = f"it {row['status']}: {row['reason']}" if row["reason"] else f"no readable file {row['image']!r}"
            raise RequestError("image", why)
        return picture

    def attention(
        self,
        layer: str | None = None,
        word: str | None = None,
        *,
        prompt: int | str | None = None,
        seed: int | None = None,
        selection: str | None = None,
        lesioned: str | Sequence[str] | None = None,
        branch: str = "cond",
        step: int | None = None,
        head: int | None = None,
        **where: Any,
    ) -> NDArray[np.float32]:
        """How much each place of one image looks at a word: (height, width) of the layer, in [0, 1].

        Needs a run with `capture=maps`. Mean over heads and steps, conditional branch, unless said otherwise.
        layer: module path of the attention that looks; None merges all, each brought to the size of the largest.
        word: of the prompt, as "circle", "circle#2" for the second, or several words in a row, whose maps are added.
        selection, lesioned: which lesion the image is made under, its layer or layers; without, the baseline.
        branch: cond or uncond, as captured. step, head: number of one, where they were captured apart.
        prompt, seed, where: as of `image`.

        Raises RequestError, naming what there is, where there is no such map.
        """
        row = self._row(lesioned, selection, prompt, seed, where)
        return maps.of_image(self.folder, row, layer, word, branch, step, head)

    def _row(
        self,
        layer: str | Sequence[str] | None,
        selection: str | None,
        prompt: int | str | None,
        seed: int | None,
        where: dict[str, Any],
    ) -> pd.Series:
        """The row of one image."""
        frame = self._about(prompt, seed)
        if layer is None and selection is None:
            selection = BASELINE
        frame = self._narrowed(frame, {} if selection is None else {"selection": selection})
        if layer is not None:
            lesioned = frame[frame["selection"] != BASELINE]
            named = lesioned.apply(_layers, axis=1) if len(lesioned) else pd.Series(dtype=object)
            wanted = (layer,) if isinstance(layer, str) else tuple(layer)
            frame = lesioned[[set(one) == set(wanted) or "+".join(one) == layer for one in named]]
            if frame.empty:
                raise RequestError("layer", f"{layer!r} is not here; there are: {_listed(map('+'.join, named))}")
        frame = self._narrowed(frame, where)
        if len(frame) > 1:
            raise RequestError(*self._several(frame))
        row: pd.Series = frame.iloc[0]
        return row

    def _about(self, prompt: int | str | None, seed: int | None) -> pd.DataFrame:
        """The rows of one prompt and seed."""
        frame = self.frame
        ids = in_order(frame["prompt_id"])
        if isinstance(prompt, str):
            chosen = in_order(frame.loc[(frame["prompt_id"] == prompt) | (frame["prompt"] == prompt), "prompt_id"])
        elif prompt is None:
            chosen = ids
        else:
            chosen = ids[prompt : prompt + 1] if 0 <= prompt < len(ids) else []
        if len(chosen) != 1:
            what = "name one of" if prompt is None else f"{prompt!r} is not here; there are"
            what = f"{prompt!r} is the text of several; name one of" if len(chosen) > 1 and prompt is not None else what
            raise RequestError("prompt", f"{what}: {_listed(f'{n} {one}' for n, one in enumerate(ids))}")
        frame = frame[frame["prompt_id"] == chosen[0]]
        seeds = in_order(frame["seed"])
        if seed is None and len(seeds) > 1:
            raise RequestError("seed", f"name one of: {_listed(seeds)}")
        if seed is not None and seed not in seeds:
            raise RequestError("seed", f"{seed!r} is not here; there are: {_listed(seeds)}")
        found: pd.DataFrame = frame if seed is None else frame[frame["seed"] == seed]
        return found

    def _narrowed(self, frame: pd.DataFrame, where: dict[str, Any]) -> pd.DataFrame:
        for name, value in _columns(where).items():
            if name not in frame:
                raise RequestError(name, f"is no column of these results; there are {', '.join(map(str, frame))}")
            there = in_order(frame[name])
            frame = frame[frame[name] == value]
            if frame.empty:
                raise RequestError(name, f"{value!r} is not here; there are: {_listed(there)}")
        return frame

    def _several(self, frame: pd.DataFrame) -> tuple[str, str]:
        """Which column tells the rows apart, and what it can be."""
        names = [n for n in ("model", "selection", "layer", *LESION, *GENERATION, "lesioned", "cell") if n in frame]
        name = next((name for name in names if frame[name].nunique(dropna=False) > 1), "selection")
        return name, f"{len(frame)} images fit; name one of: {_listed(in_order(frame[name]))}"

    def _setting(self, where: dict[str, Any]) -> Setting:
        try:
            return only_setting(self.frame, **_columns(where))
        except ValueError as error:
            raise RequestError("where", str(error)) from None

    def _facts(self) -> dict[str, Any]:
        counts = self.frame["status"].value_counts()
        return {
            "model": ", ".join(clean(name, 60) for name in in_order(self.frame["model"])),
            "images": len(self.frame),
            "prompts": self.frame["prompt_id"].nunique(),
            "seeds": self.frame["seed"].nunique(),
            "layers": self.frame.loc[self.frame["layer"].fillna("") != "", "layer"].nunique(),
            "failed or invalid": int(len(self.frame) - counts.get("ok", 0)),
        }

    def __repr__(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self._facts().items())
        return f"<lesion results: {facts}; {self.folder}>"

    def _repr_html_(self) -> str:
        return as_html(f"Results in {self.folder}", self._facts()) + status_counts(self.frame).to_html(index=False)


class Plots:
    """Figures of the report, for a notebook: matplotlib figures that show themselves; `savefig` writes them."""

    def __init__(self, results: Results):
        self._results = results

    def layers(self, **where: Any) -> Figure:
        """Importance and sufficiency by layer with their intervals. where: names one setting if there are several."""
        found, setting = self._results.findings, self._results._setting(where)
        table = found.summary(setting)
        if table.empty:
            raise RequestError("selection", "these results have no leave_one_out and no only_one")
        return _shown(figures.layer_figure(table, clean(setting.label), found.metric, found.control(setting)))

    def prompts(self, selection: str = LEAVE_ONE_OUT, **where: Any) -> Figure:
        """Heat map of layers by prompts."""
        found, setting = self._results.findings, self._results._setting(where)
        table = self._results.by_prompt(selection, **where)
        if not table.size:
            raise RequestError("selection", f"these results have no {selection!r}")
        texts = self._results.frame.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"]
        table = table.rename(columns=short_names({one: str(texts[one]) for one in table.columns}))
        meaning = f"sufficiency: {found.metric}" if selection == ONLY_ONE else f"importance: 1 - {found.metric}"
        return _shown(figures.heat_map(table, meaning, clean(setting.label), selection != ONLY_ONE))

    def aspects(self, **where: Any) -> Figure:
        """Heat map of importance by layer and aspect of the prompts."""
        found, setting = self._results.findings, self._results._setting(where)
        table = found.of("aspects", setting) if len(found.aspects) else found.aspects
        if table.empty or not (table["measure"] == "importance").any():
            raise RequestError("prompts", "these results have no aspects with leave_one_out")
        meaning = f"importance: 1 - {found.metric}"
        return _shown(figures.heat_map(aspect_table(table), meaning, clean(setting.label), columns="aspect"))

    def sheet(
        self,
        prompts: Sequence[int | str],
        layers: Sequence[str],
        *,
        seed: int | None = None,
        selection: str = LEAVE_ONE_OUT,
        columns: int = 1,
        **where: Any,
    ) -> Figure:
        """A figure for print: the baseline and chosen layers (columns) of chosen prompts (rows), text as vectors.

        prompts: places (from 0), ids or texts. columns: of the paper that it spans, 1 (3.3 inches) or 2 (6.9).
        `savefig("figure.pdf")` writes it. Raises RequestError, naming what there is, for what is not there.
        """
        if columns not in (1, 2):
            raise RequestError("columns", f"got {columns!r}; allowed: 1, 2")
        results = self._results
        made = {name: value for name, value in where.items() if name in ("model", *GENERATION)}  # also of the baseline
        rows_ = []
        for prompt in prompts:
            line = [results.image(prompt=prompt, seed=seed, **made)]
            line += [results.image(layer, selection, prompt=prompt, seed=seed, **where) for layer in layers]
            rows_.append(line)
        texts = [str(results._about(prompt, seed)["prompt"].iloc[0]) for prompt in prompts]
        return _shown(
            figures.sheet(rows_, ["baseline", *layers], texts, figures.SINGLE if columns == 1 else figures.DOUBLE)
        )

    def grid(self, prompt: int | str | None = None, seed: int | None = None, **where: Any) -> Figure:
        """One prompt and seed: the baseline and every lesion, labelled with the similarity."""
        results = self._results
        about, setting = results._about(prompt, seed), results._setting(where)
        part = rows(results.frame, setting)
        here = part[part.index.isin(about.index)]
        scope, metric = grids.Scope.of(part, setting), results.findings.metric
        first = about.iloc[0]
        picture = grids.compare(here, scope, results.folder, first["prompt_id"], int(first["seed"]), metric=metric)
        figure = Figure(figsize=(picture.width / DPI, picture.height / DPI), dpi=DPI)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(picture, interpolation="nearest")
        axes.set_axis_off()
        return _shown(figure)


def _shown(figure: Figure) -> Figure:
    """A figure that a notebook shows as the value of a cell, without pyplot's state."""
    setattr(figure, "_repr_png_", partial(_png, figure))  # noqa: B010
    return figure


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    with figures.styled():
        figure.set_dpi(DPI)
        FigureCanvasAgg(figure).print_png(data)
    return data.getvalue()


def _columns(where: dict[str, Any]) -> dict[str, Any]:
    """window=(start, end) as the columns that hold it."""
    found = dict(where)
    if "window" in found:
        found["window_start"], found["window_end"] = found.pop("window")
    return found


def _layers(row: pd.Series) -> tuple[str, ...]:
    """What a row is about: its layer, or the layers that are lesioned together."""
    return (row["layer"],) if row["layer"] else names_of(row.get("lesioned", ""))


def _listed(values: Any) -> str:
    names = [clean(value, 100) or "''" for value in dict.fromkeys(values)]
    rest = len(names) - SHOWN
    return ", ".join([*names[:SHOWN], *([f"{rest} more"] if rest > 0 else [])]) or "none"
