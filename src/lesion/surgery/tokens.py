"""Lesions of what chosen text tokens bring to an attention, to the image's queries of one call.

The attention runs a second time, in which the tokens have other values, other keys and values, or are not there; of
that run the lesioned rows are taken. A token that is cut out of the text is one that a softmax never saw: under any
processor this is an attention mask. Nothing of what the text itself gets in a joint attention changes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lesion.denoising.wrapping import forward_replaced
from lesion.study.tokens import EACH, EVERYWHERE, expanded, layer_and_set
from lesion.surgery.anatomy import Anatomy, AnatomyError, Layer, Site
from lesion.surgery.hook_points import Call, FromText, HookPoint, ImageStream, ImageTokens, Share, TextLength, wide
from lesion.surgery.intervention import Intervention

if TYPE_CHECKING:
    from lesion.surgery.operation import SiteLesions


@dataclass(frozen=True)
class Places:
    """Where sets of tokens are in the texts of a batch.

    of: places by guidance branch and set, for each image; of a set that a negative prompt lacks nothing.
    length: of every text, in tokens.
    """

    of: Sequence[Mapping[tuple[int, str], tuple[int, ...]]]
    length: int


def with_tokens(
    anatomy: Anatomy,
    names: Sequence[str],
    of_tokens: Callable[[Site], HookPoint] | None = None,
    whole: str = "",
) -> Anatomy:
    """The layers by token: each layer of an anatomy by attention with each of these sets of tokens.

    of_tokens: the hook point of what tokens bring to a site; of a denoiser's None.
    whole: the component, where each set in all of its layers is one layer.
    """
    places = of_tokens or _of_tokens
    groups = anatomy.layers
    if whole:
        groups = (Layer(whole, 0, "", 0, tuple(site for layer in groups for site in layer.sites)),)
    layers: list[Layer] = []
    for layer, name in itertools.product(groups, names):
        sites = tuple(replace(site, path=expanded([site.path], [name])[0], hook=places(site)) for site in layer.sites)
        path = expanded([layer.path], [name])[0]
        layers.append(Layer(path, len(layers), layer.place, layer.resolution, sites))
    return Anatomy(tuple(layers), anatomy.kind, EVERYWHERE if whole else EACH)


def _of_tokens(site: Site) -> HookPoint:
    """What the image gets at a site of a denoiser: of joint attention its half alone."""
    hook = site.hook
    if isinstance(hook, FromText):
        return ImageTokens(hook.module, hook.block) if hook.single else ImageStream(hook.module)
    if type(hook) is not HookPoint:
        raise AnatomyError(f"the text tokens of {site.path} cannot be told apart", "layers.by")
    return hook


@dataclass(frozen=True)
class _Chosen:
    """What one intervention does to the rows of a call: how much of each is replaced, and of which tokens."""

    key: str
    share: Share
    columns: tuple[tuple[int, ...], ...]


def token_mask(columns: Sequence[Sequence[int]], length: int) -> Tensor:
    """Which tokens of each row are among its columns, (rows, length, 1)."""
    mask = torch.zeros(len(columns), length, 1, dtype=torch.bool)
    for row, of_row in enumerate(columns):
        mask[row, list(of_row)] = True
    return mask


class OfTokens:
    """An attention whose text tokens are told apart. sites: one for each set of tokens.

    Raises RuntimeError within a call for a text that is not as long as the tokenizers make it.
    """

    def __init__(self, sites: Sequence[Site], places: Places):
        self.places, self.hook = places, sites[0].hook
        self.path = layer_and_set(sites[0].path)[0]

    def image(self, call: Call, output: Any) -> Tensor:
        """The image's part of an output; of a joint attention without a text it is all of it."""
        if isinstance(self.hook, ImageStream) and isinstance(output, Tensor):
            return output
        return self.hook.read(call, output, 0)

    def text(self, call: Call) -> Tensor:
        """The text that the attention is given, (rows, tokens, channels)."""
        single = isinstance(self.hook, ImageTokens)
        text = call.hidden[:, call.text] if single else call.argument("encoder_hidden_states", 1)
        if not isinstance(text, Tensor) or text.dim() != 3:
            raise RuntimeError(f"{self.path} is given no text whose tokens can be told apart")
        if text.shape[1] != self.places.length:
            raise RuntimeError(
                f"{self.path} reads {text.shape[1]} text tokens and the tokenizers make {self.places.length}: they "
                "cannot be told apart"
            )
        return text

    def projected(self, call: Call, what: Sequence[str], changed: Callable[[Tensor], Tensor]) -> Any:
        """The output where the projections of the text to keys or values are changed so."""
        seen: set[str] = set()

        def make(name: str, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def projecting(hidden: Tensor) -> Tensor:
                seen.add(name)
                return changed(forward(hidden))

            return projecting

        joint = isinstance(self.hook, ImageStream)
        names = {"keys": "add_k_proj" if joint else "to_k", "values": "add_v_proj" if joint else "to_v"}
        with ExitStack() as stack:
            for one in what:
                part = getattr(call.module, names[one], None)
                if isinstance(part, nn.Module):
                    stack.enter_context(forward_replaced(part, functools.partial(make, names[one])))
            output = call.run()
        if missing := {names[one] for one in what} - seen:
            raise RuntimeError(f"{self.path} does not project its text by {', '.join(sorted(missing))}")
        return output


class TokenLesions(OfTokens):
    """The lesions of a batch at one attention."""

    def __init__(self, sites: Sequence[SiteLesions], places: Places):
        super().__init__([site.site for site in sites], places)
        self.sites, self.client = list(sites), sites[0].client
        self.interventions = {key: one for site in sites for key, one in site.interventions.items()}
        self._prepared: dict[tuple[Any, ...], list[_Chosen]] = {}

    def chosen(self, like: Tensor) -> list[_Chosen]:
        """What is done to the rows of the current denoiser call."""
        key = (self.client.inside, self.client.run.half, len(like), like.device, like.dtype)
        if key not in self._prepared:
            self._prepared[key] = self._chosen(like)
        return self._prepared[key]

    def _chosen(self, like: Tensor) -> list[_Chosen]:
        branches = self.client.run.branches(len(like)).tolist()
        weights = {key: [0.0] * len(branches) for key in self.interventions}
        columns: dict[str, list[set[int]]] = {key: [set() for _ in branches] for key in self.interventions}
        for site in self.sites:
            name = layer_and_set(site.site.path)[1]
            for key, line in zip(site.interventions, site.weights(branches)[1], strict=True):
                for row, weight in enumerate(line):
                    if weight and (places := self.places.of[row % len(site.lesions)].get((branches[row], name))):
                        weights[key][row] = weight  # a row has one lesion, so all its sets have one strength
                        columns[key][row].update(places)
        found = []
        for key, line in weights.items():
            if any(line):
                kind = wide(like)
                make = functools.partial(torch.tensor, line, dtype=kind)
                column = self.client.placed(("weights", tuple(line), kind), make, like.device)
                chosen = tuple(tuple(sorted(one)) for one in columns[key])
                found.append(_Chosen(key, Share.of(column, line, like.dim()), chosen))
        return found

    def output(self, call: Call) -> Any:
        """The attention's output with the lesions in it."""
        chosen = self.chosen(call.hidden)
        if not chosen:
            return call.run()
        # Of cross-attention nothing is needed but the lesioned run where that is all there is.
        spared = len(chosen) == 1 and chosen[0].share.whole and self.hook.everything
        output = None if spared else call.run()
        for one in chosen:
            image = self._changed(call, one)
            output = image if output is None else self.hook.write(call, output, [(0, image, one.share)])
        return output

    def _changed(self, call: Call, chosen: _Chosen) -> Tensor:
        """What the image gets, (rows, image tokens, channels), from a run with these tokens changed."""
        intervention = self.interventions[chosen.key]
        if "text" in intervention.of_tokens:
            return self.image(call, self._reading(call, chosen, intervention))
        if intervention.changes == "tokens":
            return self._masked(call, chosen)
        return self._filled(call, chosen, intervention)

    def _reading(self, call: Call, chosen: _Chosen, intervention: Intervention) -> Any:
        """The output with other features of these tokens."""
        text, mask = self.text(call), call.kwargs.get("attention_mask")
        if "encoder_hidden_states" not in call.kwargs:
            raise RuntimeError(f"{self.path} is given no text by name, so it cannot be given another")
        branches = self._branches(text)
        other, other_mask = intervention.text(self.path, branches, text, mask)
        here = self._mask(chosen, text)
        new = {"encoder_hidden_states": torch.where(here, other.to(text.dtype), text)}
        if mask is not None and other_mask is not None:
            new["attention_mask"] = torch.where(here.reshape(len(text), *[1] * (mask.dim() - 2), -1), other_mask, mask)
        return call.forward(*call.args, **{**call.kwargs, **new})

    def _filled(self, call: Call, chosen: _Chosen, intervention: Intervention) -> Tensor:
        """What the image gets with other values, or keys and values, of these tokens."""
        text = self.text(call)
        branches = self._branches(text)

        def changed(projected: Tensor) -> Tensor:
            """projected: of the text, or of text and image in one sequence."""
            here = self._mask(chosen, projected)
            values = intervention.fill(self.path, self.client.run.call, branches, projected)
            return torch.where(here, values.to(projected.dtype), projected)

        return self.image(call, self.projected(call, intervention.of_tokens, changed))

    def _masked(self, call: Call, chosen: _Chosen) -> Tensor:
        """What the image gets where it cannot see these tokens: rows that lack the same ones run together."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, columns in enumerate(chosen.columns):
            if columns:
                groups.setdefault(columns, []).append(row)
        image: Tensor | None = None
        for columns, rows in groups.items():
            index = self._index(rows, call.hidden.device)
            part = self._without(call, columns, index)
            if image is None:
                image = part.new_zeros(len(call.hidden), *part.shape[1:])
            image.index_copy_(0, index, part)
        assert image is not None
        return image

    def _without(self, call: Call, columns: Sequence[int], rows: Tensor) -> Tensor:
        """Of these rows alone, with these tokens cut out of the text."""
        text, hidden = self.text(call), call.hidden
        kept = sorted(set(range(text.shape[1])) - set(columns))
        index = self._index(kept, text.device)
        mask, rotary = call.kwargs.get("attention_mask"), call.kwargs.get("image_rotary_emb")
        joint, single = isinstance(self.hook, ImageStream), isinstance(self.hook, ImageTokens)
        if len(call.args) > 1 or ((joint or single) and mask is not None):
            raise RuntimeError(f"{self.path} is called in a way in which its text cannot be cut")
        kwargs = {name: value for name, value in call.kwargs.items() if name != "hidden_states"}
        image = hidden[rows]
        if joint or single:
            length = text.shape[1]
            whole = torch.cat([index, torch.arange(length, _tokens(call, text), device=text.device)])
            if rotary is not None:  # (cos, sin), each (text and image tokens, head channels), the text first
                kwargs["image_rotary_emb"] = tuple(table[whole.to(table.device)] for table in rotary)
            if single:
                call = replace(call, args=(image[:, whole],), kwargs=kwargs, image=slice(len(kept), None))
                return self.image(call, call.run())
            kwargs["encoder_hidden_states"] = text[rows][:, index] if kept else self._none(call, text[rows])
            return self.image(call, call.forward(image, **kwargs))
        if not kept:  # nothing to look at: the attention gives its bias alone
            kwargs["encoder_hidden_states"] = text[rows]
            if mask is not None:
                kwargs["attention_mask"] = mask[rows]
            blind = replace(call, args=(image,), kwargs=kwargs)
            return self.image(call, self.projected(blind, ("values",), torch.zeros_like))
        kwargs["encoder_hidden_states"] = text[rows][:, index]
        if mask is not None:
            kwargs["attention_mask"] = mask[rows][..., index]
        return self.image(call, call.forward(image, **kwargs))

    def _mask(self, chosen: _Chosen, like: Tensor) -> Tensor:
        """Which tokens are chosen, (rows, tokens, 1), where this is: (rows, tokens, channels)."""
        columns, length = chosen.columns, like.shape[1]
        return self.client.placed(("mask", columns, length), lambda: token_mask(columns, length), like.device)

    def _index(self, places: Sequence[int], device: torch.device) -> Tensor:
        make = functools.partial(torch.tensor, places, dtype=torch.long)
        return self.client.placed(("index", tuple(places)), make, device)

    def _branches(self, like: Tensor) -> Tensor:
        """The guidance branch of each row, (rows,), where the rows are."""
        branches = self.client.run.branches(len(like))
        return self.client.placed(("branches", tuple(branches.tolist())), lambda: branches, like.device)

    def _none(self, call: Call, text: Tensor) -> Tensor | None:
        """A text of no tokens: `Attention`'s processors leave out one that is None, `FluxAttention`'s want it empty."""
        from diffusers.models.attention_processor import Attention

        return None if isinstance(call.module, Attention) else text[:, :0]


def _tokens(call: Call, text: Tensor) -> int:
    """Tokens of text and image together."""
    return call.hidden.shape[1] + (0 if call.image.start else text.shape[1])


def lesioned(
    sites: Sequence[SiteLesions], places: Places, module: nn.Module, text: TextLength, forward: Callable[..., Any]
) -> Callable[..., Any]:
    """Return the module's forward with the lesions of its sites, one for each set of tokens, applied."""
    together = TokenLesions(sites, places)

    def lesioned(*args: Any, **kwargs: Any) -> Any:
        return together.output(Call(module, forward, args, kwargs, text.image))

    return lesioned
