"""Make a study in rounds, with further images only for layers whose interval is still too wide.

Pure: imports nothing of torch. The subjects of a study are its prompts with its seeds. They stand in one order: every
prompt with the first seed, then every prompt with the second…; prompts as good as random
(`lesion.study.pairs.scattered`), so that the first ones are a fair sample of all. A round adds the next few subjects
for every lesion that is still open; so each lesion has a prefix of the order, and all lesions share that of the
shortest. Nothing depends on what the store held before, on time or on chance: the same request gives the same study.

A lesion (a layer under one selection, replacement, window, branch and strength) is closed when half the width of the
95 % interval of its importance or sufficiency (`analysis.bootstrap`) is at most `ci_halfwidth`. Looking after every
round and stopping at the first good look is optional stopping: it prefers samples that spread little by chance. So a
stop asks that the interval be narrow enough with the largest spread that is likely, too (`_reach`), and a minimum of
prompts (`start`) comes before the first look. What then holds by simulation is in docs/budget.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from lesion.analysis.bootstrap import BOUNDED, Interval
from lesion.analysis.cells import MEASURES, no_effect, over_prompts, shared_noise
from lesion.analysis.importance import as_similarity
from lesion.errors import RequestError
from lesion.study.budget import FEWEST, Budget
from lesion.study.grid import NO_LESION, Cell, Study, kind_of
from lesion.study.lesions import Lesion
from lesion.study.pairs import scattered
from lesion.study.prompts import Prompt

ROUNDED = ("leave_one_out", "only_one")  # selections of one layer each; any other is made in full
FEWEST_SEEDS = 2  # that all prompts share, before a look counts
SURE = 0.9  # of the spread of prompts, which a look rests on
OPEN, TIGHT, NO_CHANGE, SPENT, EXHAUSTED = "", "tight", "no effect", "budget spent", "grid exhausted"


@dataclass(frozen=True)
class Part(Study):
    """Some of a study's cells: of each lesion those of a run of subjects.

    spans: first and one past the last subject, of the baseline and of each of `lesions()`. Order and keys of the cells
    are those of the whole study.
    """

    spans: tuple[tuple[int, int], ...] = field(default=(), kw_only=True)

    @classmethod
    def of(cls, study: Study, spans: Sequence[tuple[int, int]]) -> Part:
        values = {one.name: getattr(study, one.name) for one in fields(Study)}
        return cls(**values, spans=tuple(spans))

    @cached_property
    def _place(self) -> dict[Prompt, int]:
        return {prompt: place for place, prompt in enumerate(scattered(self.prompts))}

    def cells(self) -> Iterator[Cell]:
        """As those of the study, without the ones that are not in it."""
        kinds: defaultdict[tuple[Any, ...], list[tuple[Lesion | None, tuple[int, int]]]] = defaultdict(list)
        for lesion, span in zip((None, *self.lesions()), self.spans, strict=True):
            kinds[kind_of(lesion)].append((lesion, span))
        for lesions in kinds.values():
            for prompt in self.prompts:
                subject = self.subject(prompt)
                for number, seed in enumerate(self.seeds):
                    place = number * len(self.prompts) + self._place[prompt]
                    for lesion, (start, end) in lesions:
                        if start <= place < end:
                            yield self.cell(prompt, seed, lesion, subject)

    def _planned(self) -> Iterator[tuple[Prompt, int, Lesion | None, str]]:
        done: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for lesion, span in zip((None, *self.lesions()), self.spans, strict=True):
            earlier = done[lesion.digest if lesion else NO_LESION]  # spans of lesions that make the same images
            for prompt in self.prompts:
                subject = self.subject(prompt)
                for number, seed in enumerate(self.seeds):
                    place = number * len(self.prompts) + self._place[prompt]
                    if span[0] <= place < span[1] and not any(start <= place < end for start, end in earlier):
                        yield prompt, seed, lesion, self.key(subject, seed, lesion)
            earlier.append(span)

    def _without_steering(self) -> Part:
        return Part.of(super()._without_steering(), self.spans[:1])

    def rows(self) -> Iterator[tuple[Lesion | None, int]]:
        for lesion, (start, end) in zip((None, *self.lesions()), self.spans, strict=True):
            yield lesion, end - start

    def __len__(self) -> int:
        return sum(end - start for start, end in self.spans)


@dataclass
class _Course:
    """How far a lesion has come. done: subjects it has. reason: why it was closed, OPEN before that."""

    lesion: Lesion
    done: int
    rounded: bool
    reason: str = OPEN
    rounds: int = 0
    found: Interval | None = None
    names: list[str] = field(default_factory=list)  # prompt ids of the subjects looked at so far
    seeds: list[int] = field(default_factory=list)  # and their seeds
    effects: list[float] = field(default_factory=list)  # and the effects there

    @property
    def going(self) -> bool:
        return self.rounded and not self.reason


class Rounds:
    """The rounds of one study: make `part`, then `look` at it, as long as that says that there is another."""

    def __init__(self, study: Study, budget: Budget):
        """Raises RequestError where a budget makes no sense; it names the key."""
        self.study, self.budget = study, budget
        self.subjects = len(study.prompts) * len(study.seeds)
        _check(study, budget)
        first = min(budget.start, self.subjects)
        self.courses = [
            _Course(lesion, first if rounded else self.subjects, rounded)
            for lesion in study.lesions()
            for rounded in [lesion.selection in ROUNDED]
        ]
        self.baselines = max([first, *(one.done for one in self.courses)])
        self.part = self.whole
        self.number = 1
        if budget.max_images is not None and len(self.part) > budget.max_images:
            raise RequestError(
                "budget.max_images", f"the first round alone takes {len(self.part)} images; allowed: that many or more"
            )

    @property
    def whole(self) -> Part:
        """Everything that the rounds up to now hold."""
        return Part.of(self.study, [(0, self.baselines), *((0, one.done) for one in self.courses)])

    def look(self, score: Callable[[Cell], float], metric: str = "clip_similarity") -> bool:
        """Close what is good enough, and lay out the next round: True if there is one, which is in `part` then.

        score: the metric's value of an image in this or an earlier round, NaN if it has none.
        """
        for course in self.courses:
            if course.going:
                course.rounds = self.number
                effects = self._effects(course, score, metric)
                course.found = over_prompts(effects)
                course.reason = self._verdict(course.found, effects)
                if not course.reason and course.done == self.subjects:
                    course.reason = EXHAUSTED
        still = [one for one in self.courses if one.going]
        if not still:
            return False
        start = still[0].done  # the same for all that are open
        end = min(start + self.budget.round, self.subjects)
        if self.budget.max_images is not None:
            each = len(still) + (self.baselines < self.subjects)
            end = min(end, start + (self.budget.max_images - len(self.whole)) // each)
        if end <= start:
            for course in still:
                course.reason = SPENT
            return False
        spans = [(self.baselines, max(self.baselines, end))]
        for course in self.courses:
            spans.append((start, end) if course.going else (0, 0))
            course.done = end if course.going else course.done
        self.baselines = max(self.baselines, end)
        self.part = Part.of(self.study, spans)
        self.number += 1
        return True

    def table(self) -> pd.DataFrame:
        """One row a lesion that the rounds are for: how far it went and why it ended.

        Columns: model, selection, measure, replacement, layer, kind, window_start, window_end, branch, strength; images
        (made for it, whatever came of them), grid (what the whole grid has), rounds, reason (tight, no effect, budget
        spent, grid exhausted); mean, low, high, halfwidth, method, n_prompts, n_images (valid ones) of its effect, 1 -
        similarity, at its last look; ci_halfwidth (what was asked).
        """
        records = []
        for course in self.courses:
            if not course.rounded:
                continue
            lesion, found = course.lesion, course.found
            record: dict[str, Any] = {"model": self.study.model.name, "selection": lesion.selection}
            record |= {"measure": MEASURES[lesion.selection], "replacement": lesion.replacement.name}
            record |= {"layer": lesion.layer, "kind": lesion.kind}
            record |= {"window_start": lesion.window[0], "window_end": lesion.window[1]}
            record |= {"branch": lesion.branch, "strength": lesion.strength}
            record |= {"images": course.done, "grid": self.subjects, "rounds": course.rounds, "reason": course.reason}
            if found:
                record |= {"mean": found.mean, "low": found.low, "high": found.high}
                record |= {"halfwidth": (found.high - found.low) / 2, "method": found.method}
                record |= {"n_prompts": found.n_prompts, "n_images": found.n_images}
            records.append({**record, "ci_halfwidth": self.budget.ci_halfwidth})
        return pd.DataFrame(records)

    def marked(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The results of `whole`, row by row as its cells, with two columns more.

        images_taken: how many the row's lesion took. stopped: `table`'s reason, "" for what is made in full.
        """
        of: dict[Lesion | None, tuple[int, str]] = {None: (self.baselines, "")}
        of |= {course.lesion: (course.done, course.reason) for course in self.courses}
        found = [of[cell.lesion] for cell in self.whole.cells()]
        return frame.assign(images_taken=[taken for taken, _ in found], stopped=[reason for _, reason in found])

    def _verdict(self, found: Interval, effects: pd.DataFrame) -> str:
        if found.n_prompts < FEWEST:  # so many images are not valid
            return OPEN
        if shared_noise(effects) and effects["seed"].nunique() < min(FEWEST_SEEDS, len(self.study.seeds)):
            return OPEN  # what another seed would give is not known yet
        if not _reach(found) <= self.budget.ci_halfwidth:
            return OPEN
        return NO_CHANGE if no_effect(effects["effect"]) else TIGHT

    def _effects(self, course: _Course, score: Callable[[Cell], float], metric: str) -> pd.DataFrame:
        prompts = scattered(self.study.prompts)
        for place in range(len(course.names), course.done):
            prompt, seed = prompts[place % len(prompts)], self.study.seeds[place // len(prompts)]
            value = score(self.study.cell(prompt, seed, course.lesion))
            effect = 1.0 - as_similarity(value, metric)
            course.names.append(prompt.id)
            course.seeds.append(seed)
            course.effects.append(effect if np.isfinite(effect) else np.nan)
        columns = {"prompt_id": course.names, "seed": course.seeds, "effect": course.effects}
        return pd.DataFrame(columns).assign(noise=self.study.settings.noise)


def _reach(found: Interval) -> float:
    """Half the width of the interval, had the prompts the largest spread that is likely (SURE) by those looked at.

    A sample of little spread by chance would end its own lesion early. Limits that hold whatever the spread stay.
    """
    from scipy.special import chdtri

    half = (found.high - found.low) / 2
    if found.used.startswith(BOUNDED):
        return half
    freedom = found.n_prompts - 1
    return half * float(np.sqrt(freedom / chdtri(freedom, SURE)))


def _check(study: Study, budget: Budget) -> None:
    key = "budget.ci_halfwidth"
    if not any(name in ROUNDED for name in study.selections):
        raise RequestError(
            key, f"is for selection={' or '.join(ROUNDED)}; {', '.join(study.selections)} has no interval a layer"
        )
    if "pairs" in study.selections and "leave_one_out" in study.selections:
        raise RequestError(
            key, "does not go with pairs beside leave_one_out: a pair needs both its layers' images of every prompt "
            "and seed; allowed: one of the two, or null"
        )  # fmt: skip
    if len(study.prompts) < FEWEST:
        raise RequestError(
            key, f"needs at least {FEWEST} prompts, whose spread the interval is of; this study has "
            f"{len(study.prompts)}; allowed here: null"
        )  # fmt: skip
