"""How busy the denoiser keeps a CPU: its operations a second over the machine's own peak, and what could raise them.

All in one run: square matrix products and convolutions of many channels are the peak; the denoiser's own products,
convolutions and attentions are also run one by one, which tells how much of its time goes elsewhere.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from bench.report import Row, alternate, number, ratios
from bench.setup import Options, Setup, loaded
from lesion.denoising.run import Enough
from lesion.generation.generate import generate
from lesion.models.loading import compile_blocks

BATCHES = (8, 16, 32, 64)
SIDES = (512, 1024, 2048)  # of square products
CONVOLUTIONS = ((8, 128, 64), (8, 256, 32), (8, 512, 32))  # images, channels in and out, side; 3 x 3
AS_IT_IS, WHOLE, FREEZING = "as it is", "compiled as a whole", "compiled as a whole, weights frozen"
SECONDS = 1.0  # that one figure of the peak takes at least
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch's counter does not know it
KINDS = {
    **dict.fromkeys((torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm), "products"),
    torch.ops.aten.convolution: "convolutions",
    ATTENTION: "attention",
}


def peak(this: Setup, options: Options) -> tuple[str, list[Row]]:
    """The share of the peak in float32 and bfloat16, or in the precision asked for; then what could raise it."""
    rows: list[Row] = []
    for dtype in (options.dtype,) if options.dtype else ("float32", "bfloat16"):
        rows += _shares(this, options, dtype) + _candidates(this, options, dtype)
    note = (
        f"One call of the denoiser on the {2 * this.batch} rows of a batch, without lesions. Operations are counted "
        "by torch's flop counter, with attention. The peak is the faster of square matrix products and of 3 x 3 "
        "convolutions of many channels. `alone`: the call's own products, convolutions and attentions, each run by "
        f"itself on its own tensors. Frozen weights are constants of compiled code, and so would be all that puts "
        f"lesions on it. {this.said().replace(f', {this.dtype}', '')}."
    )
    return note, rows


@dataclass(frozen=True)
class Call:
    """A call of the denoiser. operations: that it takes."""

    module: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operations: int = 0

    def seconds(self) -> float:
        began = time.perf_counter()
        with torch.no_grad():
            self.module(*self.args, **self.kwargs)
        return time.perf_counter() - began


def _call(this: Setup, dtype: str, images: int) -> Call:
    """The first call of the denoiser for so many images."""
    _, study, model = loaded([*this.overrides(images, dtype), "selection=none", f"generation.batch_size={images}"])
    cells = list(study.cells())
    cells = (cells * images)[:images]
    seen: list[tuple[Any, Any]] = []

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))
        raise Enough

    handle = model.denoiser.register_forward_pre_hook(see, with_kwargs=True)
    with suppress(Enough):
        generate(model, cells, {})
    handle.remove()
    args, kwargs = tree_map_only(Tensor, Tensor.clone, seen[0])  # no inference tensors, which compiled code sees apart
    return Call(model.denoiser, args, kwargs, operations(lambda: model.denoiser(*args, **kwargs)))


def operations(work: Callable[[], object]) -> int:
    """Multiplications and additions of matrix products, convolutions and attentions."""

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={ATTENTION: attention}) as counter:
        work()
    return int(counter.get_total_flops())


class _Noted(TorchDispatchMode):
    """Notes the operators that multiply, with their arguments, how often each is called on tensors of these shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, list[Any]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kind := KINDS.get(function.overloadpacket):
            form = [(one.shape, one.stride()) if isinstance(one, Tensor) else one for one in args]
            self.found.setdefault((kind, str((function, form))), [0, function, args, kwargs or {}])[0] += 1
        return function(*args, **(kwargs or {}))


@dataclass
class Alone:
    """Operators of one kind run by themselves: operations and seconds."""

    operations: int = 0
    seconds: float = 0.0


def alone(call: Call, least: float) -> dict[str, Alone]:
    """The operators of a call that multiply, run one by one, by kind. least: seconds that one is repeated for."""
    with torch.no_grad(), _Noted() as noted:
        call.module(*call.args, **call.kwargs)
    found: defaultdict[str, Alone] = defaultdict(Alone)
    for (kind, _), (times, function, args, kwargs) in noted.found.items():

        def work(function: Any = function, args: Any = args, kwargs: Any = kwargs) -> object:
            return function(*args, **kwargs)

        found[kind].operations += times * operations(work)
        found[kind].seconds += times * _median(work, least)
    return dict(found)


def _median(work: Callable[[], object], least: float) -> float:
    """Median seconds of some work, which is repeated for so many seconds, twice at least; the first is not counted."""
    with torch.no_grad():
        work()
        times: list[float] = []
        while sum(times) < least or len(times) < 2:
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def peaks(dtype: torch.dtype, quick: bool) -> dict[str, float]:
    """Operations a second of the fastest square product and of the fastest convolution."""
    best: dict[str, float] = {}
    least = 0.01 if quick else SECONDS
    for side in (64,) if quick else SIDES:
        a, b = (torch.randn(side, side, dtype=dtype) for _ in range(2))
        rate = 2 * side**3 / _median(lambda a=a, b=b: a @ b, least)  # type: ignore[misc]
        best["products"] = max(rate, best.get("products", 0.0))
    for images, channels, side in ((2, 16, 8),) if quick else CONVOLUTIONS:
        x, weight = (
            torch.randn(images, channels, side, side, dtype=dtype),
            torch.randn(channels, channels, 3, 3, dtype=dtype),
        )
        for layout in (torch.contiguous_format, torch.channels_last):
            y, kernel = x.to(memory_format=layout), weight.to(memory_format=layout)
            work = lambda y=y, kernel=kernel: functional.conv2d(y, kernel, padding=1)  # type: ignore[misc] # noqa: E731
            rate = operations(work) / _median(work, least)
            best["convolutions"] = max(rate, best.get("convolutions", 0.0))
    return best


def _shares(this: Setup, options: Options, dtype: str) -> list[Row]:
    call, least = _call(this, dtype, this.batch), 0.001 if options.quick else 0.2
    call.seconds()
    best: defaultdict[str, list[float]] = defaultdict(list)
    each: defaultdict[str, list[Alone]] = defaultdict(list)
    seconds = []
    for _ in range(options.repeats):
        for kind, rate in peaks(getattr(torch, dtype), options.quick).items():
            best[kind].append(rate)
        seconds.append(call.seconds())
        for kind, one in alone(call, least).items():
            each[kind].append(one)
    rows = [Row(f"{kind}, {dtype}", "peak", [rate / 1e9 for rate in rates], " GFLOP/s") for kind, rates in best.items()]
    rows += [
        Row(
            f"{kind}, {dtype}",
            f"alone, {number(100 * found[0].operations / call.operations)}% of the call's operations",
            [one.operations / one.seconds / 1e9 for one in found],
            " GFLOP/s",
        )
        for kind, found in each.items()
    ]
    highest = [max(both) for both in zip(*best.values(), strict=True)]
    together = [sum(one.seconds for one in ones) for ones in zip(*each.values(), strict=True)]
    what = f"{number(call.operations / 1e9)} GFLOP"
    return [
        *rows,
        Row(f"call, {dtype}", f"{what}, seconds", seconds, " s"),
        Row(
            f"share, {dtype}",
            "operations a second / the higher peak",
            [100 * call.operations / spent / rate for spent, rate in zip(seconds, highest, strict=True)],
            "%",
        ),
        Row(
            f"multiplying, {dtype}",
            "seconds of its products, convolutions and attentions alone / of the call",
            [100 * one / spent for one, spent in zip(together, seconds, strict=True)],
            "%",
        ),
    ]


def _candidates(this: Setup, options: Options, dtype: str) -> list[Row]:
    """Seconds an image of a call under each, over those as it is. All are compiled, and run twice, before that."""
    call = _call(this, dtype, this.batch)
    sides: dict[str, Callable[[], float]] = {AS_IT_IS: lambda: call.seconds() / this.batch}
    for images in (2,) if options.quick else BATCHES:
        if images != this.batch:
            other = _call(this, dtype, images)
            sides[f"batches of {images}"] = lambda other=other, images=images: other.seconds() / images  # type: ignore[misc]
    threads = torch.get_num_threads()
    if threads > 1:
        sides[f"1 of {threads} threads"] = lambda: _on_threads(call, 1) / this.batch
    changes: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {"channels_last": _channels_last}
    if shutil.which("g++") and not options.quick:
        frozen = partial(torch.compile, options={"freezing": True})
        changes |= {"compiled blocks": _compiled_blocks, WHOLE: torch.compile, FREEZING: frozen}
    failed: dict[str, str] = {}
    for name, change in changes.items():
        # Dynamo and the memory format change a module for good.
        one = replace(call, module=change(copy.deepcopy(call.module)))
        try:
            for _ in range(2):
                one.seconds()
        except Exception as error:  # whatever a compiler raises
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"
            continue
        sides[name] = lambda one=one: one.seconds() / this.batch  # type: ignore[misc]
    found = alternate(options.repeats, sides)
    what = "seconds an image of a call / as it is"
    base = found.pop(AS_IT_IS)
    rows = [Row(f"{AS_IT_IS}, {dtype}", "seconds an image of a call", base, " s")]
    rows += [Row(f"{name}, {dtype}", what, ratios(values, base), "x") for name, values in found.items()]
    return rows + [Row(f"{name}, {dtype}", what, text=why) for name, why in failed.items()]


def _on_threads(call: Call, threads: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call.seconds()
    finally:
        torch.set_num_threads(before)


def _channels_last(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _compiled_blocks(module: nn.Module) -> nn.Module:
    compile_blocks(module)
    return module
