"""Functional language models: descriptions (Spec trees) and pure functions."""

from zoo.core import SeqContext, Spec, linear
from zoo.interop import from_hf, to_hf
from zoo.models import Model, create, describe, list_models, unroll

__all__ = [
    "Model",
    "SeqContext",
    "Spec",
    "create",
    "describe",
    "from_hf",
    "linear",
    "list_models",
    "to_hf",
    "unroll",
]
