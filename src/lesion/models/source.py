"""Where a model lies and what it is made of, found out without loading a weight."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from lesion.errors import RequestError
from lesion.models import facts, files, loras, schedulers
from lesion.models.hub import snapshot
from lesion.models.loras import Lora
from lesion.models.schedulers import SCHEDULERS
from lesion.store.digests import sha256_of
from lesion.study.checks import one_of
from lesion.study.grid import ModelIdentity
from lesion.study.settings import DECLARED

EMBEDDED = Path(__file__).parent / "embedded"
DENOISERS = ("unet", "transformer")
# Beginnings of the names of pipelines that call the denoiser once for each branch of classifier-free guidance, and of
# those that put a template around the prompt before an encoder reads it.
APART = ("QwenImage", "Flux2Klein")
TEMPLATED = ("QwenImage", "Flux2", "ZImage")
DTYPES = ("float32", "float16", "bfloat16")  # as torch names them
OFFLOADS = ("none", "model", "sequential")
# What the settings of a study say themselves; `model.arguments` may not.
SETTLED = frozenset(
    {"self", "prompt", "generator", "output_type", "image", "return_dict", "num_images_per_prompt", "latents"}
    | {"callback_on_step_end"}
    | {one.argument for one in DECLARED if one.argument}
)
# Further arguments of calls that would override what a study says itself, by pattern, and why.
REFUSED = {
    r"timesteps|sigmas|denoising_end": "generation.steps says which steps are made",
    r"(pooled_)?prompt_.*": "the prompts say the text, to every encoder",
    r"negative_(pooled_)?prompt_.*": "generation.negative_prompt says it, to every encoder",
    r"true_cfg_scale": "generation.guidance says the guidance",
    r".*ip_adapter.*": "no IP adapter is loaded",
    r"callback.*|kwargs": "it is code, not a value",
}
LIBRARIES = ("diffusers", "transformers")  # that an index may name classes of
DECODERS = ("float32", "tf32", "bfloat16")
# Repeated blocks of denoisers for which diffusers names none, read in 0.42's source.
BLOCKS = {
    "HunyuanDiT2DModel": ("HunyuanDiTBlock",),
    "PixArtTransformer2DModel": ("BasicTransformerBlock",),
    "SanaTransformer2DModel": ("SanaTransformerBlock",),
    "SD3Transformer2DModel": ("JointTransformerBlock",),
}
STOCK = "stock"  # the decoder's float32 as torch multiplies it by itself: TF32 in convolutions, full in matrix products
UPCASTING = re.compile("XL|Kolors")  # pipelines that decode a float16 autoencoder in float32
_MENDED = {"compile": "compile 3"}  # switch -> its name in keys since its last mend
_CONFIGS = ["*.json", "*/*.json", "*/*.txt", "*/*.model"]


@dataclass(frozen=True)
class ModelSpec:
    """The request for a model.

    id: "embedded", a local folder, a hub name, or a .safetensors file (then `pipeline` names its diffusers class and
    `config` a folder or hub name with its configs). pipeline, of a folder or hub name: a class in the place of the one
    in model_index.json, of diffusers or as `package.module.Class`. dtype: auto, float32, float16 or bfloat16.
    scheduler: a key of SCHEDULERS, or None for the model's own. loras: adapters. vae: folder or hub name of an
    autoencoder in the place of the model's own. arguments: further ones of the pipeline's call, as (name, JSON) pairs.
    offload: none, model or sequential: where weights wait. vae_slicing: images are decoded one at a time; vae_tiling:
    in tiles. compile, channels_last, tf32, shared_rows: for speed; they, slicing and tiling change the rounding.
    decoder: float32, tf32 or bfloat16: precision of the products in the autoencoder's decode; "": see `decoder_of`.
    """

    name: str
    id: str
    pipeline: str | None = None
    config: str | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: str = "auto"
    scheduler: str | None = None
    loras: tuple[Lora, ...] = ()
    vae: str | None = None
    arguments: tuple[tuple[str, str], ...] = ()
    offload: str = "none"
    vae_slicing: bool = False
    vae_tiling: bool = False
    compile: bool = False
    channels_last: bool = False
    tf32: bool = False
    shared_rows: bool = False
    decoder: str = ""

    @classmethod
    def of(cls, config: Mapping[str, Any], performance: Mapping[str, Any]) -> ModelSpec:
        """From the `model` group of a config, which has the recommended settings besides, and from `performance`.

        Raises RequestError naming the key: an unknown dtype, adapters that are not well described.
        """
        for key, group in (("model.dtype", config), ("performance.dtype", performance)):
            one_of(key, group.get("dtype", "auto"), ("auto", *DTYPES))
        both = {**config, **performance, "decoder": performance.get("decoder") or ""}
        one_of("performance.decoder", both["decoder"] or "null", ("null", *DECODERS))
        both["loras"] = loras.parse(config.get("loras") or [])
        both["arguments"] = tuple(sorted((k, json.dumps(v)) for k, v in (config.get("arguments") or {}).items()))
        return cls(**{name: both[name] for name in cls.__dataclass_fields__ if name in both})

    @property
    def switches(self) -> tuple[str, ...]:
        """Names of what is switched on, for speed or memory, and rounds differently.

        A name gets a number when what it does is mended: images made before it then do not count.
        """
        names = ("compile", "channels_last", "tf32", "shared_rows", "vae_slicing", "vae_tiling")
        return tuple(_MENDED.get(name, name) for name in names if getattr(self, name))


@dataclass(frozen=True)
class Source:
    """A model that exists.

    folder: its configs (of a hub name, the snapshot's). file: the single file, if it is one. adapters: the file of each
    LoRA. vae: folder of another autoencoder.
    """

    spec: ModelSpec
    folder: Path
    file: Path | None = None
    commit: str | None = None
    adapters: tuple[Path, ...] = ()
    vae: Path | None = None

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json: component name -> [library, class]."""
        return files.read_mapping(self.folder / "model_index.json", "model.id")

    @property
    def components(self) -> dict[str, tuple[str, str]]:
        """Library and class of each component that the pipeline has."""
        return {
            name: (entry[0], entry[1])
            for name, entry in self.index.items()
            if not name.startswith("_") and _is_component(entry) and entry[0]
        }

    @property
    def scheduler(self) -> str:
        """Class name of the scheduler that will run, and its variant if it is asked for by name.

        Two requests for one model whose schedulers would step differently have different ones.
        """
        if self.spec.scheduler:
            return schedulers.label(self.spec.scheduler, self.scheduler_config)
        return self.components.get("scheduler", ("diffusers", "default"))[1]

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know of the request for this model, in sentences."""
        name = self.spec.scheduler
        if not name or not schedulers.is_own(name, self.scheduler_config):
            return ()
        return (
            f"model.scheduler={name} is what the model has anyway: model.scheduler=null makes the same pixels, but its "
            "images are kept apart",
        )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every config and weight file that makes this model (of a hub model: its commit)."""
        digest = hashlib.sha256()
        extra = (self.spec.variant, self.spec.pipeline, self.scheduler)
        digest.update(json.dumps([*extra, self.commit and [self.spec.id, self.commit]]).encode())
        if self.commit is None:
            for path in self._files():
                digest.update(f"{'' if path == self.file else path.relative_to(self.folder)}\0".encode())
                digest.update(sha256_of(path))
        if more := self._more():  # left out where there is nothing, so that fingerprints stay
            digest.update(json.dumps(more, sort_keys=True).encode())
        return digest.hexdigest()[:32]

    def _more(self) -> dict[str, Any]:
        """What else makes the images: adapters with their weights, another autoencoder, arguments of the call."""
        found: dict[str, Any] = {}
        if self.adapters:
            files = zip(self.spec.loras, self.adapters, strict=True)
            found["loras"] = [[sha256_of(path).hex(), lora.weight] for lora, path in files]
        if self.vae:
            parts = sorted(path for path in self.vae.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
            found["vae"] = [[path.name, sha256_of(path).hex()] for path in parts]
        if self.spec.arguments:
            found["arguments"] = self.spec.arguments
        return found

    def _files(self) -> list[Path]:
        names = [self.folder / "model_index.json"]
        for component in self.components:
            names += [path for path in (self.folder / component).rglob("*") if path.is_file()]
        if self.file:  # of the folder, only configs and tokenizers are used
            names = [path for path in names if path.suffix in (".json", ".txt", ".model")]
        return [*sorted(names), *([self.file] if self.file else [])]

    def skeleton(self, component: str) -> Any:
        """The component as a torch module on the meta device: its structure without its weights.

        Raises RequestError if the pipeline has no such component or it is no torch module.
        """
        import diffusers
        import torch

        if component not in self.components:
            raise RequestError(
                "component", f"{self.spec.id!r} has no {component!r}; allowed: {_listed(self.components)}"
            )
        library, name = self.components[component]
        try:
            cls = self._class(component)
            with torch.device("meta"):
                if library == "transformers" and hasattr(cls, "config_class"):
                    return cls(cls.config_class.from_pretrained(self.folder / component))
                if diffusers.ModelMixin in getattr(cls, "__mro__", ()):
                    return cls.from_config(cls.load_config(self.folder / component))
        except Exception as error:  # whatever a class raises at values that it does not expect
            why = " ".join(str(error).split())[:200]
            raise RequestError("model.id", f"{component} ({name}) of {self.spec.id!r} cannot be built: {why}") from None
        raise RequestError("component", f"{component!r} ({name}) is no neural network; choose another component")

    @property
    def compiles(self) -> bool:
        """Whether the repeated blocks of the denoiser's class are known: diffusers names them, or `BLOCKS`."""
        library, name = self.components[self.denoiser]
        if library == "diffusers" and name in BLOCKS:
            return True
        if library == "diffusers" and (known := facts.denoiser(name)):
            return bool(known["repeated_blocks"])
        return bool(getattr(self._class(self.denoiser), "_repeated_blocks", None))

    @property
    def shares_rows(self) -> bool:
        """Whether text comes into the denoiser by cross-attention alone: see `lesion.surgery.shared_rows`."""
        extras = ("addition_embed_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim")
        is_unet = self.components[self.denoiser][1] == "UNet2DConditionModel"
        return is_unet and not any(self.denoiser_config.get(name) for name in extras)

    def _class(self, component: str) -> Any:
        library, name = self.components[component]
        return getattr(importlib.import_module(library), name)

    @property
    def pipeline(self) -> str:
        """Class name of the pipeline."""
        return self.spec.pipeline or str(self.index["_class_name"])

    @cached_property
    def embedded_guidance(self) -> bool:
        """Whether guidance is an input of the denoiser (FLUX.1, latent consistency models): it has no CFG branches."""
        config = self.denoiser_config
        if self.pipeline.startswith(APART):
            return False
        return "guidance_embeds" in config or bool(config.get("time_cond_proj_dim"))

    @cached_property
    def denoiser_config(self) -> dict[str, Any]:
        """The JSON config of the denoiser; empty if it has none."""
        return _config(self.folder / self.denoiser)

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """The JSON config of the model's own scheduler; empty if it has none."""
        return _config(self.folder / "scheduler")

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The JSON config of the autoencoder that decodes; empty if there is none."""
        return _config(self.vae or self.folder / "vae")

    def config(self, component: str, file: str = "config.json") -> dict[str, Any]:
        """The JSON config of a component; empty if it has none of this name."""
        return _config(self.folder / component, file)

    @property
    def denoiser(self) -> str:
        """Name of the component that denoises."""
        for name in DENOISERS:
            if name in self.components:
                return name
        raise RequestError(
            "model.id",
            f"{self.spec.id!r} ({self.pipeline}) has no denoiser named {' or '.join(DENOISERS)} in model_index.json; "
            f"it has: {_listed(self.components) or 'nothing'}",
        )


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto` is float32 on a CPU and float16 on a GPU."""
    return dtype if dtype != "auto" else ("float32" if device == "cpu" else "float16")


def identity_of(source: Source, device: str) -> ModelIdentity:
    """What of the model can change pixels, known before a weight is loaded."""
    dtype = resolve_dtype(source.spec.dtype, device)
    switches = source.spec.switches
    if decoder := decoder_of(source, device):
        switches = (*switches, f"decoder {decoder}")
    return ModelIdentity(source.spec.name, source.fingerprint, dtype, device.split(":")[0], switches)


def decoder_of(source: Source, device: str) -> str:
    """Return in which precision the autoencoder's decode multiplies: tf32, bfloat16, STOCK, or "" for the model's own.

    STOCK is for an autoencoder that its pipeline decodes in float32 for lack of float16's range, on a GPU: in full
    float32 that takes a third of an image of 20 steps (docs/performance.md).
    """
    if source.spec.decoder:
        return "" if source.spec.decoder == "float32" else source.spec.decoder
    half = resolve_dtype(source.spec.dtype, device) == "float16" and device.startswith("cuda")
    upcast = UPCASTING.search(source.pipeline) and source.vae_config.get("force_upcast", True)
    return STOCK if half and upcast and not source.spec.tf32 else ""


def _config(folder: Path, file: str = "*config.json") -> dict[str, Any]:
    """The JSON config of a component; empty if it has none."""
    found = sorted(path for path in folder.glob(file) if path.is_file())
    return files.read_mapping(found[0], "model.id") if found else {}


def pipeline_class(name: str, key: str = "model.pipeline") -> Any:
    """A pipeline class of diffusers, or of any module as `package.module.Class`. Raises RequestError."""
    import diffusers

    module, _, last = name.rpartition(".")
    found = None
    if all(part.isidentifier() for part in name.split(".")):
        with suppress(ImportError, AttributeError):
            found = getattr(importlib.import_module(module) if module else diffusers, last)
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        raise RequestError(
            key,
            f"{name[:80]!r} is no pipeline class; allowed: one of diffusers, or package.module.Class as model.pipeline",
        )
    return found


def needed_parts(cls: Any) -> list[str]:
    """Names of the components that a pipeline class cannot do without."""
    expected, _ = cls._get_signature_keys(cls)
    return sorted(set(expected) - set(cls._optional_components))


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))


def resolve(spec: ModelSpec) -> Source:
    """Find the model's configs (for a hub name, fetch them: no weights). Raises RequestError where there is none.

    Adapters and another autoencoder are found too, and what does not fit this model is refused.
    """
    if spec.scheduler is not None and spec.scheduler not in SCHEDULERS:  # before anything is fetched
        schedulers.check(spec.scheduler, {}, "")
    check_offload(spec.offload)
    with files.reading("model.id"):
        source = _found(spec)
        _check_index(source)
    with files.reading(loras.KEY):
        adapters = tuple(loras.locate(lora) for lora in spec.loras)
    with files.reading("model.vae"):
        source = replace(source, adapters=adapters, vae=_autoencoder(spec.vae) if spec.vae else None)
    if spec.scheduler is None:
        schedulers.check_own(source.scheduler_config)
    else:
        schedulers.check(spec.scheduler, source.scheduler_config, source.pipeline)
    if known := facts.pipeline(source.pipeline):
        arguments = set(known["arguments"])
    else:
        cls = pipeline_class(source.pipeline, "model.pipeline" if spec.pipeline else "model.id")
        arguments = set(inspect.signature(cls.__call__).parameters)
    takes = {name for name in arguments - SETTLED if not _refused(name)}
    for name, _ in spec.arguments:
        if name not in takes:
            short, why = source.pipeline.rpartition(".")[2], f": {_refused(name)}" if name in arguments else ""
            raise RequestError("model.arguments", f"{short} takes no {name!r} here{why}; allowed: {_listed(takes)}")
    return source


def check_files(source: Source) -> None:
    """Raises RequestError where a file of the model, of a local folder or single file, cannot be what it is to be.

    Of a hub name the weights are not there yet.
    """
    with files.reading("model.id"):
        if source.file:
            files.check_safetensors(source.file, "model.id")
        elif source.commit is None:
            parts = {name: of for name, of in source.components.items() if not (source.vae and name == "vae")}
            _check_parts(source, parts)
            files.check_components(source.folder, parts, source.spec.variant, "model.id")
    with files.reading("model.vae"):
        if source.vae:
            files.check_weights(source.vae, "diffusers", None, "model.vae")
    with files.reading(loras.KEY):
        for path in source.adapters:
            loras.check(path)


def _check_parts(source: Source, parts: Mapping[str, Any]) -> None:
    """Raises RequestError for a model_index.json without a component that its pipeline needs."""
    known = facts.pipeline(source.pipeline)
    for name in known["parts"] if known else needed_parts(pipeline_class(source.pipeline)):
        if name not in parts and not (source.vae and name == "vae"):
            raise RequestError(
                "model.id", f"model_index.json of {source.spec.id!r} names no {name}, which {source.pipeline} needs"
            )


def _refused(name: str) -> str:
    """Why `model.arguments` may not override this argument; "" if it may."""
    if name in SETTLED:
        return "other keys of the request say it"
    return next((why for pattern, why in REFUSED.items() if re.fullmatch(pattern, name)), "")


def _check_index(source: Source) -> None:
    """Refuse a model_index.json that would run other code than diffusers' and transformers', or lead out of the folder.

    A class of one's own is named on the command line, as `model.pipeline`.
    """

    def refuse(what: str) -> NoReturn:
        raise RequestError("model.id", f"model_index.json of {source.spec.id!r} {what}")

    index = source.index
    name = index.get("_class_name")
    if not isinstance(name, str) or not name.isidentifier():
        refuse(f"names the class {name!r}; allowed: one of diffusers, or package.module.Class as model.pipeline")
    if (source.folder / "None.py").exists():  # which diffusers takes for the code of a pipeline
        refuse("has a None.py beside it; code of a model folder is not run")
    for part, entry in index.items():
        if part.startswith("_") or not _is_component(entry):
            continue
        if not part.isidentifier() or not (source.folder / part).resolve().is_relative_to(source.folder.resolve()):
            refuse(f"has a component {part!r} that leads out of its folder")
        if entry[0] is None:
            continue
        if len(entry) != 2 or not all(isinstance(one, str) and one.isidentifier() for one in entry):
            refuse(f"has {entry!r} for {part}; allowed: a library and a class")
        library = entry[0]
        if library not in LIBRARIES and not _is_pipeline_module(library):
            refuse(f"names a class of {library!r} for {part}; allowed: {', '.join(LIBRARIES)}")
        if (source.folder / part / f"{library}.py").exists():  # which diffusers takes for the library
            refuse(f"has code in {part}/{library}.py; code of a model folder is not run")


def _is_component(entry: Any) -> bool:
    """Whether it is of the form [library, class], as of a component; other lists are settings of the pipeline."""
    return isinstance(entry, list) and bool(entry) and all(one is None or isinstance(one, str) for one in entry)


def _is_pipeline_module(name: str) -> bool:
    """Whether diffusers has a folder of pipelines of this name, whose classes an index names by it."""
    found = importlib.util.find_spec("diffusers")  # which is not imported by this
    places = found.submodule_search_locations if found else None
    return any((Path(place) / "pipelines" / name / "__init__.py").is_file() for place in places or ())


def check_offload(offload: str, device: str = "") -> None:
    """Raises RequestError for a way of offloading that is none, or makes no sense on the device ("": any)."""
    if offload not in OFFLOADS:
        raise RequestError("model.offload", f"got {offload!r}; allowed: {', '.join(OFFLOADS)}")
    if offload != "none" and device == "cpu":
        raise RequestError("model.offload", "moves weights to an accelerator and back; allowed on device=cpu: none")


def _found(spec: ModelSpec) -> Source:
    path = EMBEDDED if spec.id == "embedded" else Path(spec.id).expanduser()
    if path.suffix == ".safetensors":
        return _single_file(spec, path)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise RequestError("model.id", f"{spec.id!r} is no diffusers folder: it has no model_index.json")
        return Source(spec, path)
    if path.is_absolute() or spec.id.startswith((".", "~")) or spec.id.count("/") != 1:
        raise RequestError(
            "model.id",
            f"no folder {spec.id!r}; allowed: a diffusers folder, a .safetensors file, a hub name 'org/model'",
        )
    folder = snapshot(spec.id, _CONFIGS, "model.id", revision=spec.revision)
    return Source(spec, folder, commit=folder.name)


def _autoencoder(name: str) -> Path:
    """Folder of the autoencoder. Raises RequestError."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
            raise RequestError("model.vae", f"no folder {name!r}; allowed: null, a folder, a hub name")
        folder = snapshot(name, ["config.json", "diffusion_pytorch_model.safetensors"], "model.vae")
    if not str(_config(folder).get("_class_name", "")).startswith("Autoencoder"):
        raise RequestError("model.vae", f"{name!r} holds no autoencoder: its config.json names none")
    return folder


def _loads_single_files(pipeline: str) -> bool:
    if known := facts.pipeline(pipeline):
        return bool(known["single_file"])
    import diffusers

    return hasattr(getattr(diffusers, pipeline, None), "from_single_file")


def _single_file(spec: ModelSpec, path: Path) -> Source:
    if not path.is_file():
        raise RequestError("model.id", f"no file {spec.id!r}")
    if not spec.pipeline:
        raise RequestError(
            "model.pipeline", "a single file does not say its class; name it: StableDiffusionPipeline, …"
        )
    if not _loads_single_files(spec.pipeline):
        raise RequestError(
            "model.pipeline", f"{spec.pipeline!r} is no diffusers pipeline that loads from a single file"
        )
    if not spec.config:
        raise RequestError(
            "model.config", "a single file needs a folder or hub name with its configs, e.g. the base model's"
        )
    folder = Path(spec.config).expanduser()
    if not folder.is_dir():
        folder = snapshot(spec.config, _CONFIGS, "model.config")
    if not (folder / "model_index.json").is_file():
        raise RequestError("model.config", f"{spec.config!r} has no model_index.json")
    return Source(spec, folder, file=path)
