"""The GPU kernel of ternary products: interpreted against integer NumPy, and lowered for CUDA without a GPU."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.ternary_matmul import mosaic_gpu, pack, packing, repack, ternary_matmul
from pallas_kernels.ternary_matmul.shapes import MODELS, TINY, TernaryShape
from pallas_kernels.wgmma import SMEM_BYTES
from tests.pallas_kernels.gpu import QUICK, count_kernels, lower_function, lower_op, simulate
from tests.pallas_kernels.sequences import assert_close
from tests.pallas_kernels.test_ternary_matmul import GRADIENT_TOLERANCE, draw, product, run

LAYOUT = mosaic_gpu.LAYOUT
SERVED = {name: dataclasses.replace(shape, layout=LAYOUT) for name, shape in MODELS.items()}


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of rows and splits of K at sizes that are quick to simulate."""
    monkeypatch.setattr(mosaic_gpu, "MAX_ROWS", 16)
    monkeypatch.setattr(mosaic_gpu, "MULTIPROCESSORS", 8)


def tiny(rows, inputs, outputs, **options):
    return TernaryShape(rows, inputs, outputs, **({"layout": LAYOUT, "dtype": jnp.float32} | options))


def simulated(args, dtype=None):
    # Arrays come as arguments: XLA folds the constants of an interpreted kernel, with bitcasts, to wrong values.
    call = functools.partial(ternary_matmul, layout=LAYOUT, dtype=dtype, implementation="mosaic_gpu")
    with simulate():
        return jax.block_until_ready(jax.jit(lambda a: call(**a), compiler_options=QUICK)(args))


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "splits"),
    [
        (1, 512, 128, 1),
        (1, 640, 256, 2),  # the last step overlaps the one before by three quarters
        (37, 1792, 128, 2),  # three blocks of rows; the splits have two steps each
        (7, 3200, 256, 4),  # the last split is shorter
    ],
)
def test_integers_are_exact(rows, inputs, outputs, splits, small_blocks):
    args = draw(tiny(rows, inputs, outputs, scaled=False), seed=outputs)
    assert mosaic_gpu.choose_blocks(rows, inputs, outputs).splits == splits
    actual = simulated(args)
    assert actual.dtype == jnp.int32
    np.testing.assert_array_equal(actual, product(args["x"], args["w"], LAYOUT))


def test_more_steps_than_slots(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(mosaic_gpu, "MAX_SLOTS", 2)
    args = draw(tiny(9, 512 * 4 + 256, 128, scaled=False))
    blocks = mosaic_gpu.choose_blocks(9, 512 * 4 + 256, 128)
    assert blocks == mosaic_gpu.Blocks(rows=16, count=1, splits=1, steps=5, slots=2)
    np.testing.assert_array_equal(simulated(args), product(args["x"], args["w"], LAYOUT))


def test_every_byte_of_weights_and_the_largest_sums_are_exact():
    """Rows of x at both ends of int8; outputs of one byte each, all 256 of them."""
    w = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 160, axis=1)
    x = np.repeat(np.array([[-128], [127], [1]], np.int8), 640, axis=1)
    expected = product(x, w, LAYOUT)
    assert expected.max() == 640 * 128
    assert expected.min() == -640 * 128
    np.testing.assert_array_equal(simulated({"x": x, "w": w}), expected)


@pytest.mark.parametrize(("per_output", "dtype"), [(False, "bfloat16"), (True, "float32"), (True, "float16")])
def test_scaled_results_equal_the_reference_bit_for_bit(per_output, dtype, small_blocks):
    args = draw(tiny(21, 896, 128, per_output=per_output))
    args["x_scale"] /= 1000
    actual = simulated(args, dtype)
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, run(args, "reference", layout=LAYOUT, dtype=dtype))


def test_scales_that_are_not_finite_spoil_their_rows_and_outputs_alone():
    args = draw(tiny(9, 640, 128, per_output=True))
    args["x_scale"][3], args["w_scale"][127] = np.nan, np.inf
    args["x"][:, 0] |= 1
    actual = np.asarray(simulated(args))
    finite = (np.arange(9)[:, None] != 3) & (np.arange(128) != 127)
    assert np.isfinite(actual[finite]).all()
    assert not np.isfinite(actual[3]).any()
    np.testing.assert_array_equal(actual, run(args, "reference", layout=LAYOUT))


def test_transformations():
    shape = tiny(3, 640, 128)
    pair = draw(shape), draw(shape, seed=1)
    dy = np.random.default_rng(2).normal(size=(3, 128)).astype(np.float32)

    def every(implementation, pair, dy):
        op = functools.partial(ternary_matmul, layout=LAYOUT, implementation=implementation)
        args, other = pair
        both = jax.tree.map(lambda *a: jnp.stack(a), *pair)

        def loss(scales):
            return jnp.sum(op(args["x"], args["w"], *scales) * dy)

        exact = {
            "twice": (op(**args), op(**(args | {"w": other["w"]}))),
            "vmap": jax.vmap(op)(both["x"], both["w"], both["x_scale"], both["w_scale"]),
            "vmap of x": jax.vmap(op, (0, None, 0, None))(both["x"], args["w"], both["x_scale"], args["w_scale"]),
        }
        return exact, jax.grad(loss)((args["x_scale"], args["w_scale"]))

    compiled = jax.jit(every, static_argnums=0, compiler_options=QUICK)
    expected, expected_gradient = compiled("reference", pair, dy)
    with simulate():
        actual, gradient = jax.block_until_ready(compiled("mosaic_gpu", pair, dy))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert_close(gradient, expected_gradient, GRADIENT_TOLERANCE)


def test_a_checkpointed_scan_over_layers_lowers():
    """Interpretation, having effects, takes neither."""
    shape = tiny(3, 640, 640)
    layers = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape), a.dtype), shape.arrays())

    def loss(scales, layers):
        @jax.checkpoint
        def layer(x, arrays):
            y = ternary_matmul(x, layout=LAYOUT, implementation="mosaic_gpu", **arrays)
            return jnp.clip(jnp.round(y), -128, 127).astype(jnp.int8), y

        arrays = {"w": layers["w"], **scales}
        return jnp.sum(jax.lax.scan(layer, layers["x"][0], arrays)[1])

    scales = {name: layers[name] for name in ("x_scale", "w_scale")}
    assert count_kernels(lower_function(jax.grad(loss), scales, layers)) >= 2


def tile(x, tiling):
    """`x` cut as a layout of registers says: its last axes into tiles, then the last axes of those again."""
    for sizes in tiling.tiles:
        first = x.ndim - len(sizes)
        cut = x.shape[:first] + tuple(p for n, s in zip(x.shape[first:], sizes, strict=True) for p in (n // s, s))
        outer = [*range(first), *(first + 2 * i for i in range(len(sizes)))]
        x = x.reshape(cut).transpose([*outer, *(first + 2 * i + 1 for i in range(len(sizes)))])
    return x


def test_words_lie_in_the_registers_of_their_bytes():
    of_bytes: Any = mosaic_gpu.BYTES.to_mgpu()
    of_words: Any = mosaic_gpu.WORDS.to_mgpu()
    tiled_bytes = tile(np.arange(64 * 128).reshape(64, 128), of_bytes.tiling)
    tiled_words = tile(np.arange(64 * 32).reshape(64, 32), of_words.tiling)
    assert tiled_bytes.shape[:-1] == tiled_words.shape[:-1]
    np.testing.assert_array_equal(tiled_bytes, 4 * tiled_words + np.arange(4))
    for name in ("warp_dims", "lane_dims", "vector_dim"):
        assert getattr(of_bytes, name) == getattr(of_words, name)


@pytest.mark.parametrize("inputs", [512, 640, 1024, 2560, 6912, 28672])
@pytest.mark.parametrize("rows", [1, 16, 33, 128, 129, 300, 2048])
def test_blocks_fit_memory_and_cover_everything_once(rows, inputs):
    steps = -(-inputs // mosaic_gpu.STEP)
    for outputs in (128, 640, 2560, 13824):
        blocks = mosaic_gpu.choose_blocks(rows, inputs, outputs)
        assert blocks.rows % 8 == 0
        assert blocks.rows <= mosaic_gpu.MAX_ROWS
        assert (blocks.count - 1) * blocks.rows < rows <= blocks.count * blocks.rows
        assert (blocks.splits - 1) * blocks.steps < steps <= blocks.splits * blocks.steps
        threads = blocks.splits * blocks.count * outputs // mosaic_gpu.BLOCK_OUTPUTS
        assert blocks.splits == 1 or threads <= mosaic_gpu.MULTIPROCESSORS
        assert blocks.slots >= min(2, blocks.steps)
        step_bytes = blocks.rows * mosaic_gpu.STEP + mosaic_gpu.BLOCK_OUTPUTS * mosaic_gpu.WIDTH
        assert blocks.slots * step_bytes < SMEM_BYTES


@pytest.mark.parametrize("name", SERVED)
def test_lowers_at_every_published_shape(name):
    assert count_kernels(lower_op(ternary_matmul, SERVED[name])) == 2  # the result, and the sums for the gradient


@pytest.mark.parametrize("inputs", [512, 640, 768])
def test_lowers_where_rows_of_weights_end_in_a_part_of_a_step(inputs):
    assert count_kernels(lower_op(ternary_matmul, tiny(37, inputs, 128, per_output=True))) == 2


def test_weights_that_are_brought_to_the_layout():
    w = np.random.default_rng(0).integers(-1, 2, (128, 512)).astype(np.int8)
    x = np.random.default_rng(1).integers(-128, 128, (2, 512)).astype(np.int8)
    packed = repack(pack(jnp.asarray(w), "w2a8"), "w2a8", LAYOUT)
    np.testing.assert_array_equal(simulated({"x": x, "w": packed}), x.astype(np.int64) @ w.astype(np.int64).T)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (TINY["hf"], r"does not read layout='hf': .* repack\(w, 'hf', 'i2_s'\)"),
        (TINY["decode"], r"does not read layout='i2_s_columns': .* repack\(w, 'i2_s_columns', 'i2_s'\)"),
        (TINY["w2a8"], "does not read layout='w2a8'"),
        (tiny(3, 512, 133), "does not serve N=133 outputs of w: .* to N=256"),
        (tiny(3, 384, 128), "does not serve K=384 inputs of x: a step takes 512"),
    ],
)
def test_what_is_not_served_raises(shape, words):
    def call(implementation):
        step = functools.partial(ternary_matmul, implementation=implementation, **shape.options())
        return jax.eval_shape(lambda a: step(**a), shape.arrays())

    with pytest.raises(UnsupportedError, match=words):
        call("mosaic_gpu")
    assert call(None).shape == (shape.rows, shape.outputs)


def test_serves_by_name_alone():
    shape = tiny(3, 512, 128)
    for implementation, kernels in ((None, 0), ("mosaic_gpu", 1)):
        step = functools.partial(ternary_matmul, implementation=implementation, **shape.options())
        assert count_kernels(lower_function(lambda a, step=step: step(**a), shape.arrays())) == kernels


def test_published_shapes_have_bytes_in_this_layout():
    for shape in SERVED.values():
        assert packing.LAYOUTS[LAYOUT].sizes(shape.arrays()["w"].shape) == (shape.outputs, shape.inputs)
