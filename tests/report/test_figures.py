"""Figures: which are written, their size on paper, and what is drawn at planted values."""

from __future__ import annotations

import io
import os
import re
import time
import zlib
from dataclasses import fields
from pathlib import Path

import matplotlib.colors
import numpy as np
import pandas as pd
import pytest
from fontTools.subset import Options
from fontTools.ttLib import TTFont
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from lesion.analysis.settings import settings
from lesion.processes import Call, Processes
from lesion.report import curves, figures, illustrations, write_report
from lesion.report.findings import Findings, findings
from lesion.report.profile import levels, profile
from lesion.report.text import clean, short_names
from lesion.study.prompts import slug
from planted import LAYERS, planted


def stems(drawn):
    return {path.name.rpartition(".")[0] for path, _ in drawn}


def test_every_kind_of_data_has_its_figure_at_paper_size(tmp_path):
    frame, floor = planted(everything=True)
    found = findings(frame, floor)
    one = settings(frame)[0]
    drawn = illustrations.of_setting(tmp_path, found, one, Processes(0), clusters=True).pictures()
    kinds = (
        "layers",
        "profile",
        "heatmap--leave_one_out",
        "heatmap-clustered--only_one",
        "aspects",
        "modes",
        "cumulative",
    )
    assert {f"{kind}--tiny--zero" for kind in kinds} <= stems(drawn)
    over = illustrations.over_settings(tmp_path, found, Processes(0)).pictures()
    assert {"doses--1", "windows--importance--1", "window-curves--importance--1"} <= stems(over)
    assert any(name.startswith("zero-vs-mean") for name in stems(over))
    for path, text in [*drawn, *over]:
        assert path.stat().st_size > 1000 and "same numbers are in the tables" in text
        assert path.with_suffix(".png").is_file() and path.with_suffix(".pdf").is_file()
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert round(picture.width / 220, 1) in (figures.SINGLE, figures.DOUBLE)


def test_figures_are_written_only_where_the_data_have_them(tmp_path):
    frame, _ = planted()
    plain = frame[(frame["selection"] != "only_one") & (frame["replacement"] != "mean")].assign(aspects="")
    found = findings(plain)
    drawn = stems(illustrations.of_setting(tmp_path, found, settings(plain)[0], Processes(0)).pictures())
    assert drawn == {"layers--tiny--zero", "profile--tiny--zero", "heatmap--leave_one_out--tiny--zero"}
    assert illustrations.over_settings(tmp_path, found, Processes(0)).pictures() == []
    bare = frame[frame["selection"] == "none"]
    assert illustrations.of_setting(tmp_path, findings(bare), settings(bare)[0], Processes(0)).pictures() == []


def test_what_a_layers_absence_breaks_has_its_figure(tmp_path, drafts):
    frame, _ = planted()
    broken = (frame["selection"] == "leave_one_out") & (frame["layer"] == LAYERS[2])
    frame = frame.assign(read_shape=np.where(broken, 0.0, 1.0), read_count=np.nan)
    found = findings(frame)
    for one in settings(frame):
        drawn = illustrations.of_setting(tmp_path, found, one, Processes(0)).pictures()
        assert {f"reading--{one.slug}", f"alone--{one.slug}"} <= stems(drawn)


@pytest.mark.slow
def test_of_many_settings_the_first_have_every_figure_and_the_page_says_so(tmp_path, drafts, monkeypatch):
    frame, floor = planted(prompts=2, seeds=1)
    monkeypatch.setattr(illustrations, "SETTINGS", 1)
    names = {path.name for path in write_report(tmp_path, frame, floor)}
    assert {"profile--tiny--zero.pdf", "layers--tiny--zero.pdf", "layers--tiny--mean.pdf"} <= names
    assert "profile--tiny--mean.pdf" not in names
    assert "Only the first 1 settings have every figure" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_replacements_of_different_layers_have_no_scatter_and_cost_nothing(tmp_path, drafts):
    frame, floor = planted()
    frame = frame[(frame["layer"] == "") | (frame["layer_index"] < 2) == (frame["replacement"] == "zero")]
    written = write_report(tmp_path, frame, floor)
    assert written[-1].is_file() and not [path for path in written if "-vs-" in path.name]
    table = pd.DataFrame({"layer": ["a"], **{f"importance{end}": [0.1] for end in ("", "_low", "_high")}})
    names = ("importance", "importance")
    curves.scatter(table, table.assign(layer="b"), names, names, "nothing shared", True)


def test_intervals_are_drawn_at_their_values():
    frame, floor = planted()
    table = findings(frame, floor).summary(settings(frame)[0])
    axes = figures.layer_figure(table, "title", "clip_similarity").axes[0]
    bars = axes.containers[0].lines[2][0].get_segments()
    known = table[table["importance_low"].notna()]
    np.testing.assert_allclose([bar[:, 0] for bar in bars], known[["importance_low", "importance_high"]].to_numpy())
    assert [text.get_text() for text in axes.get_yticklabels()] == LAYERS
    assert {"no effect", "another seed"} <= {text.get_text() for text in axes.texts}


def test_numbers_of_crowded_points_do_not_meet():
    rng = np.random.default_rng(0)
    crowd = 24
    names = [f"down_blocks.0.attentions.{number}" for number in range(crowd)]
    x = np.concatenate([np.zeros(8), rng.uniform(0, 1e-4, 8), rng.uniform(0, 0.4, 8)])
    y = np.concatenate([np.full(8, 0.05), rng.uniform(0, 0.1, 8), rng.uniform(0, 0.9, 8)])
    one = pd.DataFrame({"layer": names, "importance": x, "importance_low": x, "importance_high": x + 0.2})
    other = pd.DataFrame({"layer": names, "sufficiency": y, "sufficiency_low": y - 0.1, "sufficiency_high": y + 0.1})
    figure = curves.scatter(one, other, ("importance", "sufficiency"), ("a", "b"), "", False)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == [str(number + 1) for number in range(crowd)]
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]  # without the line to the point
    for place, box in enumerate(boxes):
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
        assert not any(box.overlaps(after) for after in boxes[place + 1 :])


@pytest.mark.parametrize("high", [0.617, 0.156, 0.0007, 3.0])
def test_the_colour_bar_names_no_value_beyond_its_end(high):
    table = pd.DataFrame({"layer": LAYERS, "importance": [0.0, high / 8, high, np.nan, high / 2]})
    by_prompt = table.set_index("layer")
    for figure in (figures.heat_map(by_prompt, "m", "t"), profile(table, "importance", "m", "t")):
        figure.draw_without_rendering()
        (bar,) = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
        ticks = np.asarray(bar.get_yticks())
        places = np.asarray(bar.transData.transform([(0, tick) for tick in ticks]))[:, 1] * 72 / figure.dpi
        inside = np.abs(places - bar.bbox.y0 * 72 / figure.dpi - bar.bbox.height * 36 / figure.dpi)
        drawn = inside <= bar.bbox.height * 36 / figure.dpi + 0.5
        assert drawn.sum() > 2 and (np.diff(places[drawn]) > 4).all() and ticks[drawn].max() <= max(high, 1e-3)


def test_the_u_follows_the_blocks():
    assert levels(LAYERS) == [0, 1, 1, 1, 0]
    sdxl = ["down_blocks.1.attentions.0", "down_blocks.2.attentions.1", "mid_block.attentions.0"]
    assert levels([*sdxl, "up_blocks.0.attentions.2", "up_blocks.1.attentions.0"]) == [1, 2, 2, 2, 1]
    assert (
        levels(["transformer_blocks.0", "transformer_blocks.1"]) is None and levels(["mid_block.attentions.0"]) is None
    )
    table = pd.DataFrame({"layer": LAYERS, "importance": [0.0, 0.1, 0.4, np.nan, 0.2]})
    figure = profile(table, "importance", "importance", "title")
    boxes = figure.axes[0].patches
    assert [matplotlib.colors.to_hex(boxes[n].get_facecolor()) for n in (0, 2)] == ["#00224e", "#fee838"]
    assert boxes[3].get_hatch() and "n/a" in " ".join(text.get_text() for text in figure.axes[0].texts)


def test_clusters_bring_like_layers_together():
    table = pd.DataFrame([[0, 9, 0], [5, 5, np.nan], [0, 8, 0], [5, 6, 5]], index=list("abcd"), columns=list("xyz"))
    found = figures.clustered(table)
    order = "".join(found.index)
    assert {order[:2], order[2:]} & {"ac", "ca"} and sorted(found.columns) == list("xyz")
    assert figures.clustered(table.iloc[:1, :2]).shape == (1, 2)


@pytest.mark.parametrize("text", ["$\\frac{1}$ & _x_ %", "<script>\n\x00‮שלום", "x" * 10_000])
def test_any_text_can_be_drawn(tmp_path, text):
    table = pd.DataFrame([[0.1, np.nan]], index=[text], columns=[text, text + "2"])
    assert all(path.is_file() for path in figures.save(figures.heat_map(table, "m", clean(text, 300)), tmp_path / "x"))


def test_letters_in_a_pdf_are_a_font_without_what_only_shapes_text(tmp_path):
    before = [*Options._drop_tables_default]
    table = pd.DataFrame([[0.0, 1.0]], index=["fi"], columns=["a", "b"])
    _, pdf = figures.save(figures.heat_map(table, "m", "t"), tmp_path / "x")
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf.read_bytes(), re.DOTALL)
    whole = [zlib.decompressobj().decompress(stream) for stream in streams if stream[:1] == b"x"]
    fonts = [TTFont(io.BytesIO(data)) for data in whole if data.startswith(b"\0\1\0\0")]
    assert fonts and all("glyf" in font and not {"GSUB", "GPOS", "GDEF"} & {*font.keys()} for font in fonts)
    assert before == Options._drop_tables_default


def test_a_reference_far_from_the_data_is_named_at_the_side_instead_of_squeezing_them():
    frame, floor = planted()
    table = findings(frame, floor).summary(settings(frame)[0])
    near, far = (figures.layer_figure(table, "t", "clip_similarity", control).axes[0] for control in (0.6, -2.0))
    names = [text.get_text() for text in near.texts]
    assert "all lesioned" in names and near.get_xlim()[1] < 0.6
    names = [text.get_text() for text in far.texts]
    assert "all lesioned: 3.00 \u2192" in names and far.get_xlim()[1] < 0.6


def test_figures_have_no_title_unless_asked_and_take_the_users_style(tmp_path):
    table = pd.DataFrame([[0.0, 0.25, 1.0]], index=["mid_block.attentions.0"], columns=["a", "b", "c"])
    style = tmp_path / "mine.mplstyle"
    style.write_text("font.family: DejaVu Serif\nfont.size: 9\n")

    def drawn(look: figures.Look):
        with figures.looking(look):
            figure = figures.heat_map(table, "importance", "a title")
            with figures.styled():
                return figure, matplotlib.rcParams["font.family"], matplotlib.rcParams["font.size"]

    plain, family, _ = drawn(figures.Look())
    assert plain.get_suptitle() == "" and family[0] != "DejaVu Serif"
    titled, family, size = drawn(figures.Look((str(style),), titles=True))
    assert titled.get_suptitle() == "a title" and (family, size) == (["DejaVu Serif"], 9)
    style.write_bytes(b"\xff")
    for odd in ("nonesuch", str(tmp_path), str(style)):
        figures._over.cache_clear()
        with pytest.raises(ValueError, match=f"^style '{odd}': "):
            drawn(figures.Look((odd,)))
    image = plain.axes[0].images[0]
    assert image.norm(0.25) == pytest.approx(0.5)  # the square root of its share
    assert [text.get_text() for text in plain.axes[0].texts] == ["0", "0.25", "1.00"]


def test_a_sheet_is_text_and_pictures_at_the_papers_width():
    pictures = [[Image.new("RGB", (8, 8), (40 * row, 80 * column, 0)) for column in range(3)] for row in range(2)]
    texts = ["a red circle", "two stars"]
    figure = figures.sheet(pictures, ["baseline", LAYERS[2], LAYERS[4]], texts, figures.SINGLE)
    assert figure.get_figwidth() == figures.SINGLE
    shown = [axes for axes in figure.axes if axes.images]
    for place, axes in enumerate(shown):
        row, column = divmod(place, 3)
        assert tuple(axes.images[0].get_array()[0, 0]) == (40 * row, 80 * column, 0)
    assert [axes.get_title() for axes in shown[:3]] == ["baseline", "mid.a0", "up1.a0"]
    assert " ".join(shown[3].get_ylabel().split()) == "two stars"


def test_prompts_get_short_names_that_tell_them_apart():
    texts = [
        "a large red circle on a white background",
        "two blue squares on a black background",
        "a green triangle to the left of a yellow star on a gray background",
        "a green triangle to the left of a yellow cross on a gray background",
    ]
    names = short_names({slug(text): text for text in texts})
    assert list(names.values())[:2] == ["large red circle white", "two blue squares black"]
    assert len(set(names.values())) == 4 and max(map(len, names.values())) <= 26
    assert short_names({"cat": "a very long text about a cat", "dog": "dogs"}) == {
        "cat": "cat",
        "dog": "dog",
    }  # ids of one's own


def test_a_report_made_by_two_processes_has_the_same_files(tmp_path, monkeypatch):
    """Byte for byte, under settings of matplotlib and a style of this process. Slow: the other imports."""
    frame, floor = planted(prompts=2, seeds=1)
    frame = frame[frame["replacement"] != "mean"]
    monkeypatch.setitem(matplotlib.rcParams, "axes.titlesize", 4.0)
    (tmp_path / "own.mplstyle").write_text("axes.facecolor: eeeeee\nsavefig.dpi: 60\n", encoding="utf-8")
    known = findings(frame, floor)
    monkeypatch.chdir(tmp_path)  # paths may be relative
    listed = {}
    with Processes(1, ["lesion.report.figures:prepare", "lesion.report.findings:prepare"]) as two:
        two.start()
        calls = []
        monkeypatch.setattr(two, "call", lambda work: calls.append(Processes.call(two, work)) or calls[-1])
        first = two.call(os.getpid)
        listed["one"] = write_report(Path("one"), frame, floor, known=known, styles=["own.mplstyle"])
        while not first._ended and not two.alone:
            time.sleep(0.01)
        assert first.result() != os.getpid()
        made = []
        monkeypatch.setattr(Call, "_make", lambda self, make=Call._make: made.append(self) or make(self))
        together = findings(frame, floor, processes=two)
        assert len(calls) > len(made) > 0  # the other process worked out some of them
        for one in fields(Findings):
            alone, shared = getattr(known, one.name), getattr(together, one.name)
            if isinstance(alone, pd.DataFrame):
                pd.testing.assert_frame_equal(alone, shared)
            elif not one.name.startswith("_"):
                assert alone == shared
        calls.clear(), made.clear()
        listed["two"] = write_report(Path("two"), frame, floor, known=together, styles=["own.mplstyle"], processes=two)
        assert len(calls) > len(made) > 0  # and drew some
    names = [[path.relative_to(name) for path in paths] for name, paths in listed.items()]
    assert names[0] == names[1]
    assert len(names[0]) > 30
    for name in names[0]:
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes(), name
