"""Which component holds colour? The tables of docs/components.md and docs/tokens.md.

    lesion -m experiment=components,tokens tracker=none
    python scripts/components_doc.py multirun/DATE/TIME

A lesion breaks an aspect of an image if the pixel reader sees it right in the baseline and wrong under the lesion.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pandas as pd

from lesion.analysis.cells import names_of
from lesion.report.merging import put_together, run_folders
from lesion.study.components import COMPONENTS, components_of
from lesion.study.tokens import MARK, layer_and_set

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"(<!-- grid -->\n).*?(<!-- end -->)", re.DOTALL)
BROKEN = ("colour broken", "shape broken")
ASPECTS = {"colour": "read_colour", "shape": "read_shape"}


def effects(frame: pd.DataFrame) -> pd.DataFrame:
    """Each lesioned image with its importance and, for each aspect, whether the lesion breaks it; NaN where the
    baseline has it wrong."""
    baselines = frame[frame["selection"] == "none"].set_index(["prompt_id", "seed"])
    lesioned = frame[(frame["selection"] != "none") & (frame["status"] == "ok")]
    before = baselines.loc[pd.MultiIndex.from_frame(lesioned[["prompt_id", "seed"]])]
    found = lesioned.assign(importance=1 - lesioned["clip_similarity"])
    for aspect, column in ASPECTS.items():
        right = before[column].to_numpy() == 1
        found[aspect] = (1 - lesioned[column]).where(right)
    return found


def of_components(found: pd.DataFrame) -> str:
    """A row for each component: mean over its layers' lesions, and the layer with the most.

    Of an aspect it is the share of images in which it is broken.
    """
    heads = ["component", "layers", *(word for name in ("importance", *BROKEN) for word in (f"{name}: mean", "most"))]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * 7]
    for component in [one for one in COMPONENTS if (found["component"] == one).any()]:
        by_layer = found[found["component"] == component].groupby("layer", sort=False)
        means = by_layer[["importance", *ASPECTS]].mean()
        cells = [f"`{component}`", str(len(means))]
        for name in means:
            most = means[name].idxmax()
            named = f"{means[name].max():.2f} `{str(most).removeprefix(f'{component}.')}`"
            cells += [f"{means[name].mean():.3f}", named if means[name].max() > 0 else "0.00"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def of_tokens(found: pd.DataFrame) -> str:
    """A row for each set of tokens and where it is lesioned."""
    lines = [f"| tokens | lesioned in | importance | {' | '.join(BROKEN)} |", "| --- | --- | --- | --- | --- |"]
    for lesioned, rows in found.groupby(found["layer"].where(found["layer"] != "", found["lesioned"]), sort=False):
        layers = names_of(lesioned)
        (name,) = {layer_and_set(layer)[1] for layer in layers}
        means = rows[["importance", *ASPECTS]].mean()
        where = " and ".join(f"`{one}`" for one in components_of(layers))
        lines.append(f"| `{name}` | {where} | " + " | ".join(f"{value:.2f}" for value in means) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or the folder of a sweep")
    parser.add_argument("--print", action="store_true", help="change no page")
    args = parser.parse_args()
    frame, _, _, _ = put_together(run_folders(args.folders), Path.cwd())
    found = effects(frame)
    of_sets = found["layer"].str.contains(MARK, regex=False) | found["lesioned"].str.contains(MARK, regex=False)
    tables = {"components.md": of_components(found[~of_sets]), "tokens.md": of_tokens(found[of_sets])}
    for name, table in tables.items():
        page = DOCS / name
        if args.print:
            print(table)
            continue
        text, count = BLOCK.subn(
            lambda match, table=table: f"{match[1]}{table}\n{match[2]}", page.read_text(encoding="utf-8")
        )
        if count != 1:
            raise SystemExit(f"{page} has {count} places for the table; 1 is wanted")
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
