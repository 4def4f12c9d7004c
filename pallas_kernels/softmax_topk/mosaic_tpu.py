"""Softmax and top-k as a Pallas TPU kernel: one read of the logits.

The grid walks rows (parallel) and blocks of columns (in order). A block is seen as chunks of 128 columns, one per lane:

1. One pass keeps, per lane, the running maximum and sum of the softmax, and the block's largest entry, its chunk, and
   the second largest entry. Lanes meet only when the row is finished.
2. If an entry beats the k-th best so far, the 128 lane maxima are sorted and merged into the sorted list of the 128
   best. Only if a lane's second entry may beat the new k-th best is the block searched again, for the next entry of
   every lane, until none does: exact for any input, and one merge for most blocks.

Candidates are ordered by (value descending, column ascending), so the order of lanes and chunks never shows.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, interpret

LANES = 128
UNROLL = 8  # chunks per loop step
_ROWS = 32
_BLOCK_ELEMENTS = 32 * 8192  # 1 MiB of float32, twice for the pipeline
_HIGHEST = float(jnp.finfo(jnp.float32).max)  # running maxima are kept finite: inf - inf is NaN
_SCRATCH = (jnp.float32, jnp.float32, jnp.float32, jnp.int32, jnp.float32)  # all [rows, 128]
_NO_CHUNK = 1 << 16
_NO_COLUMN = jnp.iinfo(jnp.int32).max


def block_sizes(rows: int, columns: int, itemsize: int) -> tuple[int, int]:
    """(rows, columns) of a block of logits: whole tiles, whole loop steps, and about 1 MiB of float32."""
    tile = 32 // itemsize
    block_rows = min(_ROWS, pl.cdiv(rows, tile) * tile)
    if columns <= UNROLL * LANES:
        return block_rows, pl.cdiv(columns, LANES) * LANES
    blocks = pl.cdiv(columns, _BLOCK_ELEMENTS // block_rows)
    step = UNROLL * LANES
    return block_rows, pl.cdiv(pl.cdiv(columns, blocks), step) * step


def supports(logits, *, k: int) -> None:
    """Raises `UnsupportedError` where `forward` cannot serve the call."""
    del k
    if logits.dtype == jnp.float16:
        raise dispatch.UnsupportedError("softmax_topk: mosaic_tpu does not read float16: logits; use bfloat16")
    if logits.shape[1] >= _NO_CHUNK * LANES:
        raise dispatch.UnsupportedError(
            f"softmax_topk: mosaic_tpu does not serve {_NO_CHUNK * LANES} columns or more: logits {logits.shape}"
        )


def forward(logits, *, k: int):
    """Returns (lse [N], values [N, k], indices [N, k]), arguments as in `softmax_topk`."""
    rows, columns = logits.shape
    block_rows, block_columns = block_sizes(rows, columns, logits.dtype.itemsize)
    grid = (pl.cdiv(rows, block_rows), pl.cdiv(columns, block_columns))
    best = pl.BlockSpec((block_rows, LANES), lambda i, j: (i, 0))
    lse, values, indices = pl.pallas_call(
        functools.partial(_kernel, k=k, columns=columns),
        grid=grid,
        in_specs=[pl.BlockSpec((block_rows, block_columns), lambda i, j: (i, j))],
        out_specs=[pl.BlockSpec((block_rows, 1), lambda i, j: (i, 0)), best, best],
        out_shape=[
            jax.ShapeDtypeStruct((rows, 1), jnp.float32),
            jax.ShapeDtypeStruct((rows, LANES), jnp.float32),
            jax.ShapeDtypeStruct((rows, LANES), jnp.int32),
        ],
        scratch_shapes=[pltpu.VMEM((block_rows, LANES), t) for t in _SCRATCH],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret.parameters(),
        name="softmax_topk",
    )(logits)
    spoiled = jnp.isnan(lse)
    return lse[:, 0], jnp.where(spoiled, jnp.nan, values[:, :k]), jnp.where(spoiled, -1, indices[:, :k])


def _kernel(x_ref, lse_ref, values_ref, indices_ref, maximum_ref, total_ref, *lanes_refs, k, columns):
    value_ref, chunk_ref, second_ref = lanes_refs
    j, last = pl.program_id(1), pl.num_programs(1) - 1
    start = j * x_ref.shape[1]
    limit = columns - start

    @pl.when(j == 0)
    def _():
        maximum_ref[...] = jnp.full_like(maximum_ref, -_HIGHEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        values_ref[...] = jnp.full_like(values_ref, -jnp.inf)
        indices_ref[...] = jnp.full_like(indices_ref, _NO_COLUMN)

    def first_pass(limit):
        _first_pass(x_ref, maximum_ref, total_ref, value_ref, chunk_ref, second_ref, limit)

    if columns % x_ref.shape[1] == 0:
        first_pass(None)
    else:  # the last block hangs over the edge, where it holds anything
        pl.when(j < last)(lambda: first_pass(None))
        pl.when(j == last)(lambda: first_pass(limit))

    def search_again():
        value, chunk = _next_of_every_lane(x_ref, value_ref[...], chunk_ref[...], limit)
        value_ref[...], chunk_ref[...] = value, chunk
        kth = values_ref[:, k - 1 : k], indices_ref[:, k - 1 : k]
        return jnp.any(_before(value, _columns(chunk, start), *kth)).astype(jnp.int32)

    def merge(carry):
        _, searches = carry
        _merge(values_ref, indices_ref, value_ref[...], _columns(chunk_ref[...], start))
        # The first pass remembers the second entries alone: behind them, only a search can tell.
        may_enter = (searches > 0) | jnp.any(second_ref[...] >= values_ref[:, k - 1 : k])
        return lax.cond(may_enter, search_again, lambda: jnp.int32(0)), searches + 1

    # Columns of this block are behind all in the list: only a larger value enters, and in the first block any.
    enters = (j == 0) | jnp.any(value_ref[...] > values_ref[:, k - 1 : k])
    lax.while_loop(lambda carry: carry[0] > 0, merge, (enters.astype(jnp.int32), 0))

    @pl.when(j == last)
    def _():
        maximum = jnp.max(maximum_ref[...], axis=-1, keepdims=True)
        total = jnp.sum(total_ref[...] * jnp.exp(maximum_ref[...] - maximum), axis=-1, keepdims=True)
        lse_ref[...] = maximum + jnp.log(total)


def _load(x_ref, chunk, limit):
    """float32 [R, 128]; columns from `limit` (of the block) on are -inf."""
    x = x_ref[:, pl.ds(pl.multiple_of(chunk * LANES, LANES), LANES)].astype(jnp.float32)
    if limit is None:
        return x
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(lane < limit - chunk * LANES, x, -jnp.inf)


def _over_chunks(x_ref, body, carry):
    """carry = body(chunk, carry) for all chunks of the block, `UNROLL` of them to a loop step."""
    chunks = x_ref.shape[1] // LANES
    unroll = min(UNROLL, chunks)

    def step(i, carry):
        for offset in range(unroll):
            carry = body(i * unroll + offset, carry)
        return carry

    return lax.fori_loop(0, chunks // unroll, step, carry)


def _first_pass(x_ref, maximum_ref, total_ref, value_ref, chunk_ref, second_ref, limit):
    """Updates the running softmax, and writes each lane's largest entry, its chunk, and its second largest entry."""

    def largest(chunk, carry):
        value, where, second = carry
        x = _load(x_ref, chunk, limit)
        where = jnp.where(x > value, chunk, where)
        return jnp.maximum(value, x), where, jnp.maximum(second, jnp.minimum(value, x))

    shape = value_ref.shape
    lowest = jnp.full(shape, -jnp.inf)
    value, where, second = _over_chunks(x_ref, largest, (lowest, jnp.zeros(shape, jnp.int32), lowest))
    value_ref[...], chunk_ref[...], second_ref[...] = value, where, second
    maximum = jnp.minimum(jnp.maximum(maximum_ref[...], value), _HIGHEST)

    def add(chunk, total):
        return total + jnp.exp(_load(x_ref, chunk, limit) - maximum)

    total = total_ref[...] * jnp.exp(maximum_ref[...] - maximum)
    total_ref[...] = _over_chunks(x_ref, add, total)
    maximum_ref[...] = maximum


def _next_of_every_lane(x_ref, value, chunk, limit):
    """The entry of every lane that follows (value, chunk) in the order of candidates, and its chunk."""

    def body(here, carry):
        best, where = carry
        x = _load(x_ref, here, limit)
        follows = (x < value) | ((x == value) & (here > chunk))
        better = follows & ((x > best) | ((x == best) & (where == _NO_CHUNK)))
        return jnp.where(better, x, best), jnp.where(better, here, where)

    return _over_chunks(x_ref, body, (jnp.full(value.shape, -jnp.inf), jnp.full(chunk.shape, _NO_CHUNK)))


def _columns(chunk, start):
    return start + chunk * LANES + lax.broadcasted_iota(jnp.int32, chunk.shape, 1)


def _before(value, column, other_value, other_column):
    return (value > other_value) | ((value == other_value) & (column < other_column))


def _merge(values_ref, indices_ref, value, column):
    """Merges 128 unsorted candidates a row into the sorted list of the 128 best."""
    lane = lax.broadcasted_iota(jnp.int32, value.shape, 1)
    for level in range(7):  # sort with the best last (Batcher's bitonic network) ...
        for distance in range(level, -1, -1):
            backwards = (lane >> (level + 1)) & 1
            value, column = _exchange(value, column, lane, distance, 1 - backwards)
    best, index = values_ref[...], indices_ref[...]
    keep = _before(best, index, value, column)  # ... so that the better of list and candidates are the 128 best of all
    best, index = jnp.where(keep, best, value), jnp.where(keep, index, column)
    for distance in range(6, -1, -1):
        best, index = _exchange(best, index, lane, distance, 0)
    values_ref[...], indices_ref[...] = best, index


def _exchange(value, column, lane, distance: int, best_last):
    """Orders every lane and its partner, 2^distance lanes away."""
    upper = (lane >> distance) & 1
    other_value, other_column = (
        jnp.where(upper == 1, pltpu.roll(a, 1 << distance, 1), pltpu.roll(a, LANES - (1 << distance), 1))
        for a in (value, column)
    )
    keep = _before(value, column, other_value, other_column) == (upper == best_last)
    return jnp.where(keep, value, other_value), jnp.where(keep, column, other_column)
