"""Models that answer questions on images, asked how probable an answer is."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lesion.scoring import _hub_models
from lesion.scoring._embeddings import KEPT, Kept, digest

if TYPE_CHECKING:
    import torch

BLIP = "BlipForQuestionAnswering"
CHAT = "ForConditionalGeneration"  # classes of transformers that end so are asked in a chat
TEMPLATES = ("chat_template.jinja", "chat_template.json")  # or in one of these:
CONFIGS = ("processor_config.json", "tokenizer_config.json")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Question:
    """What is asked of an image, the right answer, and the answers to choose from, if there are such."""

    text: str
    answer: str
    choices: tuple[str, ...] = ()


def spellings(answer: str) -> list[str]:
    """Return the ways to write an answer: with a small and a capital first letter, behind a space or not, and of a
    number up to ten the numeral and the word.
    """
    forms = [answer]
    if answer.lower() in NUMBERS:
        forms.append(str(NUMBERS.index(answer.lower())))
    elif answer in map(str, range(len(NUMBERS))):
        forms.append(NUMBERS[int(answer)])
    cases = [form for one in forms for form in (one, one[0].lower() + one[1:], one[0].upper() + one[1:])]
    return list(dict.fromkeys(space + form for form in cases for space in ("", " ")))


def check(folder: Path) -> None:
    """Raise ValueError for a model that cannot be asked; loads nothing."""
    kind = _hub_models.architecture(folder)
    if kind == BLIP:
        return
    if not kind.endswith(CHAT):
        raise ValueError(f"{_hub_models.CONFIG} is of {kind or 'no model'}; allowed: {BLIP}, or a chat model …{CHAT}")
    named = any((folder / file).is_file() for file in TEMPLATES)
    if not named and not any(
        '"chat_template"' in (folder / file).read_text(encoding="utf-8")
        for file in CONFIGS
        if (folder / file).is_file()
    ):
        raise ValueError(f"the folder has no chat template ({TEMPLATES[0]})")


class Answerer(ABC):
    """Probabilities of answers; each question of an image is asked once."""

    def __init__(self, model: Any, processor: Any, device: torch.device):
        self.model, self.processor, self.device = model, processor, device
        self.tokenizer = processor.tokenizer
        self._kept: Kept[tuple[str, Question], float] = Kept(KEPT)

    def __call__(self, image: NDArray[np.uint8], question: Question) -> float:
        """The probability of a question's answer, any spelling, in [0, 1]. image: (height, width, 3), 0-255."""
        return self._kept.get((digest(image), question), lambda: self._probability(image, question))

    def _probability(self, image: NDArray[np.uint8], question: Question) -> float:
        import torch

        from lesion.scoring._exact import exact

        tokens = [self.tokenizer(form, add_special_tokens=False).input_ids for form in spellings(question.answer)]
        # What begins with another spelling is counted there already.
        apart = [one for one in tokens if not any(one[: len(other)] == other and one != other for other in tokens)]
        total = 0.0
        with exact(self.device):
            given = self._given(image, question)
            seen: dict[tuple[int, ...], Any] = {}
            for sequence in {tuple(one) for one in apart}:
                before = sequence[:-1]
                if before not in seen:
                    seen[before] = torch.log_softmax(self._logits(given, before).double().cpu(), dim=-1)
                places = seen[before]  # (len(sequence), vocabulary)
                total += float(places[range(len(sequence)), list(sequence)].sum().exp())
        return min(total, 1.0)

    @abstractmethod
    def _given(self, image: NDArray[np.uint8], question: Question) -> Any:
        """What the model is asked, ready for `_logits`."""

    @abstractmethod
    def _logits(self, given: Any, before: Sequence[int]) -> torch.Tensor:
        """Of each next token after none, one, ... all of an answer's tokens `before`: (len(before) + 1, vocabulary)."""


class Blip(Answerer):
    """BLIP: a text encoder reads the question with the image, a decoder writes the answer."""

    def _given(self, image: NDArray[np.uint8], question: Question) -> Any:
        import torch

        given = self.processor(images=Image.fromarray(image), text=question.text, truncation=True, return_tensors="pt")
        given = given.to(self.device)
        seen = self.model.vision_model(pixel_values=given["pixel_values"].to(self.model.dtype)).last_hidden_state
        return self.model.text_encoder(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
        ).last_hidden_state

    def _logits(self, given: Any, before: Sequence[int]) -> torch.Tensor:
        import torch

        ids = torch.tensor([[self.model.decoder_start_token_id, *before]], device=self.device)
        logits: torch.Tensor = self.model.text_decoder(input_ids=ids, encoder_hidden_states=given).logits[0]
        return logits


class Chat(Answerer):
    """A vision-language model: the image and the question are the user's turn, the answer begins the model's."""

    def _given(self, image: NDArray[np.uint8], question: Question) -> Any:
        asked = question.text
        if question.choices:
            asked += f" Answer with one of: {', '.join(question.choices)}."
        elif "answer" not in asked.lower():
            asked += " Answer in one word."
        content = [{"type": "image", "image": Image.fromarray(image)}, {"type": "text", "text": asked}]
        given = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.device)
        return {name: part.to(self.model.dtype) if part.is_floating_point() else part for name, part in given.items()}

    def _logits(self, given: Any, before: Sequence[int]) -> torch.Tensor:
        import torch

        shape = given["input_ids"].shape
        more = {"input_ids": list(before), "attention_mask": [1] * len(before)}
        longer = {
            name: torch.cat([part, part.new_tensor([more.get(name, [0] * len(before))])], dim=1)
            if part.shape == shape
            else part
            for name, part in given.items()
        }
        wanted = len(before) + 1
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            longer["logits_to_keep"] = wanted
        logits: torch.Tensor = self.model(**longer, use_cache=False).logits[0, -wanted:]
        return logits


@lru_cache(maxsize=1)
def answerer(folder: Path, device: str, dtype: str) -> Answerer:
    """Load the model of a folder, for all studies of this process."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, BlipForQuestionAnswering

    blip = _hub_models.architecture(folder) == BLIP
    model = _hub_models.loaded(
        BlipForQuestionAnswering if blip else AutoModelForImageTextToText, folder, torch.device(device), dtype
    )
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    return (Blip if blip else Chat)(model, processor, torch.device(device))
