"""Tables and hostile texts through a real LaTeX, where one is installed."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from lesion.analysis import settings
from lesion.report import contents, crossing, tables
from lesion.report.findings import findings
from planted import planted

NASTY = r"\input{/etc/passwd} 50% & $x_1^2$ # {~} \\ " "\n\n" + r"\end{tabular} < > | ` ' \" [a]"
HEAD = r"""\documentclass{article}
\usepackage[margin=1in]{geometry}\usepackage[T1]{fontenc}\usepackage{array,booktabs,longtable,siunitx}
\begin{document}
"""


def compiled(folder, text: str) -> str:
    """What the PDF says. Fails where LaTeX complains."""
    (folder / "paper.tex").write_text(HEAD + text + r"\end{document}" + "\n", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "paper.tex"]
    for _ in range(2):  # longtable settles its widths in the second run
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=250)
        assert done.returncode == 0, done.stdout[-1500:]
    wide = [line for line in done.stdout.splitlines() if line.startswith("Overfull")]
    assert not [line for line in wide if float(line.split("(")[1].split("pt")[0]) > 5], wide
    if not shutil.which("pdftotext"):
        return ""
    command = ["pdftotext", "-layout", "paper.pdf", "-"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX here")
@pytest.mark.parametrize("siunitx", [False, True])
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
    if said:
        assert r"\input{/etc/passwd} 50% & $x" in " ".join(said.split())
        assert "down_blocks.0.attentions.0" in said and "root:" not in said
