"""What reaches the command line and should not: unknown keys, values that no table holds, errors nobody foresaw."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pandas as pd
import pytest
from hydra.plugins.sweeper import Sweeper

import lesion
from lesion import models
from lesion.cli import report, structure
from lesion.config import parsing
from lesion.errors import RequestError, visible
from lesion.report.tables import Column, Table, write
from lesion.run import maker
from lesion.study import layer_patterns


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("+new.key=1", ["new: ", "no such key", "allowed", "window"]),
        ("+seed=3", ["seed: ", "near: seeds"]),
        ("++generation.step=3", ["generation.step", "near: generation.steps"]),
        ("+calibration.sead=3", ["calibration.sead", "seeds"]),
        ("~seeds", ["seeds: ", "needed"]),
        ("~store", ["store: ", "needed"]),
        ("~model", ["model: is taken out; it is needed; allowed: embedded"]),
        ("prompts=a red, blue one", ["""as a prompt: prompts=inline 'prompts.items=["a red, blue one"]'"""]),
        ("replacement.zero=3", ["replacement.zero: ", "mapping"]),
        ("window.x=3", ["command line: ", "'x'"]),
        ("scorer=true", ["scorer: ", "got True", "embedded"]),
        ("selection=[null]", ["selection: ", "got None", "leave_one_out"]),
        ("dry_run=${oc.env:HOME}", ["dry_run: ", "true or false"]),
        ("model.arguments=3", ["model.arguments: ", "mapping"]),
        ("generation.steps=1000000000000", ["generation.steps: ", "[1, 10000]"]),
        ("generation.height=100000", ["generation.height: ", "8 to 16384"]),
        ("generation.guidance=1e300", ["generation.guidance: ", "[0, 10000]"]),
        ("generation.batch_size=1000000000000", ["generation.batch_size: ", "[1, 10000]"]),
        ("generation.steps=" + "9" * 5000, ["generation.steps"]),
        ("scorer.batch_size=1000000000000", ["scorer.batch_size: ", "[1, 10000]"]),
        ("model.name=" + "x" * 20_000, ["model.name: ", "20000 characters"]),
        ("hydra.verbose=5", ["hydra.verbose: ", "true, false", "got 5"]),
        ("hydra.verbose=[0,2]", ["hydra.verbose: ", "a logger", "got [0, 2]"]),
        ("hydra.job.name='a\0b'", ["hydra.job.name: ", "NUL"]),
        ("hydra.job.name='a\ud800'", ["hydra.job.name: ", "surrogate"]),
        ("hydra.run.dir='a\0b'", ["hydra.run.dir: ", "NUL"]),
        ("hydra.run.dir='a\ud800'", ["hydra.run.dir: ", "surrogate"]),
        ("hydra.run.dir=", ["hydra.run.dir: must name a folder; got ''"]),
        ("hydra.sweep.dir=", ["hydra.sweep.dir: must name a folder; got ''"]),
        ("hydra.job.name=a/b", ["hydra.job.name: ", "within the run folder", "got 'a/b'"]),
        ("hydra.job.name='${nope}'", ["hydra.job.name: ", "'nope' not found"]),
        ("hydra.job.chdir='${nope:}'", ["hydra.job.chdir: ", "nope"]),
        ("hydra.output_subdir=/dev/null", ["hydra.output_subdir: ", "within the run folder"]),
        ("prompts.items=" + "[" * 60 + "]" * 60, ["prompts.items: ", "nested"]),
        ("performance.compile=5", ["performance.compile: ", "true or false", "got 5"]),
        ("store.check=-1", ["store.check: ", "true or false"]),
        ("store.dir=", ["store.dir: must name a folder; got ''"]),
        ("store.dir=[a]", ["store.dir: must be text; got ['a']"]),
        ("model.name={a: 1}", ["model.name: must be text; got {'a': 1}"]),
        ("store.dir=s3://bucket/store", ["store.dir: 's3://bucket/store' is no folder", "a file system"]),
        ("prompts.items=" + "[" * 600 + "]" * 600, ["prompts.items: ", "nested"]),
        ("generation.steps=100000000000000000000", ["generation.steps: ", "64 bits"]),
        ("generation.width=80000000000000000000", ["generation.width: ", "64 bits"]),
        ("generation.negative_prompt='a\0b'", ["generation.negative_prompt: ", "NUL"]),
        ("generation.negative_prompt='a\ud800b'", ["generation.negative_prompt: ", "surrogate"]),
        ("model.name='\udc80'", ["model.name: ", "surrogate"]),
        ("scorer.name='\udc80'", ["scorer.name: ", "surrogate"]),
        ("prompts.items=[{text: a, aspects: ['\ud800']}]", ["prompts", "surrogate"]),
        ("prompts.items=[{text: a, id: '" + "𠀀" * 70 + "'}]", ["prompts", "255 bytes"]),
        ("layers.include=['re:\x1b[31m(']", ["layers.include: ", r"\x1b"]),
        ("--unknown", ["command line: ", "--unknown"]),
        ("--cfg=nonsense", ["command line: ", "'nonsense'", "'job'"]),
        ("+hydra.foo=1", ["hydra.foo: ", "no such key", "hydra.job"]),
        ("+hydra.job.nam=1", ["hydra.job.nam: ", "near: hydra.job.name"]),
    ],
)
def test_it_is_refused_in_one_line(cli, monkeypatch, argument, words):
    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("loaded a model"))
    code, out, err = cli(argument)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert all(word in err for word in words), err
    assert "\x1b" not in err
    assert list(cli.folder.iterdir()) == []


class Picking(Sweeper):
    """A sweeper that picks values as it goes, as those do which optimise."""

    def __init__(self, params=None):
        pass

    def setup(self, *, hydra_context, task_function, config):
        pass

    def sweep(self, arguments):
        pytest.fail("began")


def test_jobs_of_any_sweeper_are_checked_before_the_first(cli):
    picking = ("-m", f"hydra.sweeper._target_={__name__}.Picking")
    for given, words in (
        (["seeds=choice(0,1)", "generation.steps=choice(2,-3)"], "generation.steps: "),
        (["generation.guidance=interval(-2, 3)"], "generation.guidance: "),
    ):
        code, out, err = cli(*picking, *given)
        assert (code, out, err.count("\n")) == (2, "", 1) and words in err, err
    code, out, err = cli("-m", "hydra.sweeper=3")
    assert (code, err) == (2, "lesion: hydra.sweeper: must be a mapping; got 3\n")
    code, out, err = cli("-m", "seeds=range(0,1,0)")
    assert (code, err.count("\n")) == (2, 1) and err.startswith(
        "lesion: seeds: range(0,1,0) names no job: range() arg 3"
    )
    code, out, err = cli("hydra.run.dir=/dev/null/x", "dry_run=true")
    assert (code, err) == (2, "lesion: hydra.run.dir: cannot be written to: Not a directory\n")
    assert list(cli.folder.iterdir()) == []


def test_the_arguments_of_the_pipeline_can_be_set_whole_and_one_by_one(cli):
    for given in ("model.arguments={eta: 0.5}", "model.arguments.eta=0.5", "+model.arguments.eta=0.5"):
        code, _, err = cli(given, "dry_run=true")
        assert code == 0, err
    code, _, err = cli("model.arguments={max_sequence_length: 256}")
    assert code == 2
    assert "takes no 'max_sequence_length'" in err


def test_a_pattern_that_backtracks_is_refused_in_time():
    path, pattern = "a" * 40 + "!", r"re:^(a|a)*$"
    start = time.process_time()
    with pytest.raises(RequestError, match=r"layers.include: .* takes more than 1 s"):
        layer_patterns.matches(path, pattern, "layers.include")
    assert time.process_time() - start < 10
    assert layer_patterns.matches("up_blocks.1.attentions.0", r"re:^up_.*\.\d$", "layers.include")
    assert not layer_patterns.matches("up_blocks.1.attentions.0", "up_blocks.1", "layers.include")


def test_an_unforeseen_error_before_the_start_is_one_line_and_leaves_no_trace(cli, monkeypatch):
    monkeypatch.setattr(parsing, "parse_seeds", lambda *args: {}["planted fault"])
    for mode in ([], ["-m"]):
        code, out, err = cli(*mode)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert re.search(r"unforeseen KeyError at lesion\.config\.parsing:\d+: 'planted fault'", err)
        assert "LESION_TRACEBACK=FILE" in err
        assert list(cli.folder.iterdir()) == []
    monkeypatch.setenv("LESION_TRACEBACK", "traceback.txt")
    assert cli()[0] == 2
    assert "Traceback (most recent call last)" in (cli.folder / "traceback.txt").read_text()


def test_after_the_start_the_results_of_what_is_there_are_written(cli, monkeypatch):
    batches = []

    def failing(self, *args, made=maker.Maker._make, **options):
        batches.append(1)
        if len(batches) == 2:
            raise LookupError("planted fault")
        return made(self, *args, **options)

    monkeypatch.setattr(maker.Maker, "_make", failing)
    code, _, err = cli()
    assert code == 1
    assert "unforeseen LookupError" in err
    assert "Traceback" not in err
    (frame,) = cli.frames()
    assert len(frame) == 14
    there = frame[frame.status == "ok"]
    assert 0 < len(there) < 14
    assert there.clip_similarity.notna().all()
    monkeypatch.setattr(maker.Maker, "_make", failing)
    assert cli()[0] == 0


def test_csv_tables_hold_no_formula_and_no_control_character(tmp_path):
    texts = ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "a\x1b[31mb", "two\nlines", "a-b", "日本"]
    frame = pd.DataFrame({"prompt": texts, "value": [-1.5] * len(texts)})
    write(tmp_path, Table.of("t", "t", "t", [Column("prompt", "prompt", "text"), Column("value", "value")], frame))
    back = pd.read_csv(tmp_path / "t.csv")
    expected = ["'=1+1", "'+1", "'-1", "'@x", r"'\tx", r"'\rx", r"a\x1b[31mb", "two\nlines", "a-b", "日本"]
    assert back["prompt"].tolist() == expected
    assert (back["value"] == -1.5).all()


def test_control_characters_are_spelled_out():
    assert visible("a\x1b]0;x\x07\u202eb\udc80\x85é 日本🎉") == r"a\x1b]0;x\x07\u202eb\udc80\x85é 日本🎉"
    assert str(RequestError("key", "a\x1bb")) == r"key: a\x1bb"


@pytest.mark.parametrize("program", ["lesion-report", "lesion-inspect"])
def test_what_the_other_commands_do_not_foresee_is_one_line_too(program, capsys, monkeypatch, tmp_path):
    def fault(*args, **options):
        raise KeyError("planted\nfault")

    kept = tmp_path / "traceback.txt"
    monkeypatch.setenv("LESION_TRACEBACK", str(kept))
    if program == "lesion-report":
        (tmp_path / "results.parquet").touch()
        monkeypatch.setattr(report, "report", fault)
        code = report.main([str(tmp_path)])
    else:
        monkeypatch.setattr("sys.argv", [program, "model=embedded"])
        monkeypatch.setattr(structure, "report", fault)
        with pytest.raises(SystemExit) as end:
            structure.main()
        code = end.value.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"{program}: unforeseen KeyError") and "planted" in err and str(kept) in err
    assert "Traceback" in kept.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("generation.guidance_scale=1", "generation.guidance_scale: there is no such key; near: generation.guidance,"),
        ("genration.steps=1", "genration: there is no such key; near: generation,"),
        ("foo=1", "foo: there is no such key; allowed: attribution, branch, budget,"),
        ("store=3", "store: must be a mapping; got 3"),
        ("generation=null", "generation: must have a value; got null"),
        ("generation.steps=abc", "generation.steps: must be a whole number; got 'abc'"),
        ("prompts.items=3", "prompts.items: must be a list; got int"),
    ],
)
def test_wrong_keys_and_types_are_named_as_ours(cli, given, said):
    code, out, err = cli(given)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"lesion: {said}")
    assert list(cli.folder.iterdir()) == []


def test_the_module_is_the_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "lesion", "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"lesion {lesion.__version__}\n")
