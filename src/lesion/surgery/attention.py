"""What the image looks at in the text: the softmax probabilities of a denoiser's attention, computed beside it.

Before a site is called, its queries and keys are computed once more from the same inputs, with the module's own
projections, norms and rotary positions. No processor is swapped and nothing that the module computes is touched, so
this works under any processor and leaves images as they are, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from lesion.surgery.anatomy import Anatomy, AnatomyError, Site, examine, kinds_of
from lesion.surgery.hook_points import TextLength

SCORES_AT_ONCE = 1 << 25  # scores of a joint attention held at a time, 128 MiB


def text_attention(denoiser: nn.Module) -> Anatomy:
    """Return the attentions in which a denoiser's image looks at its text, grouped by `attention`.

    These are its cross-attentions or, where text and image attend jointly, its joint attentions.

    Raises AnatomyError where it has neither.
    """
    kinds = kinds_of(denoiser)
    for kind in ("cross_attention", "text_to_image"):
        if kind in kinds:
            return examine(denoiser, kind=kind)
    raise AnatomyError(f"{type(denoiser).__name__} has no attention from image to text")


@dataclass(frozen=True)
class SiteCall:
    """One call of an attention that reads the text, before it is computed.

    args, kwargs: of the call.
    text_tokens: length of the text in front of the image where both come concatenated, else 0.
    """

    site: Site
    module: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    text_tokens: int = 0

    def probabilities(self, rows: slice = slice(None)) -> Tensor:
        """See `probabilities`, of the module that is called."""
        return probabilities(self.module, self.args, self.kwargs, self.text_tokens, rows)


@contextmanager
def watched(denoiser: nn.Module, sites: Iterable[Site], tell: Callable[[SiteCall], None]) -> Iterator[None]:
    """Within this block, call `tell` before each call of these sites.

    sites: of `text_attention`, those of one head excepted.
    tell: must not keep the call, which holds the features of the whole batch.
    """
    with ExitStack() as stack:
        for site in sites:
            text = TextLength()
            stack.enter_context(text.watching(denoiser, site.hook.block))
            module = denoiser.get_submodule(site.path)

            def before(module: nn.Module, args: Any, kwargs: Any, site: Site = site, text: TextLength = text) -> None:
                tell(SiteCall(site, module, args, kwargs, text.tokens))

            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield


def probabilities(
    module: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    text_tokens: int = 0,
    rows: slice = slice(None),
) -> Tensor:
    """Compute how much each image token attends to each text token: (rows, heads, image tokens, text tokens), float32
    (float64 for a float64 model).

    Of cross-attention, every (row, head, image token) sums to 1. Of joint attention it sums to the share of the
    attention that the text gets; the rest is on the image itself. Differentiable with respect to the features wherever
    autograd records; parameters of the keys count as constants unless the text itself requires gradients.

    module: the attention, diffusers' `Attention` or `FluxAttention`.
    args, kwargs: of its call.
    text_tokens: length of the text in front of the image where both come concatenated, else 0.
    rows: of the batch.

    Raises RuntimeError where the call has no text, and for an attention that has no softmax over text keys.
    """
    names = ("hidden_states", "encoder_hidden_states", "attention_mask")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    hidden, text, mask = (given.get(name) for name in names)
    if isinstance(text, tuple):  # with an IP-Adapter: (text, images)
        text = text[0]
    if not (text is not None or text_tokens) or not all(hasattr(module, name) for name in ("to_q", "to_k", "heads")):
        raise RuntimeError(f"{type(module).__name__} is called without a text, or computes no softmax over one")
    if "Linear" in type(getattr(module, "processor", None)).__name__:
        raise RuntimeError(f"{type(module).__name__} with linear attention has no softmax to look at")
    rotary = given.get("image_rotary_emb")
    if getattr(module, "added_kv_proj_dim", None) is not None or text_tokens:
        return _joint(module, hidden, text, mask, rotary, text_tokens, rows)
    return _crossing(module, hidden, text, mask, rotary, rows)


def _crossing(module: Any, hidden: Any, text: Any, mask: Any, rotary: Any, rows: slice) -> Tensor:
    batch = len(hidden)
    hidden = hidden[rows]
    if hidden.dim() == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    if getattr(module, "group_norm", None) is not None:
        hidden = module.group_norm(hidden.transpose(1, 2)).transpose(1, 2)
    query = _heads(module, module.to_q(hidden), "norm_q")
    with torch.set_grad_enabled(torch.is_grad_enabled() and text.requires_grad):
        # The whole text, as the module itself will ask: `text_projected_once` then computes its keys once for both.
        if module.norm_cross:
            text = module.norm_encoder_hidden_states(text)
        key = _heads(module, module.to_k(text)[rows], "norm_k")
    if rotary is not None:  # of the image's positions; the text has none
        query = apply_rotary_emb(query, rotary)
    scores = _scaled(module, query) @ _precise(key).transpose(-1, -2)
    if mask is not None:
        mask = module.prepare_attention_mask(mask, text.shape[1], batch)
        scores = scores + mask.view(batch, module.heads, -1, mask.shape[-1])[rows]
    return scores.softmax(dim=-1)


def _joint(module: Any, hidden: Any, text: Any, mask: Any, rotary: Any, text_tokens: int, rows: slice) -> Tensor:
    """The image queries' share on text keys, of a softmax over both."""
    if mask is not None:
        raise RuntimeError(f"{type(module).__name__} is called with a mask over text and image, which is not supported")
    if text_tokens:
        words, image = hidden[rows, :text_tokens], hidden[rows, text_tokens:]
        of_text = _heads(module, module.to_k(words), "norm_k")
    else:
        words, image = text[rows], hidden[rows]
        of_text = _heads(module, module.add_k_proj(words), "norm_added_k")
    query = _heads(module, module.to_q(image), "norm_q")
    of_image = _heads(module, module.to_k(image), "norm_k")
    if rotary is not None:  # (cos, sin), each (text and image tokens, head channels)
        length = words.shape[1]
        of_text = apply_rotary_emb(of_text, tuple(table[:length] for table in rotary))
        query, of_image = (
            apply_rotary_emb(part, tuple(table[length:] for table in rotary)) for part in (query, of_image)
        )
    query, of_text, of_image = _scaled(module, query), _precise(of_text), _precise(of_image)
    each = query.shape[0] * query.shape[1] * (of_text.shape[2] + of_image.shape[2])
    found = []
    for part in query.split(max(1, SCORES_AT_ONCE // each), dim=2):
        on_text, on_image = part @ of_text.transpose(-1, -2), part @ of_image.transpose(-1, -2)
        total = torch.logaddexp(on_text.logsumexp(-1, keepdim=True), on_image.logsumexp(-1, keepdim=True))
        found.append((on_text - total).exp())
    return torch.cat(found, dim=2)


def _heads(module: Any, projected: Tensor, norm_name: str) -> Tensor:
    """Split a projection into heads, normalised as the module does: (rows, heads, tokens, channels)."""
    left_out = type(getattr(module, "processor", None)).__name__ in _UNNORMED
    norm: nn.Module | None = None if left_out else getattr(module, norm_name, None)
    width = projected.shape[-1] // module.heads
    if norm is not None and _width(norm) == projected.shape[-1]:  # over all heads at once, as in Sana
        projected, norm = norm(projected), None
    split = projected.unflatten(-1, (module.heads, width)).transpose(1, 2)
    return split if norm is None else cast(Tensor, norm(split))


# Processors of diffusers 0.42 that leave out the norms of queries and keys.
_UNNORMED = ("AttnProcessor", "SlicedAttnProcessor", "XFormersAttnProcessor")


def _width(norm: Any) -> int | None:
    """How many channels a norm runs over, where it says so."""
    form = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)
    if isinstance(form, int):
        return form
    return int(form[-1]) if form else None


def _scaled(module: Any, query: Tensor) -> Tensor:
    """Return precise queries times the module's scale, 1 / sqrt(channels of a head) unless it has another."""
    scale: float = getattr(module, "scale", query.shape[-1] ** -0.5)
    return _precise(query) * scale


def _precise(values: Tensor) -> Tensor:
    """Return half precision as float32, whatever the module upcasts: fused kernels keep their scores so, too."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
