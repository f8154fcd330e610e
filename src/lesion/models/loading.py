"""Loading a found model with its weights. The only place that makes a pipeline."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers

from lesion import tasks
from lesion.errors import RequestError
from lesion.models import allocator, hub, loras, memory, schedulers, shapes
from lesion.models.source import (
    BLOCKS,
    ModelSpec,
    Source,
    check_offload,
    decoder_of,
    identity_of,
    pipeline_class,
    resolve_dtype,
)
from lesion.models.text_cache import TextMemory
from lesion.study.grid import ModelIdentity
from lesion.surgery.anatomy import Anatomy, examine, kinds_of, text_sites
from lesion.surgery.compiled import Gates

log = logging.getLogger(__name__)
BACKEND = "inductor"  # of performance.compile
COMPILATIONS = 64  # of a block's code, at most
MOST = 3  # names of weights that a line tells


@dataclass(frozen=True, eq=False)
class Model:
    """A pipeline ready to generate, its denoiser, and what can be lesioned in it.

    text_sites: paths of the modules that read the text, whatever the layers under study are; of denoisers whose texts
    and images attend jointly there are none, and `anatomy` is empty until it is set for the study's kind of site.
    arguments: further ones of the pipeline's call.
    """

    pipe: Any
    denoiser: torch.nn.Module
    anatomy: Anatomy
    identity: ModelIdentity
    text_sites: tuple[str, ...] = ()
    texts: TextMemory = field(default_factory=TextMemory)
    gates: Gates | None = None  # of a compiled denoiser
    others: dict[str, Any] = field(default_factory=dict)
    components: Mapping[str, Anatomy] = field(default_factory=dict)  # of text encoders and the decoder, where studied
    arguments: dict[str, Any] = field(default_factory=dict)
    unseen: dict[str, tuple[int | None, tuple[str, ...]]] = field(default_factory=dict)  # `words.truncated` of prompts
    decodable: dict[torch.Size, int] = field(default_factory=dict)  # images decoded at once, by their latents' shape
    decoder: str = ""  # `source.decoder_of`
    shared_rows: bool = False  # `performance.shared_rows`
    settle: Callable[[Any], None] = lambda pipe: None  # offloading of a further pipeline of the same parts

    def pipeline(self, task: str) -> Any:
        """The pipeline for a task, made of the same parts. Raises ValueError if diffusers has none for this model."""
        if tasks.of(task).own:
            return self.pipe
        if task not in self.others:
            other = tasks.of(task).made_from(self.pipe)
            other.set_progress_bar_config(disable=True)
            self.settle(other)
            self.others[task] = other
        return self.others[task]


_kept: dict[tuple[ModelSpec, str, str], Model] = {}  # at most one


def load(source: Source, device: str) -> Model:
    """The model with its weights on the device.

    One is kept a process: consecutive jobs that ask for the same model load it once, and before another is loaded the
    one before goes, since both may not fit. So order a sweep by model: `model` first among its axes.
    """
    wanted = (source.spec, source.fingerprint, device)
    if wanted not in _kept:
        shapes.check(source)
        forget()
        if device == "cpu":
            allocator.keep_freed()
        _kept[wanted] = _load(source, device)
    return _kept[wanted]


def forget() -> None:
    """Let go of the model that is kept: its memory, and what was compiled for it."""
    for spec, _, device in list(_kept):
        _kept.clear()
        memory.release(device)
        if spec.compile:
            torch.compiler.reset()


def _load(source: Source, device: str) -> Model:
    spec = source.spec
    check_offload(spec.offload, device)
    pipe = _pipeline(source, getattr(torch, resolve_dtype(spec.dtype, device)))
    if spec.loras:  # before any hook, gate or compiled block
        loras.put_on(pipe, spec.loras, source.adapters)
    if dict(spec.arguments).get("clip_skip", "null") != "null":
        _name_text_models(pipe)
    denoiser = getattr(pipe, source.denoiser)
    if spec.channels_last:
        for part in (denoiser, pipe.vae):
            part.to(memory_format=torch.channels_last)
    for name in ("slicing", "tiling"):
        if getattr(spec, f"vae_{name}"):
            _enable(pipe, name)

    def settle(one: Any) -> None:
        _place(one, spec.offload, device)

    settle(pipe)
    anatomy = examine(denoiser, kind=next(iter(kinds_of(denoiser)), "cross_attention"))
    gates = None
    if spec.compile:
        gates = Gates(denoiser, anatomy)
        # One code for each width of the blocks, for batches of one size and of any, and for a single row: more than the
        # 8 after which dynamo would go on without compiling.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILATIONS)
        compile_blocks(denoiser)
    return Model(
        pipe,
        denoiser,
        anatomy,
        identity_of(source, device),
        text_sites=text_sites(denoiser),
        gates=gates,
        arguments={name: json.loads(value) for name, value in spec.arguments},
        decoder=decoder_of(source, device),
        shared_rows=spec.shared_rows,
        settle=settle,
    )


def compile_blocks(denoiser: Any, backend: str = "") -> None:
    """Have each repeated block of a denoiser compiled when it is first called. backend: BACKEND where none is named."""
    if not getattr(denoiser, "_repeated_blocks", None):
        denoiser._repeated_blocks = list(BLOCKS[type(denoiser).__name__])
    denoiser.compile_repeated_blocks(backend=backend or BACKEND)


def _pipeline(source: Source, dtype: torch.dtype) -> Any:
    """The pipeline with its weights on the CPU; what the libraries say of their own arguments meanwhile is no news.

    Raises RequestError where weights are missing or have another shape than the config says: transformers would go on
    with random ones.
    """
    with warnings.catch_warnings(), _reported() as told:
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        try:
            pipe = _loaded(source, dtype)
        except Exception as error:  # whatever classes raise at configs and files that they do not expect
            raise RequestError("model.id", f"{source.spec.id!r} cannot be loaded: {_why(error, told)}") from error
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    empty = [name for part in parts for name, weight in part.named_parameters() if weight.is_meta]
    if missing := list(dict.fromkeys([*empty, *told.missing])):
        raise RequestError("model.id", f"{source.spec.id!r} lacks weights that its configs ask for: {_few(missing)}")
    if told.unused:
        log.warning("%s has weights that nothing uses: %s", source.spec.id, _few(told.unused))
    return pipe


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more


def _why(error: Exception, told: _Told) -> str:
    if told.odd:
        return f"weights of another shape than its configs say: {_few(told.odd)}"
    words = " ".join(str(error).split())
    return f"a config has {words}, which its library does not know" if isinstance(error, KeyError) else words


class _Told(logging.Handler):
    """Reads a library's reports on the weights it loads, tables and lists, and hands on what else it says.

    missing, unused, odd: names of weights: not in the files; in the files alone; of another shape.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.missing: list[str] = []
        self.unused: list[str] = []
        self.odd: list[str] = []
        self.others: dict[str, list[logging.Handler]] = {}  # of each library

    def emit(self, record: logging.LogRecord) -> None:
        text = re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage())
        listed = re.findall("'([^']+)'", text[text.find("[") :]) or re.findall("^- (\\S+): found shape", text, re.M)
        found = False
        for names, status, words in (  # transformers 5 prints a table, transformers 4 and diffusers a list
            (self.odd, "MISMATCH", "shapes did not match"),
            (self.missing, "MISSING", "newly initialized:"),
            (self.unused, "UNEXPECTED", "were not used when initializing"),
        ):
            told = re.findall(rf"^(\S+) *\| *{status}", text, re.M) or (listed if words in text else [])
            names += told
            found = found or bool(told)
        if not found and not text.startswith(_RAISED_TOO):
            for handler in self.others[record.name.partition(".")[0]]:
                if record.levelno >= handler.level:
                    handler.handle(record)


@contextmanager
def _reported() -> Iterator[_Told]:
    """Read what the libraries report of weights, whatever their verbosity is."""
    told = _Told()
    with ExitStack() as stack:
        for library in ("diffusers", "transformers"):
            logger = logging.getLogger(library)
            told.others[library] = [*logger.handlers, *(logging.getLogger().handlers if logger.propagate else ())]
            stack.callback(logger.setLevel, logger.level)
            for name in ("handlers", "propagate"):
                stack.callback(setattr, logger, name, getattr(logger, name))
            logger.setLevel(min(logger.getEffectiveLevel(), logging.WARNING))
            logger.handlers, logger.propagate = [told], False
        yield told


_RAISED_TOO = "An error occurred while trying to fetch"  # of weights that are not there
_LIBRARIES = ("diffusers.", "transformers.")
# Said again with every prompt: what `generate.say_unseen` tells once a study, and how FLUX.2's pipeline calls Pixtral.
_OLD = (
    "The following part of your input was truncated",
    "Token indices sequence length is longer than",
    "Kwargs passed to `processor.__call__` have to be in",
)


def _news(record: logging.LogRecord) -> bool:
    """Whether what a library says is of use to who runs a study."""
    return not str(record.msg).startswith(_OLD)


def _loaded(source: Source, dtype: torch.dtype) -> Any:
    spec = source.spec
    # torch_dtype: the name that diffusers 0.35 to 0.42 have. use_safetensors: pickled weights are never opened.
    kwargs: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True}
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()  # a bar for weights that are read in a blink
    if source.vae:
        kwargs["vae"] = diffusers.AutoModel.from_pretrained(str(source.vae), torch_dtype=dtype, use_safetensors=True)
    if spec.scheduler and source.scheduler_config:
        cls = source.components["scheduler"][1]
        kwargs["scheduler"] = schedulers.without_switches(cls, source.scheduler_config)
    if source.file:
        del kwargs["use_safetensors"]  # it has been looked at: a single file is opened by its name
        pipe = pipeline_class(source.pipeline).from_single_file(str(source.file), config=str(source.folder), **kwargs)
    else:
        cls = pipeline_class(spec.pipeline) if spec.pipeline else diffusers.DiffusionPipeline
        if source.commit:
            place, kwargs["revision"], kwargs["local_files_only"] = spec.id, source.commit, not hub.answers()
        else:
            place = str(source.folder)
        pipe = cls.from_pretrained(place, variant=spec.variant, **kwargs)
    if getattr(pipe, "safety_checker", None) is not None:
        log.info("safety checker taken off: it would blank images, and a blank image has no similarity")
        pipe.safety_checker = None
    if spec.scheduler:
        pipe.scheduler = schedulers.make(spec.scheduler, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    for speaker in (pipe, *pipe.components.values()):
        # Each at its own logger: a handler's filter is passed by where the libraries also propagate (CI=true).
        for module in {cls.__module__ for cls in type(speaker).__mro__ if cls.__module__.startswith(_LIBRARIES)}:
            logging.getLogger(module).addFilter(_news)  # again and again the same filter, which counts once
    return pipe


def _name_text_models(pipe: Any) -> None:
    """Let CLIP's text models be found as `text_model`, where diffusers' `clip_skip` looks for their last norm.

    transformers 5 has no such part any more: the encoder itself is what it was.
    """
    for part in pipe.components.values():
        if isinstance(part, transformers.CLIPTextModel) and not hasattr(part, "text_model"):
            vars(part)["text_model"] = part  # past torch, which would count it among its own parts


def _enable(pipe: Any, name: str) -> None:
    """Slicing or tiling of the autoencoder. Raises RequestError if it has none."""
    vae = pipe.vae
    try:
        getattr(vae, f"enable_{name}")()
    except (AttributeError, NotImplementedError):
        raise RequestError(f"model.vae_{name}", f"{type(vae).__name__} has none; allowed here: false") from None


def _place(pipe: Any, offload: str, device: str) -> None:
    """The pipeline on the device, or its weights waiting in main memory until they are needed there."""
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
