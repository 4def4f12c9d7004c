"""Interpretation of the Pallas kernels on a CPU, for tests: numerics without the chip."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

# A context that jax.jit knows of: a function traced for interpretation is traced anew outside.
_PARAMS = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def interpret(parameters: Any = True) -> Iterator[None]:
    """Has the Pallas kernels traced inside it interpreted.

    Args:
      parameters: for TPU kernels, True for plain interpretation, or `pltpu.InterpretParams(...)` to simulate memories,
        copies and semaphores, with `detect_races=True` to look for races. For GPU kernels the parameters of the
        interpreter of Mosaic GPU; there is no plain interpretation of them.
    """
    with _PARAMS(parameters):
        yield


def parameters() -> Any:
    """What `pl.pallas_call(interpret=...)` and `plgpu.kernel(interpret=...)` are given: False outside `interpret`."""
    value = _PARAMS.value
    return False if value is None else value
