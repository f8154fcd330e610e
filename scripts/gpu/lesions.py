"""Lesions of every class of pipeline against plain hooks on plain diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu.common import JOINT, ONE_SEQUENCE, SEEDS, TEXTS, Check, Context, Hook, denoiser, lesion, near, same
from lesion.generation.generate import generate
from lesion.models import Model
from lesion.replacements import Bench, _means
from lesion.replacements.mean import Mean
from lesion.study.prompts import Prompt
from lesion.surgery.anatomy import examine
from lesion.surgery.operation import replacement_key


def lesions(context: Context) -> list[Check]:
    """Each kind of lesion by its own hook."""
    return [check for name in context.classes for check in _Class(context, name).checks()]


@dataclass
class _Class:
    """The lesions of one class of pipeline."""

    context: Context
    name: str
    tokens: int | None = None  # of the image, where its tokens are the first of one sequence

    @cached_property
    def model(self) -> Model:
        return self.context.model(self.name)

    @cached_property
    def pipe(self) -> Any:
        return self.context.pipe(self.name)

    @property
    def joint(self) -> bool:
        """Whether text and image meet in one attention."""
        return self.name in (*JOINT, *ONE_SEQUENCE)

    @property
    def attention(self) -> str:
        """The kind of attention through which text comes."""
        return "joint_attention" if self.joint else "cross_attention"

    def checks(self) -> Iterator[Check]:
        untouched = self.plain()
        for kind in (self.attention, "feed_forward" if self.joint else "self_attention", "block"):
            model, layer = self.layer(kind, 0 if self.joint else 1)
            hooks = [(site, _unchanged if kind == "block" else self.zeros) for site in model.anatomy.sites[layer]]
            ours = self.context.ours(model, self.context.cells(model, lesion(layer, kind=kind)))
            yield self.judged(f"zero, {kind}", *same(ours, self.plain(*hooks)), ours, untouched)
        yield from self.mean(untouched)
        if not self.joint:
            yield self.donor(untouched)
        yield self.head(untouched)
        if self.name == "sd":
            yield self.every_layer()

    def layer(self, kind: str, number: int, by: str = "attention") -> tuple[Model, str]:
        """The model with layers of this kind, and one of them."""
        model = replace(self.model, anatomy=examine(self.model.denoiser, by, kind))
        return model, model.anatomy.paths[number]

    def plain(self, *hooks: Hook, texts: tuple[str, ...] = TEXTS) -> Any:
        first: list[Hook] = [("noise_refiner.0", self.note)] if self.name in ONE_SEQUENCE else []
        return self.context.plain(self.pipe, self.name, [*first, *hooks], texts)

    def judged(self, name: str, fine: bool, said: str, ours: Any, untouched: Any) -> Check:
        changes = not np.array_equal(ours, untouched)
        return Check.of(f"{name}, {self.name}", fine and changes, said if changes else "the lesion changes nothing")

    def note(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Of a block that sees the image's tokens alone."""
        self.tokens = output.shape[1]

    def image(self, output: Any) -> Tensor:
        """The image's part of what a site puts out: the first of two, or the first tokens, or all."""
        part: Tensor = output[0] if isinstance(output, tuple) else output[:, : self.tokens]
        return part

    def with_image(self, output: Any, image: Tensor) -> Any:
        if isinstance(output, tuple):
            return (image, *output[1:])
        return image if self.tokens is None else torch.cat([image, output[:, self.tokens :]], dim=1)

    def zeros(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return self.with_image(output, torch.zeros_like(self.image(output)))

    def mean(self, untouched: Any) -> Iterator[Check]:
        """Against sums of plain hooks in float64, of each call and half of guidance, which plain hooks put in."""
        model, layer = self.layer(self.attention, 0 if self.joint else 1)
        sites = model.anatomy.sites[layer]
        exact = self.name == "sd"  # there the means are compared by themselves, and then put in
        cells = self.context.cells(model, lesion(layer, replacement="mean", kind=self.attention))
        bench = Bench(model, cells[0].settings, self.context.scratch / "means", len(TEXTS))
        means = _means.measure(bench, [(Prompt(text), seed) for text, seed in zip(TEXTS, SEEDS, strict=True)])
        ours = generate(model, cells, {replacement_key(cells[0].lesion): Mean(means)})  # type: ignore[arg-type]
        seen: dict[str, list[Tensor]] = {site: [] for site in sites}

        def summing(site: str) -> Callable[..., None]:
            def add(module: Any, args: Any, kwargs: Any, output: Any) -> None:
                each = self.image(output).double().mean(dim=1)
                seen[site].append(each.unflatten(0, (-1, len(TEXTS))).mean(dim=1))

            return add

        def putting(site: str) -> Callable[..., Any]:
            calls = iter(means[site].to(self.context.device) if exact else seen[site])

            def put(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
                rows = next(calls).repeat_interleave(len(TEXTS), dim=0)[:, None]
                return self.with_image(output, rows.to(self.image(output).dtype).expand_as(self.image(output)))

            return put

        self.plain(*((site, summing(site)) for site in sites))
        theirs = self.plain(*((site, putting(site)) for site in sites))
        yield self.judged(f"mean, {self.attention}", *(same if exact else near)(ours, theirs), ours, untouched)
        if exact:
            (site,) = sites
            reference = torch.stack(seen[site]).cpu()
            apart = float((means[site].double().cpu() - reference).abs().max() / reference.abs().max())
            yield Check.of("mean, its values, sd", apart < 1e-6, f"largest difference {apart:.1e} of the largest mean")

    def donor(self, untouched: Any) -> Check:
        """One layer reads another prompt, in the conditional rows."""
        (model, layer), options = self.layer("cross_attention", 1), {"prompt": "a donor"}
        sites = model.anatomy.sites[layer]
        change = lesion(layer, replacement="donor_prompt", options=options, branch="cond")
        ours = self.context.ours(model, self.context.cells(model, change), options)
        texts = ("encoder_hidden_states", "attention_mask")  # what tells a site its text
        read: dict[str, dict[str, Tensor]] = {}

        def noting(site: str) -> Callable[..., None]:
            def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
                read[site] = {key: kwargs[key][-1:].clone() for key in texts if kwargs.get(key) is not None}

            return note

        def exchanging(site: str) -> Callable[..., Any]:
            def exchange(module: Any, args: Any, kwargs: Any) -> Any:
                other = {
                    key: torch.cat([kwargs[key][: -len(TEXTS)], value.expand(len(TEXTS), *value.shape[1:])])
                    for key, value in read[site].items()
                }
                return args, {**kwargs, **other}

            return exchange

        self.plain(*((site, noting(site)) for site in sites), texts=("a donor",))
        with ExitStack() as hooks:
            for site in sites:
                module = denoiser(self.pipe).get_submodule(site)
                hooks.callback(module.register_forward_pre_hook(exchanging(site), with_kwargs=True).remove)
            theirs = self.plain()
        return self.judged("donor_prompt", *same(ours, theirs), ours, untouched)

    def head(self, untouched: Any) -> Check:
        """One head against its slice of the projection taken away; sums in another order."""
        model, layer = self.layer(self.attention, 1, by="head")
        taken = [model.anatomy.by_path[path] for path in model.anatomy.sites[layer]]

        def taking(head: int, heads: int) -> Callable[..., Any]:
            def without(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
                width = module.in_features // heads
                mine = slice(head * width, (head + 1) * width)
                share = args[0][..., mine] @ module.weight[:, mine].T
                if module.bias is not None:
                    share = share + module.bias / heads
                return self.with_image(output, self.image(output - share))

            return without

        ours = self.context.ours(model, self.context.cells(model, lesion(layer, kind=self.attention)))
        theirs = self.plain(*((one.hook.module, taking(one.head or 0, one.hook.heads)) for one in taken))
        return self.judged("head", *near(ours, theirs), ours, untouched)

    def every_layer(self) -> Check:
        """All layers by zero: both branches of guidance share their rows, so half of them are computed."""
        model = self.context.model("sd", kind="cross_attention", shared_rows=True)
        sites = [(site, self.zeros) for layer in model.anatomy.paths for site in model.anatomy.sites[layer]]
        ours = self.context.ours(model, self.context.cells(model, lesion(*model.anatomy.paths)))
        return Check.of("zero, every layer, sd", *near(ours, self.plain(*sites)))


def _unchanged(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """A block that hands on what it was given."""
    if "encoder_hidden_states" in kwargs and isinstance(output, tuple) and len(output) == 2:  # text, image
        return None if output[0] is None else kwargs["encoder_hidden_states"], kwargs["hidden_states"]
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden,) if isinstance(output, tuple) else hidden
