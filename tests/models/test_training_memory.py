"""Memory of training: recurrent models keep activations, and states at chunk boundaries alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from launch.benchmark_models import recurrent
from pallas_kernels.static_profile import chips
from tests.trees import GRADIENT_TOLERANCE, assert_trees_close, fast_jit, redraw
from zoo.core import params as params_lib
from zoo.core.params import nbytes

LENGTHS = (1 << 11, 1 << 13, 1 << 15)
FLAT = 0.1  # of bytes per token
STATE_SHARE = 0.25  # of a state per token: what a wider state adds, which also widens keys, queries and chunk states
FAST = ("mamba-tiny", "gla-tiny")
# Options that multiply the state's size by four.
WIDER = {
    "mamba-tiny": {"state": 64},
    "mamba2-tiny": {"state": 128},
    "gla-tiny": {"expand_k": 2.0},
    "simple-gla-tiny": {"expand_k": 4.0},
    "retnet-tiny": {"expand_k": 4.0},
    "linear-attention-tiny": {"expand_k": 2.0},
    "hgrn2-tiny": {"state_width": 64},
    "xlstm-tiny": {"key_width": 32},
}


def loss_of(model, **options):
    def loss(params, tokens):
        logits = model.apply(params, tokens, **options).logits
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens))

    return loss


def abstract(model, rows, length):
    return params_lib.abstract(model.param_specs()), jax.ShapeDtypeStruct((rows, length), jnp.int32)


def kept(model, length):
    """Bytes that the forward pass of one row leaves to the backward pass, by their shapes: nothing is compiled."""
    params, tokens = abstract(model, 1, length)
    backward = jax.eval_shape(lambda p, t: jax.vjp(lambda p: loss_of(model)(p, t), p)[1], params, tokens)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


def temporaries(model, rows, length, sharding=None, **options):
    """Bytes that the compiled loss and gradient need beside arguments and results."""
    shapes = abstract(model, rows, length)
    if sharding is not None:
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes)
    compiled = jax.jit(jax.value_and_grad(loss_of(model, **options))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in recurrent()]
)
def test_what_the_backward_pass_needs_is_linear_in_time(name):
    """And no states by the token are in it: one of four times the size adds a part of what those would."""
    model = zoo.create(name)
    sizes = [kept(model, length) for length in LENGTHS]
    per_token = [(b - a) / (n - m) for a, b, m, n in zip(sizes, sizes[1:], LENGTHS, LENGTHS[1:], strict=False)]
    assert abs(per_token[1] / per_token[0] - 1) < 0.01, per_token
    assert sizes[0] / LENGTHS[0] < (1 + FLAT) * per_token[1]
    if name not in WIDER:  # the state is as wide as the activations that make it
        return
    wide = zoo.create(name, **WIDER[name])
    a_state = nbytes(wide.state_specs(1)) - nbytes(model.state_specs(1))
    assert a_state > 2 * nbytes(model.state_specs(1)), "the option should widen the state"
    added = (kept(wide, LENGTHS[2]) - kept(wide, LENGTHS[1])) / (LENGTHS[2] - LENGTHS[1]) - per_token[1]
    assert added < STATE_SHARE * a_state, (added, a_state)


@pytest.mark.slow
@pytest.mark.parametrize("name", recurrent())
def test_compiled_bytes_per_token_do_not_grow(name):
    per_token = [temporaries(zoo.create(name), 1, length) / length for length in LENGTHS]
    assert max(per_token) < (1 + FLAT) * min(per_token), per_token


ONCE = {
    "vocab_size": 32,
    "width": 16,
    "pattern": "hgrn mlp",
    "mixers": {"hgrn": {"inner": 16}, "mlp": {"hidden": 24}},
}


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_remat_of_a_pattern_that_comes_once(remat):
    """The same gradient, from what the forward pass leaves to it: inputs of the sublayers, and at most the products."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 9)), jnp.int32)
    models = [zoo.create("hybrid", repeats=1, remat=option, **ONCE) for option in ("none", remat)]
    params = redraw(models[0].param_specs(), 1)

    def loss(model):
        return lambda p: jnp.sum(model.apply(p, tokens).logits ** 2)

    want, have = (fast_jit(jax.grad(loss(model)))(params) for model in models)
    assert_trees_close(have, want, GRADIENT_TOLERANCE)
    plain, less = (kept(model, 64) for model in models)
    assert less < 0.8 * plain, (less, plain)


@pytest.mark.slow
def test_remat_of_a_pattern_that_comes_once_saves_memory_of_a_tpu():
    """XLA for CPUs drops the barriers that hold recomputation back outside of loops; that for TPUs does not."""
    pytest.importorskip("libtpu")
    one = jax.sharding.SingleDeviceSharding(chips.devices("v5e:2x2")[0])

    def bytes_of(remat):
        model = zoo.create("mamba2-hybrid-tiny", remat=remat, dtype="bfloat16")
        assert model.config.repeats == 1
        return temporaries(model, 2, 4096, one, implementation="xla")

    assert bytes_of("full") < 0.5 * bytes_of("none")
