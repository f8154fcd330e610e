"""Every command of the README runs: with fewer steps, layers and prompts, and tiny models for large ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import lesion.report
from lesion.cli import report as report_cli
from lesion.cli import structure as inspect
from lesion.models import EMBEDDED

README = (Path(__file__).parents[2] / "README.md").read_text()
COMMANDS = [
    re.split(r"\s{2,}# ", line.strip())[0]
    for line in README.splitlines()
    if re.match(r"    (lesion|lesion-inspect|lesion-report) ", line)
]
QUICK = ["generation.steps=1", "layers.include=[up_blocks.3.*]", "prompts.limit=2"]


def test_the_commands_are_found():
    assert len(COMMANDS) >= 9
    assert README.count("make demo") >= 2


@pytest.fixture
def run(cli, tiny_folder, tiny_sdxl_folder, tiny_clip, tmp_path):
    """Runs a command line of the README in a folder of its own."""
    cli.defaults = []
    (tmp_path / "my.csv").write_text("text,aspects\na red circle,colour\n")
    small = [
        "generation.steps=1",
        "prompts.limit=2",
        "generation.height=16",
        "generation.width=16",
        "model.variant=null",
    ]

    def execute(command: str) -> str:
        program, *arguments = shlex.split(command)
        if program == "lesion-inspect":
            return "\n".join(inspect.report(arguments))
        if program == "lesion-report":
            expanded = [str(path) for argument in arguments for path in (sorted(tmp_path.glob(argument)) or [argument])]
            assert report_cli.main(expanded) == 0
            return ""
        if "model=sd15" in command:
            arguments += [f"model.id={tiny_folder}", *small]
        elif "experiment=sdxl_layers" in command:
            arguments += [f"model.id={tiny_sdxl_folder}", *small]
        elif "model=local" in command:
            arguments = [argument.replace("FOLDER", str(tiny_folder)) for argument in arguments] + small
        elif "model=single_file" in command:
            from single_file import write_single_file

            file = write_single_file(EMBEDDED, tmp_path / "FILE.safetensors")
            arguments = [a.replace("BASE-FOLDER", str(EMBEDDED)).replace("FILE.safe", f"{file.parent}/FILE.safe")
                         for a in arguments] + [*QUICK, "generation.height=64", "generation.width=64"]  # fmt: skip
        else:
            arguments += QUICK
        if any(name in command for name in ("model=sd15", "sdxl_layers", "model=local", "model=single_file")):
            arguments += [f"scorer.clip_model=local-dir:{tiny_clip}"]
        code, out, err = cli(*arguments, defaults=False)
        assert code == 0, err
        return out

    return execute


@pytest.mark.slow  # four jobs and a report with its figures
def test_the_worked_multirun_and_its_report(run, drawn, monkeypatch, tmp_path):
    swept, reported = (command for command in COMMANDS if " -m " in command or command.startswith("lesion-report"))
    with monkeypatch.context() as patch:  # its jobs draw what every other study draws
        patch.setattr(lesion.report, "write_report", lambda *args, **options: [])
        patch.setattr(lesion.report, "findings", lambda *_, **__: None)
        run(swept)
    run(reported)
    assert len(list(tmp_path.glob("multirun/*/*/*/results.parquet"))) == 4
    assert (tmp_path / "colour-report" / "report.html").is_file()


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if " -m " not in command and not command.startswith("lesion-report")]
)
def test_every_other_command(run, command):
    out = run(command)
    assert ("dry run" in out) == ("dry_run=true" in command)


def test_the_line_that_completes_by_tab(cli):
    (line,) = re.findall(r'^    eval "\$\(lesion (.+)\)"$', README, re.MULTILINE)
    code, out, err = cli(*shlex.split(line), defaults=False)
    assert code == 0 and "complete -o nospace" in out, err


def test_the_picture_of_the_page_is_small():
    picture = Path(__file__).parents[2] / "docs" / "images" / "page.png"
    assert "docs/images/page.png" in README and picture.stat().st_size < 300_000
