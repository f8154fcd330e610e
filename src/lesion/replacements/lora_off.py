"""`lora_off`: the layer runs without the LoRAs of `model.loras`, as if their weights were 0 there; all else stays.

It asks which layers carry a LoRA's effect: the baseline has the LoRA everywhere. `layers.kind` says which modules of a
layer lose it. At a strength between 0 and 1 a site's output is a mixture of those with and without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

from lesion.errors import RequestError
from lesion.surgery.intervention import Intervention

if TYPE_CHECKING:
    from torch import nn

    from lesion.models import ModelSpec
    from lesion.replacements import Bench


class LoraOff(Intervention):
    """The site without its LoRAs.

    layers: of each site, the layers to which PEFT has put low-rank matrices; the layer beneath runs alone.
    """

    changes = "condition"
    kinds = ("cross_attention", "self_attention", "joint_attention", "feed_forward", "block")
    heads = False  # a LoRA belongs to all heads of a projection
    compiled = False

    def __init__(self, layers: Mapping[str, list[Any]]):
        self.layers = layers

    @classmethod
    def check_model(cls, model: ModelSpec) -> None:
        """Raise RequestError if the model is asked for without a LoRA."""
        if not model.loras:
            raise RequestError(
                "replacement", "lora_off has no LoRA to take off; name one in model.loras: [{path: FOLDER}]"
            )

    @classmethod
    def build(cls, options: Mapping[str, Any], bench: Bench) -> Self:
        from peft.tuners.tuners_utils import BaseTunerLayer

        anatomy, denoiser = bench.model.anatomy, bench.model.denoiser
        if shared := [path for path, site in anatomy.by_path.items() if site.hook.module != path]:
            raise RequestError(
                "replacement", f"lora_off: attention and MLP share their projections in {shared[0]}; use kind=block"
            )
        layers = {
            site: [part for part in denoiser.get_submodule(site).modules() if isinstance(part, BaseTunerLayer)]
            for sites in anatomy.sites.values()
            for site in sites
        }
        if not any(layers.values()):
            raise RequestError(
                "replacement", f"lora_off: no LoRA has a weight in a {anatomy.kind} module of the denoiser"
            )
        if any(layer.merged for parts in layers.values() for layer in parts):
            raise RequestError("replacement", "lora_off cannot take off a LoRA that is fused into the weights")
        return cls(layers)

    @contextmanager
    def rerun(self, site: str, module: nn.Module) -> Iterator[None]:
        from lesion.denoising.wrapping import forward_replaced

        with ExitStack() as stack:
            for layer in self.layers[site]:  # also past what is remembered of its output
                stack.enter_context(forward_replaced(layer, _only(layer.base_layer)))
            yield


def _only(beneath: nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a `forward` that is this module's own; a plain function, since a wrapper's attributes are set on it."""

    def alone(*args: Any, **kwargs: Any) -> Any:
        return beneath(*args, **kwargs)

    return lambda forward: alone
