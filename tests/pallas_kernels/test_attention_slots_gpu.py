"""The GPU kernel of attention to stored slots: interpreted against the oracle, and lowered for CUDA without a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention, mosaic_gpu, mosaic_gpu_slots, shapes
from pallas_kernels.attention.mosaic_gpu_slots import STEP, Blocks, choose_blocks, choose_splits
from pallas_kernels.dispatch import UnsupportedError
from tests.pallas_kernels.gpu import count_kernels, lower_function, simulate
from tests.pallas_kernels.test_attention import BF16_TOLERANCE, assert_close, draw, largest_score, oracle
from tests.pallas_kernels.test_attention_gpu import F32_TOLERANCE, SMEM
from tests.pallas_kernels.test_attention_slots_tpu import ring

DECODE = {
    name: shape
    for name, shape in shapes.MODELS.items()
    if shape.keys is not None and shape.time * shape.heads // shape.kv_heads <= mosaic_gpu_slots.MAX_ROWS
}


@pytest.fixture
def small(monkeypatch):
    """Has the kernel use small blocks on few multiprocessors, so that few slots have many."""
    monkeypatch.setattr(mosaic_gpu_slots, "STEP", 16)
    monkeypatch.setattr(mosaic_gpu_slots, "MAX_ROWS", 16)
    monkeypatch.setattr(mosaic_gpu_slots, "MULTIPROCESSORS", 8)


def check(q, k, v, tolerances=(F32_TOLERANCE, F32_TOLERANCE), *, races=True, **arguments):
    """The interpreted kernel, with NaN in empty slots and in queries at padding, against the oracle.

    It is called without the op, which keeps small widths from it: interpreted, it takes any.
    """
    empty, pads = arguments["kv_positions"] < 0, arguments.get("q_documents", arguments["q_positions"]) < 0
    poisoned = [jnp.where(at[:, :, None, None], jnp.nan, x) for at, x in ((pads, q), (empty, k), (empty, v))]
    names = ("q_positions", "kv_positions", "q_documents", "kv_documents")
    options = {"window": None, "scale": q.shape[-1] ** -0.5, "soft_cap": None}
    options |= {name: value for name, value in arguments.items() if name in options}
    with simulate(detect_races=races):
        forward = jax.jit(functools.partial(mosaic_gpu_slots.forward, **options))
        y, lse = jax.block_until_ready(forward(*poisoned, *(arguments.get(name) for name in names)))
    expected = oracle(q, k, v, **arguments)
    assert y.dtype == q.dtype
    assert lse.dtype == jnp.float32
    assert_close(y, expected[0], tolerances[0], "y")
    assert_close(lse, expected[1], tolerances[1], "lse")
    return y, lse


@pytest.mark.parametrize(
    ("batch", "time", "heads", "groups", "widths", "slots", "blocks", "documents", "options"),
    [
        (2, 1, 4, 2, (8, 4), 70, Blocks(2, 4), False, {}),  # the last step begins before its slots
        (2, 3, 4, 1, (4, 8), 40, Blocks(1, 2), True, {"window": 30, "scale": -0.3}),
        (2, 4, 2, 2, (8, 8), 5, Blocks(2, 2), True, {"soft_cap": 2.0}),  # fewer slots than a step has
    ],
)
def test_values(small, monkeypatch, batch, time, heads, groups, widths, slots, blocks, documents, options):
    monkeypatch.setattr(mosaic_gpu_slots, "choose_blocks", lambda *_: blocks)
    q, k, v = draw(slots, batch, time, heads, groups, *widths, keys=slots)
    meta = ring(slots, batch, time, slots, documents)
    y, _ = check(q, k, v, **meta, **options)
    if documents:
        pads = np.asarray(meta["q_documents"]) < 0
        assert pads.any()
        assert (y[pads] == 0).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits(small, dtype):
    q, k, v = draw(2, 1, 2, 8, 2, 64, 64, keys=50, dtype=dtype)
    check(q, k, v, (BF16_TOLERANCE,) * 2, **ring(2, 1, 2, 50, documents=True), window=40)


def test_queries_that_see_nothing(small):
    """An empty cache, and a window that has left all slots behind."""
    q, k, v = draw(1, 2, 1, 2, 1, 8, 8, keys=20)
    stored = jnp.stack([jnp.full(20, -1, jnp.int32), jnp.arange(20, dtype=jnp.int32)])
    asked = jnp.asarray([[3], [100]], jnp.int32)
    y, lse = check(q, k, v, q_positions=asked, kv_positions=stored, window=50)
    assert (y == 0).all()
    assert (lse == -jnp.inf).all()


def test_extreme_scores_stay_finite(small):
    q, k, v = draw(9, 1, 2, 2, 1, 8, 8, keys=60)
    q, k = q * 30, k * 30
    # Rounding a score s moves its weight by a factor 1 + |s| * epsilon, here of the parts of products.
    tolerance = largest_score(q, k) * 2.0**-16
    check(q, k, v, (tolerance, F32_TOLERANCE), **ring(9, 1, 2, 60, documents=True))


def test_marks_cover_every_slot_once():
    rng = np.random.default_rng(0)
    for slots in (64, 100, 128, 200, 1000):
        positions = jnp.asarray(rng.permutation(slots)[None], jnp.int32)
        asked = jnp.asarray([[slots // 2, slots]], jnp.int32)
        marks = np.asarray(mosaic_gpu_slots._marks(None, asked, positions, None, None))[0].reshape(-1, STEP)
        found = np.zeros(slots, np.int32)
        for n, step in enumerate(marks):
            np.add.at(found, min(n * STEP, slots - STEP) + np.arange(STEP), step)
        np.testing.assert_array_equal(found, np.where(np.asarray(positions[0]) <= slots // 2, 3, 2))


@pytest.mark.parametrize("size", [2, 4])
def test_the_choice_of_blocks(size):
    for key in range(64, mosaic_gpu.MAX_WIDTH * 2 // size + 1, 64):
        for value in range(64, mosaic_gpu.MAX_WIDTH * 2 // size + 1, 64):
            blocks = choose_blocks(key, value, size)
            assert blocks.consumers == (1 if size == 4 and key + value > 192 else 2)
            assert blocks.slots in (2, 4) or blocks.consumers == 1
            assert blocks.slots % blocks.consumers == 0
            cut = blocks.consumers * size * max(key, value) * STEP if size == 4 else 0
            assert 64 * size * key + cut + blocks.slots * STEP * (size * (key + value) + 4) + 10 * 1024 <= SMEM


def test_the_choice_of_splits():
    assert [choose_splits(rows, 32) for rows in (1, 16, 64, 132)] == [32, 8, 2, 1]
    assert choose_splits(1, 1) == 1
    for rows in (1, 7, 100, 192, 1000):
        for steps in (1, 5, 128, 1024):
            assert 1 <= choose_splits(rows, steps) <= steps


def lower(shape, **changes):
    shape = dataclasses.replace(shape, **changes)

    def decode(arrays):
        return attention(**arrays, **shape.options(), implementation="mosaic_gpu", return_lse=True)

    return lower_function(decode, shape.arrays())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("name", DECODE)
def test_lowers_where_it_serves(name, dtype):
    """Keys and values are read where they lie: none is copied."""
    shape = DECODE[name]
    if dtype == jnp.float32 and shape.key > mosaic_gpu.MAX_WIDTH // 2:
        with pytest.raises(UnsupportedError, match="K=256, V=256 of q, k and v in float32"):
            lower(shape, dtype=dtype)
        return
    text = lower(shape, dtype=dtype)
    assert count_kernels(text) == 1
    short = {jnp.bfloat16: "bf16", jnp.float16: "f16", jnp.float32: "f32"}[dtype]
    stored = f"tensor<{shape.batch}x{shape.keys}x{shape.kv_heads}x{shape.key}x{short}>"
    kernel = next(line for line in text.splitlines() if "@mosaic_gpu_v2" in line)
    assert kernel.count(stored) == 2
    made = [
        line for line in text.splitlines() if line.partition("=")[2].rstrip().endswith(stored) and "stablehlo" in line
    ]
    assert not made


def test_transformations_lower():
    """vmap of a scan over layers with slots of their own."""
    q, k = jax.ShapeDtypeStruct((3, 2, 1, 4, 64), jnp.float32), jax.ShapeDtypeStruct((3, 5, 2, 100, 2, 64), jnp.float32)
    asked, stored = jax.ShapeDtypeStruct((3, 2, 1), jnp.int32), jax.ShapeDtypeStruct((3, 2, 100), jnp.int32)

    def decode(q, k, asked, stored):
        def layer(q, k):
            return q + attention(q, k, k, q_positions=asked, kv_positions=stored, implementation="mosaic_gpu"), None

        return jax.lax.scan(layer, q, k)[0]

    assert count_kernels(lower_function(jax.vmap(decode), q, k, asked, stored)) == 1


def test_what_the_kernel_does_not_serve():
    def call(time=1, heads=2, groups=1, width=64, implementation="mosaic_gpu"):
        arrays = draw(0, 1, time, heads, groups, width, width, keys=70, dtype=jnp.bfloat16)
        return functools.partial(attention, **ring(0, 1, time, 70), implementation=implementation), arrays

    for sizes, reason in (
        ({"time": 32}, "T=32"),
        ({"time": 3, "heads": 22}, "H=22, G=1: .* here 66"),
        ({"width": 96}, "K=96"),
    ):
        function, arrays = call(**sizes)
        with pytest.raises(UnsupportedError, match=f"mosaic_gpu does not serve .*{reason}"):
            lower_function(function, *arrays)

    def loss(function):
        return jax.grad(lambda *arrays: function(*arrays).astype(jnp.float32).sum())

    function, arrays = call()
    with pytest.raises(UnsupportedError, match="mosaic_gpu does not serve q_positions"):
        lower_function(loss(function), *arrays)
    assert count_kernels(lower_function(function, *arrays)) == 1
    function, arrays = call(implementation=None)  # the kernels serve by name alone
    assert count_kernels(lower_function(loss(function), *arrays)) == 0
    function, arrays = call(time=31, heads=2)
    assert count_kernels(lower_function(function, *arrays)) == 1
