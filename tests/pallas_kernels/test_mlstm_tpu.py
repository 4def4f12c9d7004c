"""The TPU kernels of the mLSTM cell, interpreted against float64 loops, and compiled without the chip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.interpret import interpret
from pallas_kernels.mlstm import mlstm, mosaic_tpu, xla
from pallas_kernels.mlstm.shapes import MODELS, MLSTMShape
from tests.pallas_kernels import test_mlstm
from tests.pallas_kernels.sequences import assert_close, check_transformations, masks
from tests.pallas_kernels.test_mlstm import TOKENS, check_gradients, draw, draw_cotangents, loop, loop_backward, poison
from tests.pallas_kernels.tpu import compile_op, count_kernels, simulate

VALUE_TOLERANCE = 4e-6  # float32, relative to the largest magnitude
GRADIENT_TOLERANCE = 1e-5
EXTREME_TOLERANCE = 4e-5  # exponents of 150 have an error of 1e-5 in float32
BFLOAT16_TOLERANCE = 2.0**-7
CHUNK = 128

run_and_pull = functools.partial(test_mlstm.run_and_pull, implementation="mosaic_tpu")


def check(args, reset=None, valid=None, *, tolerances=(VALUE_TOLERANCE, GRADIENT_TOLERANCE), terms=0.0, **options):
    """Values and gradients against the loops; padding is poisoned."""
    cotangents = draw_cotangents(args)
    given = {n: o for n, o in options.items() if n in ("scale", "eps")}
    expected = loop(args, reset, valid, **given)
    gradients = loop_backward(args, cotangents, reset, valid, **given)
    poisoned, dy = args, cotangents[0]
    if valid is not None:
        poisoned, dy = poison(args, valid), np.where(valid[..., None, None], dy, np.nan)
    options = {"chunk_size": CHUNK} | options
    out, actual = run_and_pull(poisoned, (dy, cotangents[1]), reset, valid, **options)
    assert_close(out, expected, tolerances[0])
    check_gradients(actual, gradients, tolerances[1], terms=terms)
    if valid is not None:
        assert (np.asarray(out[0])[~valid] == 0).all()
        assert all((np.asarray(actual[n])[~valid] == 0).all() for n in TOKENS)


@pytest.mark.parametrize("length", [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 37])
def test_any_length(length):
    with interpret():
        check(draw(1, length, seed=length + 1))


@pytest.mark.parametrize("layout", ["packed", "left", "between", "empty"])
def test_documents_and_poisoned_padding(layout):
    with interpret():
        check(draw(3, CHUNK + 5, seed=8), *masks(layout, 3, CHUNK + 5))


@pytest.mark.slow
def test_no_races_and_no_memory_read_before_it_is_written():
    with simulate():
        check(draw(1, CHUNK + 5), *masks("packed", 1, CHUNK + 5))


@pytest.mark.slow
@pytest.mark.parametrize("context", [interpret, simulate])
def test_chunks_of_two_blocks_of_queries(context):
    """256 tokens to a chunk, resets in both halves of the first and in the second."""
    length = 256 + 37
    reset = np.isin(np.arange(length), (3, 100, 200, 201, 270))[None]
    valid = ~np.isin(np.arange(length), (50, 51, 140, 290))[None]
    with context():
        check(draw(1, length, key=130, value=4), reset & valid, valid, chunk_size=256)
        check(draw(1, length, seed=1) | {"state": None}, chunk_size=256)


def test_a_large_epsilon_and_a_negative_scale():
    with interpret():
        check(draw(2, CHUNK + 3, seed=5), eps=0.1, scale=-0.7)


@pytest.mark.parametrize(("i", "f"), [(-50, -50), (-50, 50), (50, -50), (50, 50), (None, None)])
def test_extreme_gates_are_finite_and_exact(i, f):
    args = draw(1, CHUNK + 2, seed=11)
    rng = np.random.default_rng(12)
    for name, stuck in (("i", i), ("f", f)):
        chosen = rng.choice([-50, 0, 3, 50], p=(0.2, 0.3, 0.4, 0.1), size=args[name].shape)
        args[name] = ((chosen if stuck is None else stuck) + 0.1 * args[name]).astype(np.float32)
    with interpret():
        check(args, tolerances=(EXTREME_TOLERANCE,) * 2, terms=1.0)


def test_a_reset_drops_even_a_state_that_is_not_finite():
    args = draw(1, CHUNK + 3)
    fresh = args | {"state": None}
    args["state"] = args["state"]._replace(C=np.full_like(args["state"].C, np.nan), n=args["state"].n * np.nan)
    reset = np.arange(CHUNK + 3)[None] == 0
    cotangents = draw_cotangents(args)
    with interpret():
        out, gradients = run_and_pull(args, cotangents, reset, chunk_size=CHUNK)
    assert_close(out, loop(fresh), VALUE_TOLERANCE)
    check_gradients(gradients | {"state": None}, loop_backward(fresh, cotangents), GRADIENT_TOLERANCE, terms=1.0)


def test_bfloat16_inputs_with_float32_state_and_no_races():
    """Products of bfloat16 numbers, summed in float32: as good as their inputs, also in the new C and n."""
    args = draw(2, CHUNK + 3)
    half = args | {n: jnp.asarray(args[n], jnp.bfloat16) for n in TOKENS}
    dy, dstate = draw_cotangents(args)
    cotangents = jnp.asarray(dy, jnp.bfloat16), dstate
    rounded = jax.tree.map(lambda a: np.asarray(a, np.float32), half)
    with simulate():
        out, gradients = run_and_pull(half, cotangents, chunk_size=CHUNK)
    expected = jax.eval_shape(functools.partial(run_and_pull, implementation="xla"), half, cotangents)
    assert jax.tree.map(lambda a: a.dtype, (out, gradients)) == jax.tree.map(lambda a: a.dtype, expected)
    y, state = loop(rounded)
    assert_close(out, (y, state), BFLOAT16_TOLERANCE)
    assert_close(out[1][1:], state[1:], VALUE_TOLERANCE)  # n and m see no product
    check_gradients(gradients, loop_backward(rounded, cotangents), BFLOAT16_TOLERANCE)


@pytest.mark.slow
def test_transformations():
    def flat(args, implementation):
        y, state = test_mlstm.run(args, implementation=implementation, chunk_size=CHUNK)
        return y, state.C

    args = draw(1, CHUNK + 4)
    cotangents = draw_cotangents(args)
    cotangents = cotangents[0], cotangents[1].C
    with interpret():
        check_transformations(flat, args, cotangents, GRADIENT_TOLERANCE, name="v", implementation="mosaic_tpu")


@pytest.mark.parametrize("length", [100, 2 * CHUNK + 5])
def test_either_backward_takes_the_residuals_of_either_forward(length):
    args = draw(2, length)
    arrays = (*(args[n] for n in TOKENS), *args["state"], None, None)
    static = {"scale": 0.5, "eps": 1e-6, "chunk_size": min(CHUNK, length), "save": True}
    with interpret():
        theirs = jax.jit(lambda: mosaic_tpu.forward(*arrays, **static))()
    ours = jax.jit(lambda: xla.forward(*arrays, **static))()
    assert_close(theirs, ours, VALUE_TOLERANCE)


@pytest.mark.parametrize(
    ("args", "options", "words"),
    [
        ({"q": np.ones((1, 140, 2, 5), np.float16)}, {}, "does not compute in float16: q must"),
        ({"f": np.ones((1, 140, 2), np.float16)}, {}, "does not compute in float16: f must"),
        ({}, {"chunk_size": 20}, "chunk_size=20 must be a multiple of 128, such as 128, or T=140 at least"),
        (
            {n: np.ones((1, 140, 2, 2048), np.float32) for n in ("q", "k", "v")} | {"state": None},
            {},
            "does not hold C in VMEM: K=2048 and V=2048",
        ),
    ],
)
def test_what_is_not_honoured_raises(args, options, words):
    with interpret(), pytest.raises(UnsupportedError, match=words):
        mlstm(**(draw(1, 140) | args), **options, implementation="mosaic_tpu")


def test_plans_and_memory():
    def widths(key, value, length, chunk):
        q, v = (jax.ShapeDtypeStruct((2, length, 3, width), jnp.bfloat16) for width in (key, value))
        p = mosaic_tpu.plan(q, q, v, None, None, chunk)
        return p.key, p.value, p.chunk, p.chunks, p.masked

    assert widths(256, 512, 4096, 256) == (256, 512, 256, 16, False)
    assert widths(5, 130, 7, 7) == (128, 256, 128, 1, True)
    assert widths(384, 384, 500, 128) == (384, 384, 128, 4, True)
    for shape in MODELS.values():
        assert mosaic_tpu.vmem_bytes(shape.key, shape.value, 256) <= mosaic_tpu.VMEM_LIMIT


SMALL = MLSTMShape(2, 300, 2, 8, 4, carried=True, documents=True, dtype=jnp.float32)


@pytest.mark.parametrize("shape", [SMALL, MODELS["xlstm_7b_append"]], ids=["small", "xlstm_7b_append"])
def test_compiles_for_v5e(shape):
    assert count_kernels(compile_op("v5e", mlstm, shape)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e"])
def test_compiles_every_shape(kind):
    for name, shape in MODELS.items():
        assert count_kernels(compile_op(kind, mlstm, shape)) == (2 if shape.time > 1 else 0), name
