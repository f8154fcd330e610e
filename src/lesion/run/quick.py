"""A lesion on a user's own diffusers pipeline, for a quick look: no study, no store, no scores."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace
from typing import Any

from lesion import replacements
from lesion.denoising.run import COND, UNCOND, Denoising, Enough, sample_of
from lesion.denoising.wrapping import forward_replaced, method_replaced
from lesion.errors import RequestError
from lesion.models.source import APART
from lesion.study import layer_patterns, tokens
from lesion.study.checks import one_of, share
from lesion.study.components import COMPONENTS, DENOISER, VAE, check_axes, parse_components
from lesion.study.layers import ALL_BY
from lesion.study.lesions import BRANCHES, MOST, Axes, Lesion
from lesion.surgery.anatomy import Anatomy, AnatomyError, examine, kinds_of, text_sites
from lesion.surgery.components import Applied, ComponentLesions, examine_component
from lesion.surgery.intervention import Intervention
from lesion.surgery.operation import Lesions, replacement_key

_OTHERS = "makes other images beside the user's"
_CALIBRATED = "needs a calibration"
UNFIT = {"mean": _CALIBRATED, "optimal": _CALIBRATED, "resample": _OTHERS, "resample_pairs": _OTHERS}


@contextmanager
def lesioned(
    pipe: Any,
    layers: str | Sequence[str],
    replacement: str = "zero",
    *,
    component: str = DENOISER,
    by: str = "attention",
    kind: str | None = None,
    window: tuple[float, float] = (0.0, 1.0),
    branch: str = "both",
    strength: float = 1.0,
    **options: Any,
) -> Iterator[None]:
    """Lesion layers of a pipeline for the calls made within the block; after it the pipeline is as before.

    Any number of calls of any batch size, with and without guidance; blocks may be nested.

    pipe: a diffusers pipeline with a UNet or a transformer, not compiled.
    layers: module paths as `lesion-inspect` lists them, with * and ?, or re:REGEX; one or a list.
    replacement: a name of `lesion.replacements`, but for `mean`, `optimal`, `resample` and `resample_pairs`, which need
        a study.
    component: whose layers, as `layers.component`: the denoiser, or a text encoder or the vae, whose layers have its
        name in front: `text_encoder.encoder.layers.3`. Text is lesioned as it is encoded, so within a block give
        prompts, not embeddings.
    by, kind: what a layer is and what of it is lesioned, as `layers.by` and `layers.kind`, but for text tokens, which
        need a study; kind None: the first that the model has, of other components than the denoiser block.
    window: [start, end) as fractions of the denoising steps; of other components than the denoiser all of them.
    branch: both, cond or uncond; of the vae both. Of text encoders it takes pipelines that encode the prompt first.
    strength: in [0, 1], of `double` in [0, 2].
    options: of the replacement, e.g. `prompt` of `donor_prompt`.

    Raises RequestError for what cannot be done, naming what is allowed.
    """
    one_of("component", component, COMPONENTS)
    if by in tokens.BY:
        others = ", ".join(one for one in ALL_BY if one not in tokens.BY)
        raise RequestError("by", f"{by} needs to know each image's prompt; use lesion.study; allowed here: {others}")
    one_of("branch", branch, BRANCHES)
    share("strength", strength, MOST)
    if replacement in UNFIT:
        raise RequestError("replacement", f"{replacement} {UNFIT[replacement]}; use lesion.study")
    if component != DENOISER:
        with _once(pipe, layers, replacement, component, by, kind or "block", window, branch, strength, options):
            yield
        return
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if denoiser is None:
        raise RequestError("pipe", f"{type(pipe).__name__} has no unet and no transformer")
    start, end = window
    if not 0 <= start < end <= 1:
        raise RequestError("window", f"must be (start, end) with 0 <= start < end <= 1; got {window!r}")
    try:
        anatomy = examine(denoiser, by, kind or next(iter(kinds_of(denoiser)), "cross_attention"))
    except AnatomyError as error:
        raise RequestError(error.key, str(error)) from None
    described = replacements.describe(replacement, options)
    replacements.check(replacement, anatomy.kind, (branch,), by, (strength,))
    lesion = Lesion("custom", "", _chosen(layers, anatomy), described, (start, end), branch, strength, anatomy.kind)
    calls = _Calls(pipe, denoiser, anatomy, lesion, _built(pipe, denoiser, anatomy, replacement, options))
    with ExitStack() as stack:
        stack.callback(calls.end)
        stack.enter_context(method_replaced(pipe.scheduler, "set_timesteps", calls.beginning))
        stack.enter_context(forward_replaced(denoiser, calls.lesioned))
        yield


@contextmanager
def _once(
    pipe: Any,
    layers: str | Sequence[str],
    replacement: str,
    component: str,
    by: str,
    kind: str,
    window: tuple[float, float],
    branch: str,
    strength: float,
    options: Mapping[str, Any],
) -> Iterator[None]:
    """Lesion layers of what runs once an image, in every run of it within the block: of branch=cond and uncond in the
    first and the second that an encoder has before the denoising."""
    module = getattr(pipe, component, None)
    if module is None:
        raise RequestError("component", f"{type(pipe).__name__} has no {component}")
    parse_components([component], by, kind)
    start, end = window
    check_axes([component], Axes(selections={}, windows=((start, end),), branches=(branch,)))
    described = replacements.describe(replacement, options)
    replacements.check(replacement, kind, (branch,), by, (strength,), (component,))
    try:
        anatomy = examine_component(component, module, by, kind)
    except AnatomyError as error:
        raise RequestError(error.key, str(error)) from None
    lesion = Lesion("custom", "", _chosen(layers, anatomy), described, (start, end), branch, strength, kind)
    applied = Applied(lesion, replacements.find(replacement).build(options, SimpleNamespace()))
    lesions, runs = ComponentLesions({component: anatomy}, [], {}), itertools.count()

    def lesioned(run: Callable[..., Any]) -> Callable[..., Any]:
        def under(*args: Any, **kwargs: Any) -> Any:
            row = {0: "cond", 1: "uncond"}.get(next(runs), "")
            what = (applied, UNCOND if row == "uncond" else COND) if branch in ("both", row) and strength else None
            with lesions.at_work(component, module, what):
                return run(*args, **kwargs)

        return under

    def beginning(set_timesteps: Callable[..., Any]) -> Callable[..., Any]:
        def begin(*args: Any, **kwargs: Any) -> Any:
            nonlocal runs
            runs = itertools.count()  # the text is encoded
            return set_timesteps(*args, **kwargs)

        return begin

    with ExitStack() as stack:
        stack.enter_context(method_replaced(pipe.scheduler, "set_timesteps", beginning))
        stack.enter_context(method_replaced(module, "decode" if component == VAE else "forward", lesioned))
        yield


def _chosen(layers: str | Sequence[str], anatomy: Anatomy) -> tuple[str, ...]:
    patterns = [layers] if isinstance(layers, str) else list(layers)
    found: set[str] = set()
    for pattern in patterns:
        layer_patterns.check(pattern, "layers")
        matched = [path for path in anatomy.paths if layer_patterns.matches(path, pattern, "layers")]
        if not matched:
            raise RequestError("layers", f"{pattern!r} matches no layer; allowed: {', '.join(anatomy.paths)}")
        found.update(matched)
    return tuple(path for path in anatomy.paths if path in found)


def _built(pipe: Any, denoiser: Any, anatomy: Anatomy, name: str, options: Mapping[str, Any]) -> Intervention:
    """The replacement ready for this pipeline."""
    if name == "donor_prompt":
        from lesion.replacements._texts import Reading
        from lesion.replacements.donor_prompt import DonorPrompt

        reading = Reading(text_sites(denoiser))
        with suppress(Enough), Denoising(pipe, denoiser, 1, [reading]).running():
            pipe(options["prompt"], num_inference_steps=2, output_type="latent")
        return DonorPrompt(reading.found)
    model: Any = SimpleNamespace(anatomy=anatomy, denoiser=denoiser)
    settings: Any = SimpleNamespace(guided=True)
    return replacements.find(name).build(options, SimpleNamespace(model=model, settings=settings))


class _Calls:
    """The pipeline's calls within the block, each a denoising run of its own."""

    def __init__(self, pipe: Any, denoiser: Any, anatomy: Anatomy, lesion: Lesion, intervention: Intervention):
        self.pipe, self.denoiser, self.anatomy = pipe, denoiser, anatomy
        self.lesion, self.intervention = lesion, intervention
        self._run: Denoising | None = None
        self._attached = ExitStack()

    def end(self) -> None:
        """Take the lesions of the last call off."""
        self._run = None
        self._attached.close()

    def beginning(self, set_timesteps: Callable[..., Any]) -> Callable[..., Any]:
        """A pipeline sets the timesteps once a call, before its first denoiser call."""

        def begin(*args: Any, **kwargs: Any) -> Any:
            self.end()
            return set_timesteps(*args, **kwargs)

        return begin

    def lesioned(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The denoiser's forward; the first call of a run tells how many images there are."""

        def told(*args: Any, **kwargs: Any) -> Any:
            if self._run is None:
                self._run = self._begun(len(sample_of(args, kwargs)))
            return self._run.told(forward)(*args, **kwargs)

        return told

    def _begun(self, rows: int) -> Denoising:
        guided = getattr(self.pipe, "do_classifier_free_guidance", None)
        if guided is None and (self.lesion.branch != "both" or self.lesion.replacement.name == "null_prompt"):
            name = type(self.pipe).__name__
            raise RequestError(
                "branch", f"{name} does not tell whether it is guided; allowed: both, without null_prompt"
            )
        if not guided and self.lesion.replacement.name == "null_prompt":
            raise RequestError("replacement", "null_prompt needs guidance here: guidance_scale above 1")
        samples = rows // 2 if guided and not type(self.pipe).__name__.startswith(APART) else rows
        interventions = {replacement_key(self.lesion): self.intervention}
        client = Lesions(self.anatomy, [self.lesion] * samples, interventions)
        run = Denoising(self.pipe, self.denoiser, samples, [client])
        self._attached.enter_context(client.attached(run))
        return run
