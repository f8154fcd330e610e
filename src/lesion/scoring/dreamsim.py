"""DreamSim, a perceptual distance between an image and its baseline that follows what people find alike. 0 to 2.

    dreamsim(x, y) = 1 - <e(x), e(y)> / (|e(x)| |e(y)|)

with e the embedding of a vision transformer fine-tuned by low-rank adapters on judgements of people (of an ensemble,
the embeddings one behind the other), less its own mean, on the image at 224 x 224 pixels. 0 for identical pixels. Fu,
Tamir, Sundaram et al. 2023, arXiv:2306.09344; computed by their package (`pip install 'lesion[dreamsim]'`) from a
folder as the package makes it: weights of the towers, and a folder of adapters. The kinds `dino_vitb16`,
`dinov2_vitb14` and `ensemble` also take DINO's code and weights from torch hub, which the package keeps in that folder
once it has run with network; the others need nothing else.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lesion.scoring import Metric, OptionError, ScorerError, Shot
from lesion.scoring._embeddings import Memory, Vectors, digest, unit, with_baselines
from lesion.store.digests import digest_of

if TYPE_CHECKING:
    import torch

Kind = Literal["ensemble", "dino_vitb16", "dinov2_vitb14", "clip_vitb32", "open_clip_vitb32", "synclr_vitb16"]
DINO = ("facebookresearch_dino_main/hubconf.py", "checkpoints/dino_vitbase16_pretrain.pth")  # of torch hub
DINO_2 = ("facebookresearch_dinov2_main/hubconf.py", "checkpoints/dinov2_vitb14_pretrain.pth")
# Of each kind what its folder has, besides its adapter.
FILES: dict[str, tuple[str, ...]] = {
    "ensemble": (
        "dino_vitb16_pretrain.pth",
        "clip_vitb16_pretrain.pth.tar",
        "open_clip_vitb16_pretrain.pth.tar",
        *DINO,
    ),
    "dino_vitb16": ("dino_vitb16_pretrain.pth", *DINO),
    "dinov2_vitb14": ("dinov2_vitb14_pretrain.pth", *DINO_2),
    "clip_vitb32": ("clip_vitb32_pretrain.pth.tar",),
    "open_clip_vitb32": ("open_clip_vitb32_pretrain.pth.tar",),
    "synclr_vitb16": ("synclr_vit_b_16.pth",),
}
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")


class DreamSim(Metric):
    direction = "distance"
    range = (0.0, 2.0)
    identical = 0.0
    models = "a DreamSim"

    def __init__(self, folder: str = "", kind: Kind = "ensemble"):
        """folder: of the weights. kind: which of DreamSim's models."""
        self.folder, self.kind = folder, kind

    def identity(self) -> str:
        return f"{self.name}/1 ({self.kind} {digest_of(self._files())})"

    def check(self) -> None:
        if importlib.util.find_spec("dreamsim") is None:
            raise OptionError("kind", "needs a package that is missing: pip install 'lesion[dreamsim]'")
        try:
            self._files()
        except OSError as error:
            raise OptionError("folder", str(error)) from None

    def _files(self) -> tuple[Path, ...]:
        """What its values depend on. Raises FileNotFoundError."""
        folder = Path(self.folder).expanduser()
        made = f"from dreamsim import dreamsim; dreamsim(dreamsim_type={self.kind!r}, cache_dir=FOLDER) makes one"
        if not self.folder or not folder.is_dir():
            raise FileNotFoundError(f"{self.folder!r} is no folder of DreamSim's weights; with network, {made}")
        adapter = f"{'ensemble' if self.kind == 'ensemble' else f'{self.kind}_single'}_lora"
        weights = next((f"{adapter}/{file}" for file in ADAPTER if (folder / adapter / file).is_file()), None)
        files = (*FILES[self.kind], f"{adapter}/adapter_config.json", weights or f"{adapter}/{ADAPTER[0]}")
        if lacking := [file for file in files if not (folder / file).is_file()]:
            raise FileNotFoundError(f"{self.folder!r} lacks {lacking[0]} of kind {self.kind}; with network, {made}")
        return tuple(folder / file for file in files)

    def load(self, device: str, batch_size: int) -> None:
        super().load(device, batch_size)
        try:
            self._files()
            self.embedder = _embedder(str(Path(self.folder).expanduser()), self.kind, device)
        except ImportError:
            raise
        except Exception as error:  # file, hub and device errors of many types
            raise ScorerError(f"cannot load DreamSim from {self.folder}: {error}") from error

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        return 1 - with_baselines(self.embedder, shots, self.batch_size)


class DreamSimEmbedder:
    """Unit-length embeddings of images, each computed once (see `Memory`)."""

    def __init__(self, model: Any, preprocess: Any, device: torch.device):
        self.model, self.preprocess, self.device = model, preprocess, device
        self.images: Memory[NDArray[np.uint8]] = Memory(digest, self._embed)

    def _embed(self, images: list[NDArray[np.uint8]]) -> Vectors:
        import torch

        from lesion.scoring._exact import exact

        pixels = torch.cat([self.preprocess(Image.fromarray(image)) for image in images])  # (n, 3, 224, 224)
        with exact(self.device):
            return unit(self.model.embed(pixels.to(self.device)))


@lru_cache(maxsize=1)
def _embedder(folder: str, kind: Kind, device: str) -> DreamSimEmbedder:
    import torch
    from dreamsim import dreamsim

    place = torch.hub.get_dir()  # the package moves it to its folder
    try:
        # It and torch hub say what they find, and peft warns of the adapter that it lays in twice.
        silence = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with silence[0], silence[1], warnings.catch_warnings(action="ignore"):
            model, preprocess = dreamsim(device=device, cache_dir=folder, dreamsim_type=kind)
    finally:
        torch.hub.set_dir(place)
    return DreamSimEmbedder(model.float(), preprocess, torch.device(device))
