"""Maps against causes on the embedded model: does what a layer looks at predict what its lesion does?

    lesion prompts=study seeds=0 selection=leave_one_out generation.steps=8 capture=maps tracker=none
    python scripts/attention_doc.py outputs/DATE/TIME     the tables of docs/attention.md

Rank correlations over the 16 layers, with intervals over prompts (`lesion.analysis.maps.maps_against_causes`).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pandas as pd

from lesion.analysis.importance import layer_table
from lesion.analysis.maps import MEASURES, layer_means, maps_against_causes
from lesion.report.merging import RESULTS
from lesion.store import tables

PAGE = Path(__file__).resolve().parent.parent / "docs" / "attention.md"
BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NAMES = {one: one.replace("_", " ") for one in MEASURES} | {"iou": "IoU"}
FEWEST = 12  # prompts of which "broken" is worth a number: most lesions break nothing
READ = {"colour": "read_colour", "shape": "read_shape", "relation": "read_relation", "count": "read_count",
        "background": "read_background", "size": "read_size"}  # fmt: skip


def causes(maps: pd.DataFrame, frame: pd.DataFrame) -> str:
    """Correlations with importance, by aspect of the words, and with what the reader sees broken of that aspect."""
    found = [maps_against_causes(maps, frame, "clip_similarity")]
    for aspect, column in READ.items():
        broken = maps_against_causes(maps[maps["aspect"] == aspect], frame, "clip_similarity", column)
        found.append(broken[(broken["aspect"] == aspect) & (broken["n_prompts"] >= FEWEST)])
    whole = pd.concat(found)
    lines = ["| words | effect | prompts | " + " | ".join(NAMES[one] for one in MEASURES) + " |",
             "| --- | --- | --- |"+ " --- |" * len(MEASURES)]  # fmt: skip
    for (effect, aspect), rows in whole.groupby(["effect", "aspect"], sort=False):
        by = rows.set_index("measure")
        cells = [
            "n/a" if pd.isna(by.loc[one, "correlation"])
            else f"{by.loc[one, 'correlation']:.2f} [{by.loc[one, 'low']:.2f}, {by.loc[one, 'high']:.2f}]"
            for one in MEASURES
        ]  # fmt: skip
        what = "importance" if effect == "importance" else f"{aspect} broken"
        if by["correlation"].isna().all():
            continue
        lines.append(f"| {aspect} | {what} | {by['n_prompts'].iloc[0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def looks(maps: pd.DataFrame, frame: pd.DataFrame) -> str:
    """The layers' means over all words that speak of the picture, the IoU of those of shapes, and importance."""
    found = layer_means(maps)
    lines = ["| layer | share | entropy | mass | IoU | average precision | IoU of shapes | importance |",
             "| --- |" + " --- |" * 7]  # fmt: skip
    shapes = found[found["aspect"] == "shape"].set_index("map_layer")["iou"]
    table = layer_table(frame).set_index("layer")["importance"]
    for row in found[found["aspect"] == "all"].to_dict("records"):
        layer = row["map_layer"]
        cells = [f"{row[one]:.3f}" for one in MEASURES] + [f"{shapes[layer]:.3f}", f"{table[layer]:.4f}"]
        lines.append(f"| `{layer}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of the study above")
    parser.add_argument("--page", type=Path, default=PAGE, help="page whose tables are filled")
    asked = parser.parse_args(given)
    maps, frame = tables.read(asked.run / "maps.parquet"), tables.read(asked.run / RESULTS)
    made = {"looks": looks(maps, frame), "causes": causes(maps, frame)}
    text = asked.page.read_text(encoding="utf-8")
    asked.page.write_text(BLOCK.sub(lambda found: f"{found[1]}{made[found[2]]}\n{found[3]}", text), encoding="utf-8")
    print("\n\n".join(made.values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
