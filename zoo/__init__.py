"""Functional language models: descriptions (Spec trees) and pure functions."""

from zoo.core import SeqContext, Spec, linear
from zoo.interop import from_hf, to_hf
from zoo.models import Model, convert, create, describe, list_models, unroll

__all__ = [
    "Model",
    "SeqContext",
    "Spec",
    "convert",
    "create",
    "describe",
    "from_hf",
    "linear",
    "list_models",
    "to_hf",
    "unroll",
]
