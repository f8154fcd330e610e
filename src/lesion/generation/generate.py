"""A batch of cells -> their images. With `surgery` and `means` the only code that runs a model."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lesion import tasks
from lesion.denoising.run import COND, UNCOND, Client, Denoising, Enough
from lesion.generation.capture import Capturing
from lesion.generation.decoding import decoding, decoding_apart
from lesion.generation.layout import Steering, Target
from lesion.generation.snapshots import OtherCount, Recording, Resuming, State, States, first_step
from lesion.models import Model
from lesion.models.calling import arguments
from lesion.models.precision import set_tf32
from lesion.models.text_cache import text_projected_once
from lesion.models.tokens import columns_of
from lesion.models.words import Words, truncated, words_of, words_of_encoder
from lesion.study.components import DENOISER, begins, part_of
from lesion.study.grid import Cell
from lesion.study.lesions import Lesion
from lesion.study.prompts import Prompt
from lesion.study.settings import Settings
from lesion.study.steering import STEERING_OFF
from lesion.study.tokens import BY, layer_and_set
from lesion.surgery.attention import text_attention
from lesion.surgery.components import ComponentLesions
from lesion.surgery.intervention import Intervention
from lesion.surgery.operation import Lesions, replacement_key
from lesion.surgery.shared_rows import SharedRows
from lesion.surgery.tokens import Places

log = logging.getLogger(__name__)
MOST = 3  # prompts that are too long that a line names


def make_deterministic(seed: int = 0, tf32: bool = False) -> None:
    """Seeds every generator there is and asks cuDNN and cuBLAS for repeatable kernels.

    tf32: let float32 products on a GPU round their factors to 10 bits. The noise of an image does not depend on these
    seeds: it comes from the image's own generator.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    set_tf32(tf32)  # float32 is to mean float32 unless asked otherwise
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator an image, seeded with `Cell.noise_seed`, so that noise depends on neither device nor batch."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def under_lesions(
    model: Model,
    lesions: Sequence[Lesion | None],
    interventions: Mapping[str, Intervention],
    places: Places | None = None,
) -> list[Client]:
    """Return the clients of a run in which image i is made under lesions[i]; none where there is nothing to do.

    places: of the images' text tokens, where lesions are of these.

    On a compiled denoiser lesions are put on its gates. One of the loss that steers is for `steering`, not for these.
    """
    lesions = [None if lesion and lesion.replacement.name == STEERING_OFF else lesion for lesion in lesions]
    if model.components:
        lesions = [part_of(lesion, DENOISER) for lesion in lesions]
    if model.gates:
        return [model.gates.lesions(model.anatomy, lesions, interventions)]
    client = Lesions(model.anatomy, lesions, interventions, places)
    if not client.sites:
        return []
    return [client, SharedRows(client)] if model.shared_rows else [client]


def token_places(
    model: Model,
    cells: Sequence[Cell],
    images: int | None = None,
    component: str = DENOISER,
    lesions: Sequence[Lesion] | None = None,
) -> Places | None:
    """Return where the tokens of these cells' lesions of a component are in their prompts.

    images: of the batch, those of source prompts, which come last, counted. None for layers that are not by token.
    lesions: all of them of each cell, in the place of its own.

    Raises ValueError, in a sentence that says why, where a prompt has none of them.
    """
    anatomy = model.anatomy if component == DENOISER else model.components[component]
    if anatomy.by not in BY:
        return None
    settings = cells[0].settings
    pipe = model.pipeline(settings.task)

    @functools.cache
    def words_in(text: str) -> Words:
        if component == DENOISER:
            return words_of(pipe, text, model.arguments)
        return words_of_encoder(pipe, component, text, model.arguments)

    found: list[dict[tuple[int, str], tuple[int, ...]]] = []
    length = words_in("").length
    for cell in cells:
        of_image: dict[tuple[int, str], tuple[int, ...]] = {}
        mine: Sequence[Lesion | None] = [cell.lesion] if lesions is None else lesions
        parts = [part for one in mine if (part := part_of(one, component))]
        # Without guidance every row reads the prompt. A negative prompt need not say what a prompt says.
        needed = {
            (UNCOND if part.branch == "uncond" else COND, layer_and_set(layer)[1])
            for part in parts
            for layer in part.layers
        }
        if needed:
            texts = {COND: cell.prompt.text, UNCOND: settings.negative_prompt or ""}
            words = {branch: words_in(text) for branch, text in texts.items()}
            names = dict.fromkeys(layer_and_set(layer)[1] for part in parts for layer in part.layers)
            for branch, name in itertools.product(texts, names):
                try:
                    of_image[branch, name] = columns_of(words[branch], name)
                except KeyError as error:
                    if (branch, name) in needed:
                        raise ValueError(error.args[0]) from None
        found.append(of_image)
    found += [{} for _ in range((images or len(cells)) - len(cells))]
    return Places(found, length)


def steering(model: Model, cells: Sequence[Cell], lesions: Sequence[Lesion | None]) -> Steering | None:
    """Return the client that steers the images of these cells; None where nothing steers.

    lesions: of all images of the batch: those behind the cells' own are of source prompts, which nothing steers.
    """
    settings = cells[0].settings
    if settings.steering is None:
        return None
    pipe = model.pipeline(settings.task)
    targets: list[list[Target]] = []
    for cell in cells:
        words = words_of(pipe, cell.prompt.text, model.arguments)
        targets.append([Target(words.find(box.words), box.box) for box in cell.prompt.boxes])
    return Steering(
        settings.steering,
        text_attention(model.denoiser),
        targets + [[] for _ in lesions[len(cells) :]],
        lesions,
        settings.height / settings.width,
        whole=any(lesion and lesion.strength and lesion.replacement.name != STEERING_OFF for lesion in lesions),
    )


def say_unseen(model: Model, prompts: Sequence[Prompt]) -> None:
    """Say in one line which of these prompts end beyond the limit of the text encoders, and by how much."""
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    for text in texts:
        if text not in model.unseen:
            model.unseen[text] = truncated(model.pipe, text, model.arguments)
    cut = [text for text in texts if model.unseen[text][0]]
    if not cut:
        return
    named = [
        f"{text[:60]!r}, its last {tokens} tokens ({', '.join(words)})"
        for text, (tokens, words) in ((text, model.unseen[text]) for text in cut[:MOST])
    ]
    what = f"{len(cut)} of {len(texts)} prompts {'is' if len(cut) == 1 else 'are'}" if len(texts) > 1 else "a prompt is"
    rest = f"; and {len(cut) - MOST} more (column truncated_tokens)" if len(cut) > MOST else ""
    log.warning("%s too long: no text encoder sees of %s%s", what, "; of ".join(named), rest)


def call(
    model: Model,
    prompts: Sequence[Prompt],
    noise: Sequence[torch.Generator],
    settings: Settings,
    clients: Sequence[Client] = (),
    once: ComponentLesions | None = None,
) -> Tensor:
    """Call the pipeline with these clients taking part: (n, 3, height, width) in [0, 1], on the device.

    once: the lesions of the images in text encoders and the decoder.

    Raises ValueError where the pipeline makes another size than is asked for.
    """
    pipe, inputs = model.pipeline(settings.task), tasks.of(settings.task).inputs(prompts, settings)
    asked = arguments(pipe, settings, [prompt.text for prompt in prompts], noise, inputs, model.arguments)
    # Compiled code would be compiled anew for every module whose forward is replaced.
    sites = () if model.gates else model.text_sites
    if new := [prompt for prompt in prompts if prompt.text not in model.unseen]:  # of no study
        say_unseen(model, new)
    run = Denoising(pipe, model.denoiser, len(prompts), clients)
    with (
        run.running(),
        model.texts.attached(model.pipe, once),
        text_projected_once(model.denoiser, sites),
        _precision_kept(getattr(pipe, "vae", None)),
        decoding(getattr(pipe, "vae", None), model.decodable, model.decoder),
        decoding_apart(getattr(pipe, "vae", None), once),
    ):
        try:
            images = run.pipeline(**asked).images
        except BaseException:  # what is offloaded goes back to main memory, as at the end of a call that succeeds
            pipe.maybe_free_model_hooks()
            raise
    if not isinstance(images, Tensor):  # of a pipeline that makes arrays, whatever it is asked for
        images = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2)
    if images.shape[2:] != (settings.height, settings.width):
        made = " x ".join(map(str, images.shape[2:]))
        raise ValueError(f"{type(pipe).__name__} made {made} pixels instead of {settings.height} x {settings.width}")
    return images


@contextmanager
def _precision_kept(module: torch.nn.Module | None) -> Iterator[None]:
    """A module whose dtype is the same afterwards, also after an error.

    Pipelines decode with a float16 autoencoder in float32, and cast it back only if decoding succeeds: after one that
    ran out of memory every later image would fail.
    """
    before = [] if module is None else [(weight, weight.dtype) for weight in (*module.parameters(), *module.buffers())]
    try:
        yield
    finally:
        for weight, dtype in before:
            if weight.dtype != dtype:
                weight.data = weight.data.to(dtype)


def generate(
    model: Model,
    cells: Sequence[Cell],
    interventions: Mapping[str, Intervention],
    states: States | None = None,
    windows: Sequence[tuple[float, float]] = (),
    capturing: Capturing | None = None,
    masses: dict[str, float] | None = None,
    rounded: bool = False,
) -> NDArray[Any]:
    """Make the images of a batch, (n, height, width, 3) float in [0, 1]; all cells have the same settings.

    interventions: the replacements at work, by `operation.replacement_key`.
    states: where snapshots of baselines are kept, from which late lesions are resumed; None: every image is made from
        its noise.
    windows: those in which lesions of the study begin (`Study.begins`), for which a baseline leaves its snapshot.
    capturing: what keeps the attention maps of these cells; their images are then made from noise, since a snapshot
        has no maps of the steps before it.
    masses: gets `Steering.mass` of each steered cell, by its key.
    rounded: rather as uint8 pixels, of which a quarter of the bytes leave the device; as float if some are not finite.
    """
    try:
        images = _generate(model, cells, interventions, states, windows, capturing, masses)
    except OtherCount as error:
        log.warning("late windows are made from noise: %s", error)
        assert states is not None
        states.usable = False
        images = _generate(model, cells, interventions, states, windows, capturing, masses)
    images = images.permute(0, 2, 3, 1).float()
    if rounded and bool(images.isfinite().all()):
        images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    found: NDArray[Any] = images.cpu().numpy()
    return found


def _generate(
    model: Model,
    cells: Sequence[Cell],
    interventions: Mapping[str, Intervention],
    states: States | None,
    windows: Sequence[tuple[float, float]],
    capturing: Capturing | None,
    masses: dict[str, float] | None,
) -> Tensor:
    prompts, seeds, settings = [cell.prompt for cell in cells], [cell.noise_seed for cell in cells], cells[0].settings
    lesions = [cell.lesion for cell in cells]
    sources = [_source(cell, interventions) for cell in cells]
    together = any(source is not None for source in sources)
    if together:  # beside every image one of the source prompt, un-lesioned, with the same noise
        prompts += [
            replace(prompt, text=prompt.text if source is None else source)
            for source, prompt in zip(sources, prompts, strict=True)
        ]
        seeds, lesions = seeds * 2, lesions + [None] * len(lesions)
    noise = generators(seeds)
    clients = under_lesions(model, lesions, interventions, token_places(model, cells, len(lesions)))
    once = None
    if model.components:
        places = {one: found for one in model.components if (found := token_places(model, cells, len(lesions), one))}
        once = ComponentLesions(model.components, lesions, interventions, places)
    steers = steering(model, cells, lesions)
    if steers:
        clients.append(steers)
        states = None  # a snapshot is no place to go on from: what was steered before it could not be measured
    recording = None
    if states and states.usable and not together and any(start > 0 for start, _ in windows):
        if not any(lesions):  # an image beside a source prompt's leaves no snapshot
            recording = Recording(noise, windows)
            clients.append(recording)
        elif all(lesions) and not capturing and (kept := _states(model, cells, states)):
            clients.append(Resuming(noise, *kept))
    if capturing:
        clients.append(capturing)
    images = call(model, prompts, noise, settings, clients, once)[: len(cells)]
    if steers and masses is not None:
        masses |= {cell.key: mass for cell, mass in zip(cells, steers.mass, strict=False)}
    if states and recording and recording.calls:
        states.note(cells[0], recording.calls)
        for step, batch in recording.states.items():
            for cell, state in zip(cells, batch, strict=True):
                states.put(cell.key, step, state)
    return images


def _source(cell: Cell, interventions: Mapping[str, Intervention]) -> str | None:
    """The prompt of the image that this cell's replacement wants beside its own, if it wants one."""
    if cell.lesion is None or cell.lesion.strength == 0:
        return None
    return interventions[replacement_key(cell.lesion)].source_of(cell.prompt.text, cell.seed)


def _states(model: Model, cells: Sequence[Cell], states: States) -> tuple[list[State], int] | None:
    """The states of the cells' baselines at which the first lesion of the batch begins, and that denoiser call.

    Read, or made by running the baselines that far; None if the first lesion begins at once, or no state can be had.
    """
    window = min(begins(cell.lesion) for cell in cells if cell.lesion)
    if window[0] == 0:
        return None
    baselines = {cell.baseline.key: cell.baseline for cell in cells}
    calls = states.calls(list(baselines.values()))
    found: dict[str, State | None] = dict.fromkeys(baselines)
    start = 0
    if calls is not None:
        start = first_step(window, calls)
        if start == 0:
            return None
        found = {key: states.get(key, start, calls) for key in baselines}
    missing = [cell for key, cell in baselines.items() if found[key] is None]
    if missing:
        noise = generators([cell.noise_seed for cell in missing])
        settings = missing[0].settings
        record = Recording(noise, [window], stop=True)
        with suppress(Enough):
            untouched = under_lesions(model, [None] * len(missing), {})
            call(model, [cell.prompt for cell in missing], noise, settings, [*untouched, record])
        if calls is not None and record.calls != calls:
            raise OtherCount(f"the pipeline takes {record.calls} steps, the kept states are of {calls}")
        states.note(missing[0], record.calls)
        start = first_step(window, record.calls)
        if start not in record.states:  # it begins at once, or the scheduler is Unknown
            states.usable = start == 0
            return None
        for cell, new in zip(missing, record.states[start], strict=True):
            states.put(cell.key, start, new)
            found[cell.key] = new
    return [state for cell in cells if (state := found[cell.baseline.key])], start


def to_pixels(image: NDArray[Any]) -> tuple[NDArray[np.uint8], str]:
    """uint8 pixels as diffusers makes them, and the reason why the image is invalid ("" if it is fine).

    image: (height, width, 3), float in [0, 1] or uint8.
    """
    reason = ""
    if not np.isfinite(image).all():
        reason = "image has non-finite values"
        image = np.nan_to_num(image, nan=0.0, posinf=1.0, neginf=0.0)
    pixels: NDArray[np.uint8] = image if image.dtype == np.uint8 else (image.clip(0, 1) * 255).round().astype(np.uint8)
    if not reason and pixels.max() <= 1:
        reason = "image is all black"
    return pixels, reason
