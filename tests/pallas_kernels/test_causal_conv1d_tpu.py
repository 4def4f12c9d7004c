"""The TPU kernels of the causal convolution, interpreted against a float64 loop, and compiled without the chip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.causal_conv1d import causal_conv1d, mosaic_tpu
from pallas_kernels.causal_conv1d.shapes import MODELS
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.interpret import interpret
from tests.pallas_kernels.sequences import LAYOUTS, assert_close, check_transformations, masks
from tests.pallas_kernels.test_causal_conv1d import draw, draw_cotangents, loop, loop_backward, run, run_and_pull
from tests.pallas_kernels.tpu import compile_op, count_kernels, simulate

VALUE_TOLERANCE = 1e-6  # float32, relative to the largest magnitude
GRADIENT_TOLERANCE = 2e-6
ROUNDING = 2.0**-8  # the relative error of one rounding to bfloat16, which has 8 bits of significand
BLOCK = 32


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "MAX_ROWS", BLOCK)
    jax.clear_caches()


def check(args, reset=None, valid=None, **options):
    """Values and gradients against the loops; padding is poisoned."""
    dy, dstate = draw_cotangents(args)
    expected = loop_backward(args, (dy, dstate), reset, valid, **options)
    poisoned = args
    if valid is not None:
        poisoned = args | {"x": np.where(valid[..., None], args["x"], np.nan)}
        dy = np.where(valid[..., None], dy, np.nan)
    out, gradients = run_and_pull(poisoned, (dy, dstate), reset, valid, implementation="mosaic_tpu", **options)
    assert_close(out, loop(args, reset, valid, **options), VALUE_TOLERANCE)
    assert_close(gradients, expected, GRADIENT_TOLERANCE)
    if valid is not None:
        assert (np.asarray(out[0])[~valid] == 0).all()
        assert (np.asarray(gradients["x"])[~valid] == 0).all()


@pytest.mark.parametrize(
    ("length", "width"), [(1, 4), (BLOCK - 1, 4), (BLOCK, 3), (BLOCK + 1, 4), (16, 2), (2 * BLOCK + 5, 2)]
)
def test_any_length_and_width(length, width):
    with interpret():
        check(draw(2, length, width=width, seed=length))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_and_poisoned_padding(layout):
    with interpret():
        check(draw(3, BLOCK + 5, seed=7), *masks(layout, 3, BLOCK + 5))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_optional_arguments_may_be_absent(activation):
    with interpret():
        check(draw(2, 2 * BLOCK) | {"bias": None, "state": None}, activation=activation)


def test_no_races_and_no_memory_read_before_it_is_written():
    with simulate():
        check(draw(2, BLOCK + 5, channels=130), *masks("packed", 2, BLOCK + 5))


def test_a_reset_drops_even_a_state_that_is_not_finite():
    args = draw(1, 20)
    args["state"][:] = np.nan
    with interpret():
        out = run(args, np.arange(20)[None] == 0, implementation="mosaic_tpu")
    assert_close(out, loop(args | {"state": None}), VALUE_TOLERANCE)


def test_bfloat16_inputs_with_float32_state_and_no_races():
    """Float32 inside, rounded once, but dx of the tokens at the edges twice: as the kernel's sum, and as a whole."""
    args = draw(2, BLOCK + 3)
    half = {n: jnp.asarray(a, jnp.float32 if n == "state" else jnp.bfloat16) for n, a in args.items()}
    dy, dstate = draw_cotangents(args)
    cotangents = jnp.asarray(dy, jnp.bfloat16), dstate
    expected = loop_backward(half, cotangents)
    first = np.arange(BLOCK + 3)[:, None] < 3  # whose y the kernel leaves to XLA, as it does the new state
    kernel_alone = loop_backward(half, (np.where(first, 0, np.asarray(cotangents[0], np.float64)), 0 * dstate))
    of_kernel, whole = (np.abs(g["x"]).max() for g in (kernel_alone, expected))
    with simulate():
        (y, state), gradients = run_and_pull(half, cotangents, implementation="mosaic_tpu")
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    y_loop, state_loop = loop(half)
    assert_close(y, y_loop, ROUNDING + VALUE_TOLERANCE)
    assert_close(state, state_loop, VALUE_TOLERANCE)
    rounded = {"state": 0.0, "weight": ROUNDING, "bias": ROUNDING, "x": ROUNDING * (1 + of_kernel / whole)}
    for name, gradient in gradients.items():
        assert gradient.dtype == half[name].dtype, name
        assert_close(gradient, expected[name], rounded[name] + GRADIENT_TOLERANCE, name)


@pytest.mark.slow
def test_transformations():
    args = draw(2, 20)
    with interpret():
        check_transformations(run, args, draw_cotangents(args), GRADIENT_TOLERANCE, implementation="mosaic_tpu")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"x": np.ones((1, 20, 5), np.float16)}, "does not compute in float16: x must"),
        ({"bias": np.ones((5,), np.float16)}, "does not compute in float16: bias must"),
        ({"weight": np.ones((5, 5), np.float32), "state": None}, "does not slide 5 taps: weight must have 2 to 4"),
        ({"weight": np.ones((1, 5), np.float32), "state": None}, "does not slide 1 taps: weight must have 2 to 4"),
    ],
)
def test_what_is_not_honoured_raises(args, words):
    with interpret(), pytest.raises(UnsupportedError, match=words):
        causal_conv1d(**(draw(1, 20) | args), implementation="mosaic_tpu")


@pytest.mark.parametrize("name", ["mamba_2.8b", "samba_3.8b_append"])
def test_compiles_for_v5e(name, monkeypatch):
    monkeypatch.undo()
    compiled = compile_op("v5e", causal_conv1d, MODELS[name])
    assert count_kernels(compiled) == 2
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20  # no copy of an operand


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e"])
def test_compiles_every_shape(kind, monkeypatch):
    monkeypatch.undo()
    for name, shape in MODELS.items():
        assert count_kernels(compile_op(kind, causal_conv1d, shape)) == (2 if shape.time > 1 else 0), name
