"""lesion-audit: an untouched study is signed off, and whatever is changed in one is named."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, PngImagePlugin

from lesion.audit import run as auditing
from lesion.audit.checks import Check
from lesion.audit.paper import Tables, numbers
from lesion.cli import audit
from lesion.run import environment
from lesion.scoring.ssim import Ssim
from lesion.study.confirmation import Confirmation


def flipped(path: Path, digest: bool) -> None:
    """One pixel's channel by one. digest: the file keeps its record, with the old digest of its pixels."""
    with Image.open(path) as image:
        pixels, record = np.array(image), image.text["lesion"]
    pixels[3, 5, 1] ^= 1
    if digest:
        record = json.dumps({name: value for name, value in json.loads(record).items() if name != "pixels"})
    stored(path, Image.fromarray(pixels), record)


def stored(path: Path, image: Image.Image, record: str) -> None:
    """In the place of a picture, which is a link to the store's."""
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("lesion", record)
    path.unlink()
    image.save(path, pnginfo=notes)


def rescored(folder: Path) -> None:
    frame = pd.read_parquet(folder / "results.parquet")
    frame.loc[4, "clip_similarity"] = np.nextafter(frame.loc[4, "clip_similarity"], 0)
    frame.loc[6, "clip_similarity"] -= 1e-3
    frame.to_parquet(folder / "results.parquet", index=False)


def last_digit(folder: Path) -> None:
    path = next((folder / "tables").glob("layers--*.csv"))
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    place = rows[0].index("importance")
    rows[1][place] = rows[1][place][:-1] + str((int(rows[1][place][-1]) + 1) % 10)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def edited(folder: Path) -> None:
    path = folder / ".hydra" / "config.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("steps: 3", "steps: 4"), encoding="utf-8")


def of_other_torch(folder: Path) -> None:
    record = json.loads((folder / environment.RECORD).read_text())
    record["runs"][0]["torch"] = "1.13.0"
    (folder / environment.RECORD).write_text(json.dumps(record))


@pytest.mark.slow
def test_figures_are_drawn_anew_and_compared(cli, drawn, capfd):
    folder = cli.folder / "run"
    assert cli(f"hydra.run.dir={folder}")[0] == 0
    assert audit.main([str(folder)]) == 0, capfd.readouterr().out
    path = next((folder / "figures").glob("layers--*.png"))
    with Image.open(path) as image:
        pixels = np.array(image)
    pixels[10, 10, 0] ^= 1
    Image.fromarray(pixels).save(path)
    (folder / "figures" / "more.png").write_bytes(path.read_bytes())
    assert audit.main([str(folder)]) == 1
    said = capfd.readouterr().out
    assert f"figures/{path.name} shows something else" in said and "figures/more.png is none of the files" in said


def test_an_untouched_study_is_signed_off_and_each_change_is_named(cli, drawn, no_pictures, capfd):
    folder = cli.folder / "run"
    assert cli(f"hydra.run.dir={folder}")[0] == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert audit.main([str(folder), "--share", "0.2", "--seed", "3"]) == 0, capfd.readouterr().out
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in after.keys() - before.keys()} == {"audit.json", "audit.md"}
    assert all(after[path] == before[path] for path in before)
    summary = json.loads((folder / "audit.json").read_text())
    assert summary["signed_off"] and "signed off" in (folder / "audit.md").read_text()
    (checks,) = summary["checks"].values()
    looked = {one["name"]: one["looked"] for one in checks}
    assert looked["pictures"] == 14 and looked["scores"] >= 14 and looked["remade"] >= 3 and looked["report"] > 10
    assert all(one["verdict"] == "as made" and not one["notes"] for one in checks)  # to the bit, and against the store

    # One copy with every change: each check names its own.
    one = cli.folder / "changed"
    shutil.copytree(folder, one)
    images = sorted((one / "images").rglob("seed0-leave_one_out*.png"))
    flipped(images[0], False)
    flipped(images[1], True)
    rescored(one)
    last_digit(one)
    edited(one)
    of_other_torch(one)
    shutil.copyfile(images[2], images[2].with_name("more.png"))
    with Image.open(images[3]) as image:
        pixels = np.array(image)
    images[3].unlink()
    Image.fromarray(pixels).save(images[3])
    (one / "confirmation.json").write_text("{}")
    for name in ("report.html", "report.json"):
        (one / name).unlink()
    assert audit.main([str(one), "--share", "1", "--out", str(cli.folder / "elsewhere")]) == 1
    said = capfd.readouterr().out
    (checks,) = json.loads((cli.folder / "elsewhere" / "audit.json").read_text())["checks"].values()
    differs = {check["name"]: check["differs"] for check in checks}
    named = {"results.parquet", ".hydra/config.yaml", "environment.json"}
    assert named <= {text.split()[0] for text in differs["files"] if "is not the file that was written" in text}
    assert "confirmation.json has no digest in SHA256SUMS" in differs["files"]
    assert ".hydra/config.yaml: generation.steps is 4, was 3 when the study ran" in differs["config"]
    # images[1] says nothing of its pixels, so only making it again can tell.
    assert [text.split()[0].rpartition("/")[2] for text in differs["pictures"]] == [
        images[0].name, images[3].name, "more.png"
    ]  # fmt: skip
    why = ("not those that were made", "it has no record of what it shows", "is of no row of the results")
    assert all(text.endswith(words) for text, words in zip(differs["pictures"], why, strict=True))
    assert differs["remade"] == ["12 pictures are none that the config asks for, so cannot be made again"]
    assert any("layers--" in text and "importance" in text for text in differs["report"])
    assert differs["report"][0] == "report.html is not there" and "report.json is not there" in differs["report"][1]
    assert "not signed off" in said and "generation.steps" in said


def test_scores_and_pixels_are_compared_with_what_is_worked_out_anew(cli):
    folder = cli.folder / "run"
    assert cli(f"hydra.run.dir={folder}")[0] == 0
    rescored(folder)
    keys = pd.read_parquet(folder / "results.parquet")
    hidden = folder / keys["image"].iloc[2]
    flipped(hidden, True)
    assert audit.main([str(folder), "--share", "1"]) == 1
    (checks,) = json.loads((folder / "audit.json").read_text())["checks"].values()
    differs = {check["name"]: check["differs"] for check in checks}
    scores = [text for text in differs["scores"] if "clip_similarity is" in text]
    assert any("row 4" in text and "in the store" in text for text in scores)  # in its last digit
    assert any("row 6" in text and "anew" in text for text in scores)
    assert differs["remade"] == [f"cell {keys['cell'].iloc[2]}: made anew, 1 pixels differ, by up to 1/255"]
    assert differs["pictures"] == [f"the picture of cell {keys['cell'].iloc[2]} has no digest of its pixels"]
    # A record with the digest to it is told by the images.
    of_other_torch(folder)
    sample = auditing.RunAudit(folder, auditing.Sample(), cli.folder / "versions")
    sample.work.mkdir()
    sample.given, check = sample._results(), Check("remade", "images")
    sample._made_with(check)
    assert [text.partition(" by ")[0] for text in check.differs] == ["environment.json: torch is 1.13.0,"]
    # Of a run that has no record, the batch effect is allowed.
    (folder / environment.RECORD).unlink()
    (folder / "SHA256SUMS").unlink()
    sample = auditing.RunAudit(folder, auditing.Sample(1.0), cli.folder / "work")
    sample.work.mkdir()
    found = {check.name: check for check in sample.checks()}
    assert found["remade"].verdict == "as made" and "batch effect" in found["remade"].notes[0]
    assert found["files"].verdict == "as made" and len(found["files"].notes) == 2
    assert found["config"].verdict == "as made"


def test_edits_that_keep_every_digest_in_step_are_named(cli):
    """Of a plan, of what pictures say of themselves, of a row said to have failed, and of the record."""
    folder = cli.folder / "run"
    assert cli(f"hydra.run.dir={folder}", "confirm.hypotheses=[changes]")[0] == 0
    frame = pd.read_parquet(folder / "results.parquet")
    told, clear = (folder / frame["image"].iloc[row] for row in (1, 2))
    with Image.open(told) as image:
        record = json.loads(image.text["lesion"]) | {"prompt": "a blue square"}
        stored(told, image.copy(), json.dumps(record))
    with Image.open(clear) as image:
        record, shown = image.text["lesion"], image.convert("RGBA")
        shown.putalpha(0)
        stored(clear, shown, record)
    frame.loc[4, ["status", "reason"]] = "failed", "out of memory"
    frame.to_parquet(folder / "results.parquet", index=False)
    plan = json.loads((folder / "confirmation.json").read_text())
    plan["plan"]["alpha"] = 0.5
    plan["sha256"] = Confirmation.read(plan).sha256
    (folder / "confirmation.json").write_text(json.dumps(plan))
    made = json.loads((folder / environment.RECORD).read_text())
    made["runs"][0] |= {"commit": "0123456789abcdef", "device": "cuda:0"}
    (folder / environment.RECORD).write_text(json.dumps(made))
    lines = [line.partition("  ")[2] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    (folder / "SHA256SUMS").write_text("".join(f"{environment.sha256(folder / name)}  {name}\n" for name in lines))
    assert audit.main([str(folder)]) == 1
    (checks,) = json.loads((folder / "audit.json").read_text())["checks"].values()
    differs = {check["name"]: check["differs"] for check in checks}
    assert differs["files"] == []
    assert differs["config"] == ["confirmation.json is not the plan that the config gives"]
    assert [text.partition(" says ")[2] or text.partition(" is ")[2] for text in differs["pictures"]] == [
        "another prompt than it was made with", "of mode RGBA, not RGB"
    ]  # fmt: skip
    assert any("row 4" in text and "status is failed, anew ok" in text for text in differs["scores"])
    assert [text.partition(",")[0] for text in differs["remade"] if text.startswith(environment.RECORD)] == [
        f"{environment.RECORD}: device is cuda", f"{environment.RECORD}: commit is 0123456789ab"
    ]  # fmt: skip
    made["runs"] = []
    (folder / environment.RECORD).write_text(json.dumps(made))
    (folder / ".hydra" / "request.json").unlink()
    sums = [line for line in lines if line != ".hydra/request.json"]
    (folder / "SHA256SUMS").write_text("".join(f"{environment.sha256(folder / name)}  {name}\n" for name in sums))
    auditing.RunAudit(folder, auditing.Sample(), cli.folder / "again").files(check := Check("files", "digests"))
    assert check.differs == [
        f"{environment.RECORD} names no process that made the study", ".hydra/request.json is not there"
    ]  # fmt: skip


def test_budgets_maps_and_scores_of_an_earlier_version(cli, drawn, no_pictures, monkeypatch):
    """What an earlier version computed in float32 is accepted within its stated error, and nothing beyond."""
    now = Ssim.__call__

    def before(self, shots):  # up to 4.9e-4 off where both images are flat and bright
        return (now(self, shots) - 3e-4).astype(np.float32).astype(np.float64)

    folder, out = cli.folder / "run", cli.folder / "audit"
    asked = ["prompts.items=[a, b, c, d, e]", "budget.ci_halfwidth=0.5", "budget.start=5", "capture=maps"]
    asked += ["scorer.metrics=[clip_similarity, ssim]", "selection=leave_one_out", f"hydra.run.dir={folder}"]
    monkeypatch.setattr(Ssim, "__call__", before)
    code, _, err = cli(*asked)
    assert code == 0, err
    monkeypatch.setattr(Ssim, "__call__", now)
    assert audit.main([str(folder), "--out", str(out)]) == 0
    (checks,) = json.loads((out / "audit.json").read_text())["checks"].values()
    (scores,) = [check for check in checks if check["name"] == "scores"]
    assert scores["looked"] > 10 + 1 + 5 and not scores["differs"]  # results, budget, maps
    assert any("of ssim are of an earlier version, in float32, off by up to 0.0003" in one for one in scores["notes"])

    # The same values with another digest: each is named by the audit's own computation.
    for name, column, by in (("results", "ssim", 6e-4), ("budget", "halfwidth", 1e-3), ("maps", "share", 1e-3)):
        table = pd.read_parquet(folder / f"{name}.parquet")
        row = len(table) - 1
        table.loc[row, column] -= by
        table.to_parquet(folder / f"{name}.parquet", index=False)
    assert audit.main([str(folder), "--out", str(out)]) == 1
    (checks,) = json.loads((out / "audit.json").read_text())["checks"].values()
    (differs,) = [check["differs"] for check in checks if check["name"] == "scores"]
    for name, column in (("results", "ssim"), ("budget", "halfwidth"), ("maps", "share")):
        assert any(text.startswith(f"{name}.parquet row ") and f": {column} is" in text for text in differs)


def test_every_number_of_a_paper_is_one_of_the_tables(tmp_path):
    (tmp_path / "layers.csv").write_text("layer,importance,low,high,n\nup_blocks.2,0.21149,-0.0163,0.2561,49\n")
    known = Tables([tmp_path / "layers.csv"])

    def strange(text, suffix=".md"):
        return [number.text for number in numbers(text, suffix) if not known.where(number)]

    fine = "The importance is 0.211 [−0.016, 0.256], that is 21.1 % or 0.2115 of 49 prompts (`up_blocks.2`, layer-3)."
    assert strange(fine) == []
    assert strange("It is 0.212, 0.2114, 21.2 %, -0.211 or 48.") == ["0.212", "0.2114", "21.2 %", "-0.211", "48"]
    assert strange("0.016--0.256 and 0.21-0.31") == ["0.016", "0.31"]  # a range has two numbers, not a negative one
    tex = r"""\documentclass[11pt]{article}
\begin{document}
Of $49$ prompts\cite{smith2023} (Table~\ref{tab:12}), \textbf{0.211} [\textminus{}0.016, $-0.02$], 21\,\%. % 7.77
Ours: $0.31 \pm 0.04$ in SD 1.5. % lesion-audit: ignore
\texttt{up\_blocks.7} has 0.312.\\[3pt]
"""
    found = [(one.line, one.text) for one in numbers(tex, ".tex") if not known.where(one)]
    assert found == [(5, "0.312")]


@pytest.mark.parametrize(
    ("suffix", "text", "strange"),
    [
        # Kinds of numbers: one that no table has is named, one that a table has is not.
        (".tex", r"\num{0.377}, \qty{37.7}{\percent}, \SI{15.9}{\percent}", ["0.377", "37.7  %"]),
        (".tex", r"$3.7\times10^{-3}$ and $1.2 \cdot 10^{-3}$", ["3.7e-3"]),
        (".md", "3.7 × 10⁻³, $1.2\\times 10^{-3}$ or 1.2e-3", ["3.7e-3"]),
        (".md", "49/48 prompts, 16/49; 16x48, 16 × 49", ["48", "48"]),
        (".tex", r"$\frac{48}{49}$", ["48"]),
        (".md", "4.9x as much in 37min, 16x", ["4.9", "37"]),
        (".tex", r"13\,132, 13{,}132 of 13\,133", ["13133"]),
        (".md", "13,132 or 13\u202f132 of 13,133", ["13,133"]),
        (".tex", r"$-$0.159, ${-}0.159$, $-$0.016, {-}0.016", ["-0.159", "-0.159"]),
        (".md", "&minus;0.159, −0.016", ["−0.159"]),
        (".md", "15.9 percent, 37.7 per cent, 37.7 pp, [-1.6, 25.6] %, 16 to 26 %", ["37.7 per cent", "37.7 pp"]),
        (".md", "_0.377_ <b>0.377</b> in 2D[^7]\n\n[^7]: 8", ["0.377", "0.377"]),
        # What is no text that a reader sees, and what only looks so.
        (".tex", "\\newcommand{\\imp}[1]{0.377 #1}\n\\usepackage[7pt]{x}\n\\begin{document}\n\\imp", ["0.377"]),
        (
            ".tex",
            r"\multirow{2}{*}{0.377} & \multicolumn{2}{c}{0.378} & \ref{tab:2}{0.379} \\[2pt]",
            ["0.377", "0.378", "0.379"],
        ),
        (".tex", r"\begin{tabular}{p{0.3\textwidth}*{4}{r}} \resizebox{0.7\textwidth}{!}{0.159} \verb|7|", []),
        (".tex", "\\begin{lstlisting}\n7\n\\end{lstlisting}\n0.377 \\\\% 8\n", ["0.377"]),
        (".md", "```\n~~~\n```\n0.377 <!-- 7\n8 --> `9`", ["0.377"]),
    ],
)
def test_every_kind_of_number_is_read(tmp_path, suffix, text, strange):
    values = "0.21149,-0.0163,0.2561,0.0012,0.159,49,16,13132"
    (tmp_path / "layers.csv").write_text(f"a,b,c,d,e,f,g,h\n{values}\n")
    known = Tables([tmp_path / "layers.csv"])
    assert [number.text for number in numbers(text, suffix) if not known.where(number)] == strange


@pytest.mark.parametrize(
    "arguments", [["nowhere"], [".", "--share", "0"], [".", "--share", "x"], [".", "--paper", "no.tex"], ["."]]
)
def test_a_wrong_request_is_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert audit.main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
