"""Where a CLIP's weights come from: the package, a local folder or file, or open_clip's own list and the hub."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants as hub

from lesion import models
from lesion.models import facts
from lesion.models.hub import answers as hub_answers
from lesion.store.digests import digest_of

if TYPE_CHECKING:
    import torch

EMBEDDED = models.EMBEDDED / "clip"
LOCAL, HUB = "local-dir:", "hf-hub:"
PARTS = (".json", ".txt", ".safetensors", ".bin", ".pth", ".pt")  # of a model folder


def resolve(model: str, pretrained: str | None) -> tuple[str, str | None]:
    """open_clip's two words for a model, without any loading; ValueError, FileNotFoundError if they cannot be right."""
    if model == "embedded":
        model = f"{LOCAL}{EMBEDDED}"
    if model.startswith(LOCAL):
        folder = Path(model.removeprefix(LOCAL)).expanduser()
        if not (folder / "open_clip_config.json").is_file():
            raise FileNotFoundError(f"no open_clip_config.json in {folder}")
        return f"{LOCAL}{folder}", None
    if model.startswith(HUB):
        return model, None
    if facts.clip(model, pretrained):
        return model, pretrained
    import open_clip  # with torch: only for what is not known

    if model not in open_clip.list_models():
        near = ", ".join(difflib.get_close_matches(model, open_clip.list_models(), n=4, cutoff=0.4))
        raise ValueError(f"open_clip has no such model{f'; it has {near}' if near else ''}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained in tags:
        return model, pretrained
    if pretrained and Path(pretrained).expanduser().is_file():
        return model, str(Path(pretrained).expanduser())
    raise ValueError(f"clip_pretrained is neither a file nor one of {', '.join(tags)}")


def advice(model: str) -> str:
    if model == "embedded":
        return "it ships with the package: reinstall, or make it with scripts/train_embedded.py"
    if model.startswith(LOCAL):
        return "the folder needs open_clip_config.json, its weights and, if the config names one, the tokenizer's files"
    return (
        "download it once where there is network (open_clip keeps it in the hub's cache), "
        "or set scorer.clip_pretrained to a checkpoint file or scorer.clip_model to local-dir:FOLDER"
    )


def load(model: str, pretrained: str | None, device: torch.device) -> tuple[Any, Any, Any]:
    """Model (eval, float32), PIL preprocessing and tokenizer."""
    import open_clip

    offline = model.startswith(LOCAL) or not hub_answers()
    with _silent(), _hub_offline(offline):
        network, _, preprocess = open_clip.create_model_and_transforms(
            model, pretrained, precision="fp32", device=device, require_pretrained=True
        )
        tokenizer = open_clip.get_tokenizer(model)
    return network.eval().requires_grad_(False), preprocess, tokenizer


def identity(model: str, pretrained: str | None) -> str:
    """The model's name; local weights by their digest, since a path says nothing about what lies there."""
    if model.startswith(LOCAL):
        folder = Path(model.removeprefix(LOCAL))
        files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in PARTS)
        name = "embedded" if folder == EMBEDDED else folder.name
        return f"{name} {digest_of(files)}"
    if pretrained and Path(pretrained).is_file():
        return f"{model} {digest_of([Path(pretrained)])}"
    return f"{model} {pretrained}" if pretrained else model


@contextmanager
def _hub_offline(offline: bool) -> Iterator[None]:
    """Cached files only: `HF_HUB_OFFLINE` for a moment; the environment variable is read only at import."""
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


@contextmanager
def _silent() -> Iterator[None]:
    """open_clip narrates each load on the root logger; errors come back as exceptions, so nothing is lost."""

    def by_others(record: logging.LogRecord) -> bool:
        return "open_clip" not in Path(record.pathname).parts

    root = logging.getLogger()
    root.addFilter(by_others)
    try:
        yield
    finally:
        root.removeFilter(by_others)
