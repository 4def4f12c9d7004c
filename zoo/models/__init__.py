"""The pattern-driven language model and its families."""

from zoo.models import (
    based,
    conversion,
    dense,
    gated_linear_attention,
    hgrn,
    hybrid,
    hybridna,
    lstm,
    mamba,
    mamba2,
    mamba2_hybrid,
    matmulfree,
    samba,
    xlstm,
    zamba,
)
from zoo.models.conversion import carry_over, convert, converted_model
from zoo.models.echo import echo_embedding
from zoo.models.language_model import LanguageModelConfig, Sublayer, unroll
from zoo.models.model import FAMILIES, PRESETS, Model, create, describe, list_models

__all__ = [
    "FAMILIES",
    "PRESETS",
    "LanguageModelConfig",
    "Model",
    "Sublayer",
    "based",
    "carry_over",
    "conversion",
    "convert",
    "converted_model",
    "create",
    "dense",
    "describe",
    "echo_embedding",
    "gated_linear_attention",
    "hgrn",
    "hybrid",
    "hybridna",
    "list_models",
    "lstm",
    "mamba",
    "mamba2",
    "mamba2_hybrid",
    "matmulfree",
    "samba",
    "unroll",
    "xlstm",
    "zamba",
]
