"""The GPU kernels of attention: interpreted against the oracle, and lowered for CUDA without a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention, mosaic_gpu, mosaic_gpu_backward, op, shapes
from pallas_kernels.attention.mosaic_gpu import Blocks
from pallas_kernels.dispatch import UnsupportedError
from tests.pallas_kernels.gpu import check_mapped, count_kernels, lower_function, lower_op, simulate
from tests.pallas_kernels.test_attention import (
    BF16_TOLERANCE,
    NAMES,
    assert_close,
    draw,
    draw_cotangents,
    largest_score,
    oracle,
    packed_documents,
    poison,
    run,
)

SMEM = 227 * 1024  # what a block of threads may use
# A product of float32 numbers in two bfloat16 parts errs by up to 3 * 2^-18 of the sum of its terms' magnitudes; the
# gradients chain three of them.
F32_TOLERANCE, F32_GRAD_TOLERANCE = 1e-5, 3e-5


@pytest.fixture
def small(monkeypatch):
    """Has the kernels use small blocks, so that short sequences have many."""
    for module, name, blocks in (
        (mosaic_gpu, "forward_blocks", Blocks(8, 16, 2)),
        (mosaic_gpu_backward, "dq_blocks", Blocks(16, 8, 1)),
        (mosaic_gpu_backward, "dkv_blocks", Blocks(8, 8, 3)),
    ):
        monkeypatch.setattr(module, name, lambda *_, blocks=blocks: blocks)
    monkeypatch.setattr(mosaic_gpu_backward, "TOGETHER", 16)


def check(q, k, v, cotangents=None, grad_tolerance=F32_GRAD_TOLERANCE, **arguments):
    """Values of the interpreted kernels against the oracle, gradients against autodiff of the reference.

    The kernels are called without the op, which keeps small widths from them: interpreted, they take any.
    """
    cotangents = draw_cotangents(q, v) if cotangents is None else cotangents
    arrays = (q, k, v, None, None, arguments.get("q_documents"), arguments.get("kv_documents"))
    options = {"window": None, "scale": q.shape[-1] ** -0.5, "soft_cap": None}
    options |= {name: value for name, value in arguments.items() if name in options}
    with simulate():
        y, lse = jax.jit(functools.partial(mosaic_gpu.forward, **options))(*arrays)
        backward = jax.jit(functools.partial(mosaic_gpu_backward.backward, **options))
        grads = jax.block_until_ready(backward(*arrays, y, lse, *cotangents))
    expected = oracle(q, k, v, **arguments)
    _, expected_grads = run(q, k, v, "reference", cotangents, **arguments)
    assert_close(y, expected[0], F32_TOLERANCE, "y")
    assert_close(lse, expected[1], F32_TOLERANCE, "lse")
    for name, grad, want in zip(NAMES, grads, expected_grads, strict=True):
        assert_close(grad, want, grad_tolerance, f"d{name}")
    return (y, lse), grads


@pytest.mark.parametrize(
    ("time", "heads", "groups", "key", "value", "options"),
    [
        (1, 1, 1, 8, 8, {}),
        (35, 2, 1, 8, 4, {"soft_cap": 2.0, "scale": -0.7}),
        pytest.param(53, 1, 1, 4, 8, {"window": 17}, marks=pytest.mark.slow),
        (25, 2, 1, 9, 8, {"soft_cap": 5.0}),  # dk and dv by kernels of their own
    ],
)
def test_many_small_blocks(small, time, heads, groups, key, value, options):
    check(*draw(time, 1, time, heads, groups, key, value), **options)


def test_extreme_scores_stay_finite(small):
    q, k, v = draw(9, 1, 40, 2, 1, 8, 8)
    q, k = q * 30, k * 30
    # Rounding a score s moves its weight by a factor 1 + |s| * epsilon, whatever the implementation.
    check(q, k, v, grad_tolerance=largest_score(q, k) * np.finfo(np.float32).eps)


def test_documents_and_poisoned_padding(small):
    """Packed rows, one of padding alone, and one whose documents come in any order."""
    time = 25
    documents = np.array(packed_documents(3, time, seed=time))
    documents[1] = -1
    documents[2] = np.arange(time) % 3 * 2**29
    documents = jnp.asarray(documents)
    q, k, v = (poison(x, documents) for x in draw(3, 3, time, 1, 1, 8, 8))
    pads = documents < 0
    dy, dlse = draw_cotangents(q, v)
    cotangents = jnp.where(pads[:, :, None, None], jnp.nan, dy), jnp.where(pads[:, :, None], jnp.nan, dlse)
    options = {"q_documents": documents, "kv_documents": documents, "window": 12, "soft_cap": 4.0}
    outputs, grads = check(q, k, v, cotangents, **options)
    assert pads[0].any()
    assert (outputs[0][pads] == 0).all()
    assert (outputs[1][pads] == -jnp.inf).all()
    for grad in grads:
        assert (grad[pads] == 0).all()


def test_steps_without_a_common_document_are_not_loaded(small):
    """Documents that fill tiles: what is NaN in one does not even meet a zero weight of another."""
    documents = jnp.asarray(np.arange(96)[None] // 32, jnp.int32)
    q, k, v = (x.at[:, 32:64].set(jnp.nan) for x in draw(5, 1, 96, 1, 1, 8, 8))
    options = {"window": None, "scale": 0.3, "soft_cap": None}
    with simulate(detect_races=False):
        forward = jax.jit(functools.partial(mosaic_gpu.forward, **options))
        y, lse = jax.block_until_ready(forward(q, k, v, None, None, documents, documents))
    other = np.r_[0:32, 64:96]
    expected = oracle(
        *(x[:, other] for x in (q, k, v)), scale=0.3, q_documents=documents[:, other], kv_documents=documents[:, other]
    )
    assert np.isnan(y[:, 32:64]).all()
    assert_close(y[:, other], expected[0], F32_TOLERANCE)
    assert_close(lse[:, other], expected[1], F32_TOLERANCE)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "grad_tolerance"),
    [
        (jnp.bfloat16, BF16_TOLERANCE, BF16_TOLERANCE),
        (jnp.float32, F32_TOLERANCE, F32_GRAD_TOLERANCE),
    ],
)
@pytest.mark.slow
def test_either_forward_meets_the_other_backward_through_the_op(small, dtype, tolerance, grad_tolerance):
    q, k, v = draw(12, 1, 20, 1, 1, 64, 64, dtype=dtype)
    arrays, options = (q, k, v, None, None, None, None), {"window": 9, "scale": 0.1, "soft_cap": None}
    cotangents = draw_cotangents(q, v)
    with simulate():
        outputs, grads = run(q, k, v, "mosaic_gpu", cotangents, window=9, scale=0.1)
        other = jax.jit(functools.partial(op.FORWARD["xla"], **options))(*arrays)
        backward = jax.jit(functools.partial(op.BACKWARD["mosaic_gpu"], **options))
        mixed = jax.block_until_ready(backward(*arrays, *other, *cotangents))
    expected = oracle(q, k, v, window=9, scale=0.1)
    wide = tuple(x.astype(jnp.float32) for x in (q, k, v))
    wide_cotangents = tuple(x.astype(jnp.float32) for x in cotangents)
    _, expected_grads = run(*wide, "reference", wide_cotangents, window=9, scale=0.1)
    for out, want in zip(outputs, expected, strict=True):
        assert_close(out, want, tolerance)
    third = jax.jit(functools.partial(op.BACKWARD["xla"], **options))(*arrays, *outputs, *cotangents)
    for results in (grads, mixed, third):
        for name, grad, want in zip(NAMES, results, expected_grads, strict=True):
            assert grad.dtype == dtype
            assert_close(grad, want, grad_tolerance, f"d{name}")


@pytest.mark.parametrize(
    ("blocks", "time", "window"),
    [
        (Blocks(8, 16, 2), 70, None),
        (Blocks(8, 32, 2), 130, 17),
        (Blocks(16, 8, 2), 100, 1),
        (Blocks(8, 64, 2), 129, 64),
        (Blocks(32, 16, 2), 64, 33),
        (Blocks(8, 8, 2), 64, 63),
    ],
)
def test_steps_cover_the_band_once(blocks, time, window):
    """From both sides; a step without a mask is seen in whole, and one that nothing is seen of is skipped."""
    band = mosaic_gpu.layout(time, None, None, blocks, window=window, scale=1.0, soft_cap=None).scores.band
    index = np.arange(band.length)
    distance = index[:, None] - index[None, :]
    seen = (distance >= 0) & (distance < (window or band.length))
    for by_query in (True, False):
        for start in range(0, band.length, blocks.tile):
            a, b, c, d = (int(x) for x in (band.of_queries if by_query else band.of_keys)(start))
            assert 0 <= a <= b <= c <= d <= band.length // blocks.step
            tile = (seen if by_query else seen.T)[start : start + blocks.tile]
            steps = tile.reshape(blocks.tile, -1, blocks.step)
            number = np.arange(steps.shape[1])
            np.testing.assert_array_equal(steps.any(axis=(0, 2)), (a <= number) & (number < d))
            assert steps[:, b:c].all()
            assert not steps[:, a:b].all(axis=(0, 2)).any()
            assert not steps[:, c:d].all(axis=(0, 2)).any()


def test_a_window_that_hides_nothing_is_none():
    arrays = [jnp.zeros((1, 200, 1, 64), jnp.bfloat16)] * 3 + [None] * 4
    texts = {
        str(jax.make_jaxpr(functools.partial(mosaic_gpu.forward, window=w, scale=1.0, soft_cap=None))(*arrays))
        for w in (None, 200, 2**31 - 1)
    }
    other = jax.make_jaxpr(functools.partial(mosaic_gpu.forward, window=199, scale=1.0, soft_cap=None))(*arrays)
    assert len(texts) == 1
    assert str(other) not in texts


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "choose", [mosaic_gpu.forward_blocks, mosaic_gpu_backward.dq_blocks, mosaic_gpu_backward.dkv_blocks]
)
def test_the_choice_of_blocks(choose, size):
    most, together = mosaic_gpu.MAX_WIDTH * 2 // size, mosaic_gpu_backward.TOGETHER * 2 // size
    for key in range(64, most + 1, 64):
        for value in range(64, most + 1, 64):
            blocks = choose(key, value, size)
            assert blocks.rows == 64
            assert blocks.step in (64, 128)
            assert (2 if max(key, value) * size <= 256 else 1) <= blocks.slots <= 4
            rows, steps = blocks.tile, blocks.slots * blocks.step
            if choose is mosaic_gpu.forward_blocks:
                output = value if key != value and size == 2 else 0
                held, streamed = size * (key + output) + 8, size * (key + value) + 4
                registers = value + blocks.step * (size // 2)  # parts of the weights take as much as the weights
            elif choose is mosaic_gpu_backward.dq_blocks:
                held, streamed = size * (key + value) + 12, size * (key + value) + 4
                registers = key + 2 * blocks.step
            else:
                accumulators = key + value if max(key, value) <= together else max(key, value)
                held, streamed = size * (key + value) + 4, size * (key + value) + 12
                registers = accumulators + 2 * blocks.step
            assert rows * held + steps * streamed + 10 * 1024 <= SMEM
            assert registers // 2 <= 200  # float32 of 64 rows over 128 threads, of 232


SERVED = {n: s for n, s in shapes.MODELS.items() if s.keys is None and s.key % 64 == 0}
NARROW = [n for n, s in SERVED.items() if s.key <= mosaic_gpu.MAX_WIDTH // 2]


def check_lowers(shape, together):
    assert count_kernels(lower_op(attention, shape)) == (3 if max(shape.key, shape.value) <= together else 4)


@pytest.mark.parametrize("name", SERVED)
def test_lowers_at_every_shape_it_serves(name):
    check_lowers(SERVED[name], mosaic_gpu_backward.TOGETHER)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in ("llama_135m", "samba_421m_packed") else pytest.mark.slow) for n in NARROW],
)
def test_lowers_in_float32(name):
    check_lowers(dataclasses.replace(SERVED[name], dtype=jnp.float32), mosaic_gpu_backward.TOGETHER // 2)


def test_lowers_with_every_option_and_transformation():
    """float16, unequal widths, one token; vmap over a scan of layers whose bodies are recomputed."""
    q, v = jax.ShapeDtypeStruct((2, 1, 4, 128), jnp.float16), jax.ShapeDtypeStruct((2, 1, 2, 64), jnp.float16)
    k, marks = jax.ShapeDtypeStruct((2, 1, 2, 128), jnp.float16), jax.ShapeDtypeStruct((2, 1), jnp.int32)

    def loss(q, k, v, marks):
        options = {"window": 3, "soft_cap": 5.0, "q_documents": marks, "kv_documents": marks}

        @jax.checkpoint
        def layer(q, scale):
            y = attention(q * scale, k, v, implementation="mosaic_gpu", **options)
            return q + jnp.tile(y, 2), None

        return jnp.sum(jax.lax.scan(layer, q, jnp.ones(2, jnp.float16))[0].astype(jnp.float32))

    assert count_kernels(lower_function(jax.grad(loss, argnums=(0, 1, 2)), q, k, v, marks)) >= 3
    many = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in (q, k, v, marks)]
    assert count_kernels(lower_function(jax.vmap(jax.grad(loss, argnums=(0, 1, 2))), *many)) >= 3


def test_vmap(small):
    def outputs(args, implementation):
        y, lse = attention(**args, window=9, return_lse=True, implementation=implementation)
        return y.astype(jnp.float32), lse

    check_mapped(
        outputs, dict(zip(NAMES, draw(14, 1, 12, 1, 1, 64, 64, dtype=jnp.bfloat16), strict=True)), BF16_TOLERANCE
    )


def test_what_the_kernels_do_not_serve():
    def arrays(key=64, value=64, dtype=jnp.bfloat16):
        return tuple(jax.ShapeDtypeStruct((1, 6, 1, width), dtype) for width in (key, key, value))

    def served(*arrays, implementation="mosaic_gpu", **extra):
        def call(q, k, v):
            return jnp.sum(attention(q, k, v, implementation=implementation, **extra).astype(jnp.float32))

        return count_kernels(lower_function(jax.grad(call, argnums=(0, 1, 2)), *arrays))

    index = jnp.arange(6, dtype=jnp.int32)[None]
    positions = {"q_positions": index, "kv_positions": index}
    refused = (
        (arrays(), positions, "q_positions"),
        (arrays(192, 64, jnp.float32), {}, "K=192, V=64 of q, k and v in float32: .* up to 128"),
        (arrays(96, 96), {}, "K=96, V=96"),
        (arrays(64, 72), {}, "V=72"),
        (arrays(320, 64), {}, "K=320"),
    )
    for shape, extra, reason in refused:
        with pytest.raises(UnsupportedError, match=f"mosaic_gpu does not serve .*{reason}"):
            served(*shape, **extra)
        assert served(*shape, implementation=None, **extra) == 0
    assert served(*arrays(), implementation=None) == 0  # the kernels serve by name alone
    assert served(*arrays()) == 3
    assert served(*arrays(256, 192)) == served(*arrays(128, 64, jnp.float32)) == 4
    assert served(*arrays(128, 64, jnp.float16), q_documents=index, kv_documents=index, window=2, soft_cap=1.0) == 3
