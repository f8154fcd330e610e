"""The page: its structure and escaping read by a parser, its behaviour in a headless browser where there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lesion import report
from lesion.analysis.importance import layer_by_prompt, layer_table
from lesion.analysis.maps import MEASURES
from lesion.analysis.settings import settings
from lesion.cli.report import main
from lesion.report import attention, contents, html, pictures, write_report
from lesion.report.data import as_json, inside, page_data
from lesion.report.findings import findings
from lesion.store import tensors
from lesion.store.maps import beside_image
from lesion.tracking import _page
from lesion.tracking._page import with_pictures
from test_report import LAYERS, spoil, study

pytestmark = pytest.mark.usefixtures("drafts")
HOSTILE = {
    "script": "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1>",
    "comment": "<!-- <script> -->]]> {{ 7*7 }} {% raw %}",
    "quotes": "\"double\" 'single' `back` &quot; &amp;lt;",
    "newlines": "one\ntwo\r\nthree\u2028four\x00five\x1b[31m",
    "long": "x" * 10_000,
    "rtl": "a \u202ereversed\u2066 שלום עולם مرحبا",
    "latex": r"\input{/etc/passwd} \write18{ls} $x^2$ 100% & a_b # ~ { } \end{tabular}",
    "paths": "../../etc/passwd C:\\windows\\..\\x /abs a/b:c*?|<>",
}


class Parsed(HTMLParser):
    """Every tag with its attributes, and the text of script, style and the rest apart."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inner: dict[str, list[str]] = {"script": [], "style": [], "": []}
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = tag if tag in self.inner else ""
        if self._in:
            self.inner[tag].append("")

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in:
            self.inner[self._in][-1] += data
        else:
            self.inner[""].append(data)

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def page_of(folder: Path) -> Parsed:
    return Parsed((folder / "report.html").read_text(encoding="utf-8"))


def data_of(folder: Path) -> dict[str, Any]:
    beside = folder / html.DATA_FILE
    if beside.is_file():
        return json.loads(beside.read_text().removeprefix("globalThis.LESION_REPORT = ").rstrip(";\n"))
    return json.loads(page_of(folder).inner["script"][0])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, pd.DataFrame]:
    """A run folder with its report, and its frame: the last layer has no only-one images."""
    folder = tmp_path_factory.mktemp("run")
    frame = study(folder)
    frame = frame[~((frame["selection"] == "only_one") & (frame["layer_index"] == 3))]
    write_report(folder, frame)
    return folder, frame


def test_the_page_is_one_file_without_network(run):
    folder, _ = run
    page = page_of(folder)
    assert [one.get("type") for one in page.of("script")] == ["application/json", None]
    assert not page.of("link") and not page.of("iframe") and not page.of("base")
    links = [one.get(name) for _, one in page.tags for name in ("src", "href") if one.get(name)]
    assert links and all(link.startswith("#") or (folder / unquote(link)).is_file() for link in links)
    assert {link[1:] for link in links if link.startswith("#")} <= {one.get("id") for _, one in page.tags}
    text = (folder / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttp", text.replace("http-equiv", ""))
    (policy,) = [one["content"] for one in page.of("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert (
        policy.startswith("default-src 'none'")
        and "unsafe" not in policy
        and "file:" not in policy.split("script-src")[1]
    )
    assert html._digest(page.inner["script"][1]) in policy and html._digest(page.inner["style"][0]) in policy
    style = page.inner["style"][0]
    for feature in (
        "prefers-color-scheme: dark",
        "prefers-reduced-motion",
        ":focus-visible",
        "mix-blend-mode: difference",
    ):
        assert feature in style


def test_the_page_is_marked_up_for_readers_that_do_not_see_it(run):
    page = page_of(run[0])
    identities = [one["id"] for _, one in page.tags if "id" in one]
    assert len(set(identities)) == len(identities)
    for _, one in page.tags:
        assert set((one.get("aria-labelledby") or "").split()) <= set(identities)
    assert len(page.of("html")[0].get("lang") or "") == 2 and len(page.of("main")) == 1 and len(page.of("h1")) == 1
    assert all(one.get("alt") for one in page.of("img"))
    assert all(one.get("scope") for one in page.of("th"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    names = {one.get("name") for one in page.of("select")}
    assert names == {
        "metric",
        "setting",
        "mode",
        "layer",
        "prompt",
        "aspect",
        "seed",
        "status",
        None,
    }  # None: the order


def test_the_layer_table_holds_exact_numbers_to_sort_by(run):
    folder, frame = run
    values = [one["data-value"] for one in page_of(folder).of("td") if "data-value" in one]
    table = np.array(values[: 4 * 13]).reshape(4, 13)  # the first table
    assert table[:, 0].tolist() == ["1", "2", "3", "4"]
    np.testing.assert_array_equal(table[:, 3].astype(float), layer_table(frame)["importance"])
    assert table[3, 7] == "" and table[0, 7] == "0.6"  # sufficiency: missing values have no number


def test_the_page_explains_the_marks_of_its_layer_table(run):
    folder, frame = run
    known = contents.layers(findings(frame), settings(frame)[0])
    shown = " ".join(" ".join(page_of(folder).inner[""]).split())
    assert known.caption in shown and known.note in shown and "The headings sort;" in shown


def test_hostile_text_stays_text(tmp_path):
    """Everywhere a text can come in: the page has the same elements and attributes as one of harmless texts."""
    frame = study(tmp_path, list(HOSTILE), (0,), size=16)
    plain = study(tmp_path / "harmless", list(HOSTILE), (0,), size=16)
    frame["prompt"] = frame["prompt_id"].map(HOSTILE)
    frame["aspects"] = frame["prompt"].str[:50]
    frame["prompt_id"] = frame["prompt"].str[:100]
    frame["model"] = HOSTILE["script"] + HOSTILE["latex"] + HOSTILE["paths"]
    plain["aspects"] = plain["prompt_id"]
    bad = frame["layer_index"] == 2
    frame.loc[bad, ["status", "reason"]] = [["failed", text] for text in frame.loc[bad, "prompt"]]
    plain.loc[bad, ["status", "reason"]] = ["failed", "why"]
    written = write_report(tmp_path, frame)
    write_report(tmp_path / "harmless", plain)
    page, calm = page_of(tmp_path), page_of(tmp_path / "harmless")
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in calm.tags]
    assert [set(one) for _, one in page.tags] == [set(one) for _, one in calm.tags]
    assert page.inner["script"][1] == calm.inner["script"][1]
    assert "<" not in page.inner["script"][0] and page.inner["script"][0].isascii()
    prompts = data_of(tmp_path)["prompts"]
    assert len(prompts) == len(HOSTILE) and "\ufffd" not in str(prompts)
    assert all(len(one["text"]) <= 2000 and one["text"].isprintable() for one in prompts)
    assert HOSTILE["script"] in {one["text"] for one in prompts}
    shown = " ".join(page.inner[""])
    assert not set("\u202e\u2066") & set((tmp_path / "report.html").read_text())  # nothing turns the text around it
    assert [one.get("dir") for one in page.of("td") if "prompt" in (one.get("class") or "")] == ["auto"] * len(HOSTILE)
    assert HOSTILE["script"] in shown and HOSTILE["quotes"] in shown and "שלום" in shown
    for path in written:
        assert path.resolve().is_relative_to(tmp_path.resolve()) and re.fullmatch(r"[a-zA-Z0-9._-]{1,255}", path.name)
    sources = [path.read_text() for path in written if path.suffix == ".tex"]
    assert any(r"\textbackslash{}input" in body for body in sources)
    for body in sources:
        code = re.sub(r"(?m)^%.*", "", body)  # the preamble that a table needs is said in a comment
        assert not re.search(r"\\(input|write18)", body) and not re.search(r"(?<!\\)[$#]", code)
        assert body.count(r"\begin{tabular}") == body.count(r"\end{tabular}") == body.count(r"\bottomrule") >= 1


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x.png", "images/../../x.png", "//host/x.png", "a\\..\\x.png", "", None, "x\0.png"],
)
def test_images_outside_the_folder_are_not_linked(name):
    assert inside(name) == ""


def test_links_to_images_are_quoted(tmp_path):
    frame = study(tmp_path, ("p",), (0,))
    names = ["javascript:alert(1)", "images/a b#c?d%.png", 'images/"x".png']
    frame.loc[: len(names) - 1, "image"] = names
    shown = page_data(frame, {})["rows"]["image"]
    assert shown[:3] == ["javascript%3Aalert%281%29", "images/a%20b%23c%3Fd%25.png", "images/%22x%22.png"]
    assert json.loads(as_json({"a": "</script>\u2028é"})) == {"a": "</script>\u2028é"}


def test_the_data_agree_with_the_frame(tmp_path):
    frame = spoil(study(tmp_path), 2, "failed", "why")
    mean = study(tmp_path, replacement="mean")
    frame = pd.concat([frame, mean[mean["selection"] != "none"]]).assign(aspects="colour, shape")
    data = page_data(frame, {})
    rows = data["rows"]
    assert data["layers"] == LAYERS and data["prompts"][0] == {
        "id": "p", "text": "a red circle p", "aspects": ["colour", "shape"], "short": "p"
    }  # fmt: skip
    assert {len(column) for column in rows.values()} == {len(frame)}
    for place, record in enumerate(frame.to_dict("records")):
        baseline = rows["baseline"][place]
        partner = frame.iloc[baseline]
        assert partner["selection"] == "none"
        assert (partner["prompt_id"], partner["seed"]) == (record["prompt_id"], record["seed"])
        setting = rows["setting"][place]
        expected = None if record["selection"] == "none" else f"embedded, {record['replacement']} replacement"
        assert (data["settings"][setting]["label"] if setting >= 0 else None) == expected
        score = data["scores"]["clip_similarity"][place]
        assert score == record["clip_similarity"] or (score is None and record["status"] == "failed")
        assert data["reasons"][rows["reason"][place]] == record["reason"]
    grouped = page_data(frame.assign(lesioned="a+b"), {})
    assert [grouped["groups"][place] for place in set(grouped["rows"]["lesioned"])] == ["a + b"]
    alone = page_data(frame[frame["selection"] != "none"], {})
    assert set(alone["rows"]["baseline"]) == {-1}


def test_only_large_images_get_thumbnails_and_only_once(tmp_path):
    frame = study(tmp_path, ("p",), (0,), size=400).drop(columns=["height", "width"])
    Image.new("RGB", (64, 64), "red").save(tmp_path / frame["image"].iloc[0])
    Image.new("RGB", (300, 600), "red").save(tmp_path / frame["image"].iloc[1])
    (tmp_path / frame["image"].iloc[2]).write_bytes(b"not an image")
    made = report._thumbnails(tmp_path, frame)
    thumbs = [tmp_path / name for name in made.values()]
    assert len(thumbs) == len(list((tmp_path / "thumbs").iterdir())) == len(frame) - 2
    with Image.open(tmp_path / pictures.thumbnail_path(frame["image"].iloc[1])) as picture:
        assert picture.size == (128, 256)
    shown = page_data(frame, made)["rows"]["thumb"]
    assert shown[0] == shown[2] == 0 and (tmp_path / unquote(shown[1])).is_file()
    before = thumbs[0].stat().st_mtime_ns
    assert report._thumbnails(tmp_path, frame) == made and thumbs[0].stat().st_mtime_ns == before
    assert report._thumbnails(tmp_path, frame.assign(height=64, width=64)) == {}


def test_a_large_study_gets_its_first_pictures_and_says_so(tmp_path, no_figures, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "COMPARISONS", 2)
    monkeypatch.setattr(pictures, "SHEETS", 1)
    study(tmp_path, ("p", "q"), (0, 1))
    assert main([str(tmp_path)]) == 0
    assert len(list((tmp_path / "grids").glob("comparison--*"))) == 2
    text = (tmp_path / "report.html").read_text()
    assert "first 2 of 4 comparison pictures" in text and "first 1 of 4 pictures of layers by prompts" in text
    assert "--all-grids" in text
    assert main([str(tmp_path), "--all-grids"]) == 0
    assert len(list((tmp_path / "grids").glob("comparison--*"))) == 4
    assert "--all-grids" not in (tmp_path / "report.html").read_text()


def test_ten_thousand_images_make_a_small_page_in_seconds(tmp_path):
    one = study(tmp_path, ("p",), (0,))
    count = 1000
    frame = pd.concat([one] * count, ignore_index=True)
    number = np.repeat(np.arange(count), len(one))
    frame["prompt_id"] = [f"prompt-{n}" for n in number]
    frame["prompt"] = [f"a prompt of some ordinary length, number {n}" for n in number]
    frame["image"] = [
        f"images/prompt-{n}/seed0-leave_one_out-zero-up_blocks.3.attentions.2-0123abcd.png" for n in number
    ]
    began = time.process_time()
    written = html.write(tmp_path, frame, [], page_data(frame, {}))
    assert time.process_time() - began < 10.0
    assert [path.name for path in written] == ["report_data.js", "report.html"]
    assert written[0].stat().st_size < 2_000_000 and written[1].stat().st_size < 200_000
    assert len(data_of(tmp_path)["rows"]["prompt"]) == 10_000
    assert page_of(tmp_path).of("script")[0] == {"src": "report_data.js"}
    html.write(tmp_path, one, [], page_data(one, {}))
    assert not written[0].exists()


def test_lesion_report_of_several_runs_is_one_folder(tmp_path, no_pictures, capsys):
    study(tmp_path / "a", ("p",), (0,))
    other = study(tmp_path / "b", ("q",), (0,))
    (tmp_path / "private.png").write_bytes((tmp_path / "a" / other["image"].iloc[0].replace("q-", "p-")).read_bytes())
    other.loc[1, "image"] = "../private.png"  # what a results file names outside its run is left alone
    other.to_parquet(tmp_path / "b" / "results.parquet")
    out = tmp_path / "out"
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    shutil.move(out, tmp_path / "mailed")
    names = [unquote(name) for name in data_of(tmp_path / "mailed")["rows"]["image"]]
    assert names.count("") == 1
    assert all(name.startswith("images/") and (tmp_path / "mailed" / name).is_file() for name in names if name)
    assert not list((tmp_path / "mailed").rglob("private*"))


def with_maps(folder: Path, frame: pd.DataFrame) -> pd.DataFrame:
    """Maps beside the images: layer n of a baseline looks at quarter n of it, of a lesioned image at the last."""
    frame = frame.assign(cell=frame["cell"].str.replace("-", "_"))
    frame.to_parquet(folder / "results.parquet")
    for row in frame[frame["selection"].isin(("none", "leave_one_out"))].to_dict("records"):
        values = np.full((4, 1, 1, 3, 2, 2), 0.1, np.float32)
        for layer in range(4):
            values[layer, 0, 0, 0].flat[layer if row["selection"] == "none" else 3] = 0.9
        layers = {f"cond/{path}": values[n] for n, path in enumerate(LAYERS) if path != row["layer"]}
        entries = {"cond": {"red": [0], "circle": [1], "<special>": [2], "<rest>": []}}
        about = {"maps": f"{row['cell']}-x", "capture": json.dumps({"layers": LAYERS}), "entries": json.dumps(entries)}
        tensors.write(folder / beside_image(row["image"]), layers, about)
    measures = dict.fromkeys(MEASURES, 0.25) | {"map_layer": LAYERS[0], "map_index": 0, "word": "red"}
    looked = frame[["model", "prompt_id", "seed", "selection", "replacement", "layer", "cell"]]
    looked.assign(aspect="colour", **measures).to_parquet(folder / "maps.parquet")
    return frame


def test_maps_show_where_each_layer_looks_and_what_the_others_look_at_without_it(tmp_path, monkeypatch):
    frame = with_maps(tmp_path, study(tmp_path, ("p",), (0,), size=16))
    shown = {}
    monkeypatch.setattr(attention, "_sheet", lambda title, caption, tiles, picture: shown.update({title: tiles}))
    monkeypatch.setattr(attention, "_save", lambda picture, path: shown.update({path.stem: shown.popitem()[1]}))
    made = attention.pictures(tmp_path, frame, "clip_similarity")
    assert [one.word for one in made] == ["red", "circle"]
    base, under = (shown[made[0].paths[kind].stem] for kind in ("", "--lesioned"))
    assert [tile.caption for tile in base] == ["the image", "all layers", "down0.a0", "mid.a0", "up1.a10", "up1.a2"]
    assert [tile.score for tile in base[2:]] == [
        f"0.1 to 0.9; effect {effect}" for effect in ("0.100", "0.000", "0.300", "0.400")
    ]

    def quarter(tile):
        """Which quarter is the brightest."""
        light = np.asarray(tile.picture.convert("L"), dtype=float).reshape(2, tile.picture.height // 2, 2, -1)
        return int(light.mean(axis=(1, 3)).argmax())

    assert [quarter(tile) for tile in base[2:]] == [0, 1, 2, 3]
    assert [tile.caption for tile in under] == ["baseline", *(f"without {tile.caption}" for tile in base[2:])]
    assert [quarter(tile) for tile in under[1:]] == [3, 3, 3, 3]


@pytest.fixture(scope="module")
def looked(tmp_path_factory) -> Path:
    """The report of two runs with maps and one without, which has an image of the first once more."""
    folder = tmp_path_factory.mktemp("looked")
    bare = study(folder / "0", ("p",), (0,), size=16)
    bare.assign(cell=bare["cell"].str.replace("-", "_")).to_parquet(folder / "0" / "results.parquet")
    for name, prompt in (("a", "p"), ("b", "q")):
        with_maps(folder / name, study(folder / name, (prompt,), (0,), size=16))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("of_setting", "over_settings"):  # figures, which take most of the time
            patch.setattr(report.illustrations, name, lambda *_: pictures.Drawn([], 0))
        assert main([*(str(folder / name) for name in "0ab"), "--out", str(folder / "out")]) == 0
    for name in "0ab":
        shutil.rmtree(folder / name)
    return folder / "out"


def test_lesion_report_of_several_runs_has_their_maps(looked):
    files = sorted(looked.glob("maps/*/*.safetensors"))
    assert len(files) == 10 and len(list(looked.glob("maps/*"))) == 2
    measures = pd.read_csv(looked / "tables" / "maps.csv")
    assert measures[["map_layer", "aspect", "mass", "n_prompts"]].to_numpy().tolist() == [
        [LAYERS[0], aspect, 0.25, 2] for aspect in ("all", "colour")
    ]
    assert pd.read_csv(looked / "tables" / "maps-words.csv")["word"].to_list() == ["red"]
    page = page_of(looked)
    pictures = [unquote(str(one["src"])) for one in page.of("img") if "grids/maps--" in str(one.get("src"))]
    assert len(pictures) == 2 * 2 * 2 and all((looked / name).is_file() for name in pictures)
    assert all(str(one["alt"]).startswith(("red in", "circle in")) for one in page.of("img") if "maps--" in one["src"])


def test_in_a_browser_a_word_is_picked_and_its_maps_are_seen(looked, browser):
    browser.complaints.clear()
    browser.open((looked / "report.html").as_uri())
    words = "[...document.querySelectorAll('#maps .part')[1].querySelectorAll('.words > details')]"
    press = "{}.find(one => one.textContent.trim() === '{}').querySelector('summary').click()"
    assert browser.js(f"{words}.map(one => one.innerText.trim())") == ["", ""], "folded"
    browser.js("document.querySelectorAll('#maps .part > summary')[1].click()")
    assert browser.js(f"{words}.map(one => one.innerText.trim())") == ["red", "circle"]
    for word in ("red", "circle"):
        browser.js(press.format(words, word))
        loaded = f"""new Promise(done => {{
            const images = [...{words}.find(one => one.open).querySelectorAll('img')];
            const all = () => images.every(one => one.complete && one.naturalWidth > 0);
            images[0].scrollIntoView();
            const wait = () => all() ? done(images.map(one => one.getAttribute('src'))) : setTimeout(wait, 20);
            wait();
        }})"""
        sources = browser.js(loaded)
        assert len(sources) == 2 and all(f"-{word}" in one for one in sources) and "--lesioned" in sources[1]
    assert browser.js(f"{words}.map(one => one.open)") == [False, True], "one word at a time"
    assert browser.js("document.documentElement.scrollWidth <= innerWidth")
    assert browser.complaints == []


PIPES = """import os, sys
from fcntl import F_DUPFD, fcntl
ends = [fcntl(int(end), F_DUPFD, 10) for end in sys.argv[1:3]]
for number, end in zip((3, 4), ends):
    os.dup2(end, number)
os.execvp(sys.argv[3], sys.argv[3:])"""  # Chromium reads commands from descriptor 3 and answers on 4


class Browser:
    """A headless Chromium, spoken to over a pipe (the DevTools protocol); everything it complains about is kept."""

    def __init__(self, program: str, profile: str):
        read, self._to = os.pipe()
        self._from, write = os.pipe()
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        flags += ["--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage"]
        command = [sys.executable, "-c", PIPES, str(read), str(write), program, *flags, "about:blank"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=(read, write), stdout=quiet, stderr=quiet)
        os.close(read)
        os.close(write)
        self._number, self._rest, self.complaints, self.requests = 0, b"", [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = None
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    _session: str | None = None

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._from, 1 << 20)
            if not piece:
                raise RuntimeError("the browser has gone")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        method, about = message.get("method"), message.get("params", {})
        level = about.get("entry", about).get("level" if method == "Log.entryAdded" else "type")
        if method == "Runtime.exceptionThrown" or (
            method in ("Log.entryAdded", "Runtime.consoleAPICalled") and level in ("error", "warning")
        ):
            self.complaints.append(json.dumps(about))
        if method == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        return message

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def js(self, code: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def key(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            code = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}[key]
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no chromium here")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        one = Browser(program, profile)
        yield one
        one.close()


@pytest.fixture(scope="module", params=["inline", "beside"])
def opened(request, browser, tmp_path_factory) -> tuple[Browser, pd.DataFrame, Path]:
    """A page with hostile prompts, one image file gone, opened from disk; its data inside it or beside it."""
    folder = tmp_path_factory.mktemp("browser")
    frame = study(folder, ("p", "q", "r"), (0, 1), size=32)
    frame["prompt"] = frame["prompt_id"].map(dict(zip("pqr", HOSTILE.values())))
    frame["aspects"] = frame["prompt_id"].map({"p": "colour", "q": "shape", "r": "colour,shape"})
    frame.loc[(frame["prompt_id"] == "q") & (frame["seed"] == 1) & (frame["layer_index"] == 2), "clip_similarity"] -= (
        0.3
    )
    frame = spoil(frame, 0, "failed", "out of memory")
    (folder / frame["image"].iloc[0]).unlink()
    table = contents.layers(findings(frame), settings(frame)[0])
    sections = [html.Section("embedded, zero", "s", ["Short."], parts=[html.Part("Which?", tables=[table])], setting=0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "INLINE_ROWS", 10 if request.param == "beside" else 10_000)
        assert len(html.write(folder, frame, sections, page_data(frame, {}))) == (2 if request.param == "beside" else 1)
    browser.open("about:blank")  # so that the page before asks for nothing more
    browser.complaints.clear()
    browser.requests.clear()
    browser.open((folder / "report.html").as_uri())
    return browser, frame, folder


def test_in_a_browser_the_table_sorts(opened):
    browser, _, _ = opened
    order = "[...document.querySelectorAll('.sortable tbody tr')].map(row => row.cells[1].textContent)"
    state = "[...document.querySelectorAll('.sortable th[aria-sort]')].map(head => head.ariaSort)"
    press = "[...document.querySelectorAll('.sortable thead button')].find(one => one.textContent === '{}').click()"
    assert browser.js(order) == LAYERS and browser.js(state)[0] == "ascending"
    browser.js(press.format("importance"))
    by_importance = browser.js(order)
    assert by_importance == [LAYERS[3], LAYERS[2], LAYERS[0], LAYERS[1]] and browser.js(state)[4] == "descending"
    browser.js(press.format("importance"))
    assert browser.js(order) == by_importance[::-1] and browser.js(state).count("none") == len(browser.js(state)) - 1
    browser.js(press.format("depth"))
    assert browser.js(order) == LAYERS


def test_in_a_browser_the_heat_map_agrees_with_the_analysis_and_opens_its_images(opened):
    browser, frame, _ = opened
    words = browser.js("[...document.querySelectorAll('#heat td button')].map(one => one.ariaLabel)")
    shown = [float(re.search(r"change (\S+),", one)[1]) for one in words]
    np.testing.assert_allclose(shown, layer_by_prompt(frame).to_numpy().ravel(), atol=6e-4)
    assert words[0] == "down_blocks.0.attentions.0, prompt p: change 0.100, 2 images"
    browser.js("document.querySelector('#heat button').focus()")
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowLeft", "ArrowUp", "ArrowUp"):
        browser.key(key)
    assert browser.js("document.activeElement.ariaLabel").startswith("down_blocks.0.attentions.0, prompt q")
    assert browser.js("document.querySelectorAll('#heat button[tabindex=\"0\"]').length") == 1
    browser.key("Enter")
    assert browser.js("document.querySelector('dialog').open")
    title = "document.getElementById('compare-title').textContent"
    assert browser.js(title) == "leave-one-out, down_blocks.0.attentions.0, seed 0"
    scores = "document.getElementById('compare-scores').textContent"
    assert browser.js(scores) == "change 0.100clip_similarity 0.900"
    for place, view in enumerate(("slider", "side", "blink", "difference")):  # arrows page in every view, from any knob
        browser.js(f"document.querySelector('#views [value={view}]').click()")
        browser.js(f"document.getElementById('{'cut' if view == 'slider' else 'gain'}').focus()")
        browser.key("ArrowLeft" if place % 2 else "ArrowRight")
        assert f"seed {1 - place % 2}" in browser.js(title)
        assert view in browser.js("document.getElementById('stage').className")
    browser.key("ArrowRight")
    assert browser.js("document.getElementById('compare-at').textContent") == "Image 2 of 2."
    width = "document.querySelector('#stage img').getBoundingClientRect().width"
    fit = browser.js(width)
    browser.js("document.getElementById('larger').click()")
    assert browser.js(width) == pytest.approx(2 * fit)
    browser.js("document.getElementById('smaller').click(), document.querySelector('#views [value=slider]').click()")
    browser.js("Promise.all([...document.querySelectorAll('#stage img')].map(one => one.decode())).then(() => 1)")
    assert browser.js("[...document.querySelectorAll('#stage img')].map(one => one.naturalWidth)") == [32, 32]
    style = "getComputedStyle(document.querySelector('#stage .lesioned')).{}"
    browser.js("document.getElementById('cut').value = 25")
    browser.js("document.getElementById('cut').dispatchEvent(new Event('input', {bubbles: true}))")
    assert browser.js(style.format("clipPath")) == "inset(0px 0px 0px 25%)"
    browser.js("document.querySelector('#views [value=difference]').click()")
    assert browser.js(style.format("mixBlendMode")) == "difference"
    assert browser.js("document.getElementById('gain-knob').hidden") is False
    browser.key("Escape")
    assert not browser.js("document.querySelector('dialog').open")
    assert browser.js("document.activeElement.ariaLabel").startswith("down_blocks.0.attentions.0, prompt q")


def test_in_a_browser_filters_choose_the_images(opened):
    browser, frame, _ = opened
    choose = """(async () => {{
        const form = document.getElementById('filters');
        const field = form.elements.{name};
        field.value = [...field.options || []].find(one => one.text === '{text}')?.value ?? '{text}';
        field.dispatchEvent(new Event('input', {{bubbles: true}}));
        await new Promise(done => setTimeout(done, 200));
        const all = [...document.querySelectorAll('#gallery li')];
        return [all.length, document.getElementById('gallery-words').textContent];
    }})()"""
    said = "{} image{} of 60, baseline to the left."
    left_out = int((frame["selection"] == "leave_one_out").sum())
    words = "document.getElementById('gallery-words').textContent"
    assert browser.js(words) == said.format(left_out, "s")  # the page opens with leave-one-out
    chosen = frame
    assert browser.js(choose.format(name="mode", text="every mode")) == [48, said.format(60, "s")]
    for name, text, keep in (
        ("mode", "leave-one-out", frame["selection"] == "leave_one_out"),
        ("aspect", "shape", frame["aspects"].str.contains("shape")),
        ("seed", "1", frame["seed"] == 1),
        ("layer", LAYERS[2], frame["layer"] == LAYERS[2]),
        ("words", "{{ 7", frame["prompt_id"] == "q"),
    ):
        chosen = chosen[keep.reindex(chosen.index)]
        assert browser.js(choose.format(name=name, text=text)) == [
            len(chosen), said.format(len(chosen), "s" * (len(chosen) != 1))
        ], name  # fmt: skip
    assert len(chosen) == 1 and browser.js("document.querySelectorAll('#heat button').length") == 1
    address = "decodeURIComponent(location.hash)"
    assert browser.js(address).startswith("#mode=leave_one_out") is False  # as the page opens
    assert f"layer={LAYERS[2]}&seed=1" in browser.js(address).replace("&aspect=shape", "")
    browser.js("document.querySelector('#filters [type=reset]').click()")
    browser.js("new Promise(done => setTimeout(done, 200))")
    assert browser.js(words) == said.format(left_out, "s") and browser.js(address) == ""
    browser.js(choose.format(name="mode", text="baseline"))
    assert browser.js("[...document.querySelectorAll('#gallery img')].every(one => one.loading === 'lazy')")
    browser.js("document.querySelector('#gallery li').scrollIntoView()")  # those out of sight are not loaded
    hole = "document.querySelector('#gallery li .hole')?.textContent"
    browser.js(f"(async () => {{ while (!{hole}) await new Promise(done => setTimeout(done, 20)); }})()")
    assert browser.js(hole) == "missing: no readable image file"
    assert browser.js("document.querySelector('#gallery .score').textContent") == "baseline"
    browser.js("document.querySelector('#filters [type=reset]').click()")
    browser.js("new Promise(done => setTimeout(done, 200))")


def test_in_a_browser_a_link_shows_the_same_and_rows_open_images(opened):
    browser, frame, folder = opened
    page = (folder / "report.html").as_uri()
    valid = frame[(frame["selection"] == "leave_one_out") & (frame["status"] == "ok")]
    most = valid.loc[valid["clip_similarity"].idxmin()]
    first = "document.querySelector('#gallery button').ariaLabel"
    assert f"{most['layer']}, prompt {most['prompt_id']}, seed {most['seed']}" in browser.js(
        first
    )  # most changed first
    assert browser.js("document.querySelectorAll('#gallery li:first-child img').length") == 2  # beside its baseline
    browser.js("document.querySelector('#gallery button').click()")
    link = browser.js("location.href")
    assert most["image"] in unquote(link)
    browser.open("about:blank")
    browser.open(link)
    title = "document.querySelector('dialog').open && document.getElementById('compare-title').textContent"
    assert browser.js(title) == f"leave-one-out, {most['layer']}, seed {most['seed']}"
    browser.open("about:blank")
    browser.open(f"{page}#mode=only_one&order=least&layer={LAYERS[0]}&seed=1&metric=nonesuch")
    shown = "[...document.querySelectorAll('#gallery button')].map(one => one.ariaLabel)"
    assert browser.js(shown) == [f"only-one, {LAYERS[0]}, prompt {one}, seed 1, change 0.400" for one in "pqr"]
    browser.open("about:blank")
    browser.open(page)
    browser.js("document.querySelector('tr.opens td:nth-child(3)').click()")
    assert LAYERS[0] in browser.js(title)
    browser.key("Escape")
    browser.js("document.querySelector('#profile button[data-layer=\"2\"]').click()")
    assert LAYERS[2] in browser.js(title)
    browser.key("Escape")


@pytest.mark.slow
def test_in_a_browser_no_screen_scrolls_sideways(opened):
    browser, _, folder = opened
    try:
        for width in (1440, 1024, 390):
            options = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.call("Emulation.setDeviceMetricsOverride", **options)
            browser.open((folder / "report.html").as_uri())
            assert browser.js("document.documentElement.scrollWidth") <= width
            browser.js("document.querySelector('#gallery button').click()")
            inside = (
                "(() => { const one = document.querySelector('dialog'); return one.scrollWidth <= one.clientWidth; })()"
            )
            assert browser.js(inside), width
    finally:
        browser.call("Emulation.clearDeviceMetricsOverride")


def test_in_a_browser_nothing_is_complained_about_nor_fetched(opened):
    browser, frame, folder = opened
    assert browser.js("typeof window.pwned") == "undefined"
    assert browser.requests and all(url.startswith(folder.as_uri()) for url in browser.requests)
    gone = (folder / frame["image"].iloc[0]).as_uri()  # the one file that was deleted
    expected = [
        one for one in browser.complaints if "ERR_FILE_NOT_FOUND" in one and json.loads(one)["entry"]["url"] == gone
    ]
    assert [one for one in browser.complaints if one not in expected] == [] and expected


def test_in_a_browser_a_page_with_its_pictures_inside_needs_no_folder(opened, tmp_path):
    browser, frame, folder = opened
    page, gone = with_pictures(folder / "report.html"), Path(frame["image"].iloc[0]).stem[:8]
    framed = f'<iframe sandbox="allow-scripts" width="1200" height="900" srcdoc="{escape(page)}"></iframe>'
    for name, text in (("frame.html", framed), ("alone.html", page)):  # as W&B shows it; and to ask it
        (tmp_path / name).write_text(text)
        browser.complaints.clear()
        browser.requests.clear()
        browser.open((tmp_path / name).as_uri())
        browser.js("new Promise(done => setTimeout(done, 300))")
        assert all(gone in one for one in browser.complaints), "but for the image that is not there"
        own = ("data:image/", "about:srcdoc", (tmp_path / name).as_uri())
        assert all(url.startswith(own) or gone in url for url in browser.requests)
    pictures = "[...document.querySelectorAll('#gallery img')]"
    browser.js(f"Promise.all({pictures}.map(one => {{ one.loading = 'eager'; return one.decode().catch(() => 0); }}))")
    assert browser.js(f"{pictures}.length") > 10 and browser.js(f"{pictures}.every(one => one.naturalWidth === 32)")
    assert browser.js("document.querySelectorAll('#gallery .hole').length") > 0, "the image that is not there"
    browser.js("document.querySelector('#gallery button').click()")
    assert browser.js("compare.open")
    browser.open((folder / "report.html").as_uri())
    browser.complaints.clear()


def test_pictures_beyond_the_room_of_a_page_stay_links_and_none_comes_from_elsewhere(run, tmp_path, monkeypatch):
    folder, _ = run
    whole = with_pictures(folder / "report.html")
    monkeypatch.setattr(_page, "MOST", 1)
    assert "data:image" in whole and "data:image" not in with_pictures(folder / "report.html")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "report.html").write_text(
        '<img src="../secret.png"><img src="/etc/hostname"><img src="x.png">'
    )
    assert with_pictures(tmp_path / "page" / "report.html") == (tmp_path / "page" / "report.html").read_text()


def test_in_a_browser_ten_thousand_images_are_shown_a_page_at_a_time(browser, tmp_path):
    one = study(tmp_path, ("p",), (0,))
    frame = pd.concat([one] * 1000, ignore_index=True)
    frame["prompt_id"] = [f"prompt-{n}" for n in np.repeat(np.arange(1000), len(one))]
    frame["prompt"] = "a picture of " + frame["prompt_id"]
    html.write(tmp_path, frame, [], page_data(frame, {}))
    browser.open((tmp_path / "report.html").as_uri())
    assert browser.js("performance.getEntriesByType('navigation')[0].loadEventEnd") < 5000
    items, words = (
        "document.querySelectorAll('#gallery li').length",
        "document.getElementById('gallery-words').textContent",
    )
    elements = "document.querySelectorAll('*').length"
    assert browser.js(words).startswith("4,000 images of 10,000,") and 0 < browser.js(items) <= 200
    assert browser.js(elements) < 20_000  # of these the filter has an option a prompt
    changed = f"""(async () => {{
        const before = {words}, began = performance.now();
        const field = document.getElementById('filters').elements.mode;
        field.value = [...field.options].find(one => one.text === 'every mode').value;
        field.dispatchEvent(new Event('input', {{bubbles: true}}));
        while ({words} === before) await new Promise(done => setTimeout(done, 10));
        document.body.offsetHeight;
        return performance.now() - began;
    }})()"""
    assert browser.js(changed) < 5000
    assert browser.js(words).startswith("10,000 images of 10,000,") and 0 < browser.js(items) <= 200
    turned = "[...document.querySelectorAll('#gallery-pager button')].at(-1).click()"
    first = "document.querySelector('#gallery li').textContent"
    before = browser.js(first)
    browser.js(turned)
    assert browser.js(first) != before and browser.js(items) <= 200 and browser.js(elements) < 20_000
