"""What the tests of TPU kernels share: simulation with a look-out for races, and compilation without the chip."""

import contextlib
import importlib

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.interpret import interpret

TOPOLOGIES = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4"}


@contextlib.contextmanager
def simulate():
    """Simulates memories and copies; fresh memory holds NaN and a race fails the test."""
    with interpret(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        yield
    module = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    assert module.races is not None, "nothing was simulated"
    assert not module.races.races_found


def compile_for(kind: str, op, shape):
    """Compiles outputs and gradients of `op` at an entry of its shapes.py with the TPU kernels; needs libtpu."""
    pytest.importorskip("libtpu")
    from launch.compile import topology_devices

    sharding = jax.sharding.SingleDeviceSharding(topology_devices(TOPOLOGIES[kind])[0])

    def place(tree):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)

    options = shape.options() if hasattr(shape, "options") else {}
    masks = {name: a for name, a in shape.arrays().items() if a.dtype == bool}
    floats = {name: a for name, a in shape.arrays().items() if name not in masks}

    def run(floats, masks):
        return op(**floats, **masks, **options, implementation="mosaic_tpu")

    def step(floats, masks, cotangents):
        out, pullback = jax.vjp(lambda f: run(f, masks), floats)
        return out, pullback(cotangents)[0]

    cotangents = jax.eval_shape(run, floats, masks)
    return jax.jit(step).lower(*place((floats, masks, cotangents))).compile()


def count_kernels(compiled) -> int:
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')
