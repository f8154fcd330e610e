"""Where in a call of a module the lesioned quantity lies: how it is read, and how an output with another is made.

One class a kind of quantity. Anatomy gives every site its hook point; lesions and calibration know no more of a module
than this. Shapes: rows are (image, CFG branch) pairs and come first everywhere; channels are last in 3-D tensors and
second in 4-D feature maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from lesion.denoising.wrapping import forward_replaced


@dataclass(frozen=True)
class Share:
    """How much of each row is replaced: column (rows, 1, …), where the output is and in float32 at least, so that a
    strength is not rounded; what is known of it beforehand.
    """

    column: Tensor
    whole: bool  # every row wholly
    mixed: bool  # some row in part, or beyond
    rows: tuple[int, ...] | None = None  # that are replaced at all; None where only the device knows

    @classmethod
    def of(cls, column: Tensor, weights: Sequence[float], rank: int) -> Share:
        """column: (rows,), where the output is. weights: the same, >= 0. rank: how many dimensions it has."""
        shaped = column.reshape(-1, *[1] * (rank - 1))
        rows = tuple(row for row, weight in enumerate(weights) if weight)
        return cls(shaped, all(w == 1 for w in weights), any(w > 0 and w != 1 for w in weights), rows)

    @cached_property
    def index(self) -> Tensor:
        """`rows`, where the output is: copied once for as long as the share is kept."""
        return torch.tensor(self.rows or ()).to(self.column.device, non_blocking=True)

    def picked(self, values: Tensor) -> Tensor:
        """Those rows of a tensor that has as many as the output, or one for all."""
        return values[self.index] if values.dim() and len(values) == len(self.column) > 1 else values

    @cached_property
    def of_picked(self) -> Share:
        """The share of those rows alone."""
        weights = self.column[self.index]
        return Share(weights, not self.mixed, self.mixed)


def wide(like: Tensor) -> torch.dtype:
    """The precision in which values like these are mixed and subtracted: float32, or theirs if it is finer."""
    return torch.promote_types(like.dtype, torch.float32)


def blend(output: Tensor, values: Tensor, share: Share) -> Tensor:
    """Row by row: weight 0 keeps the output and 1 takes the value, both bit for bit; any other gives a linear mixture,
    rounded once, beyond 1 on the far side of the value.

    output: (rows, tokens, channels); values: broadcastable to it.
    """
    if share.whole:
        return values.to(output.dtype).expand_as(output)
    column = share.column
    blended = torch.where(column == 1, values.to(output.dtype), output)
    if share.mixed:
        kept = output.to(column.dtype)
        mixture = kept + column * (values.to(column.dtype) - kept)
        blended = torch.where((column > 0) & (column != 1), mixture.to(output.dtype), blended)
    return blended


def keeps_shape(module: nn.Module) -> bool:
    """Whether a module is an attention or a feed-forward that puts out what it takes in: the shape of its input."""
    if isinstance(module, FeedForward):  # (act(dim -> inner), dropout, linear(inner -> dim_out), ...)
        inner, last = getattr(module.net[0], "proj", None), module.net[2]
        return getattr(inner, "in_features", None) == getattr(last, "out_features", -1)
    return getattr(module, "query_dim", None) == getattr(module, "out_dim", -1)


@dataclass(frozen=True)
class Call:
    """One call of a module.

    forward: what it would do un-lesioned.
    image: where the image's tokens are in a sequence that has the text's, too; all of it where that is not asked for.
    """

    module: nn.Module
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    image: slice = field(default_factory=lambda: slice(None))
    memo: dict[str, Tensor] = field(default_factory=dict)  # what a hook point has found out and may want again

    def run(self) -> Any:
        return self.forward(*self.args, **self.kwargs)

    def argument(self, name: str, position: int) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)

    @property
    def hidden(self) -> Tensor:
        """The first argument, (rows, …)."""
        value: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return value

    @property
    def text(self) -> slice:
        """Where the text's tokens are in the same sequence: the rest, in front of the image or behind it."""
        return slice(self.image.stop, None) if self.image.start is None else slice(None, self.image.start)


ROOT = "."  # stands for the denoiser itself where the path of a block is asked for


class TextLength:
    """Notes where text and image are in one sequence, for the modules that see both concatenated.

    tokens: of the text in front of the image; 0 where it comes behind.
    image: where the image's tokens are.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.image = slice(None)

    @contextmanager
    def watching(self, denoiser: nn.Module, block: str) -> Iterator[None]:
        """Watch the calls of the block of this path; none if it is "".

        It is given the text by itself, or it is one of Z-Image's that sees the image alone, which comes first there.
        """
        if not block:
            yield
            return
        watched = denoiser.get_submodule("" if block == ROOT else block)
        handle = watched.register_forward_pre_hook(self._note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if type(module).__name__ == "ZImageTransformerBlock":
            self.image = slice(None, args[0].shape[1])
            return
        text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
        self.tokens = text.shape[1]
        self.image = slice(self.tokens, None)


# Values in the place of parts of a hook point's quantity: (part, values broadcastable to it, share of the rows).
Changes = Sequence[tuple[int, Tensor, Share]]


@dataclass(frozen=True)
class HookPoint:
    """The whole output of a module, a tensor: (rows, tokens, channels) or (rows, channels, height, width).

    module: path of the module that is called. block: path of the block whose call says how long the text is (ROOT: the
    denoiser), "" if that does not matter.
    """

    module: str
    block: str = ""
    everything: ClassVar[bool] = True  # whether the quantity is all that the module puts out or adds
    of_input: ClassVar[bool] = False  # whether the quantity goes in: `write` then runs the module itself

    def run(self, call: Call) -> Any:
        """What the module puts out un-lesioned."""
        return call.run()

    def parts(self, output: Any) -> int:
        """How many tensors make up the quantity; each gets values of its own."""
        return 1

    def placeholder(self, call: Call) -> Any | None:
        """Something of the output's form, had without running the module; None where there is no such thing."""
        return call.hidden if keeps_shape(call.module) else None

    def read(self, call: Call, output: Any, part: int) -> Tensor:
        """The quantity, (rows, …). A difference is taken in float32, where it is not rounded."""
        quantity: Tensor = output
        return quantity

    def like(self, call: Call, output: Any, part: int) -> Tensor:
        """Something of the quantity's shape and place, for those that do not read its values."""
        return self.read(call, output, part)

    def write(self, call: Call, output: Any, changes: Changes) -> Any:
        """The output with these changes."""
        if not isinstance(output, Tensor):
            raise RuntimeError(f"{self.module} ({type(call.module).__name__}) puts out no single tensor")
        for _, values, share in changes:
            output = blend(output, values, share)
        return output

    def merge(self, call: Call, output: Any, other: Any, share: Share) -> Any:
        """The output with rows of what the module puts out in another run of the same call."""
        if isinstance(output, Tensor):
            return blend(output, other, share)
        if isinstance(output, tuple):
            pairs = zip(output, other, strict=True)
            return tuple(None if mine is None else self.merge(call, mine, its, share) for mine, its in pairs)
        return type(output)(**{name: self.merge(call, output[name], other[name], share) for name in output})


@dataclass(frozen=True)
class ImageStream(HookPoint):
    """The image's half of what a joint attention puts out: the first of its tensors, (rows, tokens, channels)."""

    everything = False

    def placeholder(self, call: Call) -> Any | None:
        return None  # the text's half is needed

    def read(self, call: Call, output: Any, part: int) -> Tensor:
        quantity: Tensor = output[0]
        return quantity

    def write(self, call: Call, output: Any, changes: Changes) -> Any:
        return (super().write(call, output[0], changes), *output[1:])

    def merge(self, call: Call, output: Any, other: Any, share: Share) -> Any:
        return (blend(output[0], other[0], share), *output[1:])


@dataclass(frozen=True)
class ImageTokens(HookPoint):
    """The image's tokens of a sequence that has the text's, too, (rows, image tokens, channels)."""

    everything = False

    def placeholder(self, call: Call) -> Any | None:
        return None

    def read(self, call: Call, output: Any, part: int) -> Tensor:
        quantity: Tensor = output[:, call.image]
        return quantity

    def write(self, call: Call, output: Any, changes: Changes) -> Any:
        return _with(output, call.image, super().write(call, output[:, call.image], changes))

    def merge(self, call: Call, output: Any, other: Any, share: Share) -> Any:
        return _with(output, call.image, blend(output[:, call.image], other[:, call.image], share))


def _of(sequence: Tensor, tokens: slice) -> Tensor:
    """Some of the tokens of a sequence, (rows, tokens, channels); all of them without an operator."""
    return sequence if tokens == slice(None) else sequence[:, tokens]


def _with(sequence: Tensor, tokens: slice, values: Tensor) -> Tensor:
    """The sequence, (rows, tokens, channels), with these values in the place of some of its tokens."""
    if tokens == slice(None):
        return values
    before = sequence[:, : tokens.start] if tokens.start else sequence[:, :0]
    after = sequence[:, :0] if tokens.stop is None else sequence[:, tokens.stop :]
    return torch.cat([before, values, after], dim=1)


@dataclass(frozen=True)
class Update(HookPoint):
    """What a block adds to its input: its residual update, output - input, of the image and, where it has one, of the
    text (parts 0 and 1). Without it (zero) the block is an identity.
    """

    def parts(self, output: Any) -> int:
        return 2 if _two_streams(output) and None not in output else 1

    def placeholder(self, call: Call) -> Any | None:
        name = type(call.module).__name__
        if name in _TEXT_FIRST:
            text = None if getattr(call.module, "context_pre_only", False) else self._inputs(call)[1]
            return text, call.hidden
        if name == "Transformer2DModel":
            return (call.hidden,) if call.kwargs.get("return_dict") is False else None
        return call.hidden if name in _PLAIN_BLOCKS else None

    def read(self, call: Call, output: Any, part: int) -> Tensor:
        stream = self.like(call, output, part)
        inputs: Tensor = self._inputs(call)[part]
        return stream.to(wide(stream)) - inputs.to(wide(stream))

    def like(self, call: Call, output: Any, part: int) -> Tensor:
        position = self._positions(call, output)[part]
        stream: Tensor = output if position is None else output[position]
        return stream

    def write(self, call: Call, output: Any, changes: Changes) -> Any:
        inputs, positions = self._inputs(call), self._positions(call, output)
        streams = {part: output if where is None else output[where] for part, where in enumerate(positions)}
        for part, values, share in changes:
            streams[part] = blend(streams[part], inputs[part] + values, share)
        if positions == [None]:
            return streams[0]
        if not isinstance(output, tuple):  # diffusers' output classes
            return type(output)(**{**output, "sample": streams[0]})
        new_output = list(output)
        for part, stream in streams.items():
            new_output[positions[part]] = stream
        return tuple(new_output)

    def _inputs(self, call: Call) -> tuple[Tensor, Any]:
        return call.hidden, call.argument("encoder_hidden_states", 1)

    def _positions(self, call: Call, output: Any) -> list[Any]:
        """Where in the output the image is and, where it has one, the text. None: the output is the image."""
        if isinstance(output, Tensor):
            return [None]
        if not _two_streams(output):
            return [0 if isinstance(output, tuple) else "sample"]
        if type(call.module).__name__ in _TEXT_FIRST:
            image = 1
        else:
            shapes = [None if stream is None else stream.shape for stream in output]
            fits = [shape == call.hidden.shape for shape in shapes]
            if sum(fits) != 1:
                raise RuntimeError(
                    f"which output of {self.module} ({type(call.module).__name__}) is the image's cannot be told"
                )
            image = fits.index(True)
        return [image] if None in output else [image, 1 - image]


# Blocks that return (text, image), read in diffusers 0.42's source; others are told apart by their shapes.
_TEXT_FIRST = (
    *("JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock"),
    *("Flux2TransformerBlock", "QwenImageTransformerBlock"),
)
# Blocks that take the image first and return it alone.
_PLAIN_BLOCKS = (
    *("BasicTransformerBlock", "SanaTransformerBlock", "HunyuanDiTBlock"),
    *("Flux2SingleTransformerBlock", "ZImageTransformerBlock"),  # of one sequence
)


def has_text_stream(hook: HookPoint, module: nn.Module) -> bool:
    """Whether what a block adds to the text is part of the hook point's quantity, told without an output."""
    named = type(module).__name__ in _TEXT_FIRST
    return isinstance(hook, Update) and named and not getattr(module, "context_pre_only", False)


def _two_streams(output: Any) -> bool:
    return isinstance(output, tuple) and len(output) == 2


@dataclass(frozen=True)
class FromText(HookPoint):
    """What the image's queries get from the text's keys in a joint attention: its output for the image, less that of
    a second pass in which the image is alone. Without it (zero) image queries cannot see text keys: the softmax runs
    over the image's keys only. The text's own half stays as it was.

    The second pass takes queries, keys and values from the first, and runs on the replaced rows only.

    single: whether text and image come concatenated.
    """

    everything = False
    single: bool = False

    def placeholder(self, call: Call) -> Any | None:
        return None

    def run(self, call: Call) -> Any:
        def noted(name: str, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def note(hidden: Tensor) -> Tensor:
                found[name] = [*found.get(name, ()), forward(hidden)]
                return found[name][-1]

            return note

        found: dict[str, list[Tensor]] = {}
        with _projections(call.module, {name: partial(noted, name) for name in _PROJECTIONS}):
            output = call.run()
        call.memo.update({name: values[0] for name, values in found.items() if len(values) == 1})
        return output

    def read(self, call: Call, output: Any, part: int) -> Tensor:
        image = self.like(call, output, part)
        return image.to(wide(image)) - self._alone(call).to(wide(image))

    def like(self, call: Call, output: Any, part: int) -> Tensor:
        image: Tensor = output[:, call.image] if self.single else output[0]
        return image

    def write(self, call: Call, output: Any, changes: Changes) -> Any:
        image = self.like(call, output, 0)
        for _, values, share in changes:
            if share.whole or share.rows is None or "alone" in call.memo:
                image = blend(image, self._alone(call) + values, share)
            elif share.rows:
                alone = self._second_pass(call, share.picked)
                replaced = blend(share.picked(image), alone + share.picked(values), share.of_picked)
                image = image.index_copy(0, share.index, replaced)
        return _with(output, call.image, image) if self.single else (image, *output[1:])

    def _alone(self, call: Call) -> Tensor:
        """Of all rows; kept for the call."""
        if "alone" not in call.memo:
            call.memo["alone"] = self._second_pass(call, lambda values: values)
        return call.memo["alone"]

    def _second_pass(self, call: Call, picked: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what the module puts out for the image alone, of the rows that `picked` takes of a tensor."""
        from diffusers.models.attention_processor import Attention

        kwargs = dict(call.kwargs)
        mask, rotary = kwargs.get("attention_mask"), kwargs.get("image_rotary_emb")
        if len(call.args) > int(self.single) or (mask is not None and not (self.single and mask.dim() == 2)):
            raise RuntimeError(f"{self.module} is called in a way in which its image cannot be told from its text")
        for name in ("hidden_states", "encoder_hidden_states", "attention_mask", "freqs_cis"):
            if kwargs.get(name) is not None:
                kwargs[name] = picked(kwargs[name])
        if self.single:
            args: tuple[Tensor, ...] = (picked(call.hidden)[:, call.image],)
            kwargs.pop("hidden_states", None)
            for name in ("attention_mask", "freqs_cis"):  # of Z-Image, (rows, tokens, …)
                if kwargs.get(name) is not None:
                    kwargs[name] = kwargs[name][:, call.image]
            if rotary is not None:  # (cos, sin), each (text and image tokens, head channels)
                kwargs["image_rotary_emb"] = tuple(table[call.image] for table in rotary)
        elif "encoder_hidden_states_mask" in kwargs:  # Qwen-Image's, whose rotary positions come apart
            args, text = (), kwargs["encoder_hidden_states"]
            kwargs["encoder_hidden_states_mask"] = text.new_zeros(text.shape[:2], dtype=torch.bool)
        else:  # Attention's processors leave out a text that is None, FluxAttention's want one of no tokens
            args, text = (), kwargs["encoder_hidden_states"]
            kwargs["encoder_hidden_states"] = None if isinstance(call.module, Attention) else text[:, :0]
            if rotary is not None:
                kwargs["image_rotary_emb"] = tuple(table[text.shape[1] :] for table in rotary)

        def known(projected: Tensor, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda hidden: picked(projected)[:, call.image] if self.single else picked(projected)

        kept = {name: partial(known, call.memo[name]) for name in _PROJECTIONS if name in call.memo}
        with _projections(call.module, kept) if kept else nullcontext():
            output = call.forward(*args, **kwargs)
        alone: Tensor = output[0] if isinstance(output, tuple) else output
        return alone


_PROJECTIONS = frozenset({"to_q", "to_k", "to_v", "to_qkv", "to_qkv_mlp_proj"})  # of the image's tokens, token by token


@contextmanager
def _projections(module: nn.Module, made: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Within it those projections that the module has, by name, run what `made` makes of their forward."""
    with ExitStack() as stack:
        for name, make in made.items():
            if isinstance(part := getattr(module, name, None), nn.Module):
                stack.enter_context(forward_replaced(part, make))
        yield


@dataclass(frozen=True)
class TextStream(HookPoint):
    """The text's hidden states that a block is given, (rows, text tokens, channels): it computes on what stands in
    their place, and what it hands on of the text follows from that.

    single: whether text and image come concatenated.
    """

    everything = False
    of_input = True
    single: bool = False

    def placeholder(self, call: Call) -> Any | None:
        return call.hidden  # nothing of the output is read

    def read(self, call: Call, output: Any, part: int) -> Tensor:
        given: Tensor = call.hidden[:, call.text] if self.single else call.argument("encoder_hidden_states", 1)
        return given

    def write(self, call: Call, output: Any, changes: Changes) -> Any:
        text = self.read(call, output, 0)
        for _, values, share in changes:
            text = blend(text, values, share)
        args, kwargs = list(call.args), dict(call.kwargs)
        name, position = ("hidden_states", 0) if self.single else ("encoder_hidden_states", 1)
        value = _with(call.hidden, call.text, text) if self.single else text
        if len(args) > position:
            args[position] = value
        else:
            kwargs[name] = value
        return call.forward(*args, **kwargs)


@dataclass(frozen=True)
class Heads(HookPoint):
    """The attention heads of an attention whose output projection they share; part h is head h.

    The module is that projection. Head h contributes W_h x_h + b/H to its output: H heads share the bias. The quantity
    is the projection's input from this head with a 1 behind, (rows, tokens, head channels + 1): the 1 stands for the
    head's share of the bias, so that zero takes that away, too, and the lesions of all heads by zero give zeros to the
    bit. heads: H.
    """

    everything = False
    heads: int = 1

    def parts(self, output: Any) -> int:
        return self.heads

    def placeholder(self, call: Call) -> Any | None:
        return None

    def read(self, call: Call, output: Any, part: int) -> Tensor:
        hidden = _of(call.hidden, call.image)
        width = hidden.shape[-1] // self.heads
        mine = hidden[..., part * width : (part + 1) * width]
        return torch.cat([mine, torch.ones_like(mine[..., :1])], dim=-1)

    def like(self, call: Call, output: Any, part: int) -> Tensor:
        if "like" not in call.memo:
            hidden = _of(call.hidden, call.image)
            call.memo["like"] = hidden[..., :1].expand(*hidden.shape[:-1], hidden.shape[-1] // self.heads + 1)
        return call.memo["like"]

    def write(self, call: Call, output: Any, changes: Changes) -> Any:
        """All heads at once, as (rows, tokens, heads, channels): one by one they would take thousands of operators."""
        quantity = _of(call.hidden, call.image).unflatten(-1, (self.heads, -1))
        bias_shares = quantity.new_ones(1, 1, 1, 1).expand(*quantity.shape[:3], 1)
        touched: Tensor | None = None
        for one in self._rounds(changes):
            share = Share(
                torch.stack([one[head][1].column if head in one else _none(one) for head in range(self.heads)], dim=2),
                len(one) == self.heads and all(share.whole for _, share in one.values()),
                any(share.mixed for _, share in one.values()),
            )
            values = [values for values, _ in one.values()]
            if all(value is values[0] for value in values) and not values[0].dim():
                channels = ones = values[0]
            else:
                filled = [one[head][0] if head in one else values[0] for head in range(self.heads)]
                stacked = torch.stack(torch.broadcast_tensors(*filled, *[quantity.new_zeros(1, 1, 1)]), dim=2)
                stacked = stacked[:, :, :-1]
                channels, ones = stacked[..., :-1], stacked[..., -1:]
            bias_shares = blend(bias_shares, ones, share)
            quantity = blend(quantity, channels, share)
            now = (share.column > 0).any(dim=2)
            touched = now if touched is None else touched | now
        lost = (bias_shares - 1).sum(dim=2)  # (rows, tokens, 1), in heads
        bias = call.forward(quantity.new_zeros(1, 1, call.hidden.shape[-1]))
        changed = call.forward(quantity.flatten(2)) + bias * (lost / self.heads)
        assert touched is not None
        return _with(output, call.image, torch.where(touched, changed, _of(output, call.image)))

    def _rounds(self, changes: Changes) -> list[dict[int, tuple[Tensor, Share]]]:
        """The changes, one of each head at a time: several replacements may act on one head, in different rows."""
        rounds: list[dict[int, tuple[Tensor, Share]]] = []
        for head, values, share in changes:
            free = next((one for one in rounds if head not in one), None)
            if free is None:
                rounds.append(free := {})
            free[head] = values, share
        return rounds


def _none(one: Mapping[int, tuple[Tensor, Share]]) -> Tensor:
    """A column of zeros beside these."""
    return torch.zeros_like(next(iter(one.values()))[1].column)


@dataclass(frozen=True)
class HeadsOfTokens(ImageTokens):
    """The heads of an attention without an output projection of its own: channels of the image's tokens, head by head.

    heads: how many.
    """

    heads: int = 1

    def parts(self, output: Any) -> int:
        return self.heads

    def read(self, call: Call, output: Any, part: int) -> Tensor:
        return super().read(call, output, part)[..., self._slice(output, part)]

    def _slice(self, output: Tensor, head: int) -> slice:
        width = output.shape[-1] // self.heads
        return slice(head * width, (head + 1) * width)

    def write(self, call: Call, output: Any, changes: Changes) -> Any:
        changed: Tensor = output.clone()
        for head, values, share in changes:
            part = self._slice(output, head)
            image = changed[:, call.image, part]
            changed[:, call.image, part] = blend(image, values, share)
        return changed


@dataclass(frozen=True)
class HeadsBeforeProjection(HeadsOfTokens):
    """The same where attention and MLP share a projection (FLUX.2's single blocks): channels of what goes into it.

    The module is that projection. width: how many channels are the attention's; they come first.
    """

    width: int = 0
    of_input = True

    def placeholder(self, call: Call) -> Any | None:
        return call.hidden  # nothing of the output is read

    def read(self, call: Call, output: Any, part: int) -> Tensor:
        return call.hidden[:, call.image, self._slice(call.hidden, part)]

    def _slice(self, output: Tensor, head: int) -> slice:
        each = self.width // self.heads
        return slice(head * each, (head + 1) * each)

    def write(self, call: Call, output: Any, changes: Changes) -> Any:
        return call.forward(super().write(call, call.hidden, changes))
