"""Objectives by name."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from objectives.output import LossOutput
from zoo.core.registry import Registry, check_keys

Objective = Callable[..., LossOutput]
OBJECTIVES: Registry[Objective] = Registry("objective")


def create(name: str, **options: Any) -> Objective:
    """The objective called `name` with its keyword-only options bound.

    Args:
      name: one of `list_objectives()`.
      **options: its keyword-only arguments, e.g. z_loss=1e-4.

    Raises:
      KeyError: unknown name, with the nearest one.
      ValueError: unknown option, with the nearest one, or a value that the objective refuses.
    """
    objective = OBJECTIVES.get(name)
    check_keys(f"objective {name!r}", options, options_of(name))
    return functools.partial(objective, **options)


def options_of(name: str) -> list[str]:
    """Names of the options of an objective."""
    parameters = inspect.signature(OBJECTIVES.get(name)).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def list_objectives() -> list[str]:
    """Names of all objectives."""
    return OBJECTIVES.names()
