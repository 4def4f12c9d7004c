"""Checks at the door of objectives and optimisers: errors name the argument, what is allowed and what was given."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from objectives.statistics import LogProbs, is_concrete


def check_statistics(**statistics: LogProbs) -> None:
    """Raises ValueError unless all are LogProbs of as many responses as the first.

    Args:
      **statistics: by argument name.
    """
    (first, reference), *_ = statistics.items()
    for name, value in statistics.items():
        if not isinstance(value, LogProbs):
            raise ValueError(f"{name} must be LogProbs, as sequence_logps returns them, got {type(value).__name__}")
        if value.sum.shape != reference.sum.shape:
            raise ValueError(f"{name} has {value.sum.shape[0]} responses, {first} has {reference.sum.shape[0]}")


def check_unpacked(**statistics: LogProbs) -> None:
    """Raises ValueError if any are of packed rows, whose tokens do not lie in the row of their response.

    Args:
      **statistics: by argument name.
    """
    for name, value in statistics.items():
        if value.packed:
            raise ValueError(
                f"{name} comes from packed rows; this objective looks at tokens and needs a row per response"
            )


def check_shape(shape: tuple[int, ...], **arrays: Any) -> None:
    """Raises ValueError unless all arrays have the shape.

    Args:
      shape: of each.
      **arrays: by argument name.
    """
    for name, value in arrays.items():
        if jnp.shape(value) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {jnp.shape(value)}")


def check_values_in(low: float, high: float, *, where: Any = None, **arrays: Any) -> None:
    """Raises ValueError unless all values of the arrays are in [low, high]; traced arrays pass.

    Args:
      low: least value.
      high: greatest value; with math.inf any finite one.
      where: bool, of the leading dimensions of the arrays; False where values do not matter. None = all matter.
      **arrays: by argument name.
    """
    for name, value in arrays.items():
        if is_concrete(value, where):
            numbers = np.asarray(value)
            within = (numbers >= low) & (numbers <= high) & (numbers < math.inf)
            _refuse(~within, numbers, where, f"{name} must be in {_interval(low, high, high == math.inf)}")


def check_values_among(allowed: Sequence[int], *, where: Any = None, **arrays: Any) -> None:
    """Raises ValueError unless all values of the arrays are among those allowed; traced arrays pass.

    Args:
      allowed: numbers.
      where: as of `check_values_in`.
      **arrays: by argument name.
    """
    *most, last = allowed
    for name, value in arrays.items():
        if is_concrete(value, where):
            numbers = np.asarray(value)
            wrong = ~np.isin(numbers, allowed)
            _refuse(wrong, numbers, where, f"{name} must be {', '.join(map(str, most))} or {last}")


def _refuse(wrong: np.ndarray, numbers: np.ndarray, where: Any, rule: str) -> None:
    """Raises ValueError that names the first number that is wrong where it matters."""
    if where is not None:
        counted = np.asarray(where) != 0
        wrong = wrong & counted.reshape(counted.shape + (1,) * (wrong.ndim - counted.ndim))
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        at = f" at index {place[0] if len(place) == 1 else place}" if place else ""
        raise ValueError(f"{rule} everywhere, got {numbers[place]}{at}")


def check_positive(*, finite: bool = True, **options: Any) -> None:
    """Raises ValueError unless all are above 0; values of a traced function, such as schedules, pass.

    Args:
      finite: whether infinity is refused.
      **options: by name.
    """
    for name, value in options.items():
        if not is_concrete(value):
            continue
        if not (_is_number(value) and value > 0):
            raise ValueError(f"{name} must be above 0, {_got(value)}")
        if finite and value == math.inf:
            raise ValueError(f"{name} must be finite, {_got(value)}")


def _is_number(value: Any) -> bool:
    """Whether it is one number, as a scalar or as an array without dimensions."""
    return np.ndim(value) == 0 and jnp.issubdtype(np.asarray(value).dtype, jnp.number)


def _got(value: Any) -> str:
    """The tail of an error: the value and, where it is no number, what was meant as far as one sees."""
    if _is_number(value):
        return f"got {value}"
    try:
        return f"got {value!r}; give a number, such as {float(value)}"
    except (TypeError, ValueError):
        return f"got {value!r}; give a number"


def check_range(low: float, high: float, *, open_high: bool = False, finite: bool = True, **options: Any) -> None:
    """Raises ValueError unless all are in [low, high], or in [low, high) with `open_high`; traced values pass.

    Args:
      low: least value.
      high: bound from above; math.inf for none.
      open_high: whether `high` itself is out.
      finite: whether infinity is out where there is no bound.
      **options: by name.
    """
    open_high = open_high or (finite and high == math.inf)
    for name, value in options.items():
        if not is_concrete(value):
            continue
        if not _is_number(value) or not (low <= value < high if open_high else low <= value <= high):
            raise ValueError(f"{name} must be in {_interval(low, high, open_high)}, {_got(value)}")


def _interval(low: float, high: float, open_high: bool) -> str:
    return f"[{low}, {high}{')' if open_high else ']'}"
