"""The TPU kernels of Taylor linear attention, interpreted against float64, and compiled without the chip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.interpret import interpret
from pallas_kernels.taylor_linear_attention import (
    features,
    mosaic_tpu,
    mosaic_tpu_backward,
    taylor_linear_attention,
    xla,
)
from pallas_kernels.taylor_linear_attention.mosaic_tpu import TILE
from pallas_kernels.taylor_linear_attention.shapes import MODELS, TaylorShape
from tests.pallas_kernels import test_taylor_linear_attention as plain
from tests.pallas_kernels.sequences import assert_close, check_transformations, masks
from tests.pallas_kernels.test_taylor_linear_attention import BY_TOKEN, draw_cotangents, loop, loop_backward, poison
from tests.pallas_kernels.tpu import compile_op, count_kernels, simulate

VALUE_TOLERANCE = 2e-6  # float32, relative to the largest magnitude; tiles are summed in another order
GRADIENT_TOLERANCE = 1e-5
# Features, weights and states are rounded to 8 bits of mantissa before they are multiplied, then the result is.
BFLOAT16_TOLERANCE = 2.0**-7
BFLOAT16_GRADIENT_TOLERANCE = 2.0**-6
CHUNK = 2 * TILE

draw = functools.partial(plain.draw, heads=1, key=16, value=24)
run = functools.partial(plain.run, chunk_size=CHUNK)
run_and_pull = functools.partial(plain.run_and_pull, chunk_size=CHUNK)


def check(args, reset=None, valid=None, **options):
    """Values and gradients equal the float64 loops; padding is poisoned."""
    cotangents = draw_cotangents(args)
    expected, gradients = loop(args, reset, valid), loop_backward(args, cotangents, reset, valid)
    given, pulled = (args, cotangents) if valid is None else poison(args, cotangents, valid)
    out, actual = run_and_pull(given, pulled, reset, valid, implementation="mosaic_tpu", **options)
    assert_close(out, expected, VALUE_TOLERANCE)
    for name, gradient in gradients.items():
        assert_close(actual[name], gradient, GRADIENT_TOLERANCE, name)
    if valid is not None:
        assert all((np.asarray(a)[~valid] == 0).all() for a in (out[0], *(actual[n] for n in BY_TOKEN)))


@pytest.mark.parametrize("length", [1, TILE - 1, TILE, TILE + 1, CHUNK + 1])
def test_any_length(length):
    with interpret():
        check(draw(1, length, seed=length))


@pytest.mark.parametrize("layout", ["packed", "left", "between", "empty"])
def test_documents_and_poisoned_padding(layout):
    with interpret():
        check(draw(2, CHUNK + 5, seed=7), *masks(layout, 2, CHUNK + 5))


def test_three_chunks_with_documents_across_and_without_a_state():
    length = 2 * TILE + 40
    args = draw(2, length, heads=2, value=8) | {"state": None}
    reset, valid = masks("between", 2, length)
    reset[:, TILE] = True  # at a boundary, where the state must not pass
    valid[1, 2 * TILE - 3 : 2 * TILE + 3] = False
    with interpret():
        check(args, reset & valid, valid, chunk_size=TILE)


def test_no_races_and_no_memory_read_before_it_is_written():
    with simulate():
        check(draw(1, CHUNK + 5, heads=2, value=8), *masks("packed", 1, CHUNK + 5))


def test_a_reset_drops_even_a_state_that_is_not_finite():
    args, length = draw(1, TILE + 3), TILE + 3
    args["state"][:] = np.nan
    reset, fresh, cotangents = np.arange(length)[None] == 0, args | {"state": None}, draw_cotangents(args)
    with interpret():
        out, gradients = run_and_pull(args, cotangents, reset, implementation="mosaic_tpu")
    assert_close(out, loop(fresh), VALUE_TOLERANCE)
    expected = loop_backward(fresh, cotangents)
    assert_close([gradients[n] for n in BY_TOKEN], [expected[n] for n in BY_TOKEN], GRADIENT_TOLERANCE)
    assert (np.asarray(gradients["state"]) == 0).all()


@pytest.mark.parametrize(("masked", "context"), [(False, interpret), (True, simulate)])
def test_bfloat16_inputs_with_float32_state_and_no_races(masked, context):
    length = TILE - 9
    args = draw(2, length)
    reset, valid = masks("between", 2, length) if masked else (None, None)
    half = {n: jnp.asarray(a, jnp.float32 if n == "state" else jnp.bfloat16) for n, a in args.items()}
    rounded = {n: np.asarray(a, np.float32) for n, a in half.items()}
    dy, dstate = draw_cotangents(args)
    cotangents = jnp.asarray(dy, jnp.bfloat16), dstate
    with context():
        out, gradients = run_and_pull(half, cotangents, reset, valid, implementation="mosaic_tpu")
    expected = loop_backward(rounded, cotangents, reset, valid)
    assert jax.tree.map(lambda a: a.dtype, gradients) == {n: a.dtype for n, a in half.items()}
    assert (out[0].dtype, out[1].dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(out, loop(rounded, reset, valid), BFLOAT16_TOLERANCE)
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, BFLOAT16_GRADIENT_TOLERANCE, name)


@pytest.mark.slow
def test_transformations():
    args = draw(1, 20, value=8)
    with interpret():
        check_transformations(
            run, args, draw_cotangents(args), GRADIENT_TOLERANCE, name="v", implementation="mosaic_tpu"
        )


def test_twice_in_one_program():
    args = draw(1, 20)

    def both(args, implementation):
        y, state = taylor_linear_attention(**args, implementation=implementation)
        return taylor_linear_attention(**(args | {"v": y, "state": state}), implementation=implementation)

    with interpret():
        actual = jax.jit(functools.partial(both, implementation="mosaic_tpu"))(args)
    assert_close(actual, jax.jit(functools.partial(both, implementation="reference"))(args), 2 * VALUE_TOLERANCE)


def test_either_backward_takes_the_residuals_of_either_forward():
    args = draw(1, TILE + 5)
    reset, valid = masks("between", 1, TILE + 5)
    arrays = (*(args[n] for n in (*BY_TOKEN, "state")), reset, valid)
    static = {"scale": 0.3, "chunk_size": TILE}
    forward = {"eps": 1e-12, "save": True} | static
    with interpret():
        y, _, theirs = jax.jit(lambda: mosaic_tpu.forward(*arrays, **forward))()
    _, _, ours = jax.jit(lambda: xla.forward(*arrays, **forward))()
    assert_close(theirs, ours, VALUE_TOLERANCE)
    cotangents = draw_cotangents(args)
    with interpret():
        actual = jax.jit(lambda: mosaic_tpu_backward.backward(*arrays, y, ours, *cotangents, **static))()
    expected = jax.jit(lambda: xla.backward(*arrays, y, theirs, *cotangents, **static))()
    assert_close(actual, expected, GRADIENT_TOLERANCE)


@pytest.mark.parametrize(
    ("args", "options", "words"),
    [
        ({"q": np.ones((1, 300, 2, 16), np.float16)}, {}, "does not compute in float16: q must be one of"),
        ({"v": np.ones((1, 300, 2, 24), np.float16)}, {}, "does not compute in float16: v must be one of"),
        ({n: np.ones((1, 300, 2, 24), np.float32) for n in "qk"}, {}, "the width K=24 of q and k must be a multiple"),
        ({"v": np.ones((1, 300, 2, 20), np.float32)}, {}, "the width V=20 of v must be a multiple of 8"),
        ({n: np.ones((1, 300, 2, 64), np.float32) for n in "qk"}, {}, "hold the state in VMEM: widths K=64"),
        ({}, {"chunk_size": 100}, "chunk_size=100 must be a multiple of 128, such as 128"),
        (
            {},
            {"chunk_size": 1000},
            "does not hold the code of a chunk: T=600 and chunk_size=600 must not both exceed 512",
        ),
    ],
)
def test_what_is_not_honoured_raises(args, options, words):
    length = 600 if "T=600" in words else 300
    given = draw(1, length, heads=2) | {"state": None} | args
    with interpret(), pytest.raises(UnsupportedError, match=words):
        taylor_linear_attention(**given, **options, implementation="mosaic_tpu")


def test_heads_per_step_divide_the_heads_and_fit_memory():
    state = mosaic_tpu.state_bytes(16, 64)
    assert state == 160 * 128 * 4
    assert mosaic_tpu.state_bytes(16, 128) == 160 * 256 * 4
    assert mosaic_tpu.choose_heads(16, 2, state) == 8
    assert mosaic_tpu.choose_heads(16, 4, state) == 4
    assert mosaic_tpu.choose_heads(12, 2, state) == 6
    assert mosaic_tpu.choose_heads(7, 2, state) == 7
    assert mosaic_tpu.choose_heads(11, 2, state) == 1
    assert mosaic_tpu.choose_heads(16, 1, mosaic_tpu.STATE_BYTES) == 1
    for heads in range(1, 33):
        for tiles in (1, 2, 4):
            n = mosaic_tpu.choose_heads(heads, tiles, state)
            assert heads % n == 0
            assert n * tiles <= mosaic_tpu.MAX_STEPS
            assert n * state <= mosaic_tpu.STATE_BYTES


def test_the_turns_are_the_pairs():
    for key in (1, 2, 5, 16, 31):
        x = np.random.default_rng(key).normal(size=key)
        rows = [(x * np.roll(x, -turn))[:count] for turn, _, count in features.turns(key)]
        a, b = features.pairs(key)
        assert [start for _, start, _ in features.turns(key)] == list(range(0, features.products(key), key))
        assert (np.concatenate(rows) == x[a] * x[b]).all()
        assert len({frozenset(pair) for pair in zip(a.tolist(), b.tolist(), strict=True)}) == key * (key + 1) // 2


@pytest.mark.parametrize(
    "shape", [TaylorShape(1, 130, 2, 16, 24, carried=True, documents=True, dtype=jnp.float32), MODELS["based_360m"]]
)
def test_compiles_for_v5e(shape):
    compiled = compile_op("v5e", taylor_linear_attention, shape)
    assert count_kernels(compiled) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e"])
def test_compiles_every_shape(kind):
    others = {
        "wide": TaylorShape(1, 300, 2, 32, 128, carried=True, documents=True),
        "mixed": TaylorShape(2, 1000, 3, 16, 40, dtype=jnp.float32),
    }
    for name, shape in (MODELS | others).items():
        expected = 2 if shape.time > 1 else 0
        assert count_kernels(compile_op(kind, taylor_linear_attention, shape)) == expected, name
