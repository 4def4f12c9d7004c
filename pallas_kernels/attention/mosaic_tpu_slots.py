"""Attention of a few queries to stored slots as a Pallas TPU kernel: decoding from a cache or a ring, forward.

It reads each key and value once, in the order of memory: [slot, key head] is one axis of columns, [token, query head]
one axis of rows, and a row's scores with the columns of other key heads are hidden like those of slots that it does
not see. Those products are wasted, but time goes into reading the slots.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.attention import mosaic_tpu
from pallas_kernels.attention.mosaic_tpu import VMEM_LIMIT, widen
from pallas_kernels.attention.reference import visible
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.tiles import LANES, as_column, contract

MAX_ROWS = 256  # of scores; beyond, products with other heads cost more than reading the slots
_TOKEN_BITS = 24  # a column's mark: bit t says that token t sees the slot; above stands the key head
_MAX_GROUPS = 2 ** (31 - _TOKEN_BITS)


def block_columns(columns: int, rows: int, width: int, itemsize: int) -> int:
    """Columns of a grid step: a power of two whose keys, values and scores fit in VMEM."""
    width = LANES * -(-width // LANES)
    # Keys and values twice, and float32 values before and after empty slots are cleared.
    most = min(2048, 2**18 // max(rows, LANES), 2**23 // (width * (4 * itemsize + 8)))
    return min(1 << (most.bit_length() - 1), LANES * (1 << max(0, (-(-columns // LANES) - 1).bit_length())))


def supports(q, k, v, q_positions, *rest, **options) -> None:
    """Raises `UnsupportedError` for what the forward kernels do not serve."""
    if q_positions is None:
        return mosaic_tpu.supports(q, k, v, q_positions, *rest, **options)
    mosaic_tpu.supports(q, k, v, None, *rest, **options)
    with_positions = "attention: mosaic_tpu does not serve q_positions and kv_positions with"
    time, heads, groups = *q.shape[1:3], k.shape[2]
    if time > _TOKEN_BITS or time * heads > MAX_ROWS or groups > _MAX_GROUPS:
        raise UnsupportedError(
            f"{with_positions} T={time}, H={heads}, G={groups}: its kernel is for decoding, up to T={_TOKEN_BITS}, "
            f"T * H = {MAX_ROWS} and G={_MAX_GROUPS}; use 'xla'"
        )
    if q.shape[3] % LANES or v.shape[3] % LANES:
        raise UnsupportedError(
            f"{with_positions} widths K={q.shape[3]}, V={v.shape[3]}: where they are not multiples of {LANES}, "
            "what is stored has another layout in memory, and it would be copied; use 'xla'"
        )


def _kernel(scale, soft_cap, row_ref, mark_ref, q_ref, k_ref, v_ref, *refs):
    y_ref, lse_ref, peak_ref, total_ref, acc_ref = refs
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        peak_ref[...] = jnp.full(peak_ref.shape, -jnp.inf, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    token, group, marks, v = row_ref[:, 0:1], row_ref[:, 1:2], mark_ref[0], v_ref[0]
    seen = ((marks >> token) & 1 == 1) & (marks >> _TOKEN_BITS == group)
    s = contract(q_ref[0], k_ref[0], 1, 1) * scale
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    s = jnp.where(seen, s, -jnp.inf)
    old_peak = peak_ref[...]
    peak = jnp.maximum(old_peak, jnp.max(s, axis=1, keepdims=True))
    peak_ref[...] = peak
    shift = jnp.where(peak == -jnp.inf, 0.0, peak)
    p, decay = jnp.exp(s - widen(shift, s.shape[1])), jnp.exp(old_peak - shift)
    parts = [p[:, n : n + LANES] for n in range(0, s.shape[1], LANES)]
    total_ref[...] = total_ref[...] * decay + sum(parts[1:], parts[0])
    # Zero times NaN is NaN: what nothing sees, as an empty slot, must be gone before the product.
    used = widen(as_column(marks, LANES), v.shape[1]) & (2**_TOKEN_BITS - 1) != 0
    v = jnp.where(used, v.astype(jnp.float32), 0.0).astype(v.dtype)
    acc_ref[...] = acc_ref[...] * widen(decay, v.shape[1]) + contract(p.astype(v.dtype), v, 1, 0)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        total = jnp.broadcast_to(jnp.sum(total_ref[...], axis=1, keepdims=True), total_ref.shape)
        share = 1.0 / jnp.where(total > 0, total, 1.0)
        y_ref[0] = (acc_ref[...] * widen(share, acc_ref.shape[1])).astype(y_ref.dtype)
        # Where nothing is seen the peak is -inf; where something is, the total is at least 1.
        lse_ref[0] = peak_ref[...] + jnp.log(jnp.maximum(total, 1.0))


def _marks(groups, window, q_positions, kv_positions, q_documents, kv_documents) -> jax.Array:
    """int32[B, 1, S * G]: the marks of all columns."""
    seen = visible(q_positions, kv_positions, q_documents, kv_documents, window)
    tokens = jnp.sum(seen << jnp.arange(seen.shape[1])[:, None], axis=1, dtype=jnp.int32)
    marks = tokens[:, :, None] | (jnp.arange(groups, dtype=jnp.int32) << _TOKEN_BITS)
    return marks.reshape(seen.shape[0], 1, -1)


def forward(q, k, v, q_positions, kv_positions, q_documents, kv_documents, *, window, scale, soft_cap):
    """Arguments as in `attention`, positions given; returns (y [B, T, H, V] in q.dtype, lse float32[B, T, H])."""
    (batch, time, heads, key), (slots, groups, value) = q.shape, v.shape[1:]
    rows, columns = time * heads, slots * groups
    block = block_columns(columns, rows, max(key, value), q.dtype.itemsize)
    steps = -(-columns // block)
    marks = _marks(groups, window, q_positions, kv_positions, q_documents, kv_documents)
    marks = jnp.pad(marks, ((0, 0), (0, 0), (0, steps * block - columns)))
    index = np.arange(rows)
    row_marks = np.stack([index // heads, index % heads // (heads // groups)], axis=1).astype(np.int32)
    k, v = (x.reshape(batch, columns, -1) for x in (k, v))
    if steps == 1:  # a block is not larger than its array; many blocks may end beyond it
        k, v = (jnp.pad(x, ((0, 0), (0, block - columns), (0, 0))) for x in (k, v))

    def fixed(*shape):
        return pl.BlockSpec((1, *shape), lambda b, step: (b, 0, 0))

    def slots_of(width):
        return pl.BlockSpec((1, block, width), lambda b, step: (b, step, 0))

    y, lse = pl.pallas_call(
        functools.partial(_kernel, scale, soft_cap),
        grid=(batch, steps),
        in_specs=[
            pl.BlockSpec((rows, 2), lambda b, step: (0, 0)),
            pl.BlockSpec((1, 1, block), lambda b, step: (b, 0, step)),
            *(fixed(rows, key), slots_of(key), slots_of(value)),
        ],
        out_specs=[fixed(rows, value), fixed(rows, LANES)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, rows, value), q.dtype),
            jax.ShapeDtypeStruct((batch, rows, LANES), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32) for width in (LANES, LANES, value)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret.parameters(),
        name="attention_slots",
    )(jnp.asarray(row_marks), marks, q.reshape(batch, rows, key), k, v)
    return y.reshape(batch, time, heads, value), lse[:, :, 0].reshape(batch, time, heads)
