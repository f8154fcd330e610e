"""A hub that does not answer costs seconds, once; what its cache has is there all the same."""

from __future__ import annotations

import time

import huggingface_hub.constants as constants
import pytest

from lesion.errors import RequestError
from lesion.models import ModelSpec, hub, resolve


@pytest.fixture
def silent(monkeypatch, tmp_path):
    """A hub whose name is looked up for ever."""
    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    monkeypatch.setattr(hub, "_head", lambda address: asked.append(address) or time.sleep(5))
    hub._reached.cache_clear()
    yield asked
    hub._reached.cache_clear()


def test_a_model_that_is_nowhere_is_refused_once_the_hub_has_been_asked(silent):
    started = time.monotonic()
    for _ in range(3):
        with pytest.raises(
            RequestError, match=r"^model.id: 'org/tiny' is no local folder, .*: it does not answer, and"
        ):
            resolve(ModelSpec("tiny", "org/tiny"))
    assert silent == [constants.ENDPOINT] and time.monotonic() - started < 3


def test_a_cached_model_is_found_without_an_answer(silent, tiny_folder, tmp_path):
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "abc").symlink_to(tiny_folder)
    source = resolve(ModelSpec("tiny", "org/tiny"))
    assert source.commit == "abc" and source.pipeline == "StableDiffusionPipeline"
