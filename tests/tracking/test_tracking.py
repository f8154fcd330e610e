"""The tracking room: what an offline W&B log holds, read back from its bytes, and that no tracker can hurt a study."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

import lesion
from lesion.tracking import Guarded, JobInfo, Tracker, make_tracker, tracker_names
from lesion.tracking import wandb as wandb_room
from wandb_logs import merged, records

LAYERS = ["down_blocks.0.attentions.0", "up_blocks.1.attentions.2"]
NASTY = [
    "<script>alert('x')</script>\n\r\n\t\x00 \u202e{{7*7}}",
    "long " * 2000,
    "lone \ud800 surrogate, 'quotes' \"and\" 🙂",
]
SUMMARY = {f"importance/zero/{layer}": 0.125 * (index + 1) for index, layer in enumerate(LAYERS)}
CONF = Path(__file__).parents[2] / "conf" / "tracker"


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No W&B settings, credentials or home of the machine the tests run on."""
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def a_job(folder: Path, name: str = "leave_one_out-zero") -> JobInfo:
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, object] = {
        "seeds": [0, 1],
        "generation": {"steps": 8, "guidance": 3.0, "negative_prompt": NASTY[0]},
        "odd": {"path": Path("a/b"), "surrogate": NASTY[2], "number": np.float32(0.5)},
    }
    return JobInfo(name=name, group="2026-11-21/study", job_type="leave_one_out", folder=folder, config=config)


def a_run_folder(folder: Path, rows_per_prompt: int = 3) -> pd.DataFrame:
    """A frame of a few rows, its tiny PNGs, two sizes of grids, a figure and results.parquet under `folder`."""
    for sub in ("images", "grids", "figures"):
        (folder / sub).mkdir(parents=True)
    rows, prompts = [], []
    for number, prompt in enumerate(NASTY):
        for column in range(rows_per_prompt):
            image = f"images/{number}-{column}.png"
            pixels = np.full((8, 8, 3), 40 * column + number, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / image)
            layer = "" if column == 0 else LAYERS[column - 1]
            similarity = 1.0 if column == 0 else 0.9
            prompts.append(prompt)
            rows.append({"seed": number, "layer": layer, "status": "ok", "image": image, "clip_similarity": similarity})
    rows.append({**rows[-1], "status": "failed", "image": "", "clip_similarity": float("nan")})
    rows.append({**rows[-1], "status": "invalid", "image": "images/broken.png"})
    (folder / "images/broken.png").write_bytes(b"\x89PNG not really")
    for name, width in (("p0-s0", 32), ("p0-s1", 33), ("p1-s0", 48)):
        Image.new("RGB", (width // 16 * 16, 16), (width, 0, 0)).save(folder / "grids" / f"{name}.png")
    Image.new("RGB", (32, 16)).save(folder / "grids" / "maps--embedded--p0--seed0--01-red--lesioned.png")
    pd.DataFrame({"word": ["red"], "mass": [0.5]}).to_parquet(folder / "maps.parquet")
    Image.new("RGB", (20, 20)).save(folder / "figures" / "heatmap.png")
    (folder / "tables").mkdir()
    columns = {"layer": [*LAYERS, "NA"], "importance": [0.25, None, 0.5], "n": [1, 2, 3], NASTY[0]: NASTY[0]}
    layers = pd.DataFrame(columns)
    layers.to_csv(folder / "tables" / "layers.csv", index=False)
    (folder / "tables" / "layers.md").write_text("not a CSV")
    (folder / "tables" / "torn.csv").write_bytes(b'a,b\n"\xff')
    frame = pd.DataFrame(rows)
    frame.to_parquet(folder / "results.parquet")
    # As objects: a string column of pandas 3 cannot hold a lone surrogate, a frame made elsewhere can.
    frame.insert(0, "prompt", pd.Series([*prompts, NASTY[-1], NASTY[-1]], dtype=object))
    return frame


def our_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a terminal would show: wandb's own logger does not propagate, though pytest listens to it."""
    return [record.getMessage() for record in caplog.records if record.name.split(".")[0] != "wandb"]


def the_logs(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def track(folder: Path, frame: pd.DataFrame, **options: object) -> None:
    tracker = make_tracker("wandb", {"progress_every": 0, **options})
    tracker.start(a_job(folder))
    for done in (1, 2, 4):
        tracker.progress(done, 4, 2.5)
    tracker.finish(frame, folder, lambda: SUMMARY)
    tracker.close(0)


def test_an_offline_run_holds_everything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    frame = a_run_folder(tmp_path)
    with caplog.at_level(logging.INFO, logger="lesion"):
        track(tmp_path, frame, tags=["demo"], project="my-lesions")
    (log,) = the_logs(tmp_path)

    assert our_lines(caplog) == [
        f"W&B: no account found, logging offline to {log.parent}; upload later with `wandb sync {log.parent}`"
    ]
    assert capfd.readouterr() == ("", "")

    found = records(log)
    (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (run.run_group, run.job_type, run.display_name) == (
        "2026-11-21/study",
        "leave_one_out",
        "leave_one_out-zero",
    )
    assert (run.project, list(run.tags)) == ("my-lesions", ["demo"])
    config = merged(run.config.update)
    assert config["seeds"] == [0, 1]
    assert config["generation"] == {"steps": 8, "guidance": 3.0, "negative_prompt": NASTY[0]}
    assert config["odd"] == {"path": "a/b", "surrogate": NASTY[2].replace("\ud800", "?"), "number": 0.5}

    history = [merged(record.history.item) for record in found if record.WhichOneof("record_type") == "history"]
    progress = [
        (point["images_done"], point["images_left"], point["images_per_second"])
        for point in history
        if "images_done" in point
    ]
    assert progress == [(1, 3, 2.5), (2, 2, 2.5), (4, 0, 2.5)]

    summary: dict[str, object] = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            summary |= merged(record.summary.update)
    assert {key.replace(".", "_"): value for key, value in SUMMARY.items()}.items() <= summary.items()

    logged = {key: value for point in history for key, value in point.items()}
    assert logged["grids"]["captions"] == ["maps--embedded--p0--seed0--01-red--lesioned", "p0-s0", "p0-s1"]
    assert logged["grids_2"]["captions"] == ["p1-s0"], "a list of pictures has one size"
    assert logged["figures/heatmap"]["_type"] == "image-file"
    for relative in [*logged["grids"]["filenames"], logged["figures/heatmap"]["path"]]:
        assert (log.parent / "files" / relative).is_file()

    layers = json.loads((log.parent / "files" / logged["tables/layers"]["path"]).read_text("utf-8"))
    assert layers["columns"][:3] == ["layer", "importance", "n"]
    assert [row[:3] for row in layers["data"]] == [[LAYERS[0], 0.25, 1], [LAYERS[1], None, 2], ["NA", 0.5, 3]]
    assert [key for key in logged if key.startswith("tables/")] == ["tables/layers"], "what cannot be read is left out"

    table = json.loads((log.parent / "files" / logged["results"]["path"]).read_text("utf-8"))
    assert table["columns"] == ["baseline", "picture", *frame.columns]
    assert [row[2] for row in table["data"]] == [text.replace("\ud800", "?") for text in frame["prompt"]]
    assert [row[-1] for row in table["data"]] == [1.0, 0.9, 0.9] * 3 + [None, None]
    assert [row[1] is not None for row in table["data"]] == [True] * 9 + [False, False]

    artifacts = {
        record.artifact.type: record.artifact for record in found if record.WhichOneof("record_type") == "artifact"
    }
    assert artifacts["results"].name == "lesion-results"
    entries = {entry.path: entry for entry in artifacts["results"].manifest.contents}
    assert {"results.parquet", "maps.parquet", "tables/layers.csv"} <= entries.keys()
    entry = entries["results.parquet"]
    assert Path(entry.local_path).read_bytes() == (tmp_path / "results.parquet").read_bytes()
    (ended,) = [record.exit for record in found if record.WhichOneof("record_type") == "exit"]
    assert ended.exit_code == 0


def test_a_steered_study_with_maps_is_logged_with_heat_maps_boxes_and_measures(cli, drawn, no_figures) -> None:
    code, _, err = cli(
        "prompts.items=[{text:'a red circle',boxes:[{words:'red circle',box:[0,0,0.5,0.5]}]}]",
        *("steering=layout", "steering.step_size=noise_share", "steering.steps=1", "steering.iterations=1"),
        *("capture=maps", "capture.layers=[mid_block.*,down_blocks.0.*]"),
        *("layers.include=[mid_block.*]", "selection=leave_one_out", "generation.steps=2"),
        *("tracker=wandb", "tracker.mode=offline", "tracker.system_metrics=false"),
    )
    assert code == 0, err
    (frame,), folder = cli.frames(), cli.newest()
    (log,) = the_logs(folder)
    history = [merged(one.history.item) for one in records(log) if one.WhichOneof("record_type") == "history"]
    logged = {key: value for point in history for key, value in point.items()}
    pictures = [name for key, value in logged.items() if key.startswith("grids") for name in value["captions"]]
    assert set(pictures) == {path.stem for path in folder.glob("grids/*.png")}
    # The comparison has the boxes: tests/report/test_box_pictures.py.
    assert {name.partition("--")[0] for name in pictures} >= {"comparison", "maps"}
    assert {name.rpartition("--")[2] for name in pictures} >= {"00-a", "01-red", "02-circle", "lesioned"}
    table, maps = (
        json.loads((log.parent / "files" / logged[name]["path"]).read_text("utf-8"))
        for name in ("results", "tables/maps")
    )
    for name in ("box_iou", "box_mass", "unsteered_distance", "attention_share", "attention_entropy_colour"):
        values = [row[table["columns"].index(name)] for row in table["data"]]
        assert values == pytest.approx(frame[name].tolist()) and np.isfinite(values).all()
    assert "mid_block.attentions.0" in [row[maps["columns"].index("map_layer")] for row in maps["data"]]


def test_table_images_are_staged_within_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setenv("WANDB_DATA_DIR", str(elsewhere))
    frame = a_run_folder(tmp_path / "job")
    track(tmp_path / "job", frame, max_table_images=5)
    staged = [
        path
        for path in (tmp_path / "job/wandb/data").rglob("*")
        if path.is_file() and path.read_bytes()[:4] == b"\x89PNG"
    ]
    wanted = [(tmp_path / "job" / image).read_bytes() for image in frame["image"][:5]]
    assert sorted(path.read_bytes() for path in staged) == sorted(wanted), (
        "the first max_table_images pictures, no others"
    )
    assert not elsewhere.exists()
    assert os.environ["WANDB_DATA_DIR"] == str(elsewhere), "left as it was"


def test_two_jobs_in_one_process_are_two_runs(tmp_path: Path) -> None:
    trackers = [make_tracker("wandb", {"mode": "offline"}) for _ in range(2)]
    for index, tracker in enumerate(trackers):  # the second starts while the first is still open
        tracker.start(a_job(tmp_path / str(index), name=f"job-{index}"))
        tracker.progress(1, 1, 1.0)
    for index, tracker in enumerate(trackers):
        tracker.close(index)
    runs = []
    for index in range(2):
        (log,) = the_logs(tmp_path / str(index))
        by_kind = {record.WhichOneof("record_type"): record for record in records(log)}
        runs.append((by_kind["run"].run.run_id, by_kind["run"].run.display_name, by_kind["exit"].exit.exit_code))
    assert [run[1:] for run in runs] == [("job-0", 0), ("job-1", 1)]
    assert runs[0][0] != runs[1][0]


def test_progress_is_logged_at_most_every_few_seconds_and_at_the_end(tmp_path: Path) -> None:
    tracker = make_tracker("wandb", {"mode": "offline", "progress_every": 3600})
    tracker.start(a_job(tmp_path))
    for done in range(1, 51):
        tracker.progress(done, 50, 10.0)
    tracker.close(0)
    (log,) = the_logs(tmp_path)
    points = [merged(record.history.item) for record in records(log) if record.WhichOneof("record_type") == "history"]
    assert [point["images_done"] for point in points] == [1, 50]


def test_no_network_goes_offline_quickly_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    import wandb

    monkeypatch.setattr(wandb_room, "_no_server", [])
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: refused at once
    wandb.teardown()  # settings are read once a process
    try:
        with caplog.at_level(logging.INFO, logger="lesion"):
            track(tmp_path / "first", a_run_folder(tmp_path / "first"), init_timeout=1)
            began = time.monotonic()
            track(tmp_path / "second", a_run_folder(tmp_path / "second"), init_timeout=600)
            assert time.monotonic() - began < 60, "the second job does not wait for the server again"
    finally:
        wandb.teardown()
    line, again = our_lines(caplog)
    assert again.startswith(line.split(", logging")[0])
    assert line.startswith("W&B: could not start online (")
    assert "127.0.0.1:9" in line
    assert "wandb sync" in line
    assert capfd.readouterr() == ("", "")
    assert [len(the_logs(tmp_path / job)) for job in ("first", "second")] == [1, 1]
    assert not list(tmp_path.glob("*/wandb/run-*")), "the failed attempt leaves nothing behind"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["500", "silence"])
def test_a_server_that_fails_or_hangs_costs_the_time_that_the_config_says(how: str, tmp_path: Path) -> None:
    """In a process of its own, so that what wandb prints at exit is seen too."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if how == "silence":
                hanging.wait(120)
            self.send_error(500)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    hanging = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import pathlib, sys, time, test_tracking as t; folder = pathlib.Path(sys.argv[1]); began = time.monotonic();"
        "t.track(folder, t.a_run_folder(folder), mode='online', init_timeout=3, finish_timeout=5);"
        "print(time.monotonic() - began)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"}
    environment["PYTHONPATH"] = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True, timeout=200
        )
    finally:
        hanging.set()
        server.shutdown()
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert time.monotonic() - began - float(done.stdout) < 60, "nothing waits for it at exit"
    assert float(done.stdout) < 3 + 5 + 40  # both timeouts, and starting wandb on a machine that is busy
    assert len(the_logs(tmp_path)) == 1


@pytest.mark.parametrize(
    ("environment", "netrc", "lacking"),
    [
        ({}, "", "no account found"),
        ({"WANDB_API_KEY": "a" * 40}, "", ""),
        (
            {"WANDB_BASE_URL": "https://wandb.example.org"},
            "machine wandb.example.org login user password " + "b" * 40,
            "",
        ),
        (
            {"WANDB_BASE_URL": "https://wandb.example.org"},
            "machine other.example.org login user password " + "b" * 40,
            "no account found",
        ),
        (
            {"WANDB_API_KEY": "has a space"},
            "",
            "the account's key is malformed (WANDB_API_KEY invalid: API key may only",
        ),
        ({}, "machine api.wandb.ai login user password abc", "the account's key is malformed (API key must have 40+"),
    ],
)
def test_an_account_is_found_without_the_network(
    environment: dict[str, str], netrc: str, lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    (tmp_path / "netrc").write_text(netrc)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    wandb.teardown()  # settings are read once a process
    try:
        said = wandb_room._account_lacking()
        assert said.startswith(lacking) and bool(said) == bool(lacking)
    finally:
        wandb.teardown()


@pytest.mark.parametrize(
    ("asked", "variable", "account", "mode"),
    [
        ("auto", None, True, "online"),
        ("auto", None, False, "offline"),
        ("auto", "offline", True, "offline"),
        ("auto", "dryrun", True, "offline"),
        ("auto", "disabled", True, "disabled"),
        ("auto", "online", False, "offline"),
        ("online", None, False, "offline"),
        ("online", "offline", True, "online"),
        ("disabled", None, True, "disabled"),
    ],
)
def test_the_mode(asked: str, variable: str | None, account: bool, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_room, "_account_lacking", lambda: "" if account else "no account found")
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert wandb_room._choose_mode(asked)[0] == mode


class Failing:
    """Raises in the method named; counts the calls."""

    def __init__(self, where: str, error: BaseException) -> None:
        self.where, self.error, self.calls = where, error, []

    def __getattr__(self, name: str):
        def method(*_: object) -> None:
            self.calls.append(name)
            if name == self.where:
                raise self.error

        return method


def live_through(tracker: Tracker, folder: Path) -> None:
    tracker.start(a_job(folder))
    tracker.progress(1, 2, 1.0)
    tracker.progress(2, 2, 1.0)
    tracker.finish(pd.DataFrame(), folder, dict)
    tracker.close(0)


@pytest.mark.parametrize("where", ["start", "progress", "finish", "close"])
def test_a_failing_tracker_warns_once_and_is_left_alone(
    where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inner = Failing(where, OSError(28, "No space left\non device"))
    live_through(Guarded("wandb", inner), tmp_path)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "tracker wandb stopped: OSError: [Errno 28] No space left on device; the study continues")
    ]
    order = ["start", "progress", "progress", "finish", "close"]
    assert inner.calls == order[: order.index(where) + 1]


def test_an_interrupt_passes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        live_through(Guarded("wandb", Failing("progress", KeyboardInterrupt())), tmp_path)


def test_a_failure_inside_closes_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frame = a_run_folder(tmp_path)
    (tmp_path / "results.parquet").unlink()
    track(tmp_path, frame, mode="offline")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "results.parquet" in warning
    (log,) = the_logs(tmp_path)
    kinds = {record.WhichOneof("record_type"): record for record in records(log)}
    assert kinds["exit"].exit.exit_code == 1
    assert "importance" in str(kinds["summary"]) or "history" in kinds


class Silent:
    """Stands for a run whose service does not answer the call named."""

    offline = False
    summary: ClassVar[dict[str, float]] = {}

    def __init__(self, where: str) -> None:
        self.where, self.calls, self.woken = where, [], threading.Event()

    def __getattr__(self, name: str):
        def method(*_: object, **__: object) -> None:
            self.calls.append(name)
            if name == self.where:
                self.woken.wait(60)
                raise BrokenPipeError

        return method


@pytest.mark.parametrize(
    ("where", "calls"), [("log", ["log"]), ("status", ["log", "status"]), ("finish", ["log", "status", "finish"])]
)
def test_a_service_that_does_not_answer_has_a_deadline(
    where: str, calls: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ended = Silent(where), []
    tracker = make_tracker("wandb", {"service_timeout": 0.2, "finish_timeout": 0.3, "progress_every": 0})
    tracker.inner.run = run
    monkeypatch.setattr(wandb_room, "_end_service", lambda: ended.append(run.woken.set()))
    began = time.monotonic()
    tracker.progress(1, 2, 1.0)
    tracker.close(0)
    tracker.close(1)
    assert 0.2 <= time.monotonic() - began < 60 and len(ended) == 1
    (line,) = caplog.messages
    waited = "0.5" if where == "finish" else "0.2"
    assert line.startswith(f"tracker wandb stopped: ServiceSilent: wandb-core has not answered for {waited} s")
    assert "tracker.service_timeout" in line and line.endswith("the study continues")
    assert run.calls == calls


@pytest.mark.slow
@pytest.mark.parametrize("when", ["progress", "close"])
@pytest.mark.parametrize("how", ["SIGSTOP", "SIGKILL"])
def test_a_stopped_service_ends_in_one_line_and_nothing_waits_for_it_at_exit(
    how: str, when: str, tmp_path: Path
) -> None:
    code = (
        "import os, pathlib, signal, sys, test_tracking as t; from wandb.sdk import wandb_setup;"
        "folder, when, how = pathlib.Path(sys.argv[1]), *sys.argv[2:]; frame = t.a_run_folder(folder);"
        "process = lambda: wandb_setup._singleton._connection._proc._process.pid;"
        "stop = lambda: os.kill(process(), getattr(signal, how));"
        "tracker = t.make_tracker('wandb', {'mode': 'offline', 'progress_every': 0, 'service_timeout': 15});"
        "tracker.start(t.a_job(folder)); when == 'progress' and stop();"
        "[tracker.progress(done, 3, 1.0) for done in (1, 2, 3)]; tracker.finish(frame, folder, lambda: t.SUMMARY);"
        "when == 'close' and stop(); tracker.close(0);"
        "t.track(folder / 'again', t.a_run_folder(folder / 'again'), mode='offline')"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment["PYTHONPATH"] = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, when, how], env=environment, capture_output=True, text=True, timeout=120
    )
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (0, "") and line.endswith("the study continues")
    assert ("wandb-core has died" if how == "SIGKILL" else "wandb-core has not answered for 15 s") in line
    (log,) = the_logs(tmp_path / "again")
    assert records(log)[-1].exit.exit_code == 0


@pytest.mark.parametrize("options", [{}, {"name": "none"}])
def test_none_does_nothing(options: dict[str, object], tmp_path: Path) -> None:
    live_through(make_tracker("none", options), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_home_prints_nothing(tmp_path: Path) -> None:
    """In a process of its own: wandb starts its helper process once."""
    code = (
        "import pathlib, sys, test_tracking as t; folder = pathlib.Path(sys.argv[1]);"
        "t.track(folder, t.a_run_folder(folder), mode='offline')"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "XDG_"))}
    environment |= {"HOME": "/proc/nonexistent", "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(the_logs(tmp_path)) == 1


def test_disabled_does_nothing(tmp_path: Path) -> None:
    live_through(make_tracker("wandb", {"mode": "disabled"}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_wrong_requests_name_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"tracker=wandbb: choose one of none, wandb"):
        make_tracker("wandbb", {})
    with pytest.raises(ValueError, match=r"tracker.mode=on: choose one of auto, online, offline, disabled"):
        make_tracker("wandb", {"mode": "on"})
    with pytest.raises(ValueError, match=r"tracker.projct: unknown option .*project"):
        make_tracker("wandb", {"projct": "x"})
    with pytest.raises(ValueError, match=r"tracker.project=a/b"):
        make_tracker("wandb", {"project": "a/b"})
    with pytest.raises(ValueError, match=r"tracker.max_table_images=-1"):
        make_tracker("wandb", {"max_table_images": -1})


def test_every_tracker_has_a_config_with_the_defaults() -> None:
    assert sorted(path.stem for path in CONF.glob("*.yaml")) == tracker_names()
    for path in CONF.glob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        assert values["name"] == path.stem
        make_tracker(values["name"], values)
    values = yaml.safe_load((CONF / "wandb.yaml").read_text())
    values["tags"] = tuple(values["tags"])
    assert {**vars(wandb_room.Options()), "name": "wandb"} == values


def test_more_pictures_than_a_key_may_hold_go_under_further_keys(tmp_path: Path) -> None:
    for number in range(110):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number:03}.png")
    lists = wandb_room._picture_lists(tmp_path, "grids")
    assert {key: len(pictures) for key, pictures in lists.items()} == {"grids": 108, "grids_2": 2}


def test_what_runs_are_grouped_and_compared_by(tmp_path: Path) -> None:
    """Scalars in the config, bars of layers, the baseline beside each picture, one run a folder."""
    from lesion.tracking import wandb as module

    config: dict[str, object] = {"selection": {"leave_one_out": {}, "all": {}}, "replacement": {"zero": {}}}
    config |= {"model": {"name": "sd15", "id": "x"}, "prompts": {"name": "colour"}, "scorer": {"name": "dino"}}
    assert module._scalars(config) == {
        "lesion_version": lesion.__version__, "selection_name": "leave_one_out+all", "replacement_name": "zero",
        "model_name": "sd15", "prompts_name": "colour", "scorer_name": "dino",
    }  # fmt: skip
    keys = ["importance/zero/mid_block.attentions.0", "importance/zero/up_blocks.1", "sufficiency/zero/up_blocks.1"]
    bars = module._bars(dict.fromkeys(keys, 0.5))
    assert list(bars) == ["layers/importance_zero", "layers/sufficiency_zero"]
    frame = pd.DataFrame(
        {"model": "m", "prompt_id": ["p", "p", "q", "q"], "seed": 0, "selection": ["none", "all", "all", "none"]}
    )
    assert module._baselines(frame) == [None, 0, 3, None]
    trackers = [module.WandbTracker(module.Options()) for _ in range(5)]
    kept = tmp_path / "store" / "unfinished" / "study"
    for number, tracker in enumerate(trackers):
        tracker.folder = tmp_path / str(min(number, 3))  # the last has the folder of the one before
    first, beside, resumed, after, again = trackers
    one, old = first._run_id(kept)
    assert not old and beside._run_id(kept)[0] != one  # two processes at once are two runs
    first._forget(finished=False)
    assert resumed._run_id(kept) == (one, True)
    resumed._forget(finished=True)
    other, old = after._run_id(kept)
    assert not old and other != one
    after._forget(finished=True)
    assert not kept.exists() and again._run_id(None) == (other, True)
    first.folder = tmp_path
    (tmp_path / "images" / "p").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "p" / "one.png")
    assert "made" in first._newest() and first._newest() == {}  # each picture once
