"""Softmax and top-k as a Pallas TPU kernel: one read of the logits.

The grid walks rows (parallel) and blocks of columns (in order). A block is seen as chunks of 128 columns, one per lane:

1. One pass keeps, per lane, the running maximum and sum of the softmax, and of the block's entries the two largest,
   their chunks, and the value of the third. Lanes meet only when the row is finished.
2. If an entry beats the k-th best so far, the largest entries of the 128 lanes are sorted and merged into the sorted
   list of the 128 best. Only if a lane's next entry may beat the new k-th best do the next entries of all lanes follow,
   from the third on by a search of the block, until none does: exact for any input, one or two merges for most blocks.

Candidates are ordered by (value descending, column ascending), so the order of lanes and chunks never shows. Sorting
has rows on lanes (hence 128 rows a block) and candidates on sublanes and vector registers: position p of the order is
sublane p // 16 of register p % 16, so most stages of the sorting network exchange whole registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, interpret

LANES = 128
SUBLANES = 8
REGISTERS = LANES // SUBLANES
UNROLL = 8  # chunks per loop step
_GROUP = 32  # rows whose accumulators a loop keeps in registers
_MAX_BLOCK_COLUMNS = 16384
_BLOCK_ELEMENTS = LANES * 8192  # 4 MiB of float32, twice for the pipeline
_HIGHEST = float(jnp.finfo(jnp.float32).max)  # running maxima are kept finite: inf - inf is NaN
_NO_CHUNK = 1 << 16
_NO_COLUMN = jnp.iinfo(jnp.int32).max


def block_sizes(rows: int, columns: int, itemsize: int) -> tuple[int, int]:
    """(rows, columns) of a block of logits: whole tiles, whole loop steps, and at most 4 MiB of float32."""
    tile = 32 // itemsize
    block_rows = min(LANES, pl.cdiv(rows, tile) * tile)
    if columns <= UNROLL * LANES:
        return block_rows, pl.cdiv(columns, LANES) * LANES
    step = UNROLL * LANES
    limit = min(_MAX_BLOCK_COLUMNS, _BLOCK_ELEMENTS // block_rows // step * step)
    blocks = pl.cdiv(columns, limit)
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
    """Returns (total [N], values [N, k], indices [N, k]): total = sum exp(x - max), 0 for a row of nothing but -inf."""
    rows, columns = logits.shape
    block_rows, block_columns = block_sizes(rows, columns, logits.dtype.itemsize)
    row_blocks = pl.cdiv(rows, block_rows)
    tile = (LANES, LANES)
    accumulator = pltpu.VMEM((block_rows, LANES), jnp.float32)
    lanes = [pltpu.VMEM(tile, dtype) for dtype in (jnp.float32, jnp.int32, jnp.float32, jnp.int32, jnp.float32)]
    best = pl.BlockSpec(tile, lambda i, j: (0, i))
    total, values, indices = pl.pallas_call(
        functools.partial(_kernel, k=k, columns=columns),
        grid=(row_blocks, pl.cdiv(columns, block_columns)),
        in_specs=[pl.BlockSpec((block_rows, block_columns), lambda i, j: (i, j))],
        out_specs=[pl.BlockSpec((block_rows, 1), lambda i, j: (i, 0)), best, best],
        out_shape=[
            jax.ShapeDtypeStruct((row_blocks * block_rows, 1), jnp.float32),
            jax.ShapeDtypeStruct((LANES, row_blocks * LANES), jnp.float32),
            jax.ShapeDtypeStruct((LANES, row_blocks * LANES), jnp.int32),
        ],
        scratch_shapes=[accumulator, accumulator, *lanes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret.parameters(),
        name="softmax_topk",
    )(logits)
    total = total[:rows]
    spoiled = jnp.isnan(total)
    values, indices = (_rows_first(a, rows)[:, :k] for a in (values, indices))
    return total[:, 0], jnp.where(spoiled, jnp.nan, values), jnp.where(spoiled, -1, indices)


def _rows_first(best, rows: int):
    """[128, N] in the order of the kernel -> [N, 128] best first."""
    best = best.reshape(REGISTERS, SUBLANES, -1).transpose(2, 1, 0)
    return best.reshape(-1, LANES)[:rows]


def _kernel(x_ref, out_ref, values_ref, indices_ref, maximum_ref, total_ref, *lanes_refs, k, columns):
    value_ref, chunk_ref, second_ref, second_chunk_ref, third_ref = lanes_refs
    j, last = pl.program_id(1), pl.num_programs(1) - 1
    start = j * x_ref.shape[1]
    limit = columns - start
    kth_row = (k - 1) % REGISTERS * SUBLANES + (k - 1) // REGISTERS

    def kth_value():
        return values_ref[kth_row : kth_row + 1]

    @pl.when(j == 0)
    def _():
        maximum_ref[...] = jnp.full_like(maximum_ref, -_HIGHEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        values_ref[...] = jnp.full_like(values_ref, -jnp.inf)
        indices_ref[...] = jnp.full_like(indices_ref, _NO_COLUMN)
        for ref in (value_ref, second_ref, third_ref):  # rows that a small block has not: NaN never enters
            ref[...] = jnp.full_like(ref, jnp.nan)
        for ref in (chunk_ref, second_chunk_ref):
            ref[...] = jnp.full_like(ref, _NO_CHUNK)

    ragged = columns % x_ref.shape[1] != 0  # the last block hangs over the edge, where it holds anything

    def masked_at_the_edge(function):
        if not ragged:
            function(None)
            return
        pl.when(j < last)(lambda: function(None))
        pl.when(j == last)(lambda: function(limit))

    masked_at_the_edge(functools.partial(_first_pass, x_ref, maximum_ref, total_ref, lanes_refs))

    def take_second():
        value_ref[...], chunk_ref[...] = second_ref[...], second_chunk_ref[...]

    def search():
        masked_at_the_edge(functools.partial(_search, x_ref, value_ref, chunk_ref))

    def next_candidates(merges):
        # A second entry of -inf has no known column; only in the first block can such an entry matter.
        pl.when((merges == 1) & (j > 0))(take_second)
        pl.when((merges > 1) | (j == 0))(search)
        kth = kth_value(), indices_ref[kth_row : kth_row + 1]
        return jnp.any(_before(*_candidates(value_ref, chunk_ref, start), *kth)).astype(jnp.int32)

    def merge(carry):
        merges = carry[1] + 1
        _merge(values_ref, indices_ref, *_candidates(value_ref, chunk_ref, start))
        # The first pass remembers three values a lane: behind them, only a search can tell.
        bound = jnp.where(merges == 1, second_ref[...], jnp.where(merges == 2, third_ref[...], jnp.inf))
        may_enter = jnp.any(kth_value() <= bound.T)
        return lax.cond(may_enter, lambda: next_candidates(merges), lambda: jnp.int32(0)), merges

    # Columns of this block are behind all in the list: only a larger value enters, and in the first block any.
    enters = (j == 0) | jnp.any(kth_value() < value_ref[...].T)
    lax.while_loop(lambda carry: carry[0] > 0, merge, (enters.astype(jnp.int32), 0))

    @pl.when(j == last)
    def _():
        maximum = jnp.max(maximum_ref[...], axis=-1, keepdims=True)
        out_ref[...] = jnp.sum(total_ref[...] * jnp.exp(maximum_ref[...] - maximum), axis=-1, keepdims=True)


def _row_groups(rows: int):
    return [slice(first, min(first + _GROUP, rows)) for first in range(0, rows, _GROUP)]


def _load(x_ref, group, chunk, limit):
    """float32 [rows of the group, 128]; columns from `limit` (of the block) on are -inf."""
    x = x_ref[group, pl.ds(pl.multiple_of(chunk * LANES, LANES), LANES)].astype(jnp.float32)
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


def _first_pass(x_ref, maximum_ref, total_ref, lanes_refs, limit):
    """Updates the running softmax, and writes (value, chunk, second, second chunk, third) of every lane."""
    for group in _row_groups(x_ref.shape[0]):

        def largest(chunk, carry, group=group):
            value, where, second, second_where, third = carry
            x = _load(x_ref, group, chunk, limit)
            first = x > value
            second_where = jnp.where(first, where, jnp.where(x > second, chunk, second_where))
            where = jnp.where(first, chunk, where)
            value, lower = jnp.maximum(value, x), jnp.minimum(value, x)
            second, lower = jnp.maximum(second, lower), jnp.minimum(second, lower)
            return value, where, second, second_where, jnp.maximum(third, lower)

        shape = (group.stop - group.start, LANES)
        lowest = jnp.full(shape, -jnp.inf)
        chunks = jnp.zeros(shape, jnp.int32), jnp.full(shape, _NO_CHUNK)
        carry = _over_chunks(x_ref, largest, (lowest, chunks[0], lowest, chunks[1], lowest))
        for ref, new in zip(lanes_refs, carry, strict=True):
            ref[group] = new
        maximum = jnp.minimum(jnp.maximum(maximum_ref[group], carry[0]), _HIGHEST)

        def add(chunk, total, group=group, maximum=maximum):
            return total + jnp.exp(_load(x_ref, group, chunk, limit) - maximum)

        total = total_ref[group] * jnp.exp(maximum_ref[group] - maximum)
        total_ref[group] = _over_chunks(x_ref, add, total)
        maximum_ref[group] = maximum


def _search(x_ref, value_ref, chunk_ref, limit):
    """Replaces every lane's (value, chunk) by the entry that follows it in the order of candidates."""
    for group in _row_groups(x_ref.shape[0]):
        value, chunk = value_ref[group], chunk_ref[group]

        def body(here, carry, group=group, value=value, chunk=chunk):
            best, where = carry
            x = _load(x_ref, group, here, limit)
            # The NaN that best starts from loses to anything, even to -inf.
            passed = (x > value) | ((x == value) & (here <= chunk)) | (x <= best)
            return jnp.where(passed, best, x), jnp.where(passed, where, here)

        start = jnp.full(value.shape, jnp.nan), jnp.full(value.shape, _NO_CHUNK)
        best, where = _over_chunks(x_ref, body, start)
        value_ref[group] = jnp.where(where == _NO_CHUNK, -jnp.inf, best)
        chunk_ref[group] = where


def _candidates(value_ref, chunk_ref, start):
    """(value, column) of every lane, [128, rows]."""
    chunk = chunk_ref[...].T
    return value_ref[...].T, start + chunk * LANES + lax.broadcasted_iota(jnp.int32, chunk.shape, 0)


def _before(value, column, other_value, other_column):
    return (value > other_value) | ((value == other_value) & (column < other_column))


def _merge(values_ref, indices_ref, value, column):
    """Merges 128 unsorted candidates a row into the sorted list of the 128 best."""
    shape = (REGISTERS, SUBLANES, LANES)
    candidates = value.reshape(shape), column.reshape(shape)
    position = lax.broadcasted_iota(jnp.int32, shape, 0) + REGISTERS * lax.broadcasted_iota(jnp.int32, shape, 1)
    for level in range(7):  # sort with the best last (Batcher's bitonic network) ...
        best_last = (position >> (level + 1)) & 1 == 0
        for bit in range(level, -1, -1):
            candidates = _exchange(*candidates, position, bit, best_last)
    best = values_ref[...].reshape(shape), indices_ref[...].reshape(shape)
    keep = _before(*best, *candidates)  # ... so that the better of list and candidates are the 128 best of all
    best = tuple(jnp.where(keep, b, c) for b, c in zip(best, candidates, strict=True))
    for bit in range(6, -1, -1):
        best = _exchange(*best, position, bit, None)
    values_ref[...], indices_ref[...] = (b.reshape(LANES, LANES) for b in best)


def _exchange(value, column, position, bit: int, best_last):
    """Orders every position and its partner, which differs in one bit: the better first where not `best_last`."""
    if 1 << bit < REGISTERS:
        split = (REGISTERS >> (bit + 1), 2, 1 << bit, SUBLANES, LANES)
        value, column = value.reshape(split), column.reshape(split)
        low, high = (value[:, 0], column[:, 0]), (value[:, 1], column[:, 1])
        in_order = _before(*low, *high)
        if best_last is not None:
            in_order = in_order != best_last.reshape(split)[:, 0]
        pairs = zip(low, high, strict=True)
        return tuple(
            jnp.stack([jnp.where(in_order, a, b), jnp.where(in_order, b, a)], axis=1).reshape(position.shape)
            for a, b in pairs
        )
    distance = (1 << bit) // REGISTERS
    upper = (position >> bit) & 1 == 1
    other = tuple(
        jnp.where(upper, pltpu.roll(a, distance, 1), pltpu.roll(a, SUBLANES - distance, 1)) for a in (value, column)
    )
    keep = _before(value, column, *other) != (upper if best_last is None else upper != best_last)
    return jnp.where(keep, value, other[0]), jnp.where(keep, column, other[1])
