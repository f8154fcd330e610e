"""Finding and loading models: a hub name, a local diffusers folder, or one .safetensors file."""

from lesion.models.loading import DTYPES, Model, identity_of, load
from lesion.models.source import EMBEDDED, SCHEDULERS, ModelSpec, Source, resolve

__all__ = ["DTYPES", "EMBEDDED", "SCHEDULERS", "Model", "ModelSpec", "Source", "identity_of", "load", "resolve"]
