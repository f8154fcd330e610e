"""The base class of replacements: what stands in the place of a lesioned site's contribution.

One subclass a file of `lesion.replacements`, found by the file's name. Class attributes say what an intervention suits,
so that a request is checked before anything loads; this module and those files import torch only where they use it.
(pyvene's interventions, arXiv 2403.07809, are built alike.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from lesion.errors import RequestError
from lesion.study.lesions import BRANCHES
from lesion.study.tokens import KINDS

if TYPE_CHECKING:
    from torch import Tensor, nn


class Intervention:
    """One replacement at work. A subclass implements one of `fill`, `text` and `rerun`, as `changes` says."""

    changes: ClassVar[Literal["output", "text", "condition", "loss", "tokens"]] = "output"
    """What of a site it changes: `output` is put in by `fill`; `text` that it reads by `text`; `condition` in which it
    runs by `rerun`; `loss`: nothing of it, the client that steers leaves its maps out; `tokens`: which it can see."""
    kinds: ClassVar[tuple[str, ...] | None] = None
    """Values of `layers.kind` that it suits; None: all."""
    branches: ClassVar[tuple[str, ...]] = BRANCHES
    """Values of `branch` on which it does something."""
    heads: ClassVar[bool] = True
    """Whether it suits single attention heads (`layers.by=head`)."""
    of_tokens: ClassVar[tuple[str, ...]] = ()
    """What of chosen text tokens it changes (`layers.by=token`), of `values`, `keys` and `text`; the first two by
    `fill`. Nothing: it does not suit tokens."""
    once: ClassVar[bool] = False
    """Whether it suits components that run once an image: text encoders and the autoencoder's decoder."""
    compiled: ClassVar[bool] = True
    """Whether it suits `performance.compile`: then it does no more than `fill`, and does not read the output."""
    tells_branches: ClassVar[bool] = True
    """Whether it may do other things to one guidance branch of an image than to the other."""
    donor_images: ClassVar[bool] = False
    """Whether it has a `source_prompt`."""
    most_strength: ClassVar[float] = 1.0
    """The largest `strength` that has a meaning; beyond 1 a site's output goes further the same way."""
    reads_output: bool = False
    """Whether `fill` reads the values of the output, not only its shape, dtype and device. A site that is replaced in
    every row is not computed unless some intervention reads its output."""
    source_prompt: str | None = None
    """A prompt of which an un-lesioned image is made beside every lesioned one, with the same noise. Its rows follow
    those of the lesioned images, in the same order within each branch, and its images are dropped."""

    @classmethod
    def kinds_of_tokens(cls) -> tuple[str, ...]:
        """Return the values of `layers.kind` of whose tokens it is; a joint attention is given no text to read."""
        return () if not cls.of_tokens else KINDS[:1] if "text" in cls.of_tokens else KINDS

    @classmethod
    def identity(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return what of the options can change pixels, as JSON data. Raises RequestError for unknown options."""
        if options:
            name = cls.__module__.rpartition(".")[2]
            raise RequestError(f"replacement.{name}", f"unknown option {next(iter(options))!r}; allowed: none")
        return {}

    @classmethod
    def check_model(cls, model: Any) -> None:
        """Raise RequestError if it makes no sense on this ModelSpec."""

    @classmethod
    def build(cls, options: Mapping[str, Any], bench: Any) -> Self:
        """Return it ready for the model of the `Bench`, for the options that `identity` has checked."""
        return cls()

    def fill(self, site: str, call: int, branches: Tensor, output: Tensor) -> Tensor:
        """Return values to put in the place of a site's quantity, broadcastable to it.

        site: its path; with `:text` behind for the text's half of a block that has two streams.
        call: number of the denoiser call, from 0.
        branches: guidance branch of each row, (rows,): 0 unconditional, 1 conditional.
        output: the quantity as the hook point reads it, (rows, tokens, channels) or (rows, channels, height, width).
        """
        raise NotImplementedError

    def source_of(self, prompt: str, seed: int) -> str | None:
        """Return the `source_prompt` of the image of this prompt and seed."""
        return self.source_prompt

    def text(self, site: str, branches: Tensor, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return text features and an attention mask for a cross-attention site to read in the place of its own.

        text: (rows, tokens, channels).
        mask: None if the site is given none.
        """
        raise NotImplementedError

    def rerun(self, site: str, module: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the site runs a second time, with the same arguments, under another condition."""
        raise NotImplementedError

    def again(
        self,
        site: str,
        module: nn.Module,
        forward: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Return what the site puts out under its condition; an override may run it on other arguments.

        forward: the module's own.
        args, kwargs: of the call.
        """
        with self.rerun(site, module):
            return forward(*args, **kwargs)
