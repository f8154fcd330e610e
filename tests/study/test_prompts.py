"""Prompts are read as they are written, or refused with the line that is wrong."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lesion.errors import RequestError
from lesion.study import prompt_files
from lesion.study.inits import read_init
from lesion.study.prompts import Prompt, parse_prompts, slug, slug_of_0_1

BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # where str.splitlines breaks, and no newline is


def parse(path: Path):
    return parse_prompts({"path": str(path)})[1]


def test_only_newlines_end_a_line(tmp_path):
    texts = [f"a red{mark}circle" for mark in BREAKS] + ["two\nlines", 'a "quoted", text']
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["text", "aspects"], *([text, "colour"] for text in texts)])
    prompts = parse(tmp_path / "a.csv")
    assert [prompt.text for prompt in prompts] == texts
    assert {prompt.aspects for prompt in prompts} == {("colour",)}
    (tmp_path / "a.txt").write_bytes("\r\n".join(texts[: len(BREAKS)]).encode())
    assert [prompt.text for prompt in parse(tmp_path / "a.txt")] == texts[: len(BREAKS)]
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"text": "a{mark}b"}}' for mark in BREAKS[:3]), encoding="utf-8")
    assert [prompt.text for prompt in parse(tmp_path / "a.jsonl")] == [f"a{mark}b" for mark in BREAKS[:3]]


def test_an_id_of_zero_is_an_id(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n0,a cat\n1,a dog\n,a cow\n")
    assert [prompt.id for prompt in parse(tmp_path / "a.csv")] == ["0", "1", slug("a cow")]
    (tmp_path / "a.jsonl").write_text('{"id": 0, "text": "a cat"}\n{"id": "", "prompt_id": 7, "text": "a dog"}')
    assert [prompt.id for prompt in parse(tmp_path / "a.jsonl")] == ["0", "7"]


def test_ids_keep_the_letters_of_any_script_and_fit_a_file_name():
    assert slug("A red circle!").startswith("a-red-circle-")
    assert slug("一只 红色的猫").startswith("一只-红色的猫-")
    assert slug("हिन्दी चित्र").startswith("हिन्दी-चित्र-")
    assert slug("caf\u00e9")[:4] == slug("cafe\u0301")[:4] == "caf\u00e9"
    for text in ("", "🎉", "a" * 500, "字" * 500, "𠀀" * 500):
        assert len(slug(text)) <= 80
        assert len(slug(text).encode()) <= 255
    captions = [chr(0x4E00 + i) + chr(0x4E00 + j) for i in range(80) for j in range(80)]
    assert len(set(map(slug, captions))) == len(captions) > len({slug_of_0_1(text) for text in captions})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"text,aspects\na red circle, on white, shape\n", ["line 2", "double quotes"]),
        ("a.csv", b"text\n\n\na cat\na dog, a cow\n", ["line 5", "2 fields for 1 columns"]),
        ("a.csv", b"text,text\na,b\n", ["line 1", "'text' twice"]),
        ("a.csv", b'text\n"a', ["line 2", "CSV"]),
        ("a.csv", b"text\na\nb\0\n", ["line 3", "NUL"]),
        ("a.csv", "text\na cat\n".encode("utf-16-le"), ["line 1", "UTF-16"]),
        ("a.csv", "text\na cat\n".encode("utf-16"), ["UTF-8"]),
        ("a.csv", "text\nein Bär\n".encode("latin-1"), ["UTF-8"]),
        ("a.txt", b"a\0b\n", ["line 1", "NUL"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a", "text": "b"}\n', ["line 2", "'text' is given twice"]),
        ("a.jsonl", b"[" * 100_000, ["line 1", "JSON"]),
        ("a.jsonl", b'{"text": "a", "id": ' + b"9" * 5000 + b"}", ["line 1", "JSON"]),
        ("a.jsonl", b'{"text": "a", "aspects": ["\\ud800"]}', ["aspect", "surrogate"]),
        ("a.jsonl", b'{"text": "a", "aspects": ["\\u0000"]}', ["aspect", "NUL"]),
        ("a.jsonl", b'{"text": "a", "id": "' + b"\xf0\xa0\x80\x80" * 70 + b'"}', ["too long", "255 bytes"]),
        ("a.jsonl", b'{"text": "a", "id": "' + b"x" * 81 + b'"}', ["too long", "80"]),
        ("a.jsonl", b'{"text": "a", "id": "../b"}', ["not allowed"]),
    ],
)
def test_what_would_be_misread_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError) as refused:
        parse(tmp_path / name)
    assert all(word in str(refused.value) for word in ["prompts.path", *words]), refused.value
    assert len(str(refused.value)) < 500


def test_rows_shorter_than_the_header_and_empty_columns_are_fine(tmp_path):
    (tmp_path / "a.csv").write_text("text,aspects,,\na cat,animal,,\na dog\n")
    assert [(prompt.text, prompt.aspects) for prompt in parse(tmp_path / "a.csv")] == [
        ("a cat", ("animal",)),
        ("a dog", ()),
    ]


@pytest.mark.parametrize("ending", [".txt", ".csv", ".jsonl", ".png"])
def test_a_fifo_is_refused_at_once(tmp_path, ending):
    os.mkfifo(path := tmp_path / f"a{ending}")
    with pytest.raises((RequestError, ValueError), match="no regular file"):
        read_init(path) if ending == ".png" else parse(path)


def test_files_are_read_as_utf_8_whatever_the_locale(tmp_path):
    (tmp_path / "a.txt").write_text("ein Bär\n", encoding="utf-8")
    code = (
        "import sys; from lesion.study.prompts import parse_prompts; "
        "print(ascii(parse_prompts({'path': sys.argv[1]})[1][0].text))"
    )
    env = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.txt")], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "'ein B\\xe4r'\n"
    command = [sys.executable, "-m", "lesion.cli.study", "tracker=红"]  # starts over in UTF-8 mode
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2 and done.stderr.startswith("lesion: ") and "红" in done.stderr


ROWS = [("a cat", "animal", "c1"), ('a "red" dog, happy', "animal", "c2"), ("two birds", "count", "c3")]


def tables() -> dict[str, bytes]:
    """The same three prompts as each format publishes them, by the name of its file."""
    out = io.StringIO()
    csv.writer(out).writerows([("Prompts", "Category", "ID"), *ROWS])
    objects = [dict(zip(("prompt", "tag", "id"), row, strict=True)) for row in ROWS]
    columns = {
        "caption": [row[0] for row in ROWS],
        "category": [row[1] for row in ROWS],
        "id": [row[2] for row in ROWS],
    }
    packed = io.BytesIO()
    pq.write_table(pa.table({**columns, "picture": [b"\xff"] * 3}), packed)
    return {
        "a.csv": b"\xef\xbb\xbf" + out.getvalue().encode(),
        "a.tsv": "\n".join("\t".join(row) for row in [("Prompt", "Challenge", "Id"), *ROWS]).encode(),
        "a.jsonl": "\n".join(map(json.dumps, objects)).encode(),
        "a.json": json.dumps(
            [{"id": o["id"], "caption": o["prompt"], "element_type": o["tag"]} for o in objects]
        ).encode(),
        "a.parquet": packed.getvalue(),
    }


@pytest.mark.parametrize("packed", [False, True])
def test_every_format_gives_the_same_prompts(tmp_path, packed):
    expected = [Prompt(text, (tag,), name) for text, tag, name in ROWS]
    for name, content in tables().items():
        path = tmp_path / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
        found = parse_prompts({"path": str(path)})
        assert (found.name, list(found.prompts)) == ("a", expected), name
        assert len(found.notes) == 1 and "texts from" in found.notes[0], found.notes
        odd = tmp_path / "odd"
        odd.write_bytes(content)
        assert list(parse_prompts({"path": str(odd), "format": name[2:]}).prompts) == expected
    for name, content in {
        "t.json": b'["a cat", "a dog"]',
        "t.txt": b"a cat\r\n\r\n a dog\n",
        "T.TXT": b"a cat\na dog",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert [prompt.text for prompt in parse(tmp_path / name)] == ["a cat", "a dog"], name
        assert parse_prompts({"path": str(tmp_path / name)}).notes == ()
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("b 1.txt", "a.txt", ".hidden.txt", "README.md"):
        (folder / name).write_text(f"text of {name}\n")
    assert [(prompt.id, prompt.text) for prompt in parse(folder)] == [
        ("a", "text of a.txt"),
        ("b-1", "text of b 1.txt"),
    ]


def test_quotes_of_a_tsv_belong_to_the_text_unless_a_program_put_them_there(tmp_path):
    texts = ['"Fly" on a wall', 'the words "Fly"', '"all of it"', 'say ""', "plain"]
    pd.DataFrame({"prompt": texts}).to_csv(tmp_path / "a.tsv", sep="\t", index=False)  # quotes where it must
    assert [prompt.text for prompt in parse(tmp_path / "a.tsv")] == texts
    pd.DataFrame({"prompt": texts}).to_csv(tmp_path / "a.tsv", sep="\t", index=False, quoting=csv.QUOTE_ALL)
    assert [prompt.text for prompt in parse(tmp_path / "a.tsv")] == texts
    (tmp_path / "a.tsv").write_text("\n".join(["Prompt", *texts]))  # as published sets are, without any
    assert [prompt.text for prompt in parse(tmp_path / "a.tsv")] == texts


def chosen(path: Path, **options):
    return parse_prompts({"path": str(path), **options})


def test_columns_are_named_or_guessed_and_what_was_guessed_is_said(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Prompt,Name,Category,Challenge,Note\na cat,x,animal,basic,hm\na dog,y,animal;fur,,hm\n")
    found = chosen(path)
    assert found.prompts[0] == Prompt("a cat", ("animal", "basic"), slug("a cat"))
    assert found.prompts[1].aspects == ("animal", "fur")
    assert found.notes == ("prompts of a: texts from `Prompt`; aspects from `Category`, `Challenge`",)
    found = chosen(path, column="note", id_column="NAME", aspects_column=["Challenge"], limit=1)
    assert found == ("a", (Prompt("hm", ("basic",), "x"),), ())
    assert [prompt.aspects for prompt in chosen(path, aspects_column=[]).prompts] == [(), ()]
    assert chosen(path, aspects_column="Note").prompts[0].aspects == ("hm",)
    for options, words in {
        "column": ("prompts.column: ", "'nonesuch'", "`Prompt`, `Name`"),
        "id_column": ("prompts.id_column: ", "`Note`"),
        "aspects_column": ("prompts.aspects_column: ", "`Note`"),
    }.items():
        with pytest.raises(RequestError) as refused:
            chosen(path, **{options: "nonesuch"})
        assert all(word in str(refused.value) for word in words), refused.value
    (tmp_path / "a.txt").write_text("a cat\n")
    with pytest.raises(RequestError, match=r"prompts\.column: .* has none"):
        chosen(tmp_path / "a.txt", column="prompt")
    path.write_text("text,prompt,id,category\na cat,a cat,1,3\na dog,,2,4\n")
    assert [(p.text, p.id, p.aspects) for p in parse(path)] == [("a cat", "1", ("3",)), ("a dog", "2", ("4",))]
    path.write_text("text,prompt,id\na cat,a cat,1\na dog,a cow,2\n")
    with pytest.raises(RequestError, match=r"prompts\.path: columns `text`, `prompt` differ in row 2; name one by"):
        parse(path)
    assert [prompt.text for prompt in chosen(path, column="prompt").prompts] == ["a cat", "a cow"]


def test_a_text_that_comes_again_counts_once_unless_its_id_is_another(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a cat\na dog\na cat\na cat\n")
    found = parse_prompts({"path": str(path)})
    assert [prompt.text for prompt in found.prompts] == ["a cat", "a dog"]
    assert found.notes == ("prompts of a: 2 of its rows repeat an earlier prompt and are left out",)
    path = tmp_path / "a.csv"
    path.write_text("id,prompt\n1,a cat\n2,a cat\n2,a cat\n,a cat\n")
    assert [(p.id, p.text) for p in parse(path)] == [("1", "a cat"), ("2", "a cat"), (slug("a cat"), "a cat")]
    path.write_text("id,prompt\n1,a cat\n1,a dog\n")
    with pytest.raises(RequestError, match="id '1' is given twice"):
        parse(path)
    twice = [{"text": "a cat", "id": "x"}, {"text": "a cat", "id": "y"}]
    assert len(parse_prompts({"items": twice}).prompts) == 2
    with pytest.raises(RequestError, match="text 'a cat' is given twice"):
        parse_prompts({"items": ["a cat", "a cat"]})


def test_limit_sample_and_condition(tmp_path):
    path = tmp_path / "a.csv"
    rows = [(number, f"prompt {number}", "odd" if number % 2 else "even") for number in range(100)]
    path.write_text("n,Prompt,Parity of it\n" + "".join(f"{n},{text},{parity}\n" for n, text, parity in rows))
    texts = lambda **options: [prompt.text for prompt in chosen(path, **options).prompts]  # noqa: E731
    assert texts(limit=3) == ["prompt 0", "prompt 1", "prompt 2"]
    assert len(texts(limit=1000)) == 100
    small, large = texts(sample=10), texts(sample=30)
    assert small == texts(sample=10) and set(small) < set(large) and len(large) == 30
    assert large == sorted(large, key=lambda text: int(text.split()[1]))
    assert small != texts(sample=10, sample_seed=1)
    assert texts(sample=30, limit=5) == large[:5]
    counts = Counter(text for seed in range(200) for text in texts(sample=10, sample_seed=seed))
    assert len(counts) == 100 and max(counts.values()) < 45  # 20 expected; a binomial's 1 - 1e-6 quantile is 42
    assert texts(where="n > 97") == ["prompt 98", "prompt 99"]
    assert texts(where="`Parity of it` == 'odd' and n < 4") == ["prompt 1", "prompt 3"]
    assert texts(where="Prompt.str.endswith('7')", limit=2) == ["prompt 7", "prompt 17"]
    assert [p.text for p in parse_prompts({"items": ["a cat", "a dog"], "where": "text == 'a dog'"}).prompts] == [
        "a dog"
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 0}, ["prompts.limit: ", "from 1"]),
        ({"sample": 3}, ["prompts.sample: ", "from 1 to 2"]),
        ({"sample": True}, ["prompts.sample: "]),
        ({"sample_seed": -1}, ["prompts.sample_seed: ", "from 0"]),
        ({"format": "xls"}, ["prompts.format: ", "csv, tsv"]),
        ({"colum": "x"}, ["prompts.colum: ", "column"]),
        ({"aspects_column": 3}, ["prompts.aspects_column: "]),
        ({"where": "Categry == 'x'"}, ["prompts.where: ", "Categry", "`Category`"]),
        ({"where": "Category = 'x'"}, ["prompts.where: "]),
        ({"where": "Category =="}, ["prompts.where: "]),
        ({"where": "Category"}, ["prompts.where: ", "no condition"]),
        ({"where": "1 == 1"}, ["prompts.where: ", "no condition"]),
        ({"where": "Category == 'z'"}, ["prompts.path: ", "no prompt is left by prompts.where"]),
        ({"where": "Category.to_csv('written')"}, ["prompts.where: ", "'to_csv'"]),
        ({"where": "Category.str.__class__ == 3"}, ["prompts.where: ", "__class__"]),
        ({"where": "@pd.DataFrame"}, ["prompts.where: "]),
        ({"where": "9 ** 9 ** 9 ** 9 > 1"}, ["prompts.where: ", "'**'"]),
        ({"where": "Category." + "x" * 50_000}, ["prompts.where: "]),
        ({"where": "("}, ["prompts.where: "]),
    ],
)
def test_wrong_options_of_a_set_are_refused(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("Prompt,Category\na cat,x\na dog,y\n")
    with pytest.raises(RequestError) as refused:
        chosen(tmp_path / "a.csv", **options)
    assert all(word in str(refused.value) for word in words), refused.value
    assert len(str(refused.value)) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_a_condition_that_takes_for_ever_is_refused(monkeypatch):
    monkeypatch.setattr("lesion.study.prompt_columns.LIMIT", 0.1)
    items = ["a" * 60 + "!", "a cat"]
    with pytest.raises(RequestError, match=r"prompts.where: .* takes more than 0.1 s"):
        parse_prompts({"items": items, "where": r"text.str.contains(r'^(?=a)(a+)+$')"})
    assert len(parse_prompts({"items": items, "where": r"text.str.contains(r'^(?=a)a+ c')"}).prompts) == 1


def test_huge_files_and_texts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_files, "LARGEST", 1 << 20)
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no disk
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"a\n" * (1 << 20)))
    (tmp_path / "torn.txt.gz").write_bytes(gzip.compress(b"a\n" * 1000)[:-9])
    for name, words in {"huge.txt": "more than 1 MiB", "bomb.txt.gz": "more than 1 MiB", "torn.txt.gz": "gzip"}.items():
        with pytest.raises(RequestError, match=words):
            parse(tmp_path / name)
    for name, content in {
        "a.txt": "x" * 10_001,
        "a.csv": "text\n" + "x" * 200_000,
        "a.jsonl": json.dumps({"text": "a", "aspects": "x" * 10_001}),
        "b.jsonl": json.dumps({"text": "a", "id": {"x": 1}}),
        "c.jsonl": '{"text": ' + "[" * 900 + "]" * 900 + "}",
    }.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(RequestError) as refused:
            parse(tmp_path / name)
        assert len(str(refused.value)) < 500, name
    monkeypatch.setattr(prompt_files, "MOST", 3)
    (tmp_path / "many.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(RequestError, match="more than 3 prompts"):
        parse(tmp_path / "many.txt")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nonesuch.csv", "no such file"),
        ("a.xlsx", "unknown ending"),
        ("/dev/zero", "no regular file"),
        ("empty", "no .txt file"),
        ("two", "2 lines"),
        ("a.json", "list of texts or of objects"),
        ("lines.json", "an object a line is .jsonl"),
        ("a.parquet", "no valid Parquet"),
        ("x" * 300 + ".txt", "too long"),
    ],
)
def test_what_is_no_file_of_prompts_is_refused(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    for file, content in {
        "a.xlsx": "PK",
        "a.json": '{"a": 1}',
        "lines.json": '{"text": "a"}\n{"text": "b"}',
        "a.parquet": "PAR1",
    }.items():
        (tmp_path / file).write_text(content)
    for folder in ("empty", "two"):
        (tmp_path / folder).mkdir()
    (tmp_path / "two" / "a.txt").write_text("a cat\na dog\n")
    with pytest.raises(RequestError, match=words) as refused:
        parse(Path(name))
    assert str(refused.value).startswith("prompts.path: ")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_standard_input_is_read_once_a_process(monkeypatch, pack):
    prompt_files._piped.cache_clear()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(pack(b"prompt,tag\na cat,x\n"))))
    for _ in range(2):
        assert parse_prompts({"path": "-", "format": "csv"}) == (
            "stdin",
            (Prompt("a cat", ("x",), slug("a cat")),),
            ("prompts of stdin: texts from `prompt`; aspects from `tag`",),
        )
    prompt_files._piped.cache_clear()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(b"a cat\n" * 100)[:-9])))
    with pytest.raises(RequestError, match="'standard input' is no whole gzip file"):
        parse_prompts({"path": "-"})
    prompt_files._piped.cache_clear()
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(RequestError, match="nothing is piped"):
        parse_prompts({"path": "-"})


def test_many_prompts_load_in_time(tmp_path):
    lines = [
        f"{number},a photo of {number} animals in front of a white house and a tree,kind {number % 7}"
        for number in range(20_000)
    ]
    (tmp_path / "a.csv").write_text("id,prompt,category\n" + "\n".join(lines))
    start = time.process_time()
    assert len(parse(tmp_path / "a.csv")) == 20_000
    assert time.process_time() - start < 1.5  # 200,000 in 5 s are 0.5 s; three times that, for a machine that is busy
