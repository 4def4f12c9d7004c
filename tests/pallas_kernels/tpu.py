"""What the tests of TPU kernels share: simulation with a look-out for races, and compilation without the chip."""

import contextlib
import importlib
from typing import Any

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.interpret import interpret
from pallas_kernels.static_profile import chips, programs


@contextlib.contextmanager
def simulate():
    """Simulates memories and copies; fresh memory holds NaN and a race fails the test."""
    with interpret(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        yield
    module = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    assert module.races is not None, "nothing was simulated"
    assert not module.races.races_found


def compile_function(topology: str, fn: Any, *abstract_args: Any) -> Any:
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
    sharding = jax.sharding.SingleDeviceSharding(chips.devices(topology)[0])
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), abstract_args)
    return jax.jit(fn).lower(*args).compile()


def compile_op(topology: str, op: Any, shape: Any) -> Any:
    """Compiles outputs and gradients of `op` at an entry of its shapes.py with the TPU kernels."""
    arrays = shape.arrays()
    floats = {name: a for name, a in arrays.items() if a is not None and programs.is_floating(a)}
    others = {name: a for name, a in arrays.items() if name not in floats}

    def run(floats, others):
        return op(**floats, **others, **shape.options(), implementation="mosaic_tpu")

    def step(floats, others, cotangents):
        out, pullback = jax.vjp(lambda f: run(f, others), floats)
        return out, pullback(cotangents)[0]

    return compile_function(topology, step, floats, others, jax.eval_shape(run, floats, others))


def count_kernels(compiled: Any) -> int:
    """Number of Pallas kernels in a compiled program."""
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')
