"""Lesions as a client of a denoising run: apply each image's lesion to the calls of its sites.

This wraps the `forward` of the modules that hook points name, so it works with any attention processor and swaps none.
Each image of a batch has its own lesion or none, given as a weight per row; the output of an image without a lesion
stays bit for bit identical. A module that is replaced in every row of the batch is not computed where possible.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from lesion.denoising.run import COND, Client, DenoiserCall, Denoising
from lesion.denoising.wrapping import forward_replaced
from lesion.study.lesions import Lesion, covers
from lesion.surgery.anatomy import Anatomy, Site
from lesion.surgery.hook_points import Call, Share, TextLength, keeps_shape, wide
from lesion.surgery.intervention import Intervention
from lesion.surgery.tokens import Places
from lesion.surgery.tokens import lesioned as tokens_lesioned


def replacement_key(lesion: Lesion) -> str:
    """Return a key that is different for different replacements; two calibrations of `mean` have two keys."""
    return f"{lesion.replacement.name}:{sorted(lesion.replacement.identity.items())}"


class Lesions(Client):
    """The lesions of one batch: image i is made under lesions[i] (None: no lesion).

    anatomy: of the denoiser.
    interventions: the built replacement for each `replacement_key`.
    places: of text tokens, where the layers are by token.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        lesions: Sequence[Lesion | None],
        interventions: Mapping[str, Intervention],
        places: Places | None = None,
    ):
        self.places = places
        self.lesions = [lesion if lesion and lesion.strength else None for lesion in lesions]
        self._tables: dict[tuple[Any, ...], _Table] = {}
        self._placed: dict[tuple[Hashable, torch.device], Tensor] = {}
        self.inside: tuple[bool, ...] = (False,) * len(lesions)  # whose window contains the current call
        of_site: dict[str, list[Lesion | None]] = {}
        for index, lesion in enumerate(self.lesions):
            for path in (site for layer in lesion.layers for site in anatomy.sites[layer]) if lesion else ():
                of_site.setdefault(path, [None] * len(lesions))[index] = lesion
        self.sites = {
            path: SiteLesions(site, of_site[path], self, interventions)
            for path, site in anatomy.by_path.items()
            if path in of_site
        }

    @contextmanager
    def attached(self, run: Denoising) -> Iterator[None]:
        """Wrap the modules of the lesioned sites; if no image has a lesion, wrap nothing."""
        self.run = run
        together: dict[str, list[SiteLesions]] = {}
        for one in self.sites.values():
            together.setdefault(one.site.hook.module, []).append(one)
        with ExitStack() as stack:
            for path, sites in together.items():
                module, text = run.denoiser.get_submodule(path), TextLength()
                made = functools.partial(_lesioned, sites, module, text)
                if self.places:
                    made = functools.partial(tokens_lesioned, sites, self.places, module, text)
                stack.enter_context(forward_replaced(module, made))
                if norm := _norm_before(run.denoiser, path):
                    stack.enter_context(forward_replaced(norm, functools.partial(_spared, sites)))
                stack.enter_context(text.watching(run.denoiser, sites[0].site.hook.block))
            yield

    def before_call(self, run: Denoising, call: DenoiserCall) -> None:
        number, calls = run.call, run.calls
        self.inside = tuple(lesion is not None and covers(lesion.window, number, calls) for lesion in self.lesions)

    def table(self, like: Tensor) -> _Table:
        """Return the weights of all sites for the current denoiser call, where rows like these are.

        They are prepared and copied together, once for each set of lesions whose windows are open: a copy a site would
        wait for the device.
        """
        key = (self.inside, self.run.half, len(like), like.device, wide(like))
        if key not in self._tables:
            branches = self.run.branches(len(like))
            weights = [site.weights(branches.tolist()) for site in {s.pattern: s for s in self.sites.values()}.values()]
            places: dict[tuple[int, ...], range] = {}
            flat: list[list[float]] = []
            for site, mine in weights:
                places[site.pattern] = range(len(flat), len(flat) + len(mine))
                flat += mine
            columns = torch.tensor(flat, dtype=wide(like)).to(like.device, non_blocking=True).unbind(0)
            rows = branches.to(like.device, non_blocking=True)
            self._tables[key] = _Table(rows, columns, flat, places)
        return self._tables[key]

    def placed(self, key: Hashable, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Return on a device what `make` makes in main memory, copied once a run for all sites and calls.

        key: by which it is told from others.
        """
        if (key, device) not in self._placed:
            self._placed[key, device] = make().to(device, non_blocking=True)
        return self._placed[key, device]


@dataclass(frozen=True)
class _Table:
    """How much of each row each intervention replaces, for all sites.

    branches: guidance branch of each row, (rows,).
    columns: tensors (rows,), one a line. lines: the same as numbers, in main memory. places: lines by
        `SiteLesions.pattern`, in the order of its interventions.
    """

    branches: Tensor
    columns: Sequence[Tensor]
    lines: Sequence[Sequence[float]]
    places: Mapping[tuple[int, ...], range]


@dataclass(frozen=True)
class Rows:
    """What the lesions of one site do to the rows of a denoiser call, prepared where the rows are.

    branches: guidance branch of each row, (rows,).
    shares: how much of each row each intervention replaces, by `replacement_key`.
    acts: whether any row is replaced at all. whole: whether every row is, wholly.
    texts: features and masks that interventions on the text have made of those the site was given.
    """

    branches: Tensor
    shares: dict[str, Share]
    acts: bool
    whole: bool
    texts: dict[tuple[str, ...], tuple[Tensor, Tensor, Tensor | None]]


class SiteLesions:
    """The lesions of a batch at one site; lesions[i] is that of image i, None if it has none here."""

    def __init__(
        self,
        site: Site,
        lesions: Sequence[Lesion | None],
        client: Lesions,
        interventions: Mapping[str, Intervention],
    ):
        self.site, self.lesions, self.client = site, lesions, client
        self.pattern = tuple(map(id, lesions))  # sites of one layer have the same
        self.keys = [replacement_key(lesion) if lesion else "" for lesion in lesions]
        self.interventions = {key: interventions[key] for key in dict.fromkeys(self.keys) if key}
        self.fills, self.texts, self.reruns = (
            [key for key, one in self.interventions.items() if one.changes == changes]
            for changes in ("output", "text", "condition")
        )
        if (self.texts or self.reruns) and site.head is not None:
            raise RuntimeError(f"{site.path}: this replacement changes a whole attention, not a head")
        self.output_read = any(one.reads_output for one in self.interventions.values())
        of_tokens = bool(client.places)  # of values and keys, not of the output
        self.output_needed = self.output_read or len(self.fills) < len(self.interventions) or of_tokens
        self._prepared: dict[tuple[Any, ...], Rows] = {}

    def rows(self, like: Tensor) -> Rows:
        """Return what the current denoiser call does to rows like these; cached by number, device, dtype and rank."""
        key = (self.client.inside, self.client.run.half, len(like), like.device, like.dtype, like.dim())
        if key not in self._prepared:
            self._prepared[key] = self._rows(like)
        return self._prepared[key]

    def _rows(self, like: Tensor) -> Rows:
        table = self.client.table(like)
        places = table.places[self.pattern]
        lines = [table.lines[place] for place in places]
        shares = {
            key: Share.of(table.columns[place], line, like.dim())
            for key, place, line in zip(self.interventions, places, lines, strict=True)
        }
        together = list(map(sum, zip(*lines, strict=True)))  # a row has one intervention at most
        return Rows(table.branches, shares, any(together), all(weight == 1 for weight in together), {})

    def weights(self, branches: Sequence[int]) -> tuple[SiteLesions, list[list[float]]]:
        """Return this site, and for each intervention how much of each row it replaces in the current denoiser call.

        branches: guidance branch of each row.
        """
        mine = {key: [0.0] * len(branches) for key in self.interventions}
        for row, branch in enumerate(branches):
            index = row % len(self.lesions)
            lesion = self.lesions[index]
            if (
                lesion
                and self.client.inside[index]
                and lesion.branch in ("both", "cond" if branch == COND else "uncond")
            ):
                mine[self.keys[index]][row] = lesion.strength
        return self, list(mine.values())

    def spares(self, like: Tensor) -> bool:
        """Return whether the current denoiser call neither keeps nor reads any of the module's own output."""
        return not self.output_needed and self.rows(like).whole

    def output(self, call: Call) -> Any:
        """Return the module's output, with rows that read another text or run under another condition where asked.

        A row with a strength other than 0 and 1 gets a mixture of both outputs.
        """
        if not self.texts and not self.reruns:
            return self.site.hook.run(call)
        hook, shares = self.site.hook, self.rows(call.hidden).shares
        if hook.everything and len(self.interventions) == 1 and self.reruns and shares[self.reruns[0]].whole:
            return self._rerun(self.reruns[0], call)
        mixed = [key for key in self.texts if shares[key].mixed]
        at_once = tuple(key for key in self.texts if key not in mixed)
        output = self._reading(call, at_once) if at_once else hook.run(call)
        for key in mixed:
            output = hook.merge(call, output, self._reading(call, (key,)), shares[key])
        for key in self.reruns:
            output = hook.merge(call, output, self._rerun(key, call), shares[key])
        return output

    def changes(self, call: Call, output: Any) -> Iterator[tuple[int, Tensor, Share]]:
        """Yield the values that replace the site's quantity, in the form that `HookPoint.write` takes."""
        for part, name in self.site.parts(output) if self.fills else ():
            read = self.site.hook.read if self.output_read else self.site.hook.like
            quantity = read(call, output, part)
            rows = self.rows(quantity)
            for key in self.fills:
                values = self.interventions[key].fill(name, self.client.run.call, rows.branches, quantity)
                yield part, values, rows.shares[key]

    def _rerun(self, key: str, call: Call) -> Any:
        """Run the module under the intervention. Tensors are passed as new objects, so no cached result is used."""
        kwargs = {name: _anew(value) for name, value in call.kwargs.items()}
        args = [_anew(value) for value in call.args]
        return self.interventions[key].again(self.site.path, call.module, call.forward, args, kwargs)

    def _reading(self, call: Call, keys: tuple[str, ...]) -> Any:
        """Return the module's output with the rows of these interventions reading their text.

        That text is the same tensor object at every step, so what the module caches of it stays valid.
        """
        text, mask = call.kwargs.get("encoder_hidden_states"), call.kwargs.get("attention_mask")
        if text is None:
            raise RuntimeError(f"{self.site.path} is given no text by name, so it cannot be given another")
        rows = self.rows(text)
        if keys not in rows.texts or rows.texts[keys][0] is not text:
            new, new_mask = text, mask
            for key in keys:
                other, other_mask = self.interventions[key].text(self.site.path, rows.branches, text, mask)
                chosen = rows.shares[key].column > 0
                new = torch.where(chosen, other.to(new.dtype), new)
                if new_mask is not None and other_mask is not None:
                    new_mask = torch.where(chosen.reshape(-1, *[1] * (new_mask.dim() - 1)), other_mask, new_mask)
            rows.texts[keys] = text, new, new_mask
        _, new, new_mask = rows.texts[keys]
        masked = {} if mask is None else {"attention_mask": new_mask}
        return call.forward(*call.args, **{**call.kwargs, "encoder_hidden_states": new, **masked})


def _lesioned(
    sites: Sequence[SiteLesions], module: nn.Module, text: TextLength, forward: Callable[..., Any]
) -> Callable[..., Any]:
    """Return the module's forward with the lesions of its sites applied: one site, or one for each head."""
    hook = sites[0].site.hook

    def lesioned(*args: Any, **kwargs: Any) -> Any:
        call = Call(module, forward, args, kwargs, text.image)
        acting = [site for site in sites if site.rows(call.hidden).acts]
        if not acting:
            return call.run()
        spared = hook.of_input or all(site.spares(call.hidden) for site in acting)
        output = hook.placeholder(call) if spared else None
        if output is None:
            output = acting[0].output(call)
        changes = [change for site in acting for change in site.changes(call, output)]
        return hook.write(call, output, changes) if changes else output

    return lesioned


def _spared(sites: Sequence[SiteLesions], norm: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of the norm before a module, which is skipped whenever the module is."""

    def spared(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden if all(site.spares(hidden) for site in sites) else norm(hidden, *args, **kwargs)

    return spared


def _norm_before(denoiser: nn.Module, path: str) -> nn.Module | None:
    """Return the layer norm whose output only this module reads; None unless the block is known to be built so."""
    parent, _, leaf = path.rpartition(".")
    block, module = denoiser.get_submodule(parent), denoiser.get_submodule(path)
    if not isinstance(block, BasicTransformerBlock) or block.norm_type != "layer_norm" or block.pos_embed is not None:
        return None
    norm = {"attn1": block.norm1, "attn2": block.norm2, "ff": block.norm3}.get(leaf)
    # A module that changes the shape is always computed.
    return norm if isinstance(norm, nn.LayerNorm) and keeps_shape(module) else None


def _anew(value: Any) -> Any:
    """Return a tensor as a new object with the same data: `text_projected_once` caches by identity."""
    return value.view_as(value) if isinstance(value, Tensor) else value
