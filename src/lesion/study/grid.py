"""The grid as data: settings and lesions make cells, cells make a study. Imports nothing of torch."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from lesion.errors import RequestError
from lesion.study.components import AFTER, VAE, components_of, families_of, family_of
from lesion.study.lesions import Axes, Choice, Lesion, Replacement, choices, digest_of
from lesion.study.prompts import Prompt
from lesion.study.settings import Settings
from lesion.study.shards import WHOLE, Shard

FORMAT = 2  # raise it when the same cell would give other pixels or another key
IDENTITY = frozenset(("format", "model", "prompt", "seed", "settings", "lesion"))  # keys of `Cell.identity`
NO_LESION = digest_of(None)


@dataclass(frozen=True)
class ModelIdentity:
    """name labels the model in tables; the rest can change pixels.

    fingerprint: hash of configs and weights. device: cpu or cuda, which round differently. switches: what is switched
    on for speed and rounds differently.
    """

    name: str
    fingerprint: str
    dtype: str
    device: str = "cpu"
    switches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One image to make; `lesion` is None for the baseline."""

    model: ModelIdentity
    prompt: Prompt
    seed: int
    settings: Settings
    lesion: Lesion | None

    def identity(self) -> dict[str, Any]:
        """Everything that can change its pixels, and nothing that can't, as JSON data.

        An axis added later must be left out at its default value, so that old hashes stay.
        """
        model: dict[str, Any] = {"fingerprint": self.model.fingerprint, "dtype": self.model.dtype}
        if self.model.device != "cpu":
            model["device"] = self.model.device
        if self.model.switches:
            model["switches"] = list(self.model.switches)
        return {
            "format": FORMAT,
            "model": model,
            "prompt": _asked(self.prompt),
            "seed": self.seed,
            "settings": self.settings.identity(),
            "lesion": None if self.lesion is None or self.lesion.strength == 0 else self.lesion.identity(),
        }

    @cached_property
    def key(self) -> str:
        """The cell's hash: the first 32 hex digits of the SHA-256 of four parts, joined by newlines.

        1. `digest_of` the identity without its prompt, seed and lesion;
        2. the SHA-256, in hex, of the prompt in UTF-8 (lone surrogates pass); `digest_of` it if it is no text;
        3. the seed in decimal;
        4. `digest_of` the identity's lesion.

        No part holds a newline, so two identities have one key only if SHA-256 collides. All but the seed is shared by
        many cells of a study, which hashes those parts once.
        """
        return _key(_subject(_context(self.identity()), self.prompt), self.seed, self.lesion)

    @property
    def noise_seed(self) -> int:
        """What the generator of the image's noise is seeded with: the seed where seeds are shared by all prompts.

        With noise of its own, the first 63 bits of the SHA-256 of two lines, the prompt's part of the key and the seed.
        """
        if self.settings.noise == "shared":
            return self.seed
        digest = hashlib.sha256(f"{_digest_of_prompt(self.prompt)}\n{self.seed}".encode()).digest()
        return int.from_bytes(digest[:8]) >> 1

    @property
    def baseline(self) -> Cell:
        return self if self.lesion is None else self._baseline

    @cached_property
    def _baseline(self) -> Cell:
        return Cell(self.model, self.prompt, self.seed, self.settings, None)

    @cached_property
    def unsteered(self) -> Cell | None:
        """The same with neither steering nor a lesion, which a steered image is compared with; None where none is."""
        if self.settings.steering is None:
            return None
        return Cell(self.model, self.prompt, self.seed, replace(self.settings, steering=None), None)


def _context(identity: Mapping[str, Any]) -> str:
    return digest_of({name: part for name, part in identity.items() if name not in ("prompt", "seed", "lesion")})


def _asked(prompt: Prompt) -> Any:
    """The prompt's identity: its text, and what it has of an init image's digest and of boxes.

    Boxes count also where nothing steers: the scores of an image tell how well it fits them.
    """
    if not prompt.digest and not prompt.boxes:
        return prompt.text
    asked: dict[str, Any] = {"text": prompt.text}
    if prompt.digest:
        asked["init"] = prompt.digest
    if prompt.boxes:
        asked["boxes"] = [[box.words, list(box.box)] for box in prompt.boxes]
    return asked


def _digest_of_prompt(prompt: Prompt) -> str:
    return _digest_of_asked(_asked(prompt))


def _digest_of_asked(asked: Any) -> str:
    if isinstance(asked, str):
        return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()
    return digest_of(asked)


def _made_of(prompt: Prompt) -> tuple[Any, ...]:
    """What images of two prompts share that are the same."""
    return prompt.text, prompt.digest, prompt.boxes


def _subject(context: str, prompt: Prompt) -> str:
    return f"{context}\n{_digest_of_prompt(prompt)}"


def _key(subject: str, seed: int, lesion: Lesion | None) -> str:
    text = f"{subject}\n{seed}\n{lesion.digest if lesion else NO_LESION}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _keys(subjects: Callable[[], Iterable[tuple[Prompt, str, Iterable[int]]]], lesion: Lesion | None) -> Iterator[str]:
    for _, subject, seeds in subjects():
        for seed in seeds:
            yield _key(subject, seed, lesion)


@dataclass(frozen=True)
class Study:
    """What is asked of one model: every prompt and seed, un-ablated and under every lesion.

    layers: the layers under study, in forward order; those outside are never lesioned. selections: name -> options.
    shard: which of the subjects, prompts with a seed, are asked for. Each has its baseline and all lesions there.
    """

    model: ModelIdentity
    settings: Settings
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    layers: tuple[str, ...]
    selections: Mapping[str, Mapping[str, Any]]
    replacements: tuple[Replacement, ...]
    windows: tuple[tuple[float, float], ...] = Axes.windows
    branches: tuple[str, ...] = Axes.branches
    strengths: tuple[float, ...] = Axes.strengths
    kind: str = Lesion.kind
    shard: Shard = WHOLE

    @cached_property
    def _choices(self) -> dict[str, list[Choice]]:
        return {name: choices(name, options, self.layers) for name, options in self.selections.items()}

    def lesions(self) -> Iterator[Lesion]:
        """Every lesion of the grid, those of one kind (same selection, replacement, …) next to each other."""
        for name, picked in self._choices.items():
            for kind in itertools.product(self.replacements, self.windows, self.branches, self.strengths):
                for choice in picked:
                    yield Lesion(name, choice.layer, choice.lesioned, *kind, kind=self.kind, place=choice.place)

    def cells(self) -> Iterator[Cell]:
        """The order of the results: baselines first, then kind by kind, and within a kind by prompt and seed."""
        for lesions in self._kinds():
            for prompt in self.prompts:
                subject = _subject(self.context, prompt)
                for seed in self.seeds_of(prompt):
                    baseline = self._cell(prompt, seed, None, _key(subject, seed, None))
                    for lesion in lesions:
                        yield self._cell(prompt, seed, lesion, _key(subject, seed, lesion), baseline)

    def places(self) -> Iterator[int]:
        """The place of each of `cells()` among those of the whole study, from 0."""
        start = 0
        for lesions in self._kinds():
            for prompt in self.prompts:
                ours = set(self.seeds_of(prompt))
                for seed in self.seeds:
                    if seed in ours:
                        yield from range(start, start + len(lesions))
                    start += len(lesions)

    def _kinds(self) -> Iterator[list[Lesion | None]]:
        for _, group in itertools.groupby(itertools.chain([None], self.lesions()), kind_of):
            yield list(group)

    def seeds_of(self, prompt: Prompt) -> tuple[int, ...]:
        """The seeds that are asked for with a prompt: all but in a shard."""
        return self.seeds if self.shard.count == 1 else self._shared_out[_made_of(prompt)]

    @cached_property
    def _shared_out(self) -> dict[Any, tuple[int, ...]]:
        """The shard's seeds for each prompt. Prompts that make the same images count as one, so no two shards do."""
        prompts = dict.fromkeys(map(_made_of, self.prompts))
        total = len(prompts) * len(self.seeds)
        if total < self.shard.count:
            raise RequestError("shard.count", f"the study has {total} different prompts x seeds; allowed: 1 to {total}")
        return {
            prompt: tuple(
                seed for place, seed in enumerate(self.seeds) if self.shard.has(number * len(self.seeds) + place, total)
            )
            for number, prompt in enumerate(prompts)
        }

    @cached_property
    def whole(self) -> str:
        """Digest, 16 hex digits, of the study of which this is a shard: shards with the same one are put together."""
        prompts = [[prompt.id, _digest_of_prompt(prompt)] for prompt in self.prompts]
        lesions = [[lesion.selection, lesion.digest] for lesion in self.lesions()]
        return digest_of([self.context, self.model.name, prompts, self.seeds, self.layers, lesions])[:16]

    @cached_property
    def _subjects(self) -> int:
        return sum(len(self.seeds_of(prompt)) for prompt in self.prompts)

    def in_plan_order(self) -> Iterator[Cell]:
        """The order of making: `unsteered`, baselines, then kind by kind, within a kind lesion by lesion, each over all
        prompts and seeds, so that most batches hold one lesion. Cells with the same key come once.
        """
        if self.unsteered:
            yield from self.unsteered.in_plan_order()
        for prompt, seed, lesion, key in self._planned():
            yield self._cell(prompt, seed, lesion, key)

    def keys(self) -> Iterator[str]:
        """The keys of `in_plan_order()`, without the cost of its cells."""
        if self.unsteered:
            yield from self.unsteered.keys()
        for _, _, _, key in self._planned():
            yield key

    def counted(self) -> Iterator[tuple[Lesion | None, int, Iterator[str]]]:
        """Each lesion of `keys()`, with the number of its different images and their keys; without `unsteered`."""
        prompts = list(self._different())
        number = sum(len(seeds) for _, seeds in prompts)

        @cache
        def subjects() -> list[tuple[Prompt, str, tuple[int, ...]]]:
            return self._hashed(prompts)  # where any key is asked for

        for lesion in self._each_lesion():
            yield lesion, number, _keys(subjects, lesion)

    def _planned(self) -> Iterator[tuple[Prompt, int, Lesion | None, str]]:
        subjects = self._hashed(self._different())
        for lesion in self._each_lesion():
            for prompt, subject, seeds in subjects:
                for seed in seeds:
                    yield prompt, seed, lesion, _key(subject, seed, lesion)

    # Two cells of a study have one key if prompts' identities, seeds and lesions' digests are equal: to make these
    # unique takes far less memory than to remember every key.

    def _hashed(self, prompts: Iterable[tuple[Prompt, tuple[int, ...]]]) -> list[tuple[Prompt, str, tuple[int, ...]]]:
        """With their parts of keys."""
        return [(prompt, _subject(self.context, prompt), seeds) for prompt, seeds in prompts]

    def _different(self) -> Iterator[tuple[Prompt, tuple[int, ...]]]:
        """Each prompt that makes images of its own, with its seeds."""
        prompts: dict[Any, Prompt] = {}
        for prompt in self.prompts:
            prompts.setdefault(_made_of(prompt), prompt)
        for prompt in prompts.values():
            yield prompt, tuple(dict.fromkeys(self.seeds_of(prompt)))

    def _each_lesion(self) -> Iterator[Lesion | None]:
        """No lesion, then each whose images no earlier one makes."""
        done: set[str] = set()
        for lesion in itertools.chain([None], self.lesions()):
            digest = lesion.digest if lesion else NO_LESION
            if digest not in done:
                done.add(digest)
                yield lesion

    @cached_property
    def context(self) -> str:
        """Digest, 64 hex digits, of what all its cells share: model and settings."""
        return _context(Cell(self.model, Prompt(""), 0, self.settings, None).identity())

    @cached_property
    def unsteered(self) -> Study | None:
        """What steered images are compared with (`Cell.unsteered`), made before them; None where nothing steers.

        They have no rows in the results.
        """
        return None if self.settings.steering is None else self._without_steering()

    def _without_steering(self) -> Study:
        return replace(self, settings=replace(self.settings, steering=None), selections={}, replacements=())

    def rows(self) -> Iterator[tuple[Lesion | None, int]]:
        """Each lesion, the baseline (None) first, with the number of its cells."""
        for lesion in itertools.chain([None], self.lesions()):
            yield lesion, self._subjects

    def subject(self, prompt: Prompt) -> str:
        """The part of a key that the cells of one prompt share; for `key` and `cell`."""
        return _subject(self.context, prompt)

    def key(self, subject: str, seed: int, lesion: Lesion | None) -> str:
        """A cell's key."""
        return _key(subject, seed, lesion)

    def cell(self, prompt: Prompt, seed: int, lesion: Lesion | None, subject: str | None = None) -> Cell:
        """A cell of the study, with its key."""
        return self._cell(prompt, seed, lesion, _key(subject or self.subject(prompt), seed, lesion))

    def _cell(self, prompt: Prompt, seed: int, lesion: Lesion | None, key: str, baseline: Cell | None = None) -> Cell:
        """With its cached properties filled, as far as they are known: many cells have one baseline."""
        cell = Cell(self.model, prompt, seed, self.settings, lesion)
        cell.__dict__["key"] = key
        if lesion and baseline:
            cell.__dict__["_baseline"] = baseline
        return cell

    def may_have(self, record: Mapping[str, Any]) -> bool:
        """Whether an image may be one of the study, or of `unsteered`: its record of `Cell.identity` says no other."""
        if not record.keys() >= IDENTITY:  # of another version
            return True
        contexts, prompts, lesions = self._parts
        return (
            _context({name: record[name] for name in IDENTITY}) in contexts
            and record["seed"] in self.seeds
            and digest_of(record["lesion"]) in lesions
            and _digest_of_asked(record["prompt"]) in prompts
        )

    @cached_property
    def _parts(self) -> tuple[set[str], set[str], set[str]]:
        """What keys are made of, beside seeds: contexts, prompts' digests, lesions' digests."""
        contexts = {self.context, *([self.unsteered.context] if self.unsteered else [])}
        lesions = {NO_LESION, *(lesion.digest for lesion in self.lesions())}
        return contexts, set(map(_digest_of_prompt, self.prompts)), lesions

    @property
    def protocol(self) -> Mapping[str, str]:
        """For each replacement 8 hex digits: the layers under study and its calibration."""
        return {replacement.name: _protocol(replacement, self.layers) for replacement in self.replacements}

    def protocol_of(self, lesion: Lesion) -> str:
        """Of a lesion 8 hex digits: the layers under study of its families, and its calibration. Only equals compare.

        So studies of different components, or sets of tokens, stand beside one another.
        """
        families = families_of(lesion.layers)
        known = self._protocols
        key = lesion.replacement.name, families
        if key not in known:
            layers = tuple(layer for layer in self.layers if family_of(layer) in families)
            known[key] = _protocol(lesion.replacement, layers)
        return known[key]

    @cached_property
    def _protocols(self) -> dict[Any, str]:
        return {}

    @property
    def begins(self) -> tuple[tuple[float, float], ...]:
        """Windows before which some lesions of the study leave the denoising as it is in the baseline."""
        return self.windows + ((AFTER,) if VAE in components_of(self.layers) else ())

    def __len__(self) -> int:
        kinds = len(self.replacements) * len(self.windows) * len(self.branches) * len(self.strengths)
        lesions = kinds * sum(len(picked) for picked in self._choices.values())
        return self._subjects * (1 + lesions)


def _protocol(replacement: Replacement, layers: Sequence[str]) -> str:
    return digest_of([dict(replacement.identity), layers])[:8]


def kind_of(lesion: Lesion | None) -> tuple[Any, ...]:
    """What cells that share a batch have in common: everything of the lesion but its layers."""
    if lesion is None:
        return ()
    return (lesion.selection, lesion.replacement, lesion.window, lesion.branch, lesion.strength)
