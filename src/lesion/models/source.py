"""Where a model lies and what it is made of, found out without loading a weight."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from lesion.errors import RequestError

EMBEDDED = Path(__file__).parent / "embedded"
SCHEDULERS = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
DENOISERS = ("unet", "transformer")
_CONFIGS = ["*.json", "*/*.json", "*/*.txt", "*/*.model"]


@dataclass(frozen=True)
class ModelSpec:
    """The request for a model.

    id: "embedded", a local folder, a hub name, or a .safetensors file (then `pipeline` names its diffusers class and
    `config` a folder or hub name with its configs). dtype: auto, float32, float16 or bfloat16. scheduler: a key of
    SCHEDULERS, or None for the model's own. compile, channels_last, tf32: for speed; they change the rounding.
    """

    name: str
    id: str
    pipeline: str | None = None
    config: str | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: str = "auto"
    scheduler: str | None = None
    compile: bool = False
    channels_last: bool = False
    tf32: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], performance: Mapping[str, Any]) -> ModelSpec:
        """From the `model` group of a config, which has the recommended settings besides, and from `performance`."""
        both = {**config, **performance}
        return cls(**{name: both[name] for name in cls.__dataclass_fields__ if name in both})

    @property
    def switches(self) -> tuple[str, ...]:
        """Names of what is switched on for speed."""
        return tuple(name for name in ("compile", "channels_last", "tf32") if getattr(self, name))


@dataclass(frozen=True)
class Source:
    """A model that exists. folder: its configs (of a hub name, the snapshot's). file: the single file, if it is one."""

    spec: ModelSpec
    folder: Path
    file: Path | None = None
    commit: str | None = None

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json: component name -> [library, class]."""
        try:
            index: dict[str, Any] = json.loads((self.folder / "model_index.json").read_text())
        except ValueError as error:
            raise RequestError("model.id", f"model_index.json of {self.spec.id!r} is no valid JSON: {error}") from None
        return index

    @property
    def components(self) -> dict[str, tuple[str, str]]:
        """Library and class of each component that the pipeline has."""
        return {
            name: (entry[0], entry[1])
            for name, entry in self.index.items()
            if not name.startswith("_") and isinstance(entry, list) and entry[0]
        }

    @property
    def scheduler(self) -> str:
        """Class name of the scheduler that will run."""
        if self.spec.scheduler:
            return SCHEDULERS[self.spec.scheduler]
        return self.components.get("scheduler", ("diffusers", "default"))[1]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every config and weight file that makes this model (of a hub model: its commit)."""
        digest = hashlib.sha256()
        extra = (self.spec.variant, self.spec.pipeline if self.file else None, self.scheduler)
        digest.update(json.dumps([*extra, self.commit and [self.spec.id, self.commit]]).encode())
        if self.commit is None:
            for path in self._files():
                digest.update(f"{'' if path == self.file else path.relative_to(self.folder)}\0".encode())
                digest.update(_digest(path, path.stat().st_mtime_ns, path.stat().st_size))
        return digest.hexdigest()[:32]

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
            cls: Any = getattr(importlib.import_module(library), name)
            with torch.device("meta"):
                if library == "transformers" and hasattr(cls, "config_class"):
                    return cls(cls.config_class.from_pretrained(self.folder / component))
                if diffusers.ModelMixin in getattr(cls, "__mro__", ()):
                    return cls.from_config(cls.load_config(self.folder / component))
        except (ImportError, AttributeError, OSError, ValueError, TypeError) as error:
            why = " ".join(str(error).split())[:200]
            raise RequestError("model.id", f"{component} ({name}) of {self.spec.id!r} cannot be built: {why}") from None
        raise RequestError("component", f"{component!r} ({name}) is no neural network; choose another component")

    @property
    def denoiser(self) -> str:
        """Name of the component that denoises."""
        for name in DENOISERS:
            if name in self.components:
                return name
        raise RequestError(
            "model.id", f"{self.spec.id!r} has no denoiser ({' or '.join(DENOISERS)}) in model_index.json"
        )


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))


@lru_cache(maxsize=4096)
def _digest(path: Path, modified: int, size: int) -> bytes:
    """sha256 of a file; `modified` and `size` only key the cache."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def resolve(spec: ModelSpec) -> Source:
    """Find the model's configs (for a hub name, fetch them: no weights). Raises RequestError where there is none."""
    if spec.scheduler is not None and spec.scheduler not in SCHEDULERS:
        raise RequestError("model.scheduler", f"unknown scheduler {spec.scheduler!r}; allowed: {_listed(SCHEDULERS)}")
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
    folder = _snapshot(spec.id, spec.revision, "model.id")
    return Source(spec, folder, commit=folder.name)


def _single_file(spec: ModelSpec, path: Path) -> Source:
    import diffusers

    if not path.is_file():
        raise RequestError("model.id", f"no file {spec.id!r}")
    if not spec.pipeline:
        raise RequestError(
            "model.pipeline", "a single file does not say its class; name it: StableDiffusionPipeline, …"
        )
    if not hasattr(getattr(diffusers, spec.pipeline, None), "from_single_file"):
        raise RequestError(
            "model.pipeline", f"{spec.pipeline!r} is no diffusers pipeline that loads from a single file"
        )
    if not spec.config:
        raise RequestError(
            "model.config", "a single file needs a folder or hub name with its configs, e.g. the base model's"
        )
    folder = Path(spec.config).expanduser()
    if not folder.is_dir():
        folder = _snapshot(spec.config, None, "model.config")
    if not (folder / "model_index.json").is_file():
        raise RequestError("model.config", f"{spec.config!r} has no model_index.json")
    return Source(spec, folder, file=path)


def _snapshot(name: str, revision: str | None, key: str) -> Path:
    """Folder with the configs of a hub model."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_CONFIGS))
    except Exception as error:  # the hub's client raises many kinds, all meaning: not to be had
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(key, f"{name!r} is no local folder, and the hub did not give it: {reason}") from None
