"""Which baselines are compared with each other for the noise floor: pure, imports nothing of torch.

The floor says how similar images are that share nothing but the prompt (other seeds) or nothing but the seed (other
prompts); `lesion.analysis.floor` reads it. All pairs of a large study would be too many (200 prompts with 4 seeds have
320,000), so each prompt takes part in a few, chosen so that a mean over them is that over all up to sampling error:

- other seeds: up to SEED_PAIRS pairs of its seeds; all of them for 5 seeds or fewer. Of more, seeds that stand next to
  each other in the list first, in a circle, so that each seed is in as many pairs as any other.
- other prompts: the prompts stand in a circle, ordered by a hash of their texts, and each meets the next
  PROMPT_PAIRS / 2 (so in all PROMPT_PAIRS; every other prompt in a study of 11 or fewer), one pair each, with the seeds
  in turn. The hash makes the partners as good as random: neighbours in a prompt file often ask for similar things.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from lesion.study.grid import Cell, Study
from lesion.study.prompts import Prompt

SEED_PAIRS = 10  # of one prompt; with PROMPT_PAIRS at most 15 pairs for each prompt of the study
PROMPT_PAIRS = 10  # that one prompt is in
COLUMNS = ("prompt_id_a", "seed_a", "prompt_id_b", "seed_b", "similarity")


def pairs(study: Study) -> Iterator[tuple[Cell, Cell]]:
    """Pairs of baselines, each pair once; none of a study of one prompt and seed."""
    for prompt in study.prompts:
        for one, other in circle(len(study.seeds), SEED_PAIRS):
            yield _baseline(study, prompt, one), _baseline(study, prompt, other)
    ordered = scattered(study.prompts)
    for number, (a, b) in enumerate(circle(len(ordered), len(ordered) * PROMPT_PAIRS // 2)):
        seed = number % len(study.seeds)
        yield _baseline(study, ordered[a], seed), _baseline(study, ordered[b], seed)


def scattered(prompts: Sequence[Prompt]) -> list[Prompt]:
    """In an order as good as random that depends on the prompts alone, not on how they are listed."""
    return sorted(prompts, key=_scatter)


def _scatter(prompt: Prompt) -> bytes:
    return hashlib.sha256(f"{prompt.text}\n{prompt.digest}".encode("utf-8", "surrogatepass")).digest()


def circle(count: int, most: int) -> Iterator[tuple[int, int]]:
    """Up to `most` different pairs of 0 … count - 1: first those one step apart in a circle, then two steps apart…"""
    done = 0
    for step in range(1, count // 2 + 1):
        # Half way round, a step leads to the same pairs from either side.
        for start in range(count // 2 if 2 * step == count else count):
            if done == most:
                return
            done += 1
            yield start, (start + step) % count


def _baseline(study: Study, prompt: Prompt, seed: int) -> Cell:
    return Cell(study.model, prompt, study.seeds[seed], study.settings, None)
