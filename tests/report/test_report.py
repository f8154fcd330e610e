"""Pictures checked pixel by pixel, tables and the page checked as text, lesion-report run on folders."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.text import Text
from omegaconf import OmegaConf
from pandas.io.formats.style_render import _escape_latex
from PIL import Image, ImageDraw

from lesion.analysis.importance import layer_table
from lesion.analysis.settings import settings
from lesion.cli.report import main
from lesion.cli.study import SweepReport, report_sweep
from lesion.report import contents, figures, fonts, ranking_lines, tables, write_report
from lesion.report.canvas import font, line_height, wrap, write
from lesion.report.findings import findings
from lesion.report.grids import comparison, layers_by_prompts
from lesion.report.merging import Refused, apart, check, merge, read
from lesion.report.tables import Column, Table, to_latex
from lesion.report.text import clean, latex, markdown

pytestmark = pytest.mark.usefixtures("drafts")
LAYERS = [
    "down_blocks.0.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.1.attentions.10",
    "up_blocks.1.attentions.2",
]
NASTY = "<script>alert(1)</script> 50% & \\ a_b\n\nשלם " + "very long " * 1000
RED, GREEN, BLUE, GREY = (250, 0, 0), (0, 250, 0), (0, 0, 250), (99, 99, 99)


def study(
    folder: Path, prompts=("p", "q"), seeds=(0, 1), replacement="zero", size=64, text="a red circle"
) -> pd.DataFrame:
    """Flat images: baseline red, leave-one-out green, only-one blue, control grey."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    cells = [("none", "", -1, 1.0, RED), ("all", "", -1, 0.5, GREY)]
    for index, layer in enumerate(LAYERS):
        cells.append(("leave_one_out", layer, index, 1.0 if index == 1 else 0.9 - 0.1 * index, GREEN))
        cells.append(("only_one", layer, index, 0.6, BLUE))
    fixed = {"model": "embedded", "aspects": "", "task": "txt2img", "steps": 4, "guidance": 3.0, "scheduler": "ddim"}
    fixed |= {"window_start": 0.0, "window_end": 1.0, "branch": "both", "strength": 1.0, "negative_prompt": ""}
    fixed |= {"height": size, "width": size}
    rows = []
    for prompt in prompts:
        for seed in seeds:
            for selection, layer, index, similarity, colour in cells:
                lesion = "" if selection == "none" else replacement
                cell = f"{prompt}-{seed}-{selection}-{index}-{lesion}"
                Image.new("RGB", (size, size), colour).save(folder / "images" / f"{cell}.png")
                rows.append({**fixed, "prompt_id": prompt, "prompt": f"{text} {prompt}", "seed": seed, "cell": cell})
                rows[-1] |= {"selection": selection, "replacement": lesion, "layer": layer, "layer_index": index}
                rows[-1] |= {"status": "ok", "reason": "", "image": f"images/{cell}.png", "clip_similarity": similarity}
    frame = pd.DataFrame(rows)
    frame.to_parquet(folder / "results.parquet")
    return frame


def spoil(frame: pd.DataFrame, number: int, status: str, reason: str) -> pd.DataFrame:
    """The frame with one leave-one-out image of prompt p, seed 0 (by depth) that went wrong."""
    frame = frame.copy()
    hit = (frame["prompt_id"] == "p") & (frame["seed"] == 0) & (frame["layer_index"] == number)
    hit &= frame["selection"] == "leave_one_out"
    frame.loc[hit, ["status", "reason", "clip_similarity"]] = [status, reason, np.nan]
    return frame


def tiles(picture: Image.Image, colour: tuple[int, int, int]) -> list[tuple[int, int]]:
    """(x, y) of the upper left corner of every 128 x 128 square of one colour."""
    same = (np.asarray(picture) == colour).all(axis=2)
    starts = same & ~np.roll(same, 1, axis=1) & ~np.roll(same, 1, axis=0)
    corners = [(int(x), int(y)) for y, x in np.argwhere(starts)]
    return [(x, y) for x, y in corners if same[y : y + 128, x : x + 128].all() and not same[y : y + 128, x + 128].any()]


def test_comparison_tiles(tmp_path):
    frame = study(tmp_path)
    picture = comparison(frame, tmp_path, "p", 0, "zero")
    red, green, blue, grey = (tiles(picture, colour) for colour in (RED, GREEN, BLUE, GREY))
    assert (len(red), len(green), len(blue), len(grey)) == (3, 4, 4, 1)  # the baseline leads each of the three blocks
    assert len({y for _, y in green}) == len({y for _, y in blue}) == 1  # one row a selection
    assert green[0][1] < blue[0][1] < grey[0][1]
    for block in (green, blue, grey):
        assert (red[0][0], block[0][1]) in red and red[0][0] < block[0][0]
    assert len({x for x, _ in green}) == 4


def test_comparison_keeps_depth_order_and_wraps_below_the_width(tmp_path):
    frame = study(tmp_path)
    for index, shade in enumerate((10, 60, 110, 160)):
        Image.new("RGB", (64, 64), (shade, 200, 0)).save(tmp_path / f"images/p-0-leave_one_out-{index}-zero.png")
    shuffled = frame.sample(frac=1, random_state=0)
    for width, per_row in ((2400, 4), (3 * 136 + 8, 2)):
        picture = comparison(shuffled, tmp_path, "p", 0, "zero", max_width=width)
        assert picture.width <= max(width, 640)
        corners = [tiles(picture, (shade, 200, 0))[0] for shade in (10, 60, 110, 160)]
        assert corners == sorted(corners, key=lambda corner: (corner[1], corner[0]))
        assert len({x for x, _ in corners}) == per_row


@pytest.mark.parametrize(("size", "shown"), [(64, 128), (100, 200), (300, 300), (512, 256), (1024, 256)])
def test_tile_sizes(tmp_path, size, shown):
    frame = study(tmp_path, ("p",), (0,), size=size)
    red = (np.asarray(comparison(frame, tmp_path, "p", 0)) == RED).all(axis=2)
    assert max(red.sum(axis=1)) == shown


def test_placeholders_name_the_reason(tmp_path):
    frame = study(tmp_path)
    failed = spoil(frame, 0, "failed", "out of memory")
    other = spoil(frame, 0, "failed", "killed")
    absent = frame.drop(failed.index[failed["status"] == "failed"])
    pictures = [comparison(one, tmp_path, "p", 0, "zero") for one in (failed, other, absent)]
    assert [len(tiles(picture, GREEN)) for picture in pictures] == [3, 3, 3]
    assert len({picture.tobytes() for picture in pictures}) == 3  # the text differs
    (tmp_path / frame["image"].iloc[0]).write_bytes(b"not an image")
    assert tiles(comparison(frame, tmp_path, "p", 0, "zero"), RED) == []


def test_every_group_of_layers_has_its_tile(tmp_path):
    frame = study(tmp_path, ("p",), (0,))
    groups = frame[frame["selection"] == "only_one"].assign(selection="pairs", layer="", layer_index=-1)
    groups["lesioned"] = [f"{LAYERS[0]}+{name}" for name in LAYERS]
    both = pd.concat([frame, groups], ignore_index=True)
    assert len(tiles(comparison(both, tmp_path, "p", 0), BLUE)) == 8


def test_layers_by_prompts(tmp_path):
    frame = study(tmp_path, ("p", "q", "r"))
    picture = layers_by_prompts(frame, tmp_path, 1, "leave_one_out", "zero")
    red, green = tiles(picture, RED), tiles(picture, GREEN)
    assert len(red) == 3 and len({y for _, y in red}) == 1  # the baseline's row comes first
    assert len(green) == 12 and len({y for _, y in green}) == 4 and len({x for x, _ in green}) == 3
    assert min(y for _, y in green) > red[0][1]
    narrow = layers_by_prompts(frame, tmp_path, 1, max_width=500)
    assert len(tiles(narrow, GREEN)) == 12 and narrow.width == 640


def test_any_prompt_can_be_drawn_and_written(tmp_path):
    frame = study(tmp_path, ("a_b%&", "q"), (0,), text=NASTY)
    written = write_report(tmp_path, spoil(frame, 2, "failed", NASTY))
    assert all(path.is_file() for path in written)
    for path in written:
        assert re.fullmatch(r"[a-zA-Z0-9._-]+", path.name)
    with pytest.raises(ValueError, match="exactly one setting"):
        comparison(pd.concat([frame, frame.assign(model="other")]), tmp_path, "q", 0)


def test_wrapped_lines_fit():
    face = font(12)
    for text in (NASTY, "x" * 500, "down_blocks.0.attentions.0.transformer_blocks.0.attn2", ""):
        lines = wrap(text, face, 128, 4)
        assert len(lines) <= 4 and all(face.getlength(line) <= 128 for line in lines)
    assert wrap("down_blocks.0.attentions.0", face, 128, 4) == ["down_blocks.0.", "attentions.0"]


@pytest.fixture
def one_font(tmp_path, monkeypatch):
    """The only installed font: 红 and 🍎 as filled squares."""
    fonts._having.cache_clear()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord("红"): "square", ord("🍎"): "square"})
    pen = TTGlyphPen(None)
    for number, corner in enumerate([(0, 0), (0, 1000), (1000, 1000), (1000, 0)]):
        (pen.lineTo if number else pen.moveTo)(corner)
    pen.closePath()
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", "square"], (1000, 0)))
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Squares of a test", "styleName": "Regular", "psName": "SquaresOfATest"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "squares.ttf")
    monkeypatch.setattr(fonts, "_installed", lambda: [tmp_path / "squares.ttf"])
    monkeypatch.setattr(fonts, "_said", set())
    yield
    fonts._having.cache_clear()


@pytest.mark.printed
def test_letters_that_dejavu_lacks_are_drawn_in_a_font_that_has_them_or_named(one_font, tmp_path, caplog, recwarn):
    canvas = Image.new("L", (400, 40), 255)
    face = font(20)
    below = write(ImageDraw.Draw(canvas), (0, 0), ["a红b🍎"], face, fill=0)
    ink = np.asarray(canvas) == 0
    left = round(face.getlength("a"))
    base = face.getmetrics()[0]
    assert ink[base - 20 : base, left + 1 : left + 19].all()  # a square as high as the font's size, on the line
    assert below == line_height(face) and wrap("红🍎" * 30, face, 100, 9)[0] == "红🍎红🍎红"  # 20 px each
    assert not caplog.records

    with figures.looking(figures.Look(titles=True)), figures.styled():
        figure = figures.heat_map(pd.DataFrame({"红红": [0.0, 1.0]}, index=["🍎", "b"]), "importance", "红")
    figures.save(figure, tmp_path / "map")
    drawn = {text.get_text(): text.get_fontfamily() for text in figure.findobj(Text)}
    assert all(drawn[text] == ["DejaVu Sans", "Squares of a test"] for text in ("红红", "🍎", "红"))
    assert drawn["b"] == ["DejaVu Sans"] and b"SquaresOfATest" in (tmp_path / "map.pdf").read_bytes()
    assert not caplog.records and not recwarn.list

    frame = study(tmp_path, ("p",)).assign(prompt="红 圆 \ufe0f é")
    write_report(tmp_path, frame)
    write_report(tmp_path, frame)
    (said,) = caplog.messages  # the one letter that no font has, once
    assert "has 圆:" in said and "lesion[fonts]" in said


def test_latex_escapes_like_pandas_and_stays_on_one_line():
    text = "a_b % & # $ { } ~x^y\\"
    assert latex(text) == _escape_latex(text).replace(r"\textbackslash ", r"\textbackslash{}").replace(
        r"\textasciitilde ", r"\textasciitilde{}"
    ).replace(r"\textasciicircum ", r"\textasciicircum{}")
    assert latex("one\n\ntwo\r\n") == "one two"
    assert latex("<שלם> é …") == r"\textless{}שלם\textgreater{} é …"
    frame = pd.DataFrame([["1", "n/a"]], columns=["50%_x\ny", "a&b"])
    shown = Table.of("x", "", "100% of a_b\n\n& c", [Column(name, name, "text") for name in frame], frame)
    table = to_latex(shown)
    assert r"50\%\_x y & a\&b \\" in table and r"\caption{100\% of a\_b \& c}\label{tab:x}" in table
    assert [name in table for name in (r"\toprule", r"\midrule", r"\bottomrule")] == [True] * 3
    assert not table.startswith("%")
    chinese = to_latex(Table.of("x", "", "", [Column("a", "a", "text")], pd.DataFrame({"a": ["é 红圆 🍎"]})))
    assert "é 红圆 🍎" in chinese and chinese.startswith("% 圆红🍎: ") and r"% \usepackage{fontspec}" in chinese


def test_tables(tmp_path, no_pictures):
    frame = spoil(spoil(study(tmp_path, ("p", "q_1")), 0, "invalid", "all black"), 2, "failed", "why")
    frame = frame[~((frame["selection"] == "only_one") & (frame["layer_index"] == 3))]
    write_report(tmp_path, frame)
    tex = (tmp_path / "tables" / "layers--embedded--zero.tex").read_text()
    assert r"\texttt{down\_blocks.0.attentions.0}" in tex and "n = 2 prompts, 2 seeds" in tex
    assert re.search(r"mid\\_block.*no effect", tex) and "n/a" in tex and "nan" not in tex.lower()
    body = [line for line in tex.splitlines() if r"\texttt" in line]
    assert [line.count(" & ") for line in body] == [6] * 4 + [3] * 4 and all(line.endswith(r"\\") for line in body)
    # images of both modes, invalid, failed; a floor that is n/a has no columns
    assert body[0].split(" & ")[5:] == ["3", r"4 \\"] and body[4].split(" & ")[1:3] == ["1", "0"]
    raw = pd.read_csv(tmp_path / "tables" / "layers--embedded--zero.csv")
    assert list(raw["layer"]) == LAYERS and raw["sufficiency"].isna().tolist() == [False, False, False, True]
    np.testing.assert_allclose(raw["importance"], layer_table(frame)["importance"])
    by_prompt = (tmp_path / "tables" / "prompts--leave_one_out--embedded--zero.tex").read_text()
    assert r"q\_1" in by_prompt
    many = study(tmp_path / "many", [f"p{index}" for index in range(8)], (0,))
    write_report(tmp_path / "many", many)
    split = (tmp_path / "many" / "tables" / "prompts--leave_one_out--embedded--zero.tex").read_text()
    assert split.count(r"\begin{table}") == 1 and "n = 8 prompts" in split
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contents, "WIDEST", 7)
        wide, _ = contents.prompts(findings(many), settings(many)[0])
    assert [path.suffix for path in tables.write(tmp_path / "wide", wide)] == [".csv"]
    assert (tmp_path / "wide" / f"{wide.stem}.csv").read_text() == Path(
        tmp_path / "many" / "tables" / f"{wide.stem}.csv"
    ).read_text()
    lines = (tmp_path / "tables" / "layers--embedded--zero.md").read_text().splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_markdown_cells_cannot_break_the_table():
    assert markdown("a|b\n`c` <i>") == r"a\|b \`c\` \<i\>"
    assert clean("a\x00\ud800b " + "c" * 900, 10) == "ab cccccc…"


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_page_escapes_prompts_and_links_to_files_that_exist(tmp_path):
    frame = study(tmp_path, text="<script>alert(1)</script>")
    frame["model"] = "a<b>&'\""
    write_report(tmp_path, frame)
    text = (tmp_path / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert [tag for tag, _ in page.tags].count("script") == 2 and "&lt;script&gt;" in text  # the page's own two
    assert "b" not in {tag for tag, _ in page.tags}
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 9 + 2 * 3 and all((tmp_path / one["src"]).is_file() for one in pictures)  # and three pairs
    assert all(one.get("loading") == "lazy" for one in pictures)
    assert "http" not in text.replace("http-equiv", "") and "prefers-color-scheme" in text
    assert "mid_block.attentions.0 has no measurable effect" in text


def test_report_of_several_settings_has_files_of_its_own_for_each(tmp_path, empty_figures):
    zero, mean = study(tmp_path, ("p",), (0,)), study(tmp_path, ("p",), (0,), replacement="mean")
    both = pd.concat([zero, mean[mean["selection"] != "none"]])
    both = pd.concat([both, zero.assign(model="Embedded"), mean[mean["selection"] == "all"].assign(window_end=0.5)])
    written = write_report(tmp_path, both)
    assert len(settings(both)) == 4 and len(set(written)) == len(written)
    assert len([path for path in written if path.name.startswith("comparison")]) == 4
    folded = [str(path).lower() for path in written]
    assert len(set(folded)) == len(folded)


def test_report_of_baselines_only_and_of_nothing(tmp_path):
    frame = study(tmp_path)
    written = write_report(tmp_path, frame[frame["selection"] == "none"])
    pictures = [path for path in written if path.suffix == ".png"]
    assert len(pictures) == 4 and len(tiles(Image.open(pictures[0]), RED)) == 1
    assert ranking_lines(findings(frame[frame["selection"] == "none"])) == []
    assert write_report(tmp_path / "empty", frame[:0])[-1].is_file()


def test_ranking_lines(tmp_path):
    frame = spoil(study(tmp_path), 3, "failed", "why")
    known = findings(frame)
    lines = ranking_lines(known)
    assert lines[0] == "embedded, zero replacement"
    assert lines[1].split("  ")[0] == "rank" and "importance (leave-one-out)" in lines[1]
    named = [next(name for name in LAYERS if f" {name} " in line) for line in lines[2:6]]
    assert named == [LAYERS[3], LAYERS[2], LAYERS[0], LAYERS[1]]
    assert "0.4000" in lines[2] and "0.6000" in lines[2]
    assert "7 (+ 1 failed)" in lines[2] and lines[5].endswith("no effect") and "no effect" not in lines[2]
    one = known.summary(settings(frame)[0]).set_index("layer").loc[LAYERS[3]]
    assert f"{one['rank']} [{one['rank_low']}, {one['rank_high']}]" in lines[2] and "95 % intervals" in lines[-1]
    assert f"  {one['typical_rank']} [{one['typical_low']}, {one['typical_high']}]  " in lines[2]


def test_ranks_that_could_be_any_place_have_no_intervals(tmp_path):
    rng = np.random.default_rng(0)  # six prompts that agree on nothing
    frame = study(tmp_path, tuple("abcdef"), (0,))
    lesioned = frame["selection"] == "leave_one_out"
    frame.loc[lesioned, "clip_similarity"] = rng.uniform(0.5, 1, int(lesioned.sum()))
    lines = ranking_lines(findings(frame))
    assert all(line.split()[1] != f"[1,{len(LAYERS)}]" and line.split()[1][0] != "[" for line in lines[2:6])
    assert "Ranks by mean importance have no interval: with these prompts each could be any place." in lines


def test_without_leave_one_out_the_most_sufficient_layer_comes_first(tmp_path):
    frame = study(tmp_path)
    frame = frame[frame["selection"] != "leave_one_out"].copy()
    rng = np.random.default_rng(0)
    planted = dict(zip(LAYERS, (0.2, 0.5, 0.9, 0.4), strict=True))
    alone = frame["layer"].map(planted) + rng.normal(0, 0.01, len(frame))
    frame["clip_similarity"] = alone.where(frame["selection"] == "only_one", frame["clip_similarity"])
    lines = ranking_lines(findings(frame))
    assert [line.split()[0] for line in lines[2:6]] == [LAYERS[place] for place in (2, 1, 3, 0)]
    assert lines[1].split() == ["layer", "sufficiency", "(only-one)", "images"] and "n/a" not in "".join(lines)
    assert "[0.8" in lines[2]


def test_lesion_report_merges_without_double_counting(tmp_path, no_figures, monkeypatch, capsys):
    first, second = study(tmp_path / "runs" / "0"), study(tmp_path / "runs" / "1", ("q", "r"))
    spoil(first, 0, "failed", "why").to_parquet(tmp_path / "runs" / "0" / "results.parquet")
    again = first[first["prompt_id"] == "p"]  # made again, this time well
    again.to_parquet(tmp_path / "again.parquet")
    (tmp_path / "runs" / "2" / "images").mkdir(parents=True)
    for name in again["image"]:
        (tmp_path / "runs" / "2" / name).write_bytes((tmp_path / "runs" / "0" / name).read_bytes())
    (tmp_path / "again.parquet").rename(tmp_path / "runs" / "2" / "results.parquet")
    monkeypatch.chdir(tmp_path)
    assert main(["runs", "runs/1"]) == 0
    out = tmp_path / "lesion-report"
    status = pd.read_csv(out / "tables" / "status.csv")
    assert status["failed"].sum() == 0 and status["total"].sum() == 10 * 3 * 2  # prompts p, q, r x 2 seeds
    assert len(tiles(Image.open(out / "grids" / "comparison--embedded--zero--p--seed0.png"), GREEN)) == 4
    assert len(tiles(Image.open(out / "grids" / "comparison--embedded--zero--r--seed1.png"), GREEN)) == 4
    assert "report.html" in capsys.readouterr().out
    assert main([str(tmp_path / "runs" / "1")]) == 0
    assert (tmp_path / "runs" / "1" / "report.html").is_file()
    assert len(second) == 40


def test_lesion_report_keeps_prompts_apart_that_share_an_id(tmp_path, no_pictures, capsys):
    study(tmp_path / "a", ("p",), (0,), text="one")
    other = study(tmp_path / "b", ("p",), (0,), text="two")
    other.assign(cell=other["cell"] + "x").to_parquet(tmp_path / "b" / "results.parquet")
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "tables" / "prompts--leave_one_out--embedded--zero.csv")
    assert list(table.columns) == ["layer", "p", "p-2"]
    assert capsys.readouterr().err == ""


def test_a_new_name_is_not_one_that_another_prompt_has(tmp_path):
    study(tmp_path / "a", ("p", "p-2"), (0,), text="one")
    other = study(tmp_path / "b", ("p",), (0,), text="two")
    other.assign(cell=other["cell"] + "x").to_parquet(tmp_path / "b" / "results.parquet")
    frame, _, _ = merge([read(tmp_path / one, tmp_path) for one in "ab"])
    texts = frame.drop_duplicates(["prompt_id", "prompt"]).set_index("prompt_id")["prompt"]
    assert texts.to_dict() == {"p": "one p", "p-2": "one p-2", "p-3": "two p"}


@pytest.mark.parametrize("names", [("cat.png", "dog.png"), ("cat.png", "cat.png")])
def test_prompts_with_other_init_images_are_kept_apart(tmp_path, names):
    """By the name of the image, or where that is the same by the baselines: their cells depend on its digest."""
    frames = {one: study(tmp_path / one, ("p", "q"), (0,)) for one in "abc"}
    for one, name in zip("abc", (*names, names[0]), strict=True):
        own = "x" if one == "b" else ""  # c has the images of a, with another lesion
        frame = frames[one].assign(task="img2img", init=name, cell=frames[one]["cell"] + own)
        if one == "c":
            frame.loc[frame["selection"] != "none", ["replacement", "cell"]] = ["mean", "c-" + frame["cell"]]
        frame.to_parquet(tmp_path / one / "results.parquet")
    frame, _, _ = merge([read(tmp_path / one, tmp_path) for one in "abc"])
    assert set(frame["prompt_id"]) == {"p", "q", "p-2", "q-2"}
    folders = frame["image"].str.split("/").str[0]
    assert set(folders[frame["prompt_id"].isin(("p-2", "q-2"))]) == {"b"}
    assert set(frame.loc[frame["replacement"] == "mean", "prompt_id"]) == {"p", "q"}
    assert len(frame) == 3 * 20 - 2  # the baselines of c are those of a


def test_results_without_aspects_or_with_some_have_no_aspect_called_nan(tmp_path):
    frame = study(tmp_path / "a", ("p",), (0,)).drop(columns="aspects")
    frame.to_parquet(tmp_path / "a" / "results.parquet")
    study(tmp_path / "b", ("q",), (0,)).assign(aspects="colour").to_parquet(tmp_path / "b" / "results.parquet")
    merged, _, _ = merge([read(tmp_path / one, tmp_path) for one in "ab"])
    assert set(merged["aspects"]) == {"", "colour"}
    assert set(findings(merged).aspects["aspect"]) == {"colour"}


def test_the_interval_is_the_users_choice(tmp_path, no_pictures, capsys):
    study(tmp_path, [f"p{n}" for n in range(6)], (0,))
    frame = pd.read_parquet(tmp_path / "results.parquet")
    frame["clip_similarity"] -= np.random.default_rng(0).uniform(0, 0.1, len(frame)) * (frame["selection"] != "none")
    frame.to_parquet(tmp_path / "results.parquet")
    for asked, expected in (([], "bootstrap-t"), (["--interval", "bca"], "bca"), (["--interval", "t"], "t")):
        assert main([str(tmp_path), *asked]) == 0
        table = pd.read_csv(tmp_path / "tables" / "layers--embedded--zero.csv")
        assert set(table["importance_method"]) == set(table["sufficiency_method"]) == {expected}
    capsys.readouterr()
    assert main([str(tmp_path), "--interval", "percentile"]) == 2
    said = capsys.readouterr().err
    assert "--interval" in said and "bca" in said and said.count("\n") == 1


def test_lesion_report_keeps_why_the_rounds_of_a_budget_ended(tmp_path, no_pictures):
    frame = study(tmp_path / "a", ("p", "q"), (0,))
    frame.assign(images_taken=2, stopped="tight").to_parquet(tmp_path / "a" / "results.parquet")
    study(tmp_path / "b", ("p", "q"), (0,), replacement="mean")  # a run without a budget
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]) == 0
    with_budget, without = (tmp_path / "out" / "tables" / f"layers--embedded--{name}.md" for name in ("zero", "mean"))
    assert with_budget.read_text().count("| tight |") == len(LAYERS)
    assert "stopped" not in without.read_text().split("|", 1)[1]


def test_lesion_report_refuses_to_mix_what_cannot_be_compared_and_names_it(tmp_path, no_pictures, capsys):
    study(tmp_path / "a", ("p",), (0,))
    other = study(tmp_path / "b", ("p",), (0,))
    other.assign(cell=other["cell"] + "x", steps=8).to_parquet(tmp_path / "b" / "results.parquet")
    folders, out = [str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out"
    assert main([*folders, "--out", str(out)]) == 2 and not out.exists()
    said = capsys.readouterr().err
    assert f"steps of 'embedded' is 4 in {folders[0]}, 8 in {folders[1]}" in said and "--mix" in said
    assert said.count("\n") == 1
    assert main([*folders, "--out", str(out), "--mix"]) == 0
    page = (out / "report.html").read_text()
    assert "embedded, zero replacement, steps 4" in page and "differ in steps; they are kept apart" in page


@pytest.mark.parametrize("name", ["scorer_identity", "fingerprint", "protocol", "importance_metric"])
def test_runs_that_differ_in_weights_or_scores_are_never_averaged(tmp_path, capsys, name):
    frames = [study(tmp_path / one, ("p",), (0,)).assign(**{name: value, "ssim": 0.5}) for one, value in ("ax", "by")]
    frames[1]["cell"] += "y"
    for one, frame in zip("ab", frames, strict=True):
        if name == "importance_metric":
            frame[name] = {"a": "clip_similarity", "b": "ssim"}[one]
        frame.to_parquet(tmp_path / one / "results.parquet")
    runs = [read(tmp_path / one, tmp_path / "out") for one in "ab"]
    with pytest.raises(Refused, match=name):
        check(runs)
    renamed, notes = apart(runs)
    frame, _, _ = merge(renamed)
    assert frame["model"].nunique() == 2 and len(frame) == 20 and name in notes[0]


def test_floors_follow_their_prompts_and_count_once(tmp_path):
    frames = {"a": study(tmp_path / "a", text="one"), "b": study(tmp_path / "b", text="two")}
    pair = {"model": "embedded", "prompt_id_a": "p", "seed_a": 0, "prompt_id_b": "p", "seed_b": 1, "similarity": 0.8}
    for name, frame in frames.items():
        frame.assign(cell=frame["cell"] + name).to_parquet(tmp_path / name / "results.parquet")
        pd.DataFrame([pair]).to_parquet(tmp_path / name / "floor.parquet")
    runs = [read(tmp_path / one, tmp_path / "out") for one in ("a", "b", "a")]
    frame, floor, _ = merge(runs)
    assert set(frame["prompt_id"]) == {"p", "q", "p-2", "q-2"} and len(frame) == 80
    assert floor["prompt_id_a"].tolist() == floor["prompt_id_b"].tolist() == ["p", "p-2"]
    pd.DataFrame([], columns=list(pair)).to_parquet(tmp_path / "a" / "floor.parquet")  # of a shard without pairs
    alone, both = (merge([read(tmp_path / one, tmp_path / "out") for one in ones])[1] for ones in ("b", "ab"))
    assert both.dtypes.equals(alone.dtypes) and both["similarity"].tolist() == [0.8]


def test_a_cell_in_two_orders_is_two_rows(tmp_path):
    frame = study(tmp_path, ("p",), (0,))
    chain = frame[frame["selection"] == "all"].assign(selection="coalitions", lesioned="+".join(LAYERS))
    both = pd.concat([frame, chain.assign(permutation=0), chain.assign(permutation=1)], ignore_index=True)
    both.to_parquet(tmp_path / "results.parquet")
    merged, _, _ = merge([read(tmp_path, tmp_path), read(tmp_path, tmp_path)])
    assert len(merged) == len(both)


def sweep(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(SweepReport, "config", None)
    config = OmegaConf.create(
        {"hydra": {"sweep": {"dir": str(folder)}, "overrides": {"task": []}}, "tracker": {"name": "none"}}
    )
    SweepReport().on_multirun_start(config)
    SweepReport().on_multirun_end(config)


def test_a_multirun_ends_with_a_report_over_its_jobs(tmp_path, no_pictures, monkeypatch, capsys):
    study(tmp_path / "0", ("p",), (0,))
    other = study(tmp_path / "1", ("q",), (0,))
    other.assign(steps=8).to_parquet(tmp_path / "1" / "results.parquet")
    sweep(tmp_path, monkeypatch)
    assert "report over all jobs" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "steps 4" in page and "steps 8" in page
    report_sweep()  # a second call, as after a job that failed, has nothing left to do
    assert capsys.readouterr().out == ""


def test_a_report_that_fails_after_a_multirun_is_said_and_costs_nothing(tmp_path, monkeypatch, capsys):
    study(tmp_path / "0", ("p",), (0,))
    (tmp_path / "tables").write_text("in the way")
    before = (tmp_path / "0" / "results.parquet").read_bytes()
    sweep(tmp_path, monkeypatch)
    said = capsys.readouterr().err
    assert "could not be written" in said and f"lesion-report --mix {tmp_path}" in said and said.count("\n") == 1
    assert (tmp_path / "0" / "results.parquet").read_bytes() == before
    sweep(tmp_path / "nothing here", monkeypatch)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "case", ["absent", "empty folder", "not parquet", "columns", "text", "no rows", "out", "usage"]
)
def test_lesion_report_refuses_in_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    frame = study(run, ("p",), (0,))
    results = run / "results.parquet"
    arguments = ["run", "--out", "out"]
    if case == "absent":
        arguments[0] = "nowhere"
    elif case == "empty folder":
        results.unlink()
    elif case == "not parquet":
        results.write_text("hello")
    elif case == "columns":
        frame.drop(columns=["layer"]).to_parquet(results)
    elif case == "text":
        frame.assign(clip_similarity="high").to_parquet(results)
    elif case == "no rows":
        frame[:0].to_parquet(results)
    elif case == "out":
        arguments[2] = "run/results.parquet"
    else:
        arguments = ["--nonsense"]
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("lesion-report: ") and printed.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_holds_the_first_prompts_of_a_study_that_is_too_large_for_it(tmp_path, no_pictures, monkeypatch):
    import lesion.report as room

    seen = []
    page_data = room.page_data
    monkeypatch.setattr(room, "page_data", lambda frame, *rest: seen.append(frame) or page_data(frame, *rest))
    frame = study(tmp_path, ("p", "q", "r"), (0,))
    monkeypatch.setattr(room, "PAGED", 2 * len(frame) // 3)
    for all_grids, prompts in ((False, "pq"), (True, "pqr")):
        write_report(tmp_path, frame, all_grids=all_grids)
        assert "".join(seen.pop()["prompt_id"].unique()) == prompts
        said = "are of the first 2 of 3 prompts" in (tmp_path / "report.html").read_text(encoding="utf-8")
        assert said == (not all_grids)
    assert room._first_prompts(frame, 1)["prompt_id"].unique().tolist() == ["p"]
