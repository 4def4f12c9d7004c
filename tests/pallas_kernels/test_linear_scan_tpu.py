"""The TPU kernels of the linear scan, interpreted against a float64 loop, and compiled without the chip."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels import tiles
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.interpret import interpret
from pallas_kernels.linear_scan import linear_scan
from pallas_kernels.linear_scan.shapes import MODELS
from tests.pallas_kernels import test_linear_scan
from tests.pallas_kernels.sequences import assert_close, check_transformations, masks
from tests.pallas_kernels.test_linear_scan import (
    check_bfloat16,
    draw,
    draw_cotangents,
    draw_extreme,
    loop,
    loop_backward,
)
from tests.pallas_kernels.tpu import compile_op, count_kernels, simulate

VALUE_TOLERANCE = 2e-6  # float32, relative to the largest magnitude; tiles are summed in another order
GRADIENT_TOLERANCE = 4e-6
CHUNK = 16

run = functools.partial(test_linear_scan.run, chunk_size=CHUNK)
run_and_pull = functools.partial(test_linear_scan.run_and_pull, chunk_size=CHUNK)


def check(args, reset=None, valid=None):
    """Values and gradients against the loops; padding is poisoned."""
    cotangents = draw_cotangents(args)
    poisoned, dh = args, cotangents[0]
    if valid is not None:
        poisoned = args | {n: np.where(valid[..., None], args[n], np.nan) for n in ("a", "b")}
        dh = np.where(valid[..., None], dh, np.nan)
    out, gradients = run_and_pull(poisoned, (dh, cotangents[1]), reset, valid, implementation="mosaic_tpu")
    assert_close(out, loop(args, reset, valid), VALUE_TOLERANCE)
    assert_close(gradients, loop_backward(args, cotangents, reset, valid), GRADIENT_TOLERANCE)
    if valid is not None:
        assert (np.asarray(out[0])[~valid] == 0).all()
        assert all((np.asarray(gradients[n])[~valid] == 0).all() for n in ("a", "b"))


@pytest.mark.parametrize("length", [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_any_length(length):
    with interpret():
        check(draw(2, length, seed=length))


@pytest.mark.parametrize("layout", ["packed", "left", "between", "empty"])
def test_documents_and_poisoned_padding(layout):
    with interpret():
        check(draw(3, 2 * CHUNK + 5, seed=7), *masks(layout, 3, 2 * CHUNK + 5))


def test_no_races_and_no_memory_read_before_it_is_written():
    with simulate():
        check(draw(2, 2 * CHUNK + 5, channels=130), *masks("packed", 2, 2 * CHUNK + 5))


@pytest.mark.parametrize("layout", [pytest.param(None, marks=pytest.mark.slow), "between"])
def test_extreme_decays_are_exact(layout):
    length = 2 * CHUNK + 5
    with interpret():
        check(draw_extreme(2, length), *(masks(layout, 2, length) if layout else ()))


def test_a_reset_drops_even_a_state_that_is_not_finite():
    args = draw(1, CHUNK + 3)
    args["state"][:] = np.nan
    reset = np.arange(CHUNK + 3)[None] == 0
    with interpret():
        out = run(args, reset, implementation="mosaic_tpu")
    assert_close(out, loop(args | {"state": None}), VALUE_TOLERANCE)


def test_bfloat16_inputs_with_float32_state_and_no_races():
    with simulate():
        call = functools.partial(run_and_pull, implementation="mosaic_tpu")
        check_bfloat16(call, CHUNK + 3, tolerances=(VALUE_TOLERANCE, GRADIENT_TOLERANCE))


@pytest.mark.slow
def test_transformations():
    args = draw(2, CHUNK + 4)
    with interpret():
        check_transformations(
            run, args, draw_cotangents(args), GRADIENT_TOLERANCE, name="b", implementation="mosaic_tpu"
        )


def test_either_backward_takes_the_boundaries_of_either_forward():
    from pallas_kernels.linear_scan import mosaic_tpu, xla

    args = draw(2, 2 * CHUNK + 5)
    arrays = (args["a"], args["b"], args["state"], None, None)
    with interpret():
        theirs = jax.jit(lambda: mosaic_tpu.forward(*arrays, chunk_size=CHUNK, save=True))()
    ours = jax.jit(lambda: xla.forward(*arrays, chunk_size=CHUNK, save=True))()
    assert_close(theirs, ours, VALUE_TOLERANCE)


@pytest.mark.parametrize(
    ("args", "options", "words"),
    [
        ({"a": np.ones((1, 40, 5), np.float16)}, {}, "does not compute in float16: a must"),
        ({"b": np.ones((1, 40, 5), np.float16)}, {}, "does not compute in float16: b must"),
        ({}, {"chunk_size": 20}, "chunk_size=20 must be a multiple of 16, such as 32"),
        (
            {"a": np.ones((1, 9000, 5), np.float32), "b": np.ones((1, 9000, 5), np.float32)},
            {"chunk_size": 8192},
            "VMEM",
        ),
    ],
)
def test_what_is_not_honoured_raises(args, options, words):
    with interpret(), pytest.raises(UnsupportedError, match=words):
        linear_scan(**(draw(1, 40) | args), **options, implementation="mosaic_tpu")


def test_blocks_fit_memory_and_waste_little():
    assert tiles.block_channels(2560, 256, 28, 1024) == 640
    assert tiles.block_channels(2048, 256, 44, 1024) == 1024
    assert tiles.block_channels(5, 256, 44, 1024) == 5
    assert tiles.block_channels(2560, 8192, 44, 1024) is None
    for channels in range(128, 6000, 200):
        block = tiles.block_channels(channels, 256, 44, 1024)
        assert 256 * 44 * block <= tiles.VMEM_BYTES
        assert block == channels or block % tiles.LANES == 0
        assert -(-channels // block) * block - channels < max(256, channels // 4)


@pytest.mark.parametrize("name", ["matmul_free_2.7b", "griffin_3b_packed"])
def test_compiles_for_v5e(name):
    compiled = compile_op("v5e", linear_scan, MODELS[name])
    assert count_kernels(compiled) == 2
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20  # no copy of an operand


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e"])
def test_compiles_every_shape(kind):
    for name, shape in MODELS.items():
        assert count_kernels(compile_op(kind, linear_scan, shape)) == (2 if shape.time > 1 else 0), name
