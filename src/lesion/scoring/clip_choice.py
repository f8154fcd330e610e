"""Which of several words CLIP reads in an image: the log odds of the prompt's own. Range [-250, 250].

    clip_choice(x, p) = s <e(x), t(p)> - log sum_c exp(s <e(x), t(p_c)>)

p has one of the words of `choices`, and p_c has the others in its place, one each; e and t are the image and text
embeddings of an open_clip model, of length 1, and s is its learned logit scale, in float32. It is log(q / (1 - q)) with
q the probability that zero-shot classification gives to the prompt among the p_c and itself (Radford et al. 2021,
arXiv:2103.00020): above 0 it is more likely than all others together. No value for prompts with none of the words, or
with more than one occurrence of any.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lesion.scoring import OptionError, Shot
from lesion.scoring._clip import ClipMetric

if TYPE_CHECKING:
    from torch import Tensor


class ClipChoice(ClipMetric):
    direction = "prompt"
    range = (-250.0, 250.0)
    signed = True

    def __init__(self, model: str, pretrained: str | None = None, choices: list | None = None):  # type: ignore[type-arg]
        """choices: words, or phrases, two at least; others as of `ClipMetric`."""
        super().__init__(model, pretrained)
        self.choices = choices or []

    def identity(self) -> str:
        return f"{super().identity()} {json.dumps(self.choices)}"

    def check(self) -> None:
        super().check()
        words = [one.strip().lower() for one in self.choices if isinstance(one, str) and one.strip()]
        if len(words) < len(self.choices) or len({*words}) < max(len(words), 2):
            raise OptionError("choices", f"got {self.choices!r}; allowed: two different words or more, as [red, blue]")

    def asks(self, prompt: str) -> bool:
        return len(self.texts(prompt)) > 1

    def texts(self, prompt: str) -> list[str]:
        """The prompt, and with each other word in the place of its own; nothing where that is not one word."""
        found = {choice: self._pattern(choice).findall(prompt) for choice in self.choices}
        if sum(map(len, found.values())) != 1:
            return []
        own = next(choice for choice, there in found.items() if there)
        before, after = self._pattern(own).split(prompt)
        return [prompt, *(f"{before}{choice}{after}" for choice in self.choices if choice != own)]

    @staticmethod
    def _pattern(choice: str) -> re.Pattern[str]:
        return re.compile(rf"(?<!\w){re.escape(choice.strip())}(?!\w)", re.IGNORECASE)

    def __call__(self, shots: Sequence[Shot]) -> NDArray[np.float64]:
        images = self.embedder.images([shot.image for shot in shots], self.batch_size)
        values = np.full(len(shots), np.nan)
        for row, shot in enumerate(shots):
            if texts := self.texts(shot.prompt):
                logits = self.embedder.scale * (self.embedder.texts(texts, self.batch_size) @ images[row])
                values[row] = logits[0] - np.logaddexp.reduce(logits[1:])
        return values

    def of_tensors(self, images: Tensor, prompts: Sequence[str], beside: Sequence[NDArray[np.uint8]]) -> Tensor:
        import torch

        vectors = self.embedder.tensors(images)
        values = []
        for vector, prompt in zip(vectors, prompts, strict=True):
            if texts := self.texts(prompt):
                features = torch.from_numpy(self.embedder.texts(texts, self.batch_size)).to(vector)
                logits = self.embedder.scale * (features @ vector)
                values.append(logits[0] - logits[1:].logsumexp(0))
            else:
                values.append(vector.sum() * 0)
        return torch.stack(values)
