"""The pattern-driven language model and its families."""

from zoo.models import based, dense, mamba, samba
from zoo.models.language_model import LanguageModelConfig, Sublayer, unroll
from zoo.models.model import FAMILIES, PRESETS, Model, create, describe, list_models

__all__ = [
    "FAMILIES",
    "PRESETS",
    "LanguageModelConfig",
    "Model",
    "Sublayer",
    "based",
    "create",
    "dense",
    "describe",
    "list_models",
    "mamba",
    "samba",
    "unroll",
]
