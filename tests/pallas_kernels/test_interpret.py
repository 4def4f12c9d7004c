"""Kernels run on a CPU inside `interpret`, and only there."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.interpret import interpret, parameters


@jax.jit
def double(x):
    def kernel(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...]

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=parameters())(x)


def test_interpretation_ends_with_the_context():
    x = jnp.ones((8, 128))
    for how in (True, pltpu.InterpretParams(detect_races=True)):
        with interpret(how):
            assert (double(x) == 2).all()
    with pytest.raises(ValueError, match="interpret mode"):
        double(x)
