"""The TPU kernels of the mLSTM cell, interpreted against float64 loops, and compiled without the chip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.interpret import interpret
from pallas_kernels.mlstm import mlstm, mosaic_tpu
from pallas_kernels.mlstm.shapes import MODELS, MLSTMShape
from tests.pallas_kernels import test_mlstm
from tests.pallas_kernels.sequences import assert_close, check_transformations, masks
from tests.pallas_kernels.test_mlstm import TOKENS, check_gradients, draw, draw_cotangents, loop, loop_backward, poison
from tests.pallas_kernels.tpu import compile_op, count_kernels, simulate

VALUE_TOLERANCE = 4e-6  # float32, relative to the largest magnitude
GRADIENT_TOLERANCE = 1e-5
EXTREME_TOLERANCE = 4e-5  # exponents of 150 have an error of 1e-5 in float32
CHUNK = 128

run = functools.partial(test_mlstm.run, chunk_size=CHUNK, implementation="mosaic_tpu")
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
        check(draw(1, length, seed=length))
