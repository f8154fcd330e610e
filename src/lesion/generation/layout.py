"""Layout guidance as a client of a denoising run: latents move so that words look into their boxes.

Chen, Laina, Vedaldi: Training-Free Layout Control with Cross-Attention Guidance, arXiv 2304.03373. The maps come from
the sites' own queries and keys (`lesion.surgery.attention`): no attention processor is swapped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lesion.denoising.run import COND, Client, DenoiserCall, Denoising, SchedulerStep
from lesion.study.boxes import Corners
from lesion.study.lesions import Lesion, covers
from lesion.study.steering import STEERING_OFF, Layout, within
from lesion.surgery.anatomy import Anatomy
from lesion.surgery.attention import SiteCall, watched


@dataclass(frozen=True)
class Target:
    """One box of one image. columns: of its words in the attention maps. box: as shares of width and height."""

    columns: tuple[int, ...]
    box: Corners


def box_mask(box: Corners, height: int, width: int, form: str) -> Tensor:
    """Return how far each cell of a map lies in a box, (height, width) in [0, 1].

    form: `whole` takes the cells from int(low * cells) to int(high * cells), the last excluded, as the publication's
        code does; on small maps that can be none. `covered` takes of each cell the share that the box covers.
    """
    x_min, y_min, x_max, y_max = box
    if form == "whole":
        mask = torch.zeros(height, width)
        mask[int(y_min * height) : int(y_max * height), int(x_min * width) : int(x_max * width)] = 1
        return mask

    def along(low: float, high: float, cells: int) -> Tensor:
        edges = torch.arange(cells + 1, dtype=torch.float64)
        return (edges[1:].clamp(max=high * cells) - edges[:-1].clamp(min=low * cells)).clamp(min=0)

    return torch.outer(along(y_min, y_max, height), along(x_min, x_max, width)).float()


def shares_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Return which share of a token's attention lies in each box: (rows, heads, boxes, tokens), in [0, 1].

    maps: attention probabilities, (rows, heads, image tokens, text tokens).
    masks: (rows, boxes, image tokens).
    """
    inside = torch.einsum("rhpt,rbp->rhbt", maps, masks)
    return inside / maps.sum(dim=2).clamp(min=torch.finfo(maps.dtype).tiny)[:, :, None]


def layout_losses(maps: Sequence[Tensor], masks: Sequence[Tensor], tokens: Tensor, weights: Tensor) -> Tensor:
    """Return the loss of each image, (rows,), in [0, 1].

    It is `(1 - attention inside the box / all attention)^2`, averaged over heads, the tokens of a box, boxes and maps.

    maps: of each site, (rows, heads, image tokens, text tokens).
    masks: of each site, (rows, boxes, image tokens).
    tokens: 1 where a token is one of the box's, (rows, boxes, text tokens); a box without tokens is none.
    weights: of each site in the average over maps, (sites, rows); where all are 0 the loss is 0.
    """
    each = _mean_of_boxes(tokens)
    losses = torch.stack(
        [
            ((1 - shares_inside(one, mask)) ** 2).mean(dim=1).mul(each).sum(dim=(1, 2))
            for one, mask in zip(maps, masks, strict=True)
        ]
    )
    return (losses * weights).sum(0) / weights.sum(0).clamp(min=torch.finfo(weights.dtype).tiny)


def _mean_of_boxes(tokens: Tensor) -> Tensor:
    """Weights with which a sum over boxes and tokens is the mean over a box's tokens, then over an image's boxes."""
    of_box = tokens.sum(dim=2, keepdim=True)
    boxes = (of_box > 0).sum(dim=1, keepdim=True)
    return tokens / of_box.clamp(min=1) / boxes.clamp(min=1)


def sigma_squared(scheduler: Any, calls: int, call: int) -> float:
    """Return the square of the noise's standard deviation beside an unscaled image, at a denoiser call.

    From the scheduler's sigmas where it has some, else from its alphas: (1 - a) / a.
    calls: denoiser calls of the run, fewer than the scheduler's timesteps in img2img. call: its number, from 0.

    Raises RuntimeError where it is infinite.
    """
    index = len(scheduler.timesteps) - calls + call
    if (sigmas := getattr(scheduler, "sigmas", None)) is not None:
        return float(sigmas[index]) ** 2
    alpha = float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])])
    return (1 - alpha) / alpha if alpha > 0 else math.inf


class _Seen(Exception):
    """The last steering site has been called: nothing further is needed of this forward pass."""


class Steering(Client):
    """Steers images to their boxes, and measures how much attention lies in these.

    layout: with the module paths of the layers that steer.
    anatomy: of `text_attention(denoiser)`.
    targets: the boxes of each image; an image without boxes is left alone.
    lesions: of each image; one by `steering_off` takes its layers' maps out of the loss.
    aspect: height over width of the images.
    whole: call the denoiser on both branches when it is asked for gradients; else on the conditional one alone, which
        is not what lesions that read the other branch need.

    mass: of each image, the share of its words' attention that lies in their boxes: mean over the denoising steps, the
    layers that steer (also those that a lesion takes out of the loss), heads, tokens and boxes. NaN without boxes.
    """

    gradients = True

    def __init__(
        self,
        layout: Layout,
        anatomy: Anatomy,
        targets: Sequence[Sequence[Target]],
        lesions: Sequence[Lesion | None] = (),
        aspect: float = 1.0,
        whole: bool = False,
    ):
        self.layout, self.targets, self.aspect, self.whole = layout, targets, aspect, whole
        self.sites = [anatomy.by_path[path] for layer in layout.layers for path in anatomy.sites[layer]]
        self.lesions = lesions or [None] * len(targets)
        self._sum, self._calls = torch.zeros(len(targets), dtype=torch.float64), 0
        self._asked: dict[Any, Tensor] = {}
        self._maps: dict[str, Tensor] | None = None  # of the forward pass under way, None where nobody looks
        self._wanted: set[str] | None = None  # sites whose maps a gradient needs, while one is computed
        self._move: Tensor | None = None

    @property
    def mass(self) -> list[float]:
        return [
            float(total) / self._calls if self._calls and boxes else math.nan
            for total, boxes in zip(self._sum, self.targets, strict=True)
        ]

    @contextmanager
    def attached(self, run: Denoising) -> Iterator[None]:
        if not any(self.targets):
            yield
            return
        parameters = [one for one in run.denoiser.parameters() if one.requires_grad]
        try:
            for one in parameters:  # gradients are wanted of the latents alone
                one.requires_grad_(False)
            with watched(run.denoiser, self.sites, self._look):
                yield
        finally:
            for one in parameters:
                one.requires_grad_(True)

    def before_call(self, run: Denoising, call: DenoiserCall) -> None:
        self._move = None
        if call.output is not None or not any(self.targets):
            return
        if run.call < self.layout.steps and self.layout.iterations:
            self._steer(run, call)
        self._maps = {}
        self._rows = slice(int((run.branches(len(call.sample)) != COND).sum()), None)

    def after_call(self, run: Denoising, call: DenoiserCall) -> None:
        if self._maps:
            found = [
                shares_inside(one, self._masks(one)).mean(dim=1).mul(_mean_of_boxes(self._tokens(one))).sum(dim=(1, 2))
                for one in self._maps.values()
            ]
            self._sum += torch.stack(found).mean(0).double().cpu()
            self._calls += 1
        self._maps = None

    def before_step(self, run: Denoising, step: SchedulerStep) -> None:
        if self._move is not None:
            step.sample = step.sample - self._move.to(step.sample.dtype)
            self._move = None

    def _look(self, call: SiteCall) -> None:
        if self._maps is None or (self._wanted is not None and call.site.path not in self._wanted):
            return
        found = call.probabilities(self._rows)
        if call.site.path in self._maps:  # under checkpointing, once more while gradients are computed
            return
        self._maps[call.site.path] = found
        if self._wanted is not None and len(self._maps) == len(self._wanted):
            raise _Seen

    def _steer(self, run: Denoising, call: DenoiserCall) -> None:
        """Move the latents of this call, and note the move for the scheduler's step."""
        scheduler, layout = run.pipe.scheduler, self.layout
        branches = run.branches(len(call.sample))
        first = int((branches != COND).sum())
        others, start = call.sample[:first], call.sample[first:].detach()
        index = len(scheduler.timesteps) - run.calls + run.call
        one = torch.ones(1, device=start.device)
        scaled = float(scheduler.scale_model_input(one, scheduler.timesteps[index]))  # input = scaled * latents
        variance = sigma_squared(scheduler, run.calls, run.call)
        if layout.step_size == "sigma_squared" and not math.isfinite(variance):
            raise RuntimeError(
                f"sigma is infinite at the first step of {type(scheduler).__name__}; allowed here: "
                "steering.step_size=noise_share"
            )
        # Of the gradient with respect to the input, in units of the input: input = scaled * latents on both sides.
        share = variance / (1 + variance) if math.isfinite(variance) else 1.0
        factor = share if layout.step_size == "noise_share" else variance * scaled**2
        weights = self._weights(run.call, run.calls, start.device)
        moving = torch.tensor([bool(boxes) for boxes in self.targets], device=start.device) & (weights.sum(0) > 0)
        precise = start.to(torch.promote_types(start.dtype, torch.float32))
        moved = precise
        for _ in range(layout.iterations):
            rows = moving.nonzero().flatten()
            if not len(rows):
                break
            losses, gradient = self._gradient(run, call, others, moved.to(start.dtype), weights, rows)
            on = losses >= layout.threshold
            moving[rows] = on
            step = layout.scale * factor * gradient.to(precise.dtype)
            moved = moved.index_add(0, rows[on], -step[on])
        change = precise - moved
        if not change.any():
            return
        self._move = change / scaled
        _with_sample(call, torch.cat([moved.to(start.dtype)] * (len(call.sample) // len(start))))

    def _gradient(
        self,
        run: Denoising,
        call: DenoiserCall,
        others: Tensor,
        latents: Tensor,
        weights: Tensor,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of these images, (rows,), and the gradient of their sum with respect to the input.

        rows: numbers of images, ascending; None for all. Those that are done cost nothing: where no lesion reads the
        other branch, the denoiser is called on these rows alone. It is run as far as the last site that any of them
        has in its loss.
        """
        rows = torch.arange(len(latents), device=latents.device) if rows is None else rows
        weights = weights[:, rows]
        sites = [site for site, weight in zip(self.sites, weights.sum(1).tolist(), strict=True) if weight]
        weights = weights[weights.sum(1) > 0]
        with torch.enable_grad(), run.aside(), _checkpointed(run.denoiser, self.layout.checkpointing):
            if self.whole and len(others):
                latents = latents.detach().clone().requires_grad_()
                sample, args, kwargs = torch.cat([others, latents]), call.args, call.kwargs
                self._rows, shown = slice(len(others), None), rows
            else:
                latents = latents[rows].detach().requires_grad_()
                at, total = len(others) + rows, len(call.sample)
                args, kwargs = _picked(call.args, total, at), _picked(call.kwargs, total, at)
                sample, self._rows, shown = latents, slice(None), None
            one = DenoiserCall(list(args), dict(kwargs))
            _with_sample(one, sample)
            self._maps, self._wanted = {}, {site.path for site in sites}
            try:
                with suppress(_Seen):
                    run.denoiser(*one.args, **one.kwargs)
                maps = [self._maps[site.path] for site in sites]
                if shown is not None:
                    maps = [map_[shown] for map_ in maps]
                masks = [self._masks(map_)[rows] for map_ in maps]
                losses = layout_losses(maps, masks, self._tokens(maps[0])[rows], weights)
                if bool((losses < self.layout.threshold).all()):  # none of them moves
                    return losses.detach(), torch.zeros_like(latents if shown is None else latents[shown])
                (gradient,) = torch.autograd.grad(losses.sum(), latents)
            finally:
                self._maps = self._wanted = None
        return losses.detach(), gradient if shown is None else gradient[shown]

    def _weights(self, call: int, calls: int, device: torch.device) -> Tensor:
        """Return the weight of each site's map in each image's loss, (sites, rows)."""
        found = torch.ones(len(self.sites), len(self.targets))
        for row, lesion in enumerate(self.lesions):
            if lesion and lesion.replacement.name == STEERING_OFF and covers(lesion.window, call, calls):
                for number, site in enumerate(self.sites):
                    if any(within(site.path, layer) for layer in lesion.layers):
                        found[number, row] -= lesion.strength
        return found.to(device)

    def _tokens(self, like: Tensor) -> Tensor:
        """Return 1 where a text token is one of a box's, (rows, boxes, text tokens)."""
        key = ("tokens", like.shape[-1], like.device, like.dtype)
        if key not in self._asked:
            found = torch.zeros(len(self.targets), max(map(len, self.targets)), like.shape[-1])
            for row, boxes in enumerate(self.targets):
                for number, target in enumerate(boxes):
                    found[row, number, list(target.columns)] = 1
            self._asked[key] = found.to(like)
        return self._asked[key]

    def _masks(self, like: Tensor) -> Tensor:
        """Return the boxes' masks on a map of so many image tokens, (rows, boxes, image tokens)."""
        key = ("masks", like.shape[2], like.device, like.dtype)
        if key not in self._asked:
            height, width = grid(like.shape[2], self.aspect)
            found = torch.zeros(len(self.targets), max(map(len, self.targets)), like.shape[2])
            for row, boxes in enumerate(self.targets):
                for number, target in enumerate(boxes):
                    found[row, number] = box_mask(target.box, height, width, self.layout.mask).flatten()
            self._asked[key] = found.to(like)
        return self._asked[key]


def grid(tokens: int, aspect: float) -> tuple[int, int]:
    """Return rows and columns of a map of so many image tokens. aspect: height over width of the image.

    Raises RuntimeError where no grid of that many cells is near this aspect.
    """
    height = min(
        (side for side in range(1, tokens + 1) if tokens % side == 0),
        key=lambda side: abs(math.log(side * side / tokens / aspect)),
    )
    width = tokens // height
    if abs(height / width / aspect - 1) > 0.5:
        raise RuntimeError(f"a map of {tokens} image tokens is no grid of height / width {aspect:g}")
    return height, width


def _picked(value: Any, rows: int, at: Tensor) -> Any:
    """Return `value` with the rows `at` of every tensor in it that has `rows` of them."""
    if isinstance(value, Tensor):
        return value[at] if value.dim() and len(value) == rows else value
    if isinstance(value, Mapping):
        return {key: _picked(one, rows, at) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_picked(one, rows, at) for one in value)
    return value


def _with_sample(call: DenoiserCall, sample: Tensor) -> None:
    if call.args:
        call.args[0] = sample
    else:
        call.kwargs["sample" if "sample" in call.kwargs else "hidden_states"] = sample


@contextmanager
def _checkpointed(denoiser: Any, wanted: bool) -> Iterator[None]:
    if not wanted or not hasattr(denoiser, "enable_gradient_checkpointing"):
        yield
        return
    denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        denoiser.disable_gradient_checkpointing()
