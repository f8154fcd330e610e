"""Tables and hostile texts through a real LaTeX, where one is installed."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lesion.analysis.settings import settings
from lesion.report import contents, crossing, tables
from lesion.report.findings import findings
from lesion.report.tables import Column, Table
from lesion.report.text import beyond_t1, latex
from planted import planted

NASTY = r"\input{/etc/passwd} 50% & $x_1^2$ # {~} \\ " "\n\n" + r"\end{tabular} < > | ` ' \" [a]"
HEAD = r"""\documentclass{article}
\usepackage[margin=1in]{geometry}\usepackage[T1]{fontenc}\usepackage{array,booktabs,longtable,siunitx}
\begin{document}
"""


def compiled(folder, text: str, engine: str = "pdflatex") -> str:
    """What the PDF says. Fails where LaTeX complains."""
    head = HEAD
    if engine == "lualatex":  # as the first lines of the text say
        lines = [line.removeprefix("% ") for line in text.splitlines() if line.startswith("% \\")]
        head = HEAD.replace(r"\usepackage[T1]{fontenc}", "\n".join(lines))
    (folder / "paper.tex").write_text(head + text + r"\end{document}" + "\n", encoding="utf-8")
    command = [engine, "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "paper.tex"]
    for _ in range(2):  # longtable settles its widths in the second run
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=250)
        assert done.returncode == 0, done.stdout[-1500:]
    wide = [line for line in done.stdout.splitlines() if line.startswith("Overfull")]
    assert not [line for line in wide if float(line.split("(")[1].split("pt")[0]) > 5], wide
    if shutil.which("pdftoppm"):
        subprocess.run(["pdftoppm", "-r", "40", "-gray", "-png", "paper.pdf", "page"], cwd=folder, check=True)
        pages = sorted(folder.glob("page-*.png"))
        inked = [float((np.asarray(Image.open(page).convert("L")) < 160).mean()) for page in pages]
        assert inked and min(inked) > 0.001, inked  # no page is blank
    if not shutil.which("pdftotext"):
        pytest.skip("compiled, but without pdftotext nobody reads what the PDF says")
    command = ["pdftotext", "-layout", "paper.pdf", "-"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX here")
@pytest.mark.parametrize("siunitx", [pytest.param(False, marks=pytest.mark.slow), True])
def test_tables_compile_and_say_what_they_should(tmp_path, siunitx):
    frame, floor = planted(everything=True)
    for old, new in (("p1", NASTY), ("p2", "a/b")):
        frame["prompt_id"] = frame["prompt_id"].replace(old, new)
        floor[["prompt_id_a", "prompt_id_b"]] = floor[["prompt_id_a", "prompt_id_b"]].replace(old, new)
    frame["model"], floor["model"] = f"tiny {NASTY}", f"tiny {NASTY}"
    frame["aspects"] = frame["aspects"].replace("shape", "shape & $size")
    found = findings(frame, floor)
    made = [*contents.of_setting(found, settings(frame)[0]), *crossing.over_settings(found), contents.status(frame)]
    said = compiled(tmp_path, "\n".join(tables.to_latex(table, siunitx) for table in made))
    assert r"\input{/etc/passwd} 50% & $x" in " ".join(said.split())
    assert "down_blocks.0.attentions.0" in said and "root:" not in said


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX here")
@pytest.mark.parametrize("siunitx", [False, True])
@pytest.mark.parametrize("long", [False, True])
def test_rows_that_begin_with_a_bracket_or_a_star_are_not_options(tmp_path, siunitx, long):
    firsts = ["[2pt] boxed", "*starred", "[bare", "plain"]
    frame = pd.DataFrame({"[head]": firsts * (12 if long else 1)})
    frame["value"] = [float(number) for number in range(len(frame))]
    made = Table.of("x", "X", "[1] *", [Column("[head]", "[head]", "text"), Column("value", "value")], frame)
    text = tables.to_latex(made, siunitx)
    assert ("longtable" in text) == long
    said = " ".join(compiled(tmp_path, text).split())
    assert "[head] value" in said
    for number, first in enumerate(firsts):
        assert f"{first} {number}.000" in said
    assert said.count("[2pt] boxed") == (12 if long else 1)


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX here")
def test_every_character_that_is_let_through_can_be_set(tmp_path):
    characters = [chr(code) for code in [*range(0x20, 0x250), *range(0x2000, 0x2070), 0x20AC, 0x5D0, 0x1F600]]
    characters = [one for one in characters if latex(one).strip() and not beyond_t1(one)]
    said = compiled(tmp_path, " ".join(f"({latex(one)})" for one in characters))
    # Accents are composed of two glyphs in some fonts, and read as such.
    assert said.count("(") == len(characters) + 1 and "(z)" in said and len(characters) > 280


def fonts_of_lualatex() -> str:
    """Names of the fonts that are installed here."""
    listed = (
        subprocess.run(["fc-list", ":", "family"], capture_output=True, text=True) if shutil.which("fc-list") else None
    )
    return listed.stdout if listed and shutil.which("lualatex") else ""


@pytest.mark.slow
@pytest.mark.skipif("CJK" not in fonts_of_lualatex(), reason="no LuaLaTeX here with a font of Chinese letters")
def test_chinese_japanese_korean_and_emoji_are_set_by_lualatex(tmp_path):
    """By the preamble that the table itself names, on a machine that lacks some of its fonts."""
    names = ["一个红色圆圈", "赤い円", "빨간 원", "Дом", *(["a 🔴 circle"] if "Emoji" in fonts_of_lualatex() else [])]
    frame = pd.DataFrame({"prompt": names, "value": [float(number) for number in range(len(names))]})
    made = Table.of("x", "X", "红", [Column("prompt", "prompt", "text"), Column("value", "value")], frame)
    text = tables.to_latex(made)
    said = " ".join(compiled(tmp_path, text, "lualatex").split())
    log = (tmp_path / "paper.log").read_text(encoding="utf-8", errors="replace")
    assert "Missing character" not in log
    assert all(f"{name} {number}.000" in said for number, name in enumerate(names) if name.isalpha())
