"""Objects that a detector with a fixed list of classes sees in an image."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lesion.scoring import _hub_models
from lesion.scoring._embeddings import Kept, digest

MASKS, BOXES = "Mask2FormerForUniversalSegmentation", "ForObjectDetection"
KEPT = 256  # images whose objects are kept, with their masks
# What GenEval calls three of COCO's classes.
OTHER_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}


@dataclass(frozen=True)
class Seen:
    """One object. box: x_min, y_min, x_max, y_max in pixels. mask: (height, width), of detectors that give it."""

    score: float
    box: tuple[float, float, float, float]
    mask: NDArray[np.bool_] | None = None


def classes(folder: Path) -> set[str]:
    """Return the classes that a detector's folder says it knows. Raises ValueError for what is no such detector."""
    kind = _hub_models.architecture(folder)
    if kind != MASKS and not kind.endswith(BOXES):
        raise ValueError(f"{_hub_models.CONFIG} is of {kind or 'no model'}; allowed: {MASKS}, or a detector …{BOXES}")
    names = _hub_models.mapping(folder / _hub_models.CONFIG).get("id2label")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{_hub_models.CONFIG} names no classes (id2label)")
    return {called(str(name)) for name in names.values()}


def called(name: str) -> str:
    return OTHER_NAMES.get(name, name)


class Detector:
    """A detector on a device; each image is looked at once for each threshold."""

    def __init__(self, model: Any, processor: Any, device: Any, masks: bool):
        self.model, self.processor, self.device, self.masks = model, processor, device, masks
        self._kept: Kept[tuple[str, float], dict[str, list[Seen]]] = Kept(KEPT)

    def __call__(self, image: NDArray[np.uint8], threshold: float) -> dict[str, list[Seen]]:
        """Objects by class, best first, with scores above `threshold`. image: (height, width, 3), 0-255."""
        return self._kept.get((digest(image), threshold), lambda: self._by_class(image, threshold))

    def _by_class(self, image: NDArray[np.uint8], threshold: float) -> dict[str, list[Seen]]:
        several: defaultdict[str, list[Seen]] = defaultdict(list)
        for label, seen in sorted(self._detect(image, threshold), key=lambda pair: -pair[1].score):
            several[called(self.model.config.id2label[label])].append(seen)
        return dict(several)

    def _detect(self, image: NDArray[np.uint8], threshold: float) -> list[tuple[int, Seen]]:
        from lesion.scoring._exact import exact

        given = self.processor(images=Image.fromarray(image), return_tensors="pt").to(self.device)
        with exact(self.device):
            outputs = self.model(**given)
            size = [image.shape[:2]]
            if not self.masks:
                (found,) = self.processor.post_process_object_detection(outputs, threshold, target_sizes=size)
                parts = (found[key].tolist() for key in ("labels", "scores", "boxes"))
                return [(label, Seen(score, tuple(box))) for label, score, box in zip(*parts, strict=True)]
            (found,) = self.processor.post_process_instance_segmentation(
                outputs, threshold, target_sizes=size, return_binary_maps=True
            )
            maps = found["segmentation"]
        info = found["segments_info"]
        return [
            (one["label_id"], Seen(one["score"], _around(mask), mask))
            for one, mask in zip(info, (maps[number].cpu().numpy() > 0 for number in range(len(info))), strict=True)
        ]


def _around(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """The smallest box around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


@lru_cache(maxsize=1)
def detector(folder: Path, device: str) -> Detector:
    """Load a detector, for all studies of this process."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForObjectDetection, Mask2FormerForUniversalSegmentation

    masks = _hub_models.architecture(folder) == MASKS
    place = torch.device(device)
    model = _hub_models.loaded(
        Mask2FormerForUniversalSegmentation if masks else AutoModelForObjectDetection, folder, place
    )
    return Detector(model, AutoImageProcessor.from_pretrained(folder, local_files_only=True), place, masks)
