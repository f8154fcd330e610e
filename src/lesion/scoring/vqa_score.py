"""How probable a model that answers questions on images holds the right answer, a mean over questions. Range [0, 1].

    vqa_score(x, p) = mean over questions q of p of: sum over spellings s of q's answer of P(s | x, q)
    P(s | x, q) = product over tokens t of s of P(s_t | x, q, s_<t)

Without `questions` each prompt has one, whether the image shows it, and its answer is Yes: VQAScore (Lin et al. 2024,
arXiv:2404.01291). With a file of questions this is Soft-TIFA (Kamath et al. 2025, GenEval 2, arXiv:2512.16853), on
questions in the form of TIFA (Hu et al. 2023, arXiv:2303.11897) or of GenEval 2; `mean` is arithmetic (of single
facts) or geometric (of the whole prompt).

An answer's spellings, as in GenEval 2, are with a small and a capital first letter, behind a space or not, and of
numbers up to ten the numeral and the word. Models: BLIP for questions (`BlipForQuestionAnswering` of transformers),
which gets the bare question, or a vision-language model with a chat template, which is also told the choices, or to
answer in one word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lesion.errors import RequestError
from lesion.scoring import Metric, OptionError, ScorerError, Shot, _hub_models, _vqa
from lesion.scoring._vqa import Question
from lesion.study import prompt_files

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
TEXTS = ("caption", "prompt", "text")  # columns that hold a prompt
PAIRS = "vqa_list"  # of GenEval 2: questions with their answers


class VqaScore(Metric):
    direction = "prompt"
    range = (0.0, 1.0)
    models = "a model that answers questions on images"

    def __init__(
        self,
        model: str = "Salesforce/blip-vqa-base",
        questions: str = "",
        question: str = QUESTION,
        mean: Literal["arithmetic", "geometric"] = "arithmetic",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ):
        """model: a name on the hub (ORG/REPO), or a folder.

        questions: a file of questions; prompts that it does not have get no value. question: without a file, of a
        prompt, which takes the place of {prompt}. mean: over the questions of a prompt. dtype: of the weights.
        """
        self.model, self.questions, self.question = model, questions, question
        self.mean, self.dtype = mean, dtype

    @cached_property
    def asked(self) -> Mapping[str, tuple[Question, ...]]:
        """The questions of each prompt of the file, by its text. Raises RequestError."""
        found: dict[str, tuple[Question, ...]] = {}
        content = prompt_files.content(self.questions, "questions")
        for number, row in enumerate(prompt_files.parsed(content, "questions"), 1):
            prompt, questions = _questions(row, f"{content.name!r} entry {number}")
            found[prompt] = found.get(prompt, ()) + questions
        return found

    def identity(self) -> str:
        folder = self._folder()
        name = self.model.rstrip("/").rpartition("/")[2]
        asked = repr(sorted(self.asked.items()) if self.questions else self.question)
        parts = name, _hub_models.digest_of_folder(folder), hashlib.sha256(asked.encode()).hexdigest()[:16]
        return f"{self.name}/1 ({' '.join(parts)} {self.mean} {self.dtype})"

    def asks(self, prompt: str) -> bool:
        return not self.questions or prompt.strip() in self.asked

    def check(self) -> None:
        try:
            self._folder()
        except (ValueError, OSError) as error:
            raise OptionError("model", f"{self.model!r}: {error}") from None
        if self.questions:
            try:
                _ = self.asked
            except RequestError as error:
                raise OptionError("questions", str(error).removeprefix("questions: ")) from None
        elif "{prompt}" not in self.question:
            raise OptionError("question", f"got {self.question!r}; it must have {{prompt}} where the prompt belongs")

    def _folder(self) -> Path:
        folder = _hub_models.folder_of(self.model, f"scorer.metrics.{self.name}.model")
        _vqa.check(folder)
        return folder

    def load(self, device: str, batch_size: int) -> None:
        super().load(device, batch_size)
        try:
            self.answerer = _vqa.answerer(self._folder(), device, self.dtype)
        except Exception as error:  # hub, file and device errors of many types
            raise ScorerError(f"cannot load {self.model} for {self.name}: {error}") from error

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        values = np.full(len(shots), np.nan)
        for number, shot in enumerate(shots):
            if questions := self._of(shot.prompt):
                each = np.array([self.answerer(shot.image, question) for question in questions])
                values[number] = each.mean() if self.mean == "arithmetic" else each.prod() ** (1 / len(each))
        return values

    def _of(self, prompt: str) -> tuple[Question, ...]:
        if self.questions:
            return self.asked.get(prompt.strip(), ())
        return (Question(self.question.replace("{prompt}", prompt), "Yes"),)


def _questions(row: prompt_files.Row, where: str) -> tuple[str, tuple[Question, ...]]:
    """The prompt of an entry of a file, and its questions. Raises RequestError."""
    prompt = next((row[name] for name in TEXTS if row.get(name)), None) if isinstance(row, dict) else None
    if not isinstance(row, dict) or not isinstance(prompt, str):
        raise RequestError("questions", f"{where} needs a text under one of {', '.join(TEXTS)}")
    entries: list[tuple[Any, Any, Any]]
    if PAIRS in row:
        pairs = row[PAIRS]
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise RequestError("questions", f"{where}: {PAIRS} must be a list of [question, answer]")
        entries = [(question, answer, []) for question, answer in pairs]
    else:
        entries = [(row.get("question"), row.get("answer"), row.get("choices") or [])]
    for question, answer, choices in entries:
        if not all(isinstance(text, str) and text.strip() for text in (question, answer)):
            raise RequestError("questions", f"{where} needs a question and an answer, each a text")
        if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
            raise RequestError("questions", f"{where}: choices must be a list of texts")
    return prompt.strip(), tuple(
        Question(str(question), str(answer).strip(), tuple(choices)) for question, answer, choices in entries
    )
