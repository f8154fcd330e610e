"""The script behind docs/layout.md: a row's means and its paired intervals at planted values."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import layout_doc


def frame(folder: Path, grey: int, ious: list[float], rights: list[float]) -> pd.DataFrame:
    Image.new("RGB", (4, 4), (grey,) * 3).save(file := folder / f"{grey}.png")
    read = dict.fromkeys(layout_doc.OTHERS, 1.0) | {"read_shape": rights, "read_size": np.nan}
    columns = {"box_iou": ious, "box_success": np.greater_equal(ious, 0.5).astype(float), "file": str(file), **read}
    return pd.DataFrame(columns, index=["a", "b", "c", "d"])


def test_a_row_has_means_and_the_intervals_of_paired_differences(tmp_path, capsys):
    unsteered = frame(tmp_path, 0, [0.0, 0.1, 0.2, 0.3], [1, 1, 1, 1])
    steered = frame(tmp_path, 51, [0.25, 0.35, 0.45, 0.55], [1, 0, 1, 1])
    layout_doc.line("unsteered", unsteered, unsteered)
    layout_doc.line("steered", steered, unsteered)
    first, second = ([cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines())
    assert (first[:3], first[4:]) == (["unsteered", "0.150", "0.000"], ["1.000", "0"])
    assert second[1] == "0.400 [0.250, 0.250]", "the same gain in every scene: no width, however the scenes differ"
    assert second[2].startswith("0.250 [0.000, ") and second[4] == "0.750 [-0.750, 0.000]"
    assert second[5] == "0.200 [0.200, 0.200]", "of the distance itself"


def test_the_area_under_the_curve_is_the_share_of_thresholds_reached():
    assert layout_doc.area(pd.Series([0.0, 0.505, 1.0])).tolist() == pytest.approx([1 / 101, 51 / 101, 1])
