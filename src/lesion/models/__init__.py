"""Finding and loading models: a hub name, a local diffusers folder, or one .safetensors file."""

from lesion.models.loading import DTYPES, Model, identity_of, load
from lesion.models.loras import Lora
from lesion.models.schedulers import SCHEDULERS
from lesion.models.source import EMBEDDED, ModelSpec, Source, check_offload, pipeline_class, resolve

__all__ = [
    "DTYPES",
    "EMBEDDED",
    "SCHEDULERS",
    "Lora",
    "Model",
    "ModelSpec",
    "Source",
    "check_offload",
    "identity_of",
    "load",
    "pipeline_class",
    "resolve",
]
