"""The script behind the tables of docs/components.md and docs/tokens.md, on planted results."""

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import components_doc

TE, MID = "text_encoder.encoder.layers.0", "mid_block.attentions.0"


def row(seed, selection, layers, similarity, colour, shape, layer=""):
    return {
        "prompt_id": "p", "seed": seed, "selection": selection, "layer": layer, "lesioned": "+".join(layers),
        "component": "", "status": "ok", "clip_similarity": similarity, "read_colour": colour, "read_shape": shape,
    }  # fmt: skip


def test_what_breaks_is_counted_where_the_baseline_is_right():
    rows = [row(0, "none", (), 1.0, 1.0, 1.0), row(1, "none", (), 1.0, 0.0, 1.0)]
    for layer, similarity, broken in ((TE, 0.5, 1), (MID, 1.0, 0)):
        rows += [row(seed, "leave_one_out", (), similarity, 1.0 - broken, 1.0, layer) for seed in (0, 1)]
    colour = [f"{layer}.tokens.aspect:colour" for layer in (TE, MID)]
    rows += [row(seed, "custom", colour, 0.25, 0.0, 1.0 - seed) for seed in (0, 1)]
    frame = pd.DataFrame(rows)
    frame["component"] = frame["layer"].map({TE: "text_encoder", MID: "denoiser", "": ""})
    found = components_doc.effects(frame)
    one = components_doc.of_components(found[found["selection"] == "leave_one_out"]).splitlines()[2:]
    assert one == [
        "| `text_encoder` | 1 | 0.500 | 0.50 `encoder.layers.0` | 1.000 | 1.00 `encoder.layers.0` | 0.000 | 0.00 |",
        "| `denoiser` | 1 | 0.000 | 0.00 | 0.000 | 0.00 | 0.000 | 0.00 |",
    ]
    (line,) = components_doc.of_tokens(found[found["selection"] == "custom"]).splitlines()[2:]
    assert line == "| `aspect:colour` | `text_encoder` and `denoiser` | 0.75 | 1.00 | 0.50 |"
