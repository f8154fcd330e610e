"""The autoencoder's decode: all images at once, and a few at a time where they do not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lesion.denoising.wrapping import method_replaced
from lesion.models import memory
from lesion.models.precision import stock, tf32
from lesion.models.source import STOCK
from lesion.study.components import VAE
from lesion.surgery.components import ComponentLesions

log = logging.getLogger(__name__)
INDEXED = 2**31  # elements of a tensor from which on CUDA's kernels take slower ways, or fail


def most_at_once(config: Mapping[str, Any], shape: Sequence[int]) -> int:
    """How many images a decoder can make without a tensor of INDEXED elements; `shape` of the latents, 4-D.

    The largest is at full resolution with the channels of the level below. All of them where nothing is known.
    """
    channels = config.get("decoder_block_out_channels") or config.get("block_out_channels")
    if not channels or len(shape) != 4:
        return shape[0]
    scale: int = 2 ** (len(channels) - 1)
    largest: int = max(channels[:2]) * shape[2] * shape[3] * scale * scale
    return max(1, (INDEXED - 1) // largest)


@contextmanager
def decoding(vae: Any, fitting: dict[torch.Size, int], precision: str = "") -> Iterator[None]:
    """Within it `vae.decode` makes as many images at once as fit, and no others are lost where they do not.

    All at once as long as memory allows, as the pipeline does by itself: slices round differently. After running out of
    memory they are halved; the denoising that led there is not done again.

    fitting: how many fitted, by the shape of one image's latents; kept for the next call.
    precision: of the decoder's products, whatever the model computes in, as `decoder_of` says it.
    """
    if not hasattr(vae, "decode"):
        yield
        return

    def sliced(decode: Callable[..., Any]) -> Callable[..., Any]:
        def decoded(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            size = min(len(z), fitting.get(z.shape[1:], len(z)))
            if z.is_cuda and not getattr(vae, "use_tiling", False):
                size = min(size, most_at_once(vae.config, z.shape))
            while True:
                try:
                    with _in(precision, z.device.type):
                        outputs = [decode(*one, **named) for one, named in _slices(z, args, kwargs, size)]
                    return _joined(outputs, z.dtype)
                except Exception as error:  # its traceback holds tensors: released only after this block
                    if size == 1 or not memory.ran_out(error):
                        raise
                memory.release(str(z.device))
                size = fitting[z.shape[1:]] = size // 2
                log.info("out of memory while decoding; images are decoded %d at a time", size)

        return decoded

    with method_replaced(vae, "decode", sliced):
        yield


@contextmanager
def decoding_apart(vae: Any, lesions: ComponentLesions | None) -> Iterator[None]:
    """Within it `vae.decode` makes images with different lesions of the decoder in calls of their own."""
    if lesions is None or not hasattr(vae, "decode"):
        yield
        return

    def apart(decode: Callable[..., Any]) -> Callable[..., Any]:
        def decoded(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            groups: dict[Any, list[int]] = {}
            for row, what in enumerate(lesions.of_images(VAE, len(z))):
                groups.setdefault(what, []).append(row)
            outputs = []
            for what, rows in groups.items():
                one, named = _some(z, args, kwargs, rows) if len(groups) > 1 else ((z, *args), kwargs)
                with lesions.at_work(VAE, vae, what):
                    outputs.append(decode(*one, **named))
            if len(outputs) == 1:
                return outputs[0]
            made = [row for rows in groups.values() for row in rows]
            return _joined(outputs, z.dtype, sorted(range(len(z)), key=made.__getitem__))

        return decoded

    with method_replaced(vae, "decode", apart):
        yield


def _slices(z: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], size: int) -> Iterator[tuple[Any, Any]]:
    """Arguments of each slice of the images."""
    if size == len(z):
        yield (z, *args), dict(kwargs)
        return
    for start in range(0, len(z), size):
        yield _some(z, args, kwargs, range(start, min(start + size, len(z))))


def _some(z: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], rows: Sequence[int]) -> tuple[Any, Any]:
    """Arguments for some of the images: what has a value for each image is picked with the latents."""

    def picked(value: Any) -> Any:
        if not isinstance(value, Tensor | list | tuple) or len(value) != len(z):
            return value
        if isinstance(rows, range):
            return value[rows.start : rows.stop]  # of a tensor no copy
        return value[rows] if isinstance(value, Tensor) else [value[row] for row in rows]

    return (picked(z), *map(picked, args)), {name: picked(value) for name, value in kwargs.items()}


def _joined(outputs: list[Any], dtype: torch.dtype, order: list[int] | None = None) -> Any:
    """One output of all images, in the precision of their latents; of a single slice the very output where it has it.

    A decoder puts out a tensor, a tuple or diffusers' output class. order: places of the images; None: as they are.
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        whole = torch.cat(outputs) if len(outputs) > 1 else first
        return (whole if order is None else whole[order]).to(dtype)
    if isinstance(first, tuple):
        return (_joined([output[0] for output in outputs], dtype, order), *first[1:])
    return type(first)(sample=_joined([output.sample for output in outputs], dtype, order))


def _in(precision: str, device: str) -> Any:
    if precision in ("tf32", STOCK):
        return tf32() if precision == "tf32" else stock()
    return torch.autocast(device, torch.bfloat16) if precision == "bfloat16" else nullcontext()
