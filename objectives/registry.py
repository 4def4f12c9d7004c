"""Objectives by name, each with its source and the test that proves it."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from objectives.output import LossOutput
from zoo.core.registry import Registry, check_choice, check_keys

Objective = Callable[..., LossOutput]

CATEGORIES = (
    "language_model",
    "preference",
    "reward",
    "rl",
    "distillation",
    "diffusion",
    "unlearning",
    "auxiliary",
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the catalogue knows of an objective.

    Attributes:
      function: arrays by position or name, options by keyword only.
      category: one of `CATEGORIES`.
      papers: arXiv ids, the one that defines it first.
      proof: the test that proves it, `file::function` below `tests/objectives`.
    """

    function: Objective
    category: str
    papers: tuple[str, ...]
    proof: str

    @property
    def inputs(self) -> list[str]:
        """Names of the arrays and statistics it takes, the optional ones in brackets."""
        return [p.name if p.default is p.empty else f"[{p.name}]" for p in self._parameters() if not _is_option(p)]

    @property
    def defaults(self) -> dict[str, Any]:
        """Options and their defaults."""
        return {p.name: p.default for p in self._parameters() if _is_option(p)}

    def _parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.function).parameters.values())


def _is_option(parameter: inspect.Parameter) -> bool:
    return parameter.kind is parameter.KEYWORD_ONLY


OBJECTIVES: Registry[Entry] = Registry("objective")


def register(name: str, *, category: str, papers: tuple[str, ...] = (), proof: str) -> Callable[[Objective], Objective]:
    """Decorator that files an objective under `name` and leaves the function as it is."""
    check_choice("category", category, CATEGORIES)

    def add(function: Objective) -> Objective:
        OBJECTIVES.register(name)(Entry(function, category, papers, proof))
        return function

    return add


def create(name: str, **options: Any) -> Objective:
    """The objective called `name` with its keyword-only options bound.

    Args:
      name: one of `list_objectives()`.
      **options: its keyword-only arguments, e.g. z_loss=1e-4.

    Raises:
      KeyError: unknown name, with the nearest one.
      ValueError: unknown option, with the nearest one. What a value may be the objective says when it is called.
    """
    entry = OBJECTIVES.get(name)
    check_keys(f"objective {name!r}", options, entry.defaults)
    return functools.partial(entry.function, **options)


def options_of(name: str) -> list[str]:
    """Names of the options of an objective."""
    return list(OBJECTIVES.get(name).defaults)


def list_objectives(category: str | None = None) -> list[str]:
    """Names of all objectives, or of one category of them."""
    if category is not None:
        check_choice("category", category, CATEGORIES)
    return [name for name, entry in OBJECTIVES.items().items() if category in (None, entry.category)]
