"""Tables as CSV (raw numbers), Markdown and LaTeX (booktabs; needs \\usepackage{booktabs} only)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lesion.analysis.importance import LEAVE_ONE_OUT, ONLY_ONE, layer_by_prompt, layer_table, status_counts
from lesion.analysis.settings import Setting
from lesion.report.text import clean, code, latex, markdown, number

HEADERS = {
    "rank": "rank",
    "layer": "layer",
    "importance": "importance",
    "importance_sd": "sd",
    "sufficiency": "sufficiency",
    "sufficiency_sd": "sd",
    "n_images": "images",
    "n_invalid": "invalid",
    "n_failed": "failed",
    "n_unscored": "unscored",
    "effect": "effect",
}
EFFECTS = {"none": "no effect", "yes": "yes", "n/a": "n/a"}
TEXTS = ("layer", "effect", "model", "selection", "replacement")  # left-aligned columns
WIDE = 6  # prompt columns a LaTeX table holds


def caption(part: pd.DataFrame, setting: Setting, what: str, metric: str = "clip_similarity") -> str:
    """Plain text: what is shown, metric, setting, how many prompts and seeds have a valid lesioned image."""
    valid = part[(part["status"] == "ok") & (part["selection"] != "none")]
    prompts, seeds = valid["prompt_id"].nunique(), valid["seed"].nunique()
    return (
        f"{what} Model {clean(setting.label)}; metric {metric}; "
        f"n = {prompts} {'prompt' if prompts == 1 else 'prompts'}, {seeds} {'seed' if seeds == 1 else 'seeds'}."
    )


def to_markdown(table: pd.DataFrame, caption: str = "") -> str:
    """A pipe table of ready-made cells, numbers and labels aligned by the reader's renderer."""
    lines = ["| " + " | ".join(markdown(name) for name in table.columns) + " |"]
    lines.append("|" + "|".join(" --- " for _ in table.columns) + "|")
    lines += ["| " + " | ".join(map(str, record)) + " |" for record in table.itertuples(index=False)]
    return (markdown(caption, 2000) + "\n\n" if caption else "") + "\n".join(lines) + "\n"


def to_latex(table: pd.DataFrame, caption: str, label: str) -> str:
    """A table environment of cells that are LaTeX already; headers and caption are escaped here."""
    plain = table.copy()
    plain.columns = pd.RangeIndex(table.shape[1])  # Styler refuses repeated column names
    heads: dict[object, str] = dict(enumerate(table.columns))
    styler = plain.style.hide(axis="index").format_index(lambda index: latex(heads[index]), axis=1)
    return styler.to_latex(
        hrules=True,
        column_format="".join("l" if name in TEXTS else "r" for name in table.columns),
        caption=latex(caption, 2000),
        label=label,
        position="tbp",
        position_float="centering",
    )


def _layer_cells(table: pd.DataFrame, as_latex: bool) -> pd.DataFrame:
    """The layer table as text cells; the `unscored` column only where there is something to count."""
    shown = {name: head for name, head in HEADERS.items() if name != "n_unscored" or table["n_unscored"].any()}
    cells = table[list(shown)].astype(object).map(number)
    cells["layer"] = [rf"\texttt{{{latex(name)}}}" if as_latex else code(name) for name in table["layer"]]
    cells["effect"] = table["effect"].map(EFFECTS)
    return cells.set_axis(list(shown.values()), axis=1)


def _prompt_cells(table: pd.DataFrame, as_latex: bool) -> pd.DataFrame:
    cells = table.astype(object).map(number)
    names = [rf"\texttt{{{latex(name)}}}" if as_latex else code(name) for name in table.index]
    cells.insert(0, "layer", names, allow_duplicates=True)
    return cells.reset_index(drop=True)


def _save(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n", errors="replace")
    return path


def write_layers(folder: Path, part: pd.DataFrame, setting: Setting, metric: str = "clip_similarity") -> list[Path]:
    """The layer table of one setting (`part` holds its rows): layers--<setting>.csv, .md, .tex."""
    table = layer_table(part, metric)
    if table.empty:
        return []
    what = (
        "Importance (leave-one-out) and sufficiency (only-one) of each layer, in depth order; means over seeds, then "
        "prompts; sd across prompts; invalid and failed images are left out of the means."
    )
    words = caption(part, setting, what, metric)
    stem = f"layers--{setting.slug}"
    return [
        _save(folder / f"{stem}.csv", table.to_csv(index=False, lineterminator="\n")),
        _save(folder / f"{stem}.md", to_markdown(_layer_cells(table, False), words)),
        _save(folder / f"{stem}.tex", to_latex(_layer_cells(table, True), words, f"tab:{stem}")),
    ]


def write_prompts(folder: Path, part: pd.DataFrame, setting: Setting, metric: str = "clip_similarity") -> list[Path]:
    """Layer x prompt tables of one setting, one a selection; LaTeX splits many prompts over several tables."""
    written = []
    for selection, what in ((LEAVE_ONE_OUT, "Importance (leave-one-out)"), (ONLY_ONE, "Sufficiency (only-one)")):
        table = layer_by_prompt(part, metric, selection)
        if table.empty:
            continue
        words = caption(part, setting, f"{what} of each layer for each prompt, mean over seeds.", metric)
        stem = f"prompts--{selection}--{setting.slug}"
        parts = [table.iloc[:, start : start + WIDE] for start in range(0, table.shape[1], WIDE)]
        tex = "\n".join(
            to_latex(
                _prompt_cells(piece, True),
                words if len(parts) == 1 else f"{words} Part {index} of {len(parts)}.",
                f"tab:{stem}" if len(parts) == 1 else f"tab:{stem}--{index}",
            )
            for index, piece in enumerate(parts, 1)
        )
        written += [
            _save(folder / f"{stem}.csv", table.to_csv(lineterminator="\n")),
            _save(folder / f"{stem}.md", to_markdown(_prompt_cells(table, False), words)),
            _save(folder / f"{stem}.tex", tex),
        ]
    return written


def write_status(folder: Path, frame: pd.DataFrame) -> list[Path]:
    """How many images are ok, invalid, failed, a model, selection and replacement: status.csv, .md, .tex."""
    table = status_counts(frame)
    words = "Images by status; invalid and failed images are left out of every mean."
    plain, tex = table.astype(object), table.astype(object)
    for name in TEXTS[2:]:
        plain[name], tex[name] = table[name].map(markdown), table[name].map(latex)
    return [
        _save(folder / "status.csv", table.to_csv(index=False, lineterminator="\n")),
        _save(folder / "status.md", to_markdown(plain, words)),
        _save(folder / "status.tex", to_latex(tex, words, "tab:status")),
    ]
