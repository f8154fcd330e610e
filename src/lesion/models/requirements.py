"""What a model needs beside text and settings, told from its configs before anything is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from lesion import tasks
from lesion.errors import RequestError
from lesion.models.calling import call_arguments, fits
from lesion.models.source import Source
from lesion.study.settings import Settings

# Words in the names of diffusers' classes whose calls want a picture, a mask or boxes beside the text.
_WITH_MORE = {
    "txt2img": "Control|Adapter|GLIGEN|Inpaint|Img2Img|Pix2Pix|Depth|Upscale|Fill|Variation|Redux|Edit|Example",
    "img2img": "Control|Adapter",
}
# Those whose calls give no image, want their own words of what to do, or run the denoiser on several views or branches.
_OTHERWISE = "LDM3D|UnCLIP|AttendAndExcite|Panorama|PipelineSafe|Paradigms|I2VGen|AnimateDiff|Video|PIAPipeline"
# Guidance that runs the denoiser on further rows or more often, by what switches it off.
_FURTHER = {"PAG": "pag_scale", "SAG": "sag_scale"}
# What diffusers' schedulers know, and refuse elsewise at the first step only.
_WORDS = {
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
}
_EXACT = ("DDIM", "DDPM", "LCM", "TCD")  # schedulers in which the noise of a zero-SNR schedule is without end at first
_TIMESTEPS = 10**6  # for each of which a scheduler keeps numbers
_SHORTEST, _LONGEST = 3, 10**6  # tokens: begin, a word and end; a tokenizer whose config names no length has 10^30


def check(source: Source, settings: Settings) -> None:
    """Raises RequestError, naming the key, where every image would fail for what the model is.

    Of a pipeline class that is not of diffusers only the steps are checked: what it does with its parts is its own.
    """
    trained = source.scheduler_config.get("num_train_timesteps", 1000)
    if not isinstance(trained, int) or not 1 <= trained <= _TIMESTEPS:
        raise RequestError(
            "model.id",
            f"the scheduler of {source.spec.id!r} has num_train_timesteps {trained!r}; allowed: 1 to {_TIMESTEPS}",
        )
    for name, values in _WORDS.items():
        if (said := source.scheduler_config.get(name, values[0])) not in values:
            raise RequestError(
                "model.id", f"the scheduler of {source.spec.id!r} has {name} {said!r}; allowed: {', '.join(values)}"
            )
    if not source.scheduler.startswith("FlowMatch") and settings.steps > trained:
        raise RequestError("generation.steps", f"the model has {trained} timesteps; allowed: 1 to {trained}")
    if settings.steering and settings.steering.step_size == "sigma_squared" and _endless(source, settings):
        raise RequestError(
            "steering.step_size",
            f"sigma is infinite at the first step of {source.scheduler} of {source.spec.id!r}; allowed: noise_share",
        )
    if "." in source.pipeline:
        return
    if re.search(_WITH_MORE.get(settings.task, "$^"), source.pipeline):
        raise RequestError(
            "model.id",
            f"{source.pipeline} wants more than text (a picture, a mask or boxes); name the class for text alone as "
            "model.pipeline, if its parts serve",
        )
    _check_calls(source, settings.task)
    _check_denoiser(source)
    _check_guidance(source, settings.guidance)
    if source.pipeline == "StableDiffusionXLPipeline":
        _check_sdxl(source)
    _check_tokenizers(source)
    _check_clip_skip(source)
    _check_arguments(source, settings.task)


def _endless(source: Source, settings: Settings) -> bool:
    """Whether denoising starts from a timestep that has noise alone."""
    config = source.scheduler_config
    last = config.get("timestep_spacing") in ("trailing", "linspace")
    whole = tasks.of(settings.task).steps(settings) == settings.steps
    zero = bool(config.get("rescale_betas_zero_snr")) and source.scheduler.startswith(_EXACT)
    return zero and last and whole


def _check_arguments(source: Source, task: str) -> None:
    known = call_arguments(source.pipeline, tasks.of(task))
    for name, text in source.spec.arguments:
        if not fits(json.loads(text), forms := known.get(name, "")):
            told = forms.replace("|", " or ")
            raise RequestError("model.arguments", f"{name} of {source.pipeline} must be {told}; got {text}")


def _check_calls(source: Source, task: str) -> None:
    """Refuse classes that make no image, or run the denoiser in ways whose rows belong to no branch."""
    if re.search(_OTHERWISE, source.pipeline) or "num_frames" in call_arguments(source.pipeline, tasks.of(task)):
        raise RequestError(
            "model.id",
            f"{source.pipeline} makes no single image, or runs its denoiser in a way of its own; name a plain class as "
            "model.pipeline, if its parts serve",
        )
    for word, scale in _FURTHER.items():
        given = json.loads(dict(source.spec.arguments).get(scale, "null"))
        if word in source.pipeline and (given is None or given != 0):
            raise RequestError(
                "model.arguments",
                f"{source.pipeline} runs its denoiser on further rows, which belong to no branch of guidance; "
                f"allowed: {{{scale}: 0.0}}; got {given!r}",
            )


def _check_denoiser(source: Source) -> None:
    config, latents = source.denoiser_config, source.vae_config.get("latent_channels")
    reads = config.get("in_channels")
    if isinstance(latents, int) and isinstance(reads, int) and reads not in (latents, 4 * latents):  # 4: packed 2 x 2
        raise RequestError(
            "model.id",
            f"the {source.denoiser} of {source.spec.id!r} reads {reads} channels where the autoencoder has {latents}: "
            "it is for inpainting or editing, and wants more than text",
        )
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        raise RequestError(
            "model.id", f"the {source.denoiser} of {source.spec.id!r} wants class labels, not text alone"
        )
    if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
        raise RequestError("model.id", f"the {source.denoiser} of {source.spec.id!r} wants an image embedding")
    added = config.get("addition_embed_type")
    given = ("text", "text_time") if source.pipeline.startswith("StableDiffusionXL") else ("text",)
    if source.denoiser == "unet" and added is not None and added not in given:
        raise RequestError(
            "model.id",
            f"the unet of {source.spec.id!r} wants a condition ({added}) that {source.pipeline} does not give",
        )


def _check_guidance(source: Source, guidance: float) -> None:
    """Refuse guidance whose branches are not what `Settings.guided` says."""
    if source.pipeline.startswith("ZImage") and 0 < guidance <= 1:
        raise RequestError(
            "generation.guidance",
            f"{source.pipeline} adds guidance times the difference of its branches, so it is off at 0 only; "
            f"allowed: 0, or above 1; got {guidance:g}",
        )
    if source.pipeline.startswith("Flux2Klein") and source.index.get("is_distilled") and guidance > 1:
        raise RequestError(
            "generation.guidance", f"{source.spec.id!r} is distilled and reads none; allowed: 0 to 1; got {guidance:g}"
        )


def _check_sdxl(source: Source) -> None:
    """The size and text that SDXL adds to a step must have the width that the UNet was made for: not the refiner's."""
    config, text = source.denoiser_config, source.config("text_encoder_2")
    if (added := config.get("addition_embed_type")) != "text_time":
        raise RequestError(
            "model.id",
            f"the unet of {source.spec.id!r} has addition_embed_type {added}, where {source.pipeline} gives text_time: "
            "model_index.json may name the class of another model",
        )
    wanted, each = config.get("projection_class_embeddings_input_dim"), config.get("addition_time_embed_dim")
    pooled = text.get("projection_dim")
    if isinstance(wanted, int) and isinstance(each, int) and isinstance(pooled, int) and wanted != 6 * each + pooled:
        raise RequestError(
            "model.id",
            f"the unet of {source.spec.id!r} wants {wanted} added values where {source.pipeline} gives "
            f"{6 * each + pooled}: is it the refiner, which has no text to image?",
        )


def _clips(source: Source, part: str) -> Iterator[str]:
    """Names of the components of CLIP: part is tokenizer or text_encoder."""
    for name, (_, cls) in source.components.items():
        if name.startswith(part) and cls.startswith("CLIP"):
            yield name


def _check_tokenizers(source: Source) -> None:
    for name in _clips(source, "tokenizer"):
        length = source.config(name, "tokenizer_config.json").get("model_max_length")
        holds = source.config(name.replace("tokenizer", "text_encoder")).get("max_position_embeddings")
        if not isinstance(length, int | float) or isinstance(length, bool) or length > _LONGEST:
            raise RequestError(
                "model.id",
                f"{name}/tokenizer_config.json of {source.spec.id!r} has no model_max_length; give it that of its "
                f"text encoder{f', {holds}' if isinstance(holds, int) else ''}",
            )
        if length < _SHORTEST or (isinstance(holds, int) and length > holds):
            raise RequestError(
                "model.id",
                f"{name}/tokenizer_config.json of {source.spec.id!r} has model_max_length {length}, its text encoder "
                f"reads {f'{_SHORTEST} to {holds}' if isinstance(holds, int) else f'at least {_SHORTEST}'}",
            )


def _check_clip_skip(source: Source) -> None:
    skip = json.loads(dict(source.spec.arguments).get("clip_skip", "null"))
    layers = [source.config(name).get("num_hidden_layers") for name in _clips(source, "text_encoder")]
    known = [one for one in layers if isinstance(one, int)]
    if skip is None or not known:
        return
    # SDXL and SD 3 read the last layer but one anyway.
    most = min(known) - (1 if source.pipeline.startswith(("StableDiffusionXL", "StableDiffusion3")) else 0)
    if isinstance(skip, bool) or not isinstance(skip, int) or not 0 <= skip <= most:
        raise RequestError(
            "model.arguments", f"clip_skip must be null or a whole number from 0 to {most} for this model; got {skip!r}"
        )
