"""`identity`: attention probabilities become the identity: every query keeps its own value and sees no other position.

The site is run once more with every position as a sequence of its own. A softmax over one key is 1, so this holds under
any processor, with the module's own projections and norms (the perturbation of arXiv 2403.17377 and 2506.10978).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lesion.errors import RequestError
from lesion.surgery.intervention import Intervention

if TYPE_CHECKING:
    from torch import nn

    from lesion.models import ModelSpec

AT_ONCE = 1 << 15  # sequences of one position; CUDA's attention kernels take fewer than 65,536 rows


class Identity(Intervention):
    """Self-attention in which every position attends to itself alone."""

    changes = "condition"
    kinds = ("self_attention",)
    heads = False
    compiled = False

    @classmethod
    def check_model(cls, model: ModelSpec) -> None:
        """Raise RequestError for linear attention, which has no probabilities."""
        from lesion.models.source import resolve

        source = resolve(model)
        if source.components[source.denoiser][1].startswith("Sana"):
            raise RequestError("replacement", f"identity: the linear attention of {model.id!r} has no probabilities")

    def again(
        self,
        site: str,
        module: nn.Module,
        forward: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        import torch

        given = {**dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)), **kwargs}
        hidden = given.pop("hidden_states")
        if hidden.dim() != 3 or given.get("encoder_hidden_states") is not None:
            raise RuntimeError(f"{site} is called in a way in which its positions cannot be told apart")
        # A mask or a rotation of positions changes nothing where there is one position.
        plain = {name: value for name, value in given.items() if value is None or isinstance(value, bool | dict)}
        alone = hidden.reshape(-1, 1, hidden.shape[-1])
        parts = [forward(part, **plain) for part in alone.split(AT_ONCE)]
        output = parts[0] if len(parts) == 1 else torch.cat(parts)
        return output.reshape(*hidden.shape[:2], -1)
