"""Finding and loading models: a hub name, a local diffusers folder, or one .safetensors file."""

from lesion.models.loading import DTYPES, Model, identity_of, load
from lesion.models.loras import Lora
from lesion.models.schedulers import SCHEDULERS
from lesion.models.source import EMBEDDED, OFFLOADS, ModelSpec, Source, pipeline_class, resolve

__all__ = [
    "DTYPES",
    "EMBEDDED",
    "OFFLOADS",
    "SCHEDULERS",
    "Lora",
    "Model",
    "ModelSpec",
    "Source",
    "identity_of",
    "load",
    "pipeline_class",
    "resolve",
]
