"""Where an open-vocabulary detector sees what the words of boxes name: OWLv2, Minderer et al. 2023, arXiv 2306.09683.

A query is "a photo of a WORDS", as published. Of each query's detections with a score of at least 0.1 (transformers'
default) those that overlap a better one (IoU above 0.5) are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lesion.scoring import _hub_models
from lesion.scoring._embeddings import Kept, digest
from lesion.store.digests import digest_of
from lesion.study.boxes import Corners

FILES = ("config.json", "model.safetensors")  # and the processor's: a tokenizer, and how pictures are brought to size
THRESHOLD, OVERLAP = 0.1, 0.5
KEPT = 4096  # images whose detections are kept


def iou(a: Corners, b: Corners) -> float:
    """Intersection over union of two boxes, in [0, 1]."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / either if either > 0 else 0.0


class Detector:
    """OWLv2 on a device. Detections are corners as shares of the image, best first."""

    def __init__(self, folder: Path, device: str):
        import torch
        from transformers import Owlv2ForObjectDetection, Owlv2Processor

        self.device = torch.device(device)
        self.processor = Owlv2Processor.from_pretrained(folder, local_files_only=True)
        self.model = _hub_models.loaded(Owlv2ForObjectDetection, folder, self.device)
        self._kept: Kept[tuple[str, tuple[str, ...]], list[list[Corners]]] = Kept(KEPT)

    def __call__(self, image: NDArray[np.uint8], words: Sequence[str]) -> list[list[Corners]]:
        """Detect what each of `words` names in an image, (height, width, 3), 0-255."""
        return self._kept.get((digest(image), tuple(words)), lambda: self._detect(image, words))

    def _detect(self, image: NDArray[np.uint8], words: Sequence[str]) -> list[list[Corners]]:
        from lesion.scoring._exact import exact

        height, width = image.shape[:2]
        queries = [f"a photo of a {one}" for one in words]
        given = self.processor(text=[queries], images=[image], return_tensors="pt").to(self.device)
        with exact(self.device):
            outputs = self.model(**given)
        (found,) = self.processor.post_process_grounded_object_detection(
            outputs, threshold=THRESHOLD, target_sizes=[(height, width)]
        )
        seen: list[list[tuple[float, Corners]]] = [[] for _ in words]
        for score, label, box in zip(*(found[key].tolist() for key in ("scores", "labels", "boxes")), strict=True):
            x_min, y_min, x_max, y_max = (
                min(max(side / size, 0.0), 1.0) for side, size in zip(box, (width, height) * 2, strict=True)
            )
            if x_max > x_min and y_max > y_min:
                seen[label].append((score, (x_min, y_min, x_max, y_max)))
        return [apart([box for _, box in sorted(one, key=lambda pair: -pair[0])]) for one in seen]


def apart(boxes: Sequence[Corners]) -> list[Corners]:
    """Return the boxes, given best first, that do not overlap a better one."""
    kept: list[Corners] = []
    for box in boxes:
        if all(iou(box, better) <= OVERLAP for better in kept):
            kept.append(box)
    return kept


def resolve(name: str) -> Path:
    """Return the folder of an OWLv2: a local one, or of a name on the hub, from its cache or downloaded once.

    Raises ValueError for what is no OWLv2 and FileNotFoundError where there is none, in one line each.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _hub_models.snapshot(name, "download it once where there is network, or name a folder of it")
    if lacking := [file for file in FILES if not (folder / file).is_file()]:
        raise FileNotFoundError(f"the folder needs {' and '.join(FILES)}; it lacks {lacking[0]}")
    _hub_models.check_kind(folder / FILES[0], "owlv2")
    return folder


def weights_digest(folder: Path) -> str:
    """16 hex digits of what its detections depend on."""
    return digest_of(tuple(folder / file for file in FILES))


@lru_cache(maxsize=2)
def detector(folder: Path, device: str) -> Detector:
    """Load the detector once for all metrics that ask for it."""
    return Detector(folder, device)
