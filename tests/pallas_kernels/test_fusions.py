"""The xla forms as XLA compiles them for the CPU among other operations, at sizes where it fuses them.

YNN, XLA's library of CPU kernels, serves such fusions and returned wrong ones for products with a fresh state
(`pallas_kernels.chunks.opaque`). The same programs compiled without it are the reference.
Without `opaque` the first op fails; the other two, which have it by the same reasoning, were not seen to.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_linear_attention import gated_linear_attention
from pallas_kernels.mlstm import mlstm
from pallas_kernels.taylor_linear_attention import features, taylor_linear_attention
from tests.trees import GRADIENT_TOLERANCE, assert_trees_close

# One head, or one group of heads: with more, a transposition stands between the product and the reduction.
ROWS, LENGTH, HEADS, KEY, VALUE = 128, 32, 1, 8, 128
WITHOUT_YNN = {"xla_cpu_experimental_ynn_fusion_type": ""}


def gla(q, k, v, gate, zeros):
    state = jnp.zeros((ROWS, HEADS, KEY, VALUE)) if zeros else None
    return gated_linear_attention(q, k, v, -jax.nn.softplus(gate), state, implementation="xla")[0]


def exponential(q, k, v, gate, zeros):
    shapes = (ROWS, HEADS, KEY, VALUE), (ROWS, HEADS, KEY), (ROWS, HEADS)
    state = tuple(jnp.zeros(shape) for shape in shapes) if zeros else None
    return mlstm(q, k, v, gate, gate, state, implementation="xla")[0]


def taylor(q, k, v, gate, zeros):
    del gate
    state = jnp.zeros((ROWS, HEADS, features.count(KEY), VALUE + 1)) if zeros else None
    return taylor_linear_attention(q, k, v, state, implementation="xla")[0]


def outputs(op, zeros, q, k, v, gate, mix):
    """A layer's output and its mean square, as in a norm, within a loop of one turn: as layers are stacked."""

    def layer(x, mix):
        y = op(q, k, x, gate, zeros).reshape(ROWS, LENGTH, -1)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)
        return (y @ mix).reshape(v.shape), None

    return jax.lax.scan(layer, v, mix[None])[0]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's fusions on the CPU")
@pytest.mark.parametrize("zeros", [False, True], ids=["fresh", "zeros"])
@pytest.mark.parametrize("op", [gla, *(pytest.param(op, marks=pytest.mark.slow) for op in (exponential, taylor))])
def test_fusions_with_a_fresh_state_change_nothing(op, zeros):
    rng = np.random.default_rng(0)
    draw = lambda *shape: (rng.standard_normal(shape) * 0.3).astype(np.float32)  # noqa: E731
    tokens = (ROWS, LENGTH, HEADS)
    args = draw(*tokens, KEY), draw(*tokens, KEY), draw(*tokens, VALUE), draw(*tokens)
    args = *args, draw(HEADS * VALUE, HEADS * VALUE)
    run = functools.partial(outputs, op, zeros)
    expected = jax.jit(run, compiler_options=WITHOUT_YNN)(*args)
    assert_trees_close(jax.jit(run)(*args), expected, GRADIENT_TOLERANCE)
