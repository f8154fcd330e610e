"""The effects of many lesions, estimated from gradients of un-lesioned images.

Similarity to the baseline is greatest where nothing is lesioned, so its gradient there is zero. The second order is
not: with g(s) the unit vector of an image (`views`) under strengths s, and J_l = dg/ds_l at s = 0,

    1 - <g(e_l), g(0)> = 1/2 |g(e_l) - g(0)|^2 ~ 1/2 |J_l|^2.

All |J_l| come at once by reverse mode: for directions q_1 … q_K, orthonormal and drawn at random among d dimensions,
d/K sum (q_k' J_l)^2 has the mean |J_l|^2, and is equal to it for K = d. Other metrics (similarity to the prompt's text,
a zero-shot logit, the distance from another prompt's image) are not greatest there: of these the estimate is the
derivative itself, signed.

With several points J_l is the mean of the derivatives at these strengths: the slopes q_k' J_l are averaged with their
sign, for the same directions at every point, and squared then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lesion.attribution.strengths import Strengths
from lesion.attribution.views import View
from lesion.generation.generate import call, generators, token_places
from lesion.models import Model
from lesion.study.grid import Cell
from lesion.study.lesions import Lesion, digest_of
from lesion.surgery.intervention import Intervention

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """Of a batch of images.

    effects: 1/2 |J|^2, (lesions, images). signed: of each metric its derivative, (lesions, images).
    images: made at strength 0, (images, 3, height, width) in [0, 1].
    """

    effects: Floats
    signed: Mapping[str, Floats]
    images: Tensor


@dataclass(frozen=True)
class _Slopes:
    """Of a batch of images at one point.

    probed: q'J of each direction, (probes, lesions, images). signed: derivatives, (metrics, lesions, images).
    dimensions: of the view.
    """

    probed: Floats
    signed: Floats
    images: Tensor
    dimensions: int


def estimate(
    model: Model,
    lesions: Sequence[Lesion],
    cells: Sequence[Cell],
    interventions: Mapping[str, Intervention],
    view: View,
    probes: int,
    seed: int = 0,
    signed: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    checkpointing: bool = False,
    points: Sequence[float] = (0.0,),
) -> Found:
    """Estimate the effect of each lesion on each of these images, which are made together, once a point.

    lesions: by replacements that change a site's output, or the values of text tokens; of one kind of site.
    cells: baselines of one setting.
    interventions: by `replacement_key`.
    probes: directions, at least 1; as many as the view has dimensions, or more, are exact.
    seed: of the directions; an image's also depend on its prompt and seed, not on its batch.
    signed: metrics, from images, (n, 3, height, width) in [0, 1], to a value of each, (n,).
    points: strengths of all lesions at which the gradients are taken, at least one; J is their mean.
    """
    prompts, settings = [cell.prompt for cell in cells], cells[0].settings
    device = next(model.denoiser.parameters()).device
    metrics = signed or {}
    places = token_places(model, cells, lesions=lesions)

    def slopes(point: float) -> _Slopes:
        """Make the images once with all lesions at this strength, and take the gradients there."""
        strengths = torch.full((len(lesions), len(cells)), point, device=device, requires_grad=True)
        client = Strengths(model.anatomy, lesions, strengths, interventions, checkpointing, places)
        with frozen(model):
            images = call(model, prompts, generators([cell.noise_seed for cell in cells]), settings, [client])
            assert client.latents is not None
            with torch.enable_grad():
                vectors = view(images, client.latents)
                values = [metric(images) for metric in metrics.values()]
            directions = torch.stack([_directions(cell, vectors.shape[1], probes, seed) for cell in cells], dim=1)
            directions = directions.to(vectors)
            passes = [(vectors, one) for one in directions] + [(value, torch.ones_like(value)) for value in values]
            last = len(passes) - 1  # keeps no graph
            slopes = [_gradient(what, strengths, one, n != last) for n, (what, one) in enumerate(passes)]
            found = torch.stack(slopes).double().cpu().numpy()
        return _Slopes(
            found[: len(directions)],
            found[len(directions) :],
            images.detach(),
            vectors.shape[1],
        )

    found = [slopes(point) for point in points]
    mean = np.mean([one.probed for one in found], axis=0)
    derivatives = np.mean([one.signed for one in found], axis=0)
    return Found(
        found[0].dimensions / len(mean) / 2 * (mean**2).sum(axis=0),
        dict(zip(metrics, derivatives, strict=True)),
        found[0].images,
    )


def _gradient(values: Tensor, strengths: Tensor, direction: Tensor, again: bool) -> Tensor:
    """Of <direction, value> of each image with respect to its strengths, (lesions, images)."""
    if not values.requires_grad:  # a constant
        return torch.zeros_like(strengths)
    slopes = torch.autograd.grad(values, strengths, direction, retain_graph=again, allow_unused=True)
    found: Tensor | None = slopes[0]
    return torch.zeros_like(strengths) if found is None else found


def _directions(cell: Cell, dimensions: int, probes: int, seed: int) -> Tensor:
    """Orthonormal directions of an image, (probes, dimensions), all of them where there are no more."""
    if probes >= dimensions:
        return torch.eye(dimensions)
    number = int(digest_of([cell.prompt.text, cell.seed, seed])[:15], 16)
    drawn = torch.randn(dimensions, probes, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    found: Tensor = torch.linalg.qr(drawn).Q.T
    return found


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """No weight wants a gradient within the block: a backward pass then costs little more than a forward one."""
    parts = [part for part in model.pipe.components.values() if isinstance(part, torch.nn.Module)]
    weights = [one for part in parts for one in part.parameters() if one.requires_grad]
    with ExitStack() as stack:
        for one in weights:
            stack.callback(one.requires_grad_, True)
            one.requires_grad_(False)
        yield
