"""One denoising run: a pipeline's way from noise to images, as an object with events.

The pipeline runs its own loop. `Denoising` stands between it, its denoiser and its scheduler: it alone counts denoiser
calls and scheduler steps, knows the guidance branch of every row, and tells its clients. Lesions, snapshots and
calibration are clients; so is whatever else looks into a run or steers it. A client is a subclass of `Client` with the
events that it needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lesion.denoising.wrapping import forward_replaced, method_replaced

UNCOND, COND = 0, 1  # branches of classifier-free guidance


class Enough(Exception):
    """Raised by a client in an event: it has what it wanted, and nobody needs the images."""


@dataclass
class DenoiserCall:
    """One call of the denoiser.

    args, kwargs: its arguments; a client may change them before the call.
    output: what it puts out; None before the call. A client that sets it before the call answers in the denoiser's
        place, one that sets it after the call changes the answer.
    """

    args: list[Any]
    kwargs: dict[str, Any]
    output: Any = None

    @property
    def sample(self) -> Tensor:
        """The noisy latents among the arguments, (rows, …); of Z-Image a list with one tensor a row. UNets and
        transformers name them differently."""
        return sample_of(self.args, self.kwargs)


@dataclass
class SchedulerStep:
    """One step of the scheduler.

    sample: the latents before it; a client may change them before the step.
    latents: its result; None before the step. A client that sets it before the step answers in the scheduler's place,
        one that sets it after the step changes the result.
    """

    sample: Tensor
    latents: Tensor | None = None


class Client:
    """Something that takes part in a denoising run. Every event does nothing unless a subclass says otherwise."""

    gradients: ClassVar[bool] = False
    """Whether its events compute gradients. The run is then under `no_grad` instead of `inference_mode`; an event that
    wants gradients says `torch.enable_grad()` itself."""
    throughout: ClassVar[bool] = False
    """Whether gradients flow through the whole run, from what its events change to the images."""

    def attached(self, run: Denoising) -> AbstractContextManager[None]:
        """Return a context that is entered before the pipeline is called and left after it, whatever happens."""
        return nullcontext()

    def before_call(self, run: Denoising, call: DenoiserCall) -> None:
        """Before the denoiser is called."""

    def after_call(self, run: Denoising, call: DenoiserCall) -> None:
        """After the denoiser was called, or a client answered in its place."""

    def before_step(self, run: Denoising, step: SchedulerStep) -> None:
        """Before a scheduler step."""

    def after_step(self, run: Denoising, step: SchedulerStep) -> None:
        """After a scheduler step that the scheduler itself made."""


class Denoising:
    """One call of a pipeline.

    pipe: a diffusers pipeline.
    denoiser: its UNet or transformer.
    samples: images of the call.
    clients: in the order in which they are told of an event.
    """

    def __init__(self, pipe: Any, denoiser: nn.Module, samples: int, clients: Sequence[Client] = ()):
        self.pipe, self.denoiser, self.samples, self.clients = pipe, denoiser, samples, tuple(clients)
        self.steps = 0  # scheduler steps done
        self._call = -1
        self._calls: int | None = None
        self._aside = False
        self.half: int | None = None  # COND or UNCOND while a pipeline calls its denoiser for one branch alone

    @property
    def calls(self) -> int:
        """Denoiser calls from noise to images. Known from the first call on: the pipeline then has its timesteps."""
        if self._calls is None:
            self._calls = calls_in(self.pipe)
        return self._calls

    @property
    def call(self) -> int:
        """Number of the present denoiser call, from 0.

        Raises RuntimeError where the pipeline calls its denoiser more than once a step.
        """
        if self._call >= self.calls:
            raise RuntimeError(
                f"the denoiser is called more often than the {self.calls} timesteps of "
                f"{type(self.pipe.scheduler).__name__} (a guidance that calls it twice a step?); "
                "steps and branches cannot be told apart"
            )
        return self._call

    def branches(self, rows: int) -> Tensor:
        """The guidance branch of each row of a denoiser call, (rows,)."""
        if self.half is not None:
            return torch.full((rows,), self.half)
        branches = branches_of(rows, self.samples)
        return branches.flip(0) if type(self.pipe).__name__.startswith(_COND_FIRST) else branches

    @property
    def is_aside(self) -> bool:
        """Whether a client is calling the denoiser for itself."""
        return self._aside

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within it a client may call the denoiser for itself: such a call counts for nothing and tells nobody."""
        before, self._aside = self._aside, True
        try:
            yield
        finally:
            self._aside = before

    @property
    def differentiable(self) -> bool:
        """Whether gradients flow through the whole run."""
        return any(client.throughout for client in self.clients)

    @property
    def pipeline(self) -> Callable[..., Any]:
        """The pipeline's call. Diffusers forbids gradients around it: where they flow it is what stands within.

        Raises RuntimeError for a pipeline whose call cannot be had without that.
        """
        if not self.differentiable:
            return self.pipe  # type: ignore[no-any-return]
        plain = getattr(type(self.pipe).__call__, "__wrapped__", None)
        if plain is None:
            raise RuntimeError(f"gradients cannot flow through {type(self.pipe).__name__}: its call is not `no_grad`'s")
        return functools.partial(plain, self.pipe)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Call `pipeline` within this block, once."""
        with ExitStack() as stack:
            looks = any(client.gradients for client in self.clients)
            mode = torch.enable_grad if self.differentiable else torch.no_grad if looks else torch.inference_mode
            stack.enter_context(mode())
            if self.clients:
                stack.enter_context(forward_replaced(self.denoiser, self.told))
                if hasattr(self.denoiser, "cache_context"):
                    stack.enter_context(method_replaced(self.denoiser, "cache_context", self._told_of_half))
            if any(_tells(client, "before_step") or _tells(client, "after_step") for client in self.clients):
                stack.enter_context(method_replaced(self.pipe.scheduler, "step", self._told_of_steps))
            for client in self.clients:
                stack.enter_context(client.attached(self))
            yield

    def told(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return what calls the denoiser's `forward` and tells the clients."""

        def told(*args: Any, **kwargs: Any) -> Any:
            if self._aside:
                return forward(*args, **kwargs)
            self._call += self.half != UNCOND  # the second half of a step
            call = DenoiserCall(list(args), kwargs)
            for client in self.clients:
                client.before_call(self, call)
            if call.output is None:
                call.output = forward(*call.args, **call.kwargs)
            for client in self.clients:
                client.after_call(self, call)
            return call.output

        return told

    def _told_of_half(self, context: Callable[..., Any]) -> Callable[..., Any]:
        """Pipelines that call their denoiser once for each branch (Qwen-Image) say so, for caches between steps."""

        @contextmanager
        def told(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            before, self.half = self.half, {"cond": COND, "uncond": UNCOND}.get(name)
            try:
                with context(name, *args, **kwargs):
                    yield
            finally:
                self.half = before

        return told

    def _told_of_steps(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def told(*args: Any, **kwargs: Any) -> Any:
            one = SchedulerStep(args[2] if len(args) > 2 else kwargs["sample"])
            for client in self.clients:
                client.before_step(self, one)
            if one.latents is not None:
                self.steps += 1
                return one.latents, one.latents  # some schedulers give a second tensor, read after the last step only
            if len(args) > 2:
                args = (*args[:2], one.sample, *args[3:])
            else:
                kwargs["sample"] = one.sample
            result = step(*args, **kwargs)
            one.latents = result[0]
            self.steps += 1
            for client in self.clients:
                client.after_step(self, one)
            return result if one.latents is result[0] else _with_latents(result, one.latents)

        return told


_COND_FIRST = ("ZImage",)  # pipelines that put the conditional half first


def _tells(client: Client, event: str) -> bool:
    return getattr(type(client), event) is not getattr(Client, event)


def _with_latents(result: Any, latents: Tensor) -> Any:
    if isinstance(result, tuple):
        return (latents, *result[1:])
    return type(result)(**{**result, "prev_sample": latents})  # diffusers' output class


def calls_in(pipe: Any) -> int:
    """How often a pipeline at work calls its denoiser: img2img leaves out the scheduler's first timesteps."""
    number = getattr(pipe, "_num_timesteps", None)
    return number if isinstance(number, int) else len(pipe.scheduler.timesteps)


def sample_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The noisy latents among the arguments of a denoiser call, (rows, …)."""
    names = ("sample", "x", "hidden_states")
    sample: Tensor = args[0] if args else next(kwargs[name] for name in names if name in kwargs)
    return sample


def branches_of(rows: int, samples: int) -> Tensor:
    """The guidance branch of each row, (rows,): diffusers puts the unconditional half first; all COND without guidance.

    Raises RuntimeError for other numbers of rows than one or two an image.
    """
    if rows == samples:
        return torch.full((rows,), COND)
    if rows == 2 * samples:
        return torch.arange(rows) // samples
    raise RuntimeError(f"the denoiser ran on {rows} rows for {samples} images; expected one or two each")
