"""Tiny models that the tests build and save to disk, with the real classes and random weights."""

from __future__ import annotations

import copy
import gc
import io
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hydra._internal import defaults_list
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.base import Metadata
from PIL import Image

import pipelines
from lesion import models, processes
from lesion.models import ModelSpec
from pipelines import byte_tokenizer, small_pipeline, small_unet, text_encoder

__all__ = ["byte_tokenizer", "small_pipeline", "small_unet", "text_encoder"]  # for the tests


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Layer lists are remembered in a folder of this session, not in the user's."""
    os.environ["LESION_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def commands_hear_ctrl_c() -> None:
    """Also where a shell started the tests in the background, whose processes ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def what_lives_is_not_collected() -> None:
    """A model that is forgotten collects garbage: half of a small test's time, if that visits every imported module."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def hydra_repeats_nothing() -> Iterator[None]:
    """To compose is half of a small test's time: the same two dozen YAML files and, two or three times, the same
    overrides are read by parsers in Python, for each file there is a map of what interpolations may name, and
    what OmegaConf notes of each value is taken apart to copy it.
    """
    load, parse_rule, make_map = OmegaConf.load, OverridesParser.parse_rule, defaults_list._create_interpolation_map
    known: dict[tuple[str, str], bytes] = {}  # pickled: each gets its own, five times as fast as by deepcopy

    def once(key: tuple[str, str], make: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = pickle.dumps(make())
        return pickle.loads(known[key])

    def load_once(source: Any) -> Any:
        text = source.read() if hasattr(source, "read") else Path(source).read_text(encoding="utf-8")
        return once((text, "file"), lambda: load(io.StringIO(text)))

    def parse_once(self: OverridesParser, text: str, rule: str) -> Any:
        return once((text, rule), lambda: parse_rule(self, text, rule))

    def map_where_needed(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
        needed = any(one.is_interpolation() for one in defaults)
        return make_map(overrides, defaults, self_added) if needed else None

    def copied(self: Metadata, memo: dict[int, Any]) -> Metadata:
        made = object.__new__(type(self))
        vars(made).update(vars(self))
        made.flags = dict(self.flags or {})
        made.resolver_cache = copy.deepcopy(self.resolver_cache) if self.resolver_cache else defaultdict(dict)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metadata, "__deepcopy__", copied, raising=False)
        patch.setattr(OmegaConf, "load", load_once)
        patch.setattr(OverridesParser, "parse_rule", parse_once)
        patch.setattr(defaults_list, "_create_interpolation_map", map_where_needed)
        yield


@pytest.fixture(autouse=True)
def no_further_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports in this process are drawn by it alone: every core has a process with tests, and others start slowly."""
    monkeypatch.setattr(processes, "MANY", 10**9)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder of 6 cross-attention layers and 16x16 images."""
    return pipelines.build("sd", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def no_batch_size_learnt() -> Iterator[None]:
    """What one test teaches of memory must not cut the batches of the next."""
    yield
    if (making := sys.modules.get("lesion.run.maker")) is not None:
        making._sizes.clear()
        making._cut.clear()


@pytest.fixture
def tiny_model(tiny_folder: Path) -> models.Model:
    """A load of the tiny folder that no other test gets, whatever becomes of it."""
    from lesion.models import loading

    loading.forget()
    model = models.load(models.resolve(tiny_spec(tiny_folder)), "cpu")
    loading.forget()
    return model


def tiny_spec(folder: Path, **changes: object) -> ModelSpec:
    return ModelSpec(**{"name": "tiny", "id": str(folder), "dtype": "float32", **changes})  # type: ignore[arg-type]


def settings(**changes: object):  # type: ignore[no-untyped-def]
    from lesion.study.settings import Settings

    base = {"task": "txt2img", "steps": 4, "guidance": 3.0, "height": 16, "width": 16, "scheduler": "DDIMScheduler"}
    return Settings(**{**base, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_sdxl_folder: Path
) -> Callable[[str], Path]:
    """The folder of the tiny pipeline of a name of `pipelines.BUILDERS`, each built once."""
    root = tmp_path_factory.mktemp("pipelines")
    there = {"sd": tiny_folder, "sdxl": tiny_sdxl_folder}
    return cache(lambda name: there.get(name) or pipelines.build(name, root / name))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP folder of random weights."""
    from test_scoring import write_clip

    return write_clip(tmp_path_factory.mktemp("clips") / "clip")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small disk of memory at a place, such as `size=32k` or `nr_inodes=20`: one that really runs full."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("file systems cannot be mounted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)  # -l: this process keeps its log open


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs in this process draw no report, which takes most of their time: for tests of what comes before it."""
    import lesion.report

    monkeypatch.setattr(lesion.report, "write_report", lambda *args, **options: [])
    monkeypatch.setattr(lesion.report, "findings", lambda *_, **__: None)


@pytest.fixture
def drafts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of few pixels, and empty PDFs, which take most of a report's time: for tests that look at other things.

    tests/report/test_figures.py has both as they are.
    """
    if request.node.get_closest_marker("printed"):
        return
    from lesion.report import figures

    style = figures._style
    monkeypatch.setattr(figures, "_style", lambda: style() | {"savefig.dpi": 60})
    monkeypatch.setattr(figures.FigureCanvasPdf, "print_pdf", lambda self, path, **options: Path(path).touch())


@pytest.fixture
def drawn(drafts: None) -> None:
    """For tests that look at the report: the jobs of `cli` draw it. Without this fixture they have `no_report`."""


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without figures, which take most of the time: for tests that look at tables, the page or grids."""
    from lesion.report.pictures import Drawn

    for name in ("of_setting", "over_settings"):
        monkeypatch.setattr(f"lesion.report.illustrations.{name}", lambda *args: Drawn([], 0))


@pytest.fixture
def no_pictures(no_figures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor grids: reports of tables and a page."""
    from lesion.report.pictures import Drawn

    for name in ("comparisons", "layer_grids"):
        monkeypatch.setattr(f"lesion.report.pictures.{name}", lambda *args: Drawn([], 0))


@pytest.fixture
def empty_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, and their files have nothing in them: for tests that look at which files there are."""
    from lesion.report import figures

    def save(figure: object, stem: Path) -> list[Path]:
        stem.parent.mkdir(parents=True, exist_ok=True)
        paths = [stem.parent / f"{stem.name}.{kind}" for kind in ("png", "pdf")]
        for path in paths:
            Image.new("RGB", (8, 8)).save(path)
        return paths

    monkeypatch.setattr(figures, "save", save)


get_mode = Hydra.get_mode


class Cli:
    """Runs the console script `lesion` in this process, in a folder of its own."""

    def __init__(
        self, folder: Path, defaults: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
    ):
        self.folder, self.defaults, self.monkeypatch, self.capfd = folder, defaults, monkeypatch, capfd
        monkeypatch.chdir(folder)

    def __call__(self, *arguments: str, defaults: bool = True) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        from lesion.cli import study as cli

        given = {argument.split("=")[0] for argument in arguments}
        base = [argument for argument in self.defaults if argument.split("=")[0] not in given] if defaults else []
        flags = [argument for argument in arguments if argument.startswith("-")]  # argparse wants them first
        rest = [argument for argument in arguments if argument not in flags]
        self.monkeypatch.setattr("sys.argv", ["lesion", *flags, *base, *rest])
        sets_mode = any("shards" in argument for argument in rest)  # else to find it costs composing twice
        self.monkeypatch.setattr(Hydra, "get_mode", get_mode if sets_mode else lambda *_, **__: None)
        self.capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = self.capfd.readouterr()
        return code, out, err

    def frames(self):  # type: ignore[no-untyped-def]
        import pandas as pd

        return [pd.read_parquet(path) for path in sorted(self.folder.rglob("results.parquet"))]

    def newest(self) -> Path:
        return max(self.folder.rglob("results.parquet"), key=lambda path: path.stat().st_mtime_ns).parent


@pytest.fixture
def cli(  # type: ignore[no-untyped-def]
    tiny_folder: Path,
    tiny_clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    request: pytest.FixtureRequest,
):
    """`lesion` on the tiny model: 2 prompts, 1 seed, 3 of 7 layers, 3 steps, without tracker; a report with `drawn`."""
    if "drawn" not in request.fixturenames:
        request.getfixturevalue("no_report")
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield Cli(
        tmp_path,
        [
            "model=local",
            f"model.id={tiny_folder}",
            f"scorer.clip_model=local-dir:{tiny_clip}",
            "prompts=inline",
            "prompts.items=[a red circle, two stars]",
            "seeds=0",
            "layers.include=[down_blocks.0.*, mid_block.*, up_blocks.1.attentions.1]",
            "generation.steps=3",
            "generation.height=16",
            "generation.width=16",
            "generation.batch_size=4",
            "tracker=none",
        ],
        monkeypatch,
        capfd,
    )
    root.handlers[:], root.level = before  # Hydra's write to streams that end with the test


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion XL folder (two text encoders, added conditions) of 4 cross-attention layers."""
    return pipelines.build("sdxl", tmp_path_factory.mktemp("models") / "tiny_sdxl")
