"""Functional language models: descriptions (Spec trees) and pure functions."""

from zoo.core import SeqContext, Spec, linear
from zoo.models import Model, create, describe, list_models, unroll

__all__ = ["Model", "SeqContext", "Spec", "create", "describe", "linear", "list_models", "unroll"]
