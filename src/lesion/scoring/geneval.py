"""Does an image show the objects that its prompt asks for, by GenEval's rules? 1 if all of it is right, else 0.

Of each class that `metadata` asks for there must be as many objects as it says, each of the colour it says, the second
where it says beside the first, and of an excluded class fewer than it says. Objects are what a detector sees with a
score above `threshold` (of prompts that ask for a number `counting_threshold`), the 16 best of a class. A colour is the
likeliest of ten for the object's crop, by a CLIP and three phrases, its background greyed where the detector gives
masks. A lies beside B where their centres are further apart than a tenth of their sizes together. Ghosh, Hajishirzi and
Schmidt 2023, arXiv:2310.11513; `evaluation/evaluate_images.py` of their repository.

Detectors: Mask2Former for instances, on COCO's 80 classes (GenEval's own is a Mask2Former on Swin-S, here as
transformers has it), or any object detector of transformers that knows the classes (DETR, RT-DETR, ...), without masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lesion.errors import RequestError
from lesion.scoring import OptionError, ScorerError, Shot, _hub_models, _objects
from lesion.scoring._clip import ClipMetric
from lesion.scoring._objects import Seen
from lesion.store.digests import digest_of
from lesion.study import prompt_files

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
PHRASES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
PLACES = ("left of", "right of", "above", "below")
COUNTING = "counting"  # the tag of prompts that ask for a number
MOST = 16  # objects of a class
NEAR = 0.1  # of the sizes of two objects: as far apart as that is nowhere
GREY = 0x99  # around an object with a mask


@dataclass(frozen=True)
class Clause:
    """So many objects of a class; colour: "" for any; place: how they lie to those of an earlier clause."""

    name: str
    count: int
    colour: str = ""
    place: tuple[str, int] | None = None


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for."""

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]
    counting: bool


class GenEval(ClipMetric):
    direction = "prompt"
    range = (0.0, 1.0)
    models = "an object detector, an open_clip model"

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        metadata: str = "",
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
    ):
        """model, pretrained: of the CLIP that names colours. metadata: GenEval's evaluation_metadata.jsonl; prompts
        that it does not have get no value. detector: a name on the hub (ORG/REPO), or a folder. threshold,
        counting_threshold: scores in [0, 1].
        """
        super().__init__(model, pretrained)
        self.metadata, self.detector = metadata, detector
        self.threshold, self.counting_threshold = threshold, counting_threshold

    @cached_property
    def asked(self) -> Mapping[str, Asked]:
        """What each prompt of the file asks for. Raises RequestError."""
        if not self.metadata:
            raise RequestError("metadata", "needs GenEval's evaluation_metadata.jsonl (docs/metrics.md)")
        content = prompt_files.content(self.metadata, "metadata")
        rows = enumerate(prompt_files.parsed(content, "metadata"), 1)
        return dict(_asked(row, f"{content.name!r} entry {number}") for number, row in rows)

    def asks(self, prompt: str) -> bool:
        return prompt.strip() in self.asked

    def identity(self) -> str:
        folder = self._folder()
        clip = super().identity().partition(" ")[2]
        name = self.detector.rstrip("/").rpartition("/")[2]
        file = digest_of((Path(self.metadata).expanduser(),))
        limits = f"{self.threshold:g} {self.counting_threshold:g}"
        return f"{self.name}/1 ({name} {_hub_models.digest_of_folder(folder)}, {file}, {limits}) {clip}"

    def check(self) -> None:
        super().check()
        for option in ("threshold", "counting_threshold"):
            if not 0 <= getattr(self, option) <= 1:
                raise OptionError(option, f"got {getattr(self, option):g}; allowed: a number in [0, 1]")
        try:
            asked = self.asked
        except RequestError as error:
            raise OptionError("metadata", str(error).removeprefix("metadata: ")) from None
        try:
            classes = _objects.classes(self._folder())
        except (ValueError, OSError) as error:
            raise OptionError("detector", f"{self.detector!r}: {error}") from None
        names = {clause.name for one in asked.values() for clause in (*one.include, *one.exclude)}
        if unknown := sorted(names - classes):
            raise OptionError("detector", f"{self.detector!r} does not know {unknown[0]!r}, which the metadata ask for")

    def _folder(self) -> Path:
        return _hub_models.folder_of(self.detector, f"scorer.metrics.{self.name}.detector")

    def load(self, device: str, batch_size: int) -> None:
        super().load(device, batch_size)
        try:
            self.objects = _objects.detector(self._folder(), device)
        except Exception as error:  # hub, file and device errors of many types
            raise ScorerError(f"cannot load the detector {self.detector}: {error}") from error
        self._colours: dict[str, NDArray[np.float64]] = {}

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        values = np.full(len(shots), np.nan)
        for number, shot in enumerate(shots):
            if asked := self.asked.get(shot.prompt.strip()):
                limit = self.counting_threshold if asked.counting else self.threshold
                found = {name: several[:MOST] for name, several in self.objects(shot.image, limit).items()}
                values[number] = correct(asked, found, lambda seen, name, s=shot: self.colours(s.image, seen, name))
        return values

    def colours(self, image: NDArray[np.uint8], found: Sequence[Seen], name: str) -> list[str]:
        """The colour of each object of a class."""
        if name not in self._colours:
            texts = [phrase.format(colour=colour, name=name) for colour in COLOURS for phrase in PHRASES]
            vectors = self.embedder.texts(texts, self.batch_size).reshape(len(COLOURS), len(PHRASES), -1).mean(axis=1)
            self._colours[name] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        embedded = self.embedder.images([crop(image, seen) for seen in found], self.batch_size)
        return [COLOURS[best] for best in (embedded @ self._colours[name].T).argmax(axis=1)]


def crop(image: NDArray[np.uint8], seen: Seen) -> NDArray[np.uint8]:
    """Return an object's box of an image, grey around the object where its mask is known; at least a pixel."""
    height, width = image.shape[:2]
    shown = image if seen.mask is None else np.where(seen.mask[..., None], image, np.uint8(GREY))
    left, top = (min(max(round(low), 0), size - 1) for low, size in zip(seen.box[:2], (width, height)))
    right, bottom = (max(round(high), low + 1) for high, low in zip(seen.box[2:], (left, top)))
    return np.ascontiguousarray(shown[top:bottom, left:right])


def correct(asked: Asked, found: Mapping[str, Sequence[Seen]], colours: Any) -> float:
    """Judge objects by class, best first: 1.0 if all that is asked for is there, else 0.0.

    colours: gives the colours of objects of a class.
    """
    right = True
    groups: list[Sequence[Seen] | None] = []
    for clause in asked.include:
        own = found.get(clause.name, ())[: clause.count]
        fits = len(own) == clause.count
        if fits and clause.colour:
            fits = list(colours(own, clause.name)).count(clause.colour) == clause.count
        if fits and clause.place:
            place, number = clause.place
            target = groups[number]
            fits = target is not None and all(place in places(a, b) for a in own for b in target)
        groups.append(own if fits else None)
        right = right and fits
    return float(right and all(len(found.get(clause.name, ())) < clause.count for clause in asked.exclude))


def places(a: Seen, b: Seen) -> set[str]:
    """Return how object a lies to object b, a part of `PLACES`."""
    boxes = np.array([a.box, b.box], dtype=np.float64).reshape(2, 2, 2)  # object, corner, (x, y)
    apart = np.diff(boxes.mean(axis=1)[::-1], axis=0)[0]
    size = np.abs(np.diff(boxes, axis=1)).sum(axis=(0, 1))
    beyond = np.maximum(np.abs(apart) - NEAR * size, 0) * np.sign(apart)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    dx, dy = beyond / np.linalg.norm(apart)
    return {place for place, holds in zip(PLACES, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)) if holds}


def _asked(row: prompt_files.Row, where: str) -> tuple[str, Asked]:
    """A prompt of the file, and what it asks for. Raises RequestError."""
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise RequestError("metadata", f"{where} needs a prompt, as in GenEval's evaluation_metadata.jsonl")
    include, exclude = (row.get(name) or [] for name in ("include", "exclude"))
    if not isinstance(include, list) or not isinstance(exclude, list) or not include:
        raise RequestError("metadata", f"{where}: include must be a list of objects, and exclude too if it is there")
    clauses = tuple(_clause(one, f"{where}: include", number) for number, one in enumerate(include))
    without = tuple(_clause(one, f"{where}: exclude", 0) for one in exclude)
    return row["prompt"].strip(), Asked(clauses, without, row.get("tag") == COUNTING)


def _clause(given: Any, where: str, number: int) -> Clause:
    if not isinstance(given, dict) or not isinstance(given.get("class"), str):
        raise RequestError("metadata", f"{where} needs a class")
    count, colour, place = given.get("count", 1), given.get("color", ""), given.get("position")
    if type(count) is not int or count < 1:
        raise RequestError("metadata", f"{where}: count must be a whole number from 1 up; got {count!r}")
    if colour and colour not in COLOURS:
        raise RequestError("metadata", f"{where}: got the color {colour!r}; allowed: {', '.join(COLOURS)}")
    if place is not None:
        if not isinstance(place, list) or len(place) != 2 or place[0] not in PLACES or place[1] not in range(number):
            raise RequestError("metadata", f"{where}: position must be [one of {', '.join(PLACES)}, an earlier object]")
        place = (place[0], place[1])
    return Clause(given["class"], count, colour, place)
