"""What the sites of a model read of a prompt, found out by asking its own pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lesion.generation.generate import call, generators
from lesion.generation.snapshots import Enough
from lesion.study.prompts import Prompt
from lesion.tasks import text_alone

if TYPE_CHECKING:
    from lesion.models import Model
    from lesion.study.settings import Settings

Read = tuple[Tensor, Tensor | None]  # text (1, tokens, channels), attention mask or None


def read_by_sites(model: Model, prompt: str, settings: Settings) -> Mapping[str, Read]:
    """For each site path the conditional text features and mask that it reads when the model is asked for `prompt`.

    The pipeline is run up to the end of its first denoiser call, so this holds for any way it treats its text.
    """
    found: dict[str, Read] = {}

    def noting(site: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            text, mask = kwargs.get("encoder_hidden_states"), kwargs.get("attention_mask")
            if text is None:
                raise RuntimeError(f"{site} is given no text by name, so it cannot be given another")
            found[site] = text[-1:].clone(), None if mask is None else mask[-1:].clone()  # the conditional row is last

        return note

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise Enough

    with torch.inference_mode(), suppress(Enough), ExitStack() as stack:
        for site in model.text_sites:
            module = model.denoiser.get_submodule(site)
            stack.callback(module.register_forward_pre_hook(noting(site), with_kwargs=True).remove)
        stack.callback(model.denoiser.register_forward_hook(stop).remove)
        call(model, [Prompt(prompt)], generators([0]), text_alone(settings))
    return found


class OtherText:
    """A `surgery.TextFiller`: every row reads the same other text. reads: by site path."""

    def __init__(self, reads: Mapping[str, Read]):
        self.reads = reads

    def retell(self, site: str, branches: Tensor, text: Tensor, mask: Tensor | None) -> Read:
        other, other_mask = self.reads[site]
        if other.shape[1:] != text.shape[1:]:
            raise RuntimeError(
                f"texts of different lengths cannot be exchanged: {tuple(other.shape[1:])} and {tuple(text.shape[1:])}"
            )
        return other.expand_as(text), None if other_mask is None or mask is None else other_mask.expand_as(mask)
