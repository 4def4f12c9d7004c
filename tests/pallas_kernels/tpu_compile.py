"""Compiles for TPUs that are not there, for tests."""

from typing import Any

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from pallas_kernels.static_profile import chips


def compile_for(topology: str, fn: Any, *abstract_args: Any) -> Any:
    """Compiles `jax.jit(fn)` to machine code for one device of a TPU topology, in this process.

    Args:
      topology: "v5e", "v5p", "v6e", or a full name such as "v5e:2x4".
      fn: the function, jitted or not.
      *abstract_args: trees of `jax.ShapeDtypeStruct` (or arrays, of which only shape and dtype count).

    Returns:
      The compiled function; `memory_analysis()` and `as_text()` work on it, running it does not.
      The test is skipped when libtpu is not installed, and for no other reason.
    """
    pytest.importorskip("libtpu")
    sharding = SingleDeviceSharding(chips.device(topology))
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), abstract_args)
    return jax.jit(fn).lower(*args).compile()
