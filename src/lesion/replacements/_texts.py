"""What the sites of a model read of a prompt, found out by asking its own pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lesion.denoising.run import Client, DenoiserCall, Denoising, Enough
from lesion.generation.generate import call, generators
from lesion.study.prompts import Prompt
from lesion.tasks import text_alone

if TYPE_CHECKING:
    from lesion.models import Model
    from lesion.study.settings import Settings

Read = tuple[Tensor, Tensor | None]  # text (1, tokens, channels), attention mask or None


def read_by_sites(model: Model, prompt: str, settings: Settings) -> Mapping[str, Read]:
    """Return for each site path the conditional text features and mask that it reads when asked for `prompt`.

    The pipeline is run up to the end of its first denoiser call, so this holds for any way it treats its text.
    """
    reading = Reading(model.text_sites)
    with suppress(Enough):
        call(model, [Prompt(prompt)], generators([0]), text_alone(settings), [reading])
    return reading.found


class Reading(Client):
    """Notes what sites read of the prompt at the first denoiser call, and ends the run after it.

    sites: their paths.
    """

    def __init__(self, sites: Sequence[str]):
        self.sites = sites
        self.found: dict[str, Read] = {}

    @contextmanager
    def attached(self, run: Denoising) -> Iterator[None]:
        with ExitStack() as stack:
            for site in self.sites:
                module = run.denoiser.get_submodule(site)
                stack.callback(module.register_forward_pre_hook(self._noting(site), with_kwargs=True).remove)
            yield

    def _noting(self, site: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            text, mask = kwargs.get("encoder_hidden_states"), kwargs.get("attention_mask")
            if text is None:
                raise RuntimeError(f"{site} is given no text by name, so it cannot be given another")
            # The conditional row is the last.
            self.found[site] = text[-1:].clone(), None if mask is None else mask[-1:].clone()

        return note

    def after_call(self, run: Denoising, call: DenoiserCall) -> None:
        raise Enough


def exchanged(read: Read, text: Tensor, mask: Tensor | None) -> Read:
    """Return another text for every row in the place of this one. Raises RuntimeError where their lengths differ."""
    other, other_mask = read
    if other.shape[1:] != text.shape[1:]:
        raise RuntimeError(
            f"texts of different lengths cannot be exchanged: {tuple(other.shape[1:])} and {tuple(text.shape[1:])}"
        )
    return other.expand_as(text), None if other_mask is None or mask is None else other_mask.expand_as(mask)
