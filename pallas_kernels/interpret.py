"""Interpretation of the Pallas kernels on a CPU, for tests: numerics without the chip."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

# A context that jax.jit knows of: a function traced for interpretation is traced anew outside.
_PARAMS = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def interpret(parameters: Any = True) -> Iterator[None]:
    """Has the TPU kernels traced inside it interpreted.

    Args:
      parameters: True for plain interpretation, or `pltpu.InterpretParams(...)` to simulate memories, copies and
        semaphores, with `detect_races=True` to look for races.
    """
    with _PARAMS(parameters):
        yield


def parameters() -> Any:
    """What `pl.pallas_call(interpret=...)` is to be given: False outside `interpret`."""
    value = _PARAMS.value
    return False if value is None else value
