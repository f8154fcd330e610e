"""Lesions of what runs once an image: text encoders and the autoencoder's decoder.

Images of a batch with different lesions are run apart, so that one run of such a component has one lesion or none, and
whatever it does with the rows of a batch (slices, tiles) cannot mix them up.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lesion.denoising.run import COND, UNCOND
from lesion.denoising.wrapping import forward_replaced
from lesion.study.components import VAE, decoder_layer, part_of
from lesion.study.lesions import Lesion
from lesion.study.tokens import layer_and_set
from lesion.surgery.anatomy import Anatomy, AnatomyError, Layer, Site
from lesion.surgery.hook_points import Call, Changes, HookPoint, ImageStream, Share, Update, blend, wide
from lesion.surgery.intervention import Intervention
from lesion.surgery.operation import replacement_key
from lesion.surgery.tokens import Places, with_tokens

_TEXT_LAYER = re.compile(r"(?:text_model\.)?(?P<layer>encoder\.(?:layers|block)\.\d+)")
_DECODER_PART = re.compile(r"decoder\.(?:mid_block|up_blocks\.\d+)\.(?:resnets|attentions)\.\d+")
_TEXT_SITES = {  # by class of the layer: attention and feed-forward
    "CLIPEncoderLayer": ("self_attn", "mlp"),
    "T5Block": ("layer.0.SelfAttention", "layer.1.DenseReluDense"),
    "UMT5Block": ("layer.0.SelfAttention", "layer.1.DenseReluDense"),
}


_VALUES = {"self_attn": "v_proj", "SelfAttention": "v"}  # by name of the attention: what projects its values
_OUTPUT = {"v_proj": "out_proj", "v": "o"}  # by name of that: what projects the attention's output


@dataclass(frozen=True)
class TextBlock(Update):
    """What a layer of a text encoder adds to its hidden states, (rows, tokens, channels)."""

    def parts(self, output: Any) -> int:
        return 1

    def _positions(self, call: Call, output: Any) -> list[Any]:
        return [0] if isinstance(output, tuple) else [None]  # T5's layers hand on the bias of positions, too


@dataclass(frozen=True)
class Projection(HookPoint):
    """What a projection puts out, (rows, tokens, channels). Values in its place are laid out in memory as it is: what
    follows reshapes it to an image, and kernels for images laid out otherwise round otherwise.
    """

    def write(self, call: Call, output: Any, changes: Changes) -> Any:
        return torch.empty_like(output).copy_(super().write(call, output, changes))


def examine_component(component: str, module: nn.Module, by: str, kind: str) -> Anatomy:
    """The layers of a text encoder or of an autoencoder's decoder, in forward order, named as `study.components` says.

    Raises AnatomyError where there are none of this kind.
    """
    groups: dict[str, list[Site]] = {}
    found = _decoder_sites(module, by, kind) if component == VAE else _text_sites(component, module, kind)
    for layer, site in found:
        groups.setdefault(layer, []).append(replace(site, path=f"{component}.{site.path}"))
    if not groups:
        raise AnatomyError(f"{component} ({type(module).__name__}) has no {kind}", "layers.kind")
    layers = [Layer(path, index, "", 0, tuple(sites)) for index, (path, sites) in enumerate(groups.items())]
    return Anatomy(tuple(layers), kind, by)


def _text_sites(component: str, encoder: nn.Module, kind: str) -> Iterator[tuple[str, Site]]:
    for path, module in encoder.named_modules():
        match = _TEXT_LAYER.fullmatch(path)
        leaves = _TEXT_SITES.get(type(module).__name__)
        if match is None or leaves is None:
            continue
        attention, forward = (f"{path}.{leaf}" for leaf in leaves)
        hook = {"block": TextBlock(path), "self_attention": ImageStream(attention), "feed_forward": HookPoint(forward)}
        if kind in hook:
            yield f"{component}.{match['layer']}", Site(hook[kind].module, 0, 0, 0, 0, hook[kind])


def encoder_tokens(anatomy: Anatomy, names: Sequence[str], whole: str = "") -> Anatomy:
    """The layers by token of a text encoder, of its anatomy by self-attention: the values of sets of tokens.

    whole: the encoder, where each set in all of its layers is one.
    """

    def values(site: Site) -> HookPoint:
        return HookPoint(f"{site.hook.module}.{_VALUES[site.hook.module.rpartition('.')[2]]}")

    return with_tokens(anatomy, names, values, whole)


def _decoder_sites(vae: nn.Module, by: str, kind: str) -> Iterator[tuple[str, Site]]:
    """Residual blocks: what one adds is the output of its last convolution or projection."""
    paths = [path for path, _ in vae.named_modules() if _DECODER_PART.fullmatch(path)]
    for path in sorted(paths, key=_forward_order):
        attends = ".attentions." in path
        if kind == "block" or (kind == "self_attention" and attends):
            hook = Projection(f"{path}.to_out.0") if attends else HookPoint(f"{path}.conv2")
            yield decoder_layer(f"{VAE}.{path}", by), Site(path, 0, 0, 0, 0, hook)


def _forward_order(path: str) -> tuple[int, int]:
    """The middle block comes first, and runs a ResNet, then an attention and a ResNet in turns; torch names it last."""
    if ".mid_block." not in path:
        return 1, 0
    number = int(path.rpartition(".")[2])
    return 0, 2 * number - 1 if ".resnets." in path else 2 * number


@dataclass(frozen=True)
class Applied:
    """A lesion of one component with its intervention, as what is made of it is remembered by; equal if all are.

    columns: where sets of tokens are in the text at hand, for a lesion of these.
    """

    lesion: Lesion
    intervention: Intervention
    columns: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def columns_of(self, site: Site) -> list[int]:
        """Where the set of tokens of a site is."""
        return list(dict(self.columns).get(layer_and_set(site.path)[1], ()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Applied):
            return NotImplemented
        same = self.lesion.digest == other.lesion.digest and self.intervention == other.intervention
        return same and self.columns == other.columns

    def __hash__(self) -> int:
        return hash(self.lesion.digest)


class ComponentLesions:
    """The lesions of a batch in other components than the denoiser, for one call of the pipeline.

    anatomies: by component.
    lesions: of each image; None: no lesion.
    interventions: the built replacement for each `replacement_key`.
    places: of text tokens, by text encoder, where the layers are by token.
    """

    def __init__(
        self,
        anatomies: Mapping[str, Anatomy],
        lesions: Sequence[Lesion | None],
        interventions: Mapping[str, Intervention],
        places: Mapping[str, Places] | None = None,
    ):
        self.anatomies, self.places = anatomies, places or {}
        self._rows: dict[str, list[Applied | None]] = {}
        for component in anatomies:
            mine = [part_of(lesion, component) for lesion in lesions]
            if any(mine):
                self._rows[component] = [
                    Applied(lesion, interventions[replacement_key(lesion)]) if lesion else None for lesion in mine
                ]
        self._calls: dict[str, int] = {}

    def of_text(self, component: str, rows: int, length: int) -> list[tuple[Applied, int] | None]:
        """What is done to each row of the present call of a text encoder, with the branch that it is of; None: nothing.

        Pipelines encode the prompts first and then the negative prompts. Raises RuntimeError for other numbers of rows
        or calls, and of tokens, `length`, where these are told apart.
        """
        if component not in self._rows:
            return [None] * rows
        number = self._calls[component] = self._calls.get(component, -1) + 1
        lesions = self._rows[component]
        if rows != len(lesions) or number > 1:
            raise RuntimeError(f"call {number + 1} of {component} has {rows} rows for {len(lesions)} images")
        name, branch = ("cond", COND) if number == 0 else ("uncond", UNCOND)
        done = [(one, branch) if one and one.lesion.branch in ("both", name) else None for one in lesions]
        return self._of_tokens(component, done, length) if component in self.places else done

    def _of_tokens(
        self, component: str, done: Sequence[tuple[Applied, int] | None], length: int
    ) -> list[tuple[Applied, int] | None]:
        """The same with the places of tokens in each row's text; nothing where it has none of them."""
        places = self.places[component]
        if length != places.length:
            raise RuntimeError(f"{component} reads {length} tokens and its tokenizer makes {places.length}")
        found: list[tuple[Applied, int] | None] = []
        for what, of in zip(done, places.of, strict=True):
            columns = tuple(sorted((name, at) for (branch, name), at in of.items() if what and branch == what[1]))
            found.append((replace(what[0], columns=columns), what[1]) if what and columns else None)
        return found

    def refuse(self, component: str) -> None:
        """Raise RuntimeError where the component has lesions: this call is none that they can be brought into."""
        if component in self._rows:
            raise RuntimeError(f"{component} is called in a way in which its rows cannot be told apart")

    def of_images(self, component: str, rows: int) -> list[tuple[Applied, int] | None]:
        """What is done to each image of a call of the decoder. Raises RuntimeError for other numbers of rows."""
        if component not in self._rows:
            return [None] * rows
        if rows != len(self._rows[component]):
            raise RuntimeError(f"{component} decodes {rows} latents of {len(self._rows[component])} images")
        return [(one, COND) if one else None for one in self._rows[component]]

    @contextmanager
    def at_work(self, component: str, module: nn.Module, what: tuple[Applied, int] | None) -> Iterator[None]:
        """Within it every run of the component is under this lesion."""
        with ExitStack() as stack:
            if what:
                applied, branch = what
                anatomy = self.anatomies[component]
                for site in (
                    site for layer in anatomy.layers if layer.path in applied.lesion.layers for site in layer.sites
                ):
                    path, make = site.hook.module, _lesioned
                    if applied.intervention.changes == "tokens":
                        path, make = path.rpartition(".")[0], _masked
                    inner = module.get_submodule(path)
                    stack.enter_context(forward_replaced(inner, functools.partial(make, site, inner, applied, branch)))
            yield


def _lesioned(
    site: Site, module: nn.Module, applied: Applied, branch: int, forward: Callable[..., Any]
) -> Callable[..., Any]:
    intervention, strength, hook = applied.intervention, applied.lesion.strength, site.hook
    columns = applied.columns_of(site)
    if applied.columns and not columns:  # of another set
        return forward

    def lesioned(*args: Any, **kwargs: Any) -> Any:
        call = Call(module, forward, args, kwargs)
        output = call.run()
        changes = []
        for part, name in site.parts(output):
            quantity = (hook.read if intervention.reads_output or columns else hook.like)(call, output, part)
            rows = len(quantity)
            column = torch.full((rows,), strength, dtype=wide(quantity), device=quantity.device)
            branches = torch.full((rows,), branch, device=quantity.device)
            values = intervention.fill(name, 0, branches, quantity)
            if columns:
                changed = quantity.clone()
                changed[:, columns] = values.to(quantity.dtype).expand_as(quantity)[:, columns]
                values = changed
            changes.append((part, values, Share.of(column, [strength] * rows, quantity.dim())))
        return hook.write(call, output, changes)

    return lesioned


def _masked(
    site: Site, module: nn.Module, applied: Applied, branch: int, forward: Callable[..., Any]
) -> Callable[..., Any]:
    """Return the forward of a self-attention in which no token can see those of a set.

    A softmax over the other keys alone is that over all, divided by the part of it that they have; that part is what
    the attention puts out where values are one at them and zero elsewhere. So it is whatever mask, bias of positions or
    kernel the attention has. A token that sees no other key gets the output projection's bias alone.
    """
    columns, strength, values = applied.columns_of(site), applied.lesion.strength, site.hook.module.rpartition(".")[2]
    if not columns:
        return forward
    reads, writes = module.get_submodule(values), module.get_submodule(_OUTPUT[values])

    def without(valued: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """What goes into the output projection under values like these, but none of the set."""

        def project(project: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda hidden: valued(project(hidden)).index_fill(1, index.to(hidden.device), 0)

        index = torch.tensor(columns)
        with forward_replaced(reads, project), forward_replaced(writes, lambda project: lambda hidden: hidden):
            found: Tensor = forward(*args, **kwargs)[0]
        return found

    def masked(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        seen, left = (without(valued, *args, **kwargs) for valued in (torch.clone, torch.ones_like))
        image = writes(torch.where(left > 0, seen / left, torch.zeros_like(seen)))
        column = torch.full((len(image),), strength, dtype=wide(image), device=image.device)
        return (blend(output[0], image, Share.of(column, [strength] * len(image), image.dim())), *output[1:])

    return masked
