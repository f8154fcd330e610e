"""Lesion studies of text-to-image diffusion models: which layers carry which part of the prompt."""

__version__ = "0.1.0"
