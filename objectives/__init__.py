"""Objectives: pure functions of statistics that return sums and weights."""

from objectives.attention_distillation import attention_distillation
from objectives.distillation import logit_distillation
from objectives.language_model import cross_entropy
from objectives.output import LossOutput
from objectives.registry import OBJECTIVES, Objective, create, list_objectives

__all__ = [
    "OBJECTIVES",
    "LossOutput",
    "Objective",
    "attention_distillation",
    "create",
    "cross_entropy",
    "list_objectives",
    "logit_distillation",
]
