"""Work that a batch shares and plain pipelines repeat: text features, and their keys and values.

Both put a wrapper in front of a module's `forward` for the time of a call and hand back tensors that the module itself
computed, so they hold for any pipeline built of such modules. Nothing stays behind on the model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lesion.denoising.wrapping import forward_replaced
from lesion.models import memory
from lesion.surgery.components import ComponentLesions

_CAPTURING = "transformers.utils.output_capturing"  # puts hooks that only look on a model at its first call
KEPT_BYTES = 2 << 30  # of text features in main memory, least recently used first out
NEAR_BYTES = (
    256 << 20
)  # of these also on the accelerator, so that batches need no copy; given back where memory runs out


def _rows(value: Any, pick: Callable[[Tensor], Any]) -> Any:
    """`value` with `pick` applied to each tensor in it; tuples and transformers' output classes keep their form.

    What is neither of these nor a plain value becomes None: a cache of keys and values, which no pipeline reads.
    """
    if isinstance(value, Tensor):
        return pick(value)
    if isinstance(value, tuple | list):
        return type(value)(_rows(item, pick) for item in value)
    if dataclasses.is_dataclass(value) and isinstance(value, dict):  # a ModelOutput
        return type(value)(**{name: _rows(item, pick) for name, item in value.items()})
    return value if isinstance(value, bool | int | float | str) else None


def _row(value: Any, row: int) -> Any:
    return _rows(value, lambda tensor: tensor[row : row + 1].cpu())


def _joined(values: list[Any]) -> Any:
    """Equally formed values of one row each -> one value of all rows."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, tuple | list):
        return type(first)(_joined(list(items)) for items in zip(*values, strict=True))
    if dataclasses.is_dataclass(first) and isinstance(first, dict):
        return type(first)(**{name: _joined([value[name] for value in values]) for name in first})
    return first


def _size(value: Any) -> int:
    sizes: list[int] = []
    _rows(value, lambda tensor: sizes.append(tensor.numel() * tensor.element_size()))
    return sum(sizes)


class TextMemory:
    """Text features of the prompts seen lately: each prompt, and the empty one, goes through an encoder once.

    Holds for any encoder that is called with token ids (n, length), alone or with an attention mask (n, …) or other
    tensors of n rows, and gives tensors of n rows, each made of its own row. Any other call goes through as it is.
    Features are remembered by all that can change them: the arguments of the call, the state of the encoder
    (`state_of`) and the lesion under which a row is encoded.
    A single row is kept apart from rows of larger batches: its features differ in the last bits.

    limit: bytes in main memory. near: bytes of copies on the accelerator.
    """

    def __init__(self, limit: int = KEPT_BYTES, near: int = NEAR_BYTES):
        self.kept, self.near = _Lately(limit), _Lately(near)
        memory.gives_back(self.near)

    def clear(self) -> None:
        """Forget everything."""
        self.kept.clear()
        self.near.clear()

    @contextmanager
    def attached(self, pipe: Any, lesions: ComponentLesions | None = None) -> Iterator[None]:
        """Within it the encoders of a pipeline remember. lesions: of the images of its call in these encoders."""
        with ExitStack() as stack:
            for name, part in getattr(pipe, "components", {}).items():
                if name.startswith("text_encoder") and isinstance(part, nn.Module):
                    make = functools.partial(self._remembering, name, part, lesions or ComponentLesions({}, [], {}))
                    stack.enter_context(forward_replaced(part, make))
            yield

    def _remembering(
        self, name: str, part: nn.Module, lesions: ComponentLesions, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        def remembering(*args: Any, **kwargs: Any) -> Any:
            given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
            ids = tensors.get(0, tensors.get("input_ids"))
            fit = ids is not None and not ids.is_floating_point() and ids.dim() == 2
            if ids is None or not fit or any(value.shape[:1] != ids.shape[:1] for value in tensors.values()):
                lesions.refuse(name)
                return forward(*args, **kwargs)
            done = lesions.of_text(name, *ids.shape)
            alone = len(ids) == 1  # one row takes other kernels than several, which round differently
            plain = [(key, value) for key, value in given.items() if key not in tensors]
            settings = str([alone, torch.is_autocast_enabled(), *plain, state_of(part, forward)])
            shapes = str([(key, value.shape[1:], value.dtype) for key, value in tensors.items()])
            columns = [value.contiguous().view(torch.uint8).cpu().numpy() for value in tensors.values()]
            names = [
                (name, settings, shapes, done[row], *(column[row].tobytes() for column in columns))
                for row in range(len(ids))
            ]
            absent: dict[Any, dict[tuple[Any, ...], int]] = {}  # by what is done to them: row by key
            for row, key in enumerate(names):
                if key not in self.kept:
                    absent.setdefault(done[row], {})[key] = row
            for what, new in absent.items():
                rows = list(new.values()) * (2 if len(new) == 1 and not alone else 1)
                some = {key: value[rows] if key in tensors else value for key, value in given.items()}
                with lesions.at_work(name, part, what):
                    found = forward(*(some[place] for place in range(len(args))), **{key: some[key] for key in kwargs})
                for place, key in enumerate(new):
                    self.kept.add(key, _row(found, place))
            whole = _joined([self._at(key, ids.device) for key in names])
            self.kept.forget()
            self.near.forget()
            return whole

        return remembering

    def _at(self, key: tuple[Any, ...], device: torch.device) -> Any:
        """The features of a key on a device."""
        if not _apart(device):
            return self.kept.used(key)
        place = (key, device)
        if place not in self.near:
            self.near.add(place, _rows(self.kept.used(key), lambda tensor: tensor.to(device)))
        return self.near.used(place)


class _Lately:
    """Values of at most `limit` bytes, by key; `forget` drops those that were not used for longest."""

    def __init__(self, limit: int):
        self.limit, self.held = limit, 0
        self._values: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def add(self, key: tuple[Any, ...], value: Any) -> None:
        self._values[key] = value
        self.held += _size(value)

    def used(self, key: tuple[Any, ...]) -> Any:
        self._values.move_to_end(key)
        return self._values[key]

    def forget(self) -> None:
        while self.held > self.limit and self._values:
            self.held -= _size(self._values.popitem(last=False)[1])

    def clear(self) -> None:
        self._values.clear()
        self.held = 0


def _apart(device: torch.device) -> bool:
    """Whether a device has a memory of its own."""
    return device.type != "cpu"


class Forgetful(TextMemory):
    """Remembers nothing: encoders run whenever they are called."""

    @contextmanager
    def attached(self, pipe: Any, lesions: ComponentLesions | None = None) -> Iterator[None]:
        yield


def state_of(part: nn.Module, forward: Callable[..., Any]) -> int:
    """Return a number that changes with whatever of a module can change what it puts out.

    That is: every parameter and buffer as an object, its dtype, place, number of changes in place and, since changes
    through `.data` are not numbered, four of its values; whether a module is in training; hooks, replaced forwards and
    LoRA layers, with the adapters that are active and their scales.
    forward: what the module itself would run, which is looked at in the place of its present `forward`.
    """
    found: list[Any] = [id(getattr(forward, "__func__", forward))]
    moving = any("_hf_hook" in vars(module) for module in part.modules())  # offloaded: its place says nothing
    probes: dict[torch.device, list[Tensor]] = {}
    for path, module in part.named_modules():
        own = vars(module)
        found.append((path, id(type(module)), module.training))
        if module is not part:
            found.append(id(own["forward"]) if "forward" in own else 0)
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            found.append(
                tuple(id(hook) for hook in own[name].values() if getattr(hook, "__module__", "") != _CAPTURING)
            )
        for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
            if tensor is None or moving:
                continue
            changes = 0 if tensor.is_inference() else tensor._version
            found.append((id(tensor), tensor.data_ptr(), tensor.dtype, changes))
            if tensor.is_contiguous() and tensor.numel():
                some = tensor.detach().view(-1)[:: max(1, tensor.numel() // 4)][:4]
                probes.setdefault(tensor.device, []).append(some.double().sum())
        if hasattr(module, "active_adapters"):  # PEFT's layers
            facts = ("active_adapters", "merged_adapters", "disable_adapters", "scaling")
            found.append(str([getattr(module, name, None) for name in facts]))
    found += [tuple(torch.stack(values).tolist()) for values in probes.values()]
    return hash(tuple(found))


@contextmanager
def text_projected_once(denoiser: nn.Module, sites: Iterable[str]) -> Iterator[None]:
    """Within one pipeline call: a site's keys and values of the text are computed at its first step and used again.

    A site asks anew when it is handed another tensor, so this holds whatever the pipeline does between steps.
    """

    def once(forward: Callable[..., Any]) -> Callable[..., Any]:
        last: list[Any] = [None, None]

        def remembering(text: Tensor) -> Any:
            if text is not last[0]:
                last[:] = text, forward(text)
            return last[1]

        return remembering

    with ExitStack() as stack:
        for site in sites:
            module = denoiser.get_submodule(site)
            for name in ("to_k", "to_v"):
                part = getattr(module, name, None)
                if isinstance(part, nn.Module):
                    stack.enter_context(forward_replaced(part, once))
        yield
