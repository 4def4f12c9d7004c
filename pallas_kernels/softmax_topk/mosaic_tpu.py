"""Softmax and top-k as a Pallas TPU kernel: one read of the logits.

The grid walks rows (parallel) and blocks of columns (in order). A block is seen as chunks of 128 columns, one per lane:

1. One pass keeps, per lane, the running maximum and sum of the softmax, and of the block's entries the two largest,
   their chunks, and the value of the third. Lanes meet only when the row is finished.
2. In rounds, the best entry that the lanes still hold goes into the sorted list of the row's k best, and its lane moves
   on to its next entry, until in none of 128 rows an entry would enter the list. If a lane that gave its two entries
   away holds a third that may enter, a search of the block finds the next of all lanes, and rounds follow again.

So any input is exact; how many rounds and searches a block takes depends on its entries: behind the first blocks few
enter. Entries are ordered by (value descending, column ascending), so the order of lanes and chunks never shows. Rounds
have rows on lanes and the list on sublanes and vector registers: position p of R registers is sublane p // R of
register p % R, so that making room moves whole registers.

Blocks of bfloat16 logits mostly go another, cheaper way (`keys`); the general one takes those that it leaves.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, interpret
from pallas_kernels.softmax_topk import keys
from pallas_kernels.tiles import LANES

SUBLANES = 8
UNROLL = 16  # chunks per loop step
_GROUP = 32  # rows whose accumulators a loop keeps in registers
_SEARCHED = 16  # the same for a search, which takes more of them
_ROUNDS = 4  # rounds to a loop step: they overlap, and none enters in those after the last
_MAX_BLOCK_COLUMNS = 16384
_BLOCK_ELEMENTS = LANES * 8192  # 4 MiB of float32, twice for the pipeline
_HIGHEST = float(jnp.finfo(jnp.float32).max)  # running maxima are kept finite: inf - inf is NaN
_NO_CHUNK = 1 << 16
_NO_COLUMN = _NO_CHUNK * LANES  # columns from here on mean that a lane holds no entry
_UNKNOWN = 4.0 * _NO_COLUMN  # what a lane holds only a search can tell


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
    if logits.shape[1] >= _NO_COLUMN:
        raise dispatch.UnsupportedError(
            f"softmax_topk: mosaic_tpu does not serve {_NO_COLUMN} columns or more: logits {logits.shape}"
        )


def forward(logits, *, k: int):
    """Returns (total [N], values [N, k], indices [N, k]): total = sum exp(x - max), 0 for a row of nothing but -inf."""
    rows, columns = logits.shape
    block_rows, block_columns = block_sizes(rows, columns, logits.dtype.itemsize)
    row_blocks = pl.cdiv(rows, block_rows)
    keyed = keys.serves(block_rows, block_columns, logits.dtype, UNROLL)
    kept = keys.length(k) if keyed else pl.cdiv(k, SUBLANES) * SUBLANES
    accumulator = pltpu.VMEM((block_rows, LANES), jnp.float32)
    tile = (LANES, LANES)
    found = [pltpu.VMEM(tile, dtype) for dtype in (jnp.float32, jnp.int32, jnp.float32, jnp.int32, jnp.float32)]
    queues = [pltpu.VMEM(tile, jnp.float32)] * 5
    keyed_scratch = [pltpu.VMEM(tile, jnp.float32)] * 4 * keyed
    best = pl.BlockSpec((kept, LANES), lambda i, j: (0, i))
    total, values, indices = pl.pallas_call(
        functools.partial(_kernel, k=k, columns=columns),
        grid=(row_blocks, pl.cdiv(columns, block_columns)),
        in_specs=[pl.BlockSpec((block_rows, block_columns), lambda i, j: (i, j))],
        out_specs=[pl.BlockSpec((block_rows, 1), lambda i, j: (i, 0)), best, best],
        out_shape=[
            jax.ShapeDtypeStruct((row_blocks * block_rows, 1), jnp.float32),
            jax.ShapeDtypeStruct((kept, row_blocks * LANES), jnp.float32),
            jax.ShapeDtypeStruct((kept, row_blocks * LANES), jnp.int32),
        ],
        scratch_shapes=[accumulator, accumulator, *found, *queues, *keyed_scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret.parameters(),
        name="softmax_topk",
    )(logits)
    total = total[:rows]
    spoiled = jnp.isnan(total)
    values, indices = (_rows_first(a, rows)[:, :k] for a in (values, indices))
    return total[:, 0], jnp.where(spoiled, jnp.nan, values), jnp.where(spoiled, -1, indices)


def _rows_first(best, rows: int):
    """[kept, N] in the order of the kernel -> [N, kept] best first."""
    kept = best.shape[0]
    return best.reshape(kept // SUBLANES, SUBLANES, -1).transpose(2, 1, 0).reshape(-1, kept)[:rows]


def _kernel(x_ref, out_ref, values_ref, indices_ref, maximum_ref, total_ref, *scratch_refs, k, columns):
    found_refs, queue_refs, key_refs = scratch_refs[:5], scratch_refs[5:10], scratch_refs[10:]
    j, last = pl.program_id(1), pl.num_programs(1) - 1
    start = j * x_ref.shape[1]
    ragged = columns % x_ref.shape[1] != 0  # the last block hangs over the edge, where it holds anything
    state_refs, list_refs = (maximum_ref, total_ref), (values_ref, indices_ref)

    def masked_at_the_edge(function):
        if not ragged:
            function(None)
            return
        pl.when(j < last)(lambda: function(None))
        pl.when(j == last)(lambda: function(columns - start))

    def begin():
        maximum_ref[...] = jnp.full_like(maximum_ref, -_HIGHEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        values_ref[...] = jnp.full_like(values_ref, jnp.nan)  # any entry enters where nothing is yet
        indices_ref[...] = jnp.zeros_like(indices_ref)
        for ref in found_refs:  # rows that a small block has not hold no entry
            ref[...] = jnp.full_like(ref, -jnp.inf if ref.dtype == jnp.float32 else _NO_CHUNK)

    def take():
        pl.when(j == 0)(begin)
        _take(x_ref, state_refs, list_refs, found_refs, queue_refs, k, start, masked_at_the_edge)

    if key_refs:
        pl.when(j == 0)(begin)  # again where the attempt at the first block fails
        kth = functools.partial(_kth, k=k)
        taken = keys.attempt(x_ref, state_refs, list_refs, key_refs, kth, masked_at_the_edge, start, UNROLL)
        pl.when(taken == 0)(take)
    else:
        take()

    @pl.when(j == last)
    def _():
        if key_refs:  # sums may be relative to 0
            maximum = jnp.clip(jnp.broadcast_to(values_ref[:1], maximum_ref.shape).T, -_HIGHEST, _HIGHEST)
        else:
            maximum = jnp.max(maximum_ref[...], axis=-1, keepdims=True)
        out_ref[...] = jnp.sum(total_ref[...] * jnp.exp(maximum_ref[...] - maximum), axis=-1, keepdims=True)


def _take(x_ref, state_refs, list_refs, found_refs, queue_refs, k, start, masked_at_the_edge):
    """Takes a block into the running softmax and the lists."""
    masked_at_the_edge(functools.partial(_largest, x_ref, found_refs))
    masked_at_the_edge(functools.partial(_add_exponentials, x_ref, found_refs[0], *state_refs))

    # The first pass does not tell where -inf stands. Behind the first block it cannot enter; there, a search tells.
    rows = slice(0, x_ref.shape[0])
    search_all = (start == 0) & jnp.any(found_refs[4][rows] == -jnp.inf)

    @pl.when(search_all)
    def _():
        found_refs[0][rows] = jnp.full((x_ref.shape[0], LANES), jnp.inf)
        found_refs[1][rows] = jnp.full((x_ref.shape[0], LANES), -1)

    def rounds_until_a_search(carry):
        _, searched, fresh = carry
        masked_at_the_edge(functools.partial(_search, x_ref, found_refs, searched > 0))
        _fill(queue_refs, found_refs, start, fresh > 0)
        _rounds(queue_refs, list_refs[0], list_refs[1], k)
        kth = tuple(_kth(ref[...], k) for ref in list_refs)
        # What is as large as the k-th stands behind it if that is from an earlier block.
        too_small = (kth[0] > queue_refs[4][...]) | ((kth[0] == queue_refs[4][...]) & (kth[1] < start))
        waits = jnp.max(jnp.where(too_small, 0.0, queue_refs[1][...]), axis=0, keepdims=True) == _UNKNOWN
        waiting = jnp.any(waits)
        pl.when(waiting)(lambda: _aim(found_refs, queue_refs, start))
        searched = _whole_groups(waits).astype(jnp.int32)
        return waiting.astype(jnp.int32), searched, searched

    every_row = jnp.ones((1, LANES), jnp.int32)
    first = jnp.int32(1), every_row * search_all.astype(jnp.int32), every_row
    lax.while_loop(lambda carry: carry[0] > 0, rounds_until_a_search, first)


def _row_groups(rows: int, size: int = _GROUP):
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def _of_group(group):
    """Which lanes hold rows of the group, [1, 128]."""
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return (lane >= group.start) & (lane < group.stop)


def _whole_groups(waiting):
    """Rows [1, 128] of all groups of which a row waits."""
    groups = [_of_group(group) for group in _row_groups(LANES, _SEARCHED)]
    return functools.reduce(jnp.logical_or, [group & jnp.any(waiting & group) for group in groups])


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


def _largest(x_ref, found_refs, limit):
    """Writes (value, chunk, second, second chunk, third) of every lane; an entry of -inf may have no chunk."""
    for group in _row_groups(x_ref.shape[0]):

        def body(chunk, carry, group=group):
            value, where, second, second_where, third = carry
            x = _load(x_ref, group, chunk, limit)
            first = x > value
            second_where = jnp.where(first, where, jnp.where(x > second, chunk, second_where))
            where = jnp.where(first, chunk, where)
            value, lower = jnp.maximum(value, x), jnp.minimum(value, x)
            second, lower = jnp.maximum(second, lower), jnp.minimum(second, lower)
            return value, where, second, second_where, jnp.maximum(third, lower)

        shape = (group.stop - group.start, LANES)
        lowest, nowhere = jnp.full(shape, -jnp.inf), jnp.full(shape, _NO_CHUNK)
        carry = _over_chunks(x_ref, body, (lowest, nowhere, lowest, nowhere, lowest))
        for ref, new in zip(found_refs, carry, strict=True):
            ref[group] = new


def _search(x_ref, found_refs, waiting, limit):
    """As `_largest`, of the entries behind (value, chunk) in the order of entries; in groups of rows that wait."""
    for group in _row_groups(x_ref.shape[0], _SEARCHED):

        def body(chunk, carry, group=group):
            (after, after_chunk), (value, where, second, second_where, third) = carry
            x = _load(x_ref, group, chunk, limit)
            passed = (x > after) | ((x == after) & (chunk <= after_chunk))
            # The NaN that all start from loses to anything, even to -inf.
            below, below_second, below_third = (passed | (x <= v) for v in (value, second, third))
            third = jnp.where(below_second, jnp.where(below_third, third, x), second)
            second = jnp.where(below, jnp.where(below_second, second, x), value)
            second_where = jnp.where(below, jnp.where(below_second, second_where, chunk), where)
            value, where = jnp.where(below, value, x), jnp.where(below, where, chunk)
            return carry[0], (value, where, second, second_where, third)

        def run(group=group, body=body):
            none = jnp.full((group.stop - group.start, LANES), jnp.nan)
            nowhere = jnp.full(none.shape, _NO_CHUNK)
            after = found_refs[0][group], found_refs[1][group]
            _, found = _over_chunks(x_ref, body, (after, (none, nowhere, none, nowhere, none)))
            for ref, new in zip(found_refs, found, strict=True):
                ref[group] = jnp.where(new != new, -jnp.inf, new) if new.dtype == jnp.float32 else new

        pl.when(jnp.any(waiting & _of_group(group)))(run)


def _add_exponentials(x_ref, value_ref, maximum_ref, total_ref, limit):
    """Updates the running softmax; `value_ref` has the block's maxima."""
    for group in _row_groups(x_ref.shape[0]):
        maximum = jnp.minimum(jnp.maximum(maximum_ref[group], value_ref[group]), _HIGHEST)

        def add(chunk, total, group=group, maximum=maximum):
            return total + jnp.exp(_load(x_ref, group, chunk, limit) - maximum)

        total = total_ref[group] * jnp.exp(maximum_ref[group] - maximum)
        total_ref[group] = _over_chunks(x_ref, add, total)
        maximum_ref[group] = maximum


def _fill(queue_refs, found_refs, start, rows):
    """Brings what was found into the queues of some rows: (value, column, next value, next column, bound) per lane."""
    for queue_ref, found_ref in zip(queue_refs, found_refs, strict=True):
        new = found_ref[...].T
        if new.dtype == jnp.int32:
            new = (start + new * LANES + lax.broadcasted_iota(jnp.int32, new.shape, 0)).astype(jnp.float32)
        queue_ref[...] = jnp.where(rows, new, queue_ref[...])


def _aim(found_refs, queue_refs, start):
    """Sets the (value, chunk) behind which a search begins: before what a lane holds, or behind the last it held."""
    value, column, next_value, next_column, _ = (ref[...] for ref in queue_refs)
    unknown = column == _UNKNOWN
    chunk = (jnp.where(unknown, next_column, column).astype(jnp.int32) - start) >> 7  # the lane falls out
    chunk = jnp.where(unknown, chunk, chunk - 1)
    found_refs[0][...], found_refs[1][...] = jnp.where(unknown, next_value, value).T, chunk.T


def _rounds(queue_refs, values_ref, indices_ref, k: int):
    """Takes the lanes' entries into the list, best first, until none that they hold enters."""
    value_ref, column_ref, next_ref, next_column_ref, _ = queue_refs

    def take(carry):
        _, values, indices = carry
        held, columns, next_columns = value_ref[...], column_ref[...], next_column_ref[...]
        best = jnp.max(held, axis=0, keepdims=True)
        column = jnp.min(jnp.where(held == best, columns, _UNKNOWN), axis=0, keepdims=True)
        enters = (column < _NO_COLUMN) & ~_before(_kth(values, k), _kth(indices, k), best, column)
        taken = columns == jnp.where(enters, column, -1.0)
        second = columns == next_columns
        value_ref[...] = jnp.where(taken, jnp.where(second, -jnp.inf, next_ref[...]), held)
        column_ref[...] = jnp.where(taken, jnp.where(second, _UNKNOWN, next_columns), columns)
        return jnp.any(enters).astype(jnp.int32), *_insert(values, indices, best, column, enters)

    carry = jnp.int32(1), values_ref[...], indices_ref[...].astype(jnp.float32)
    _, values_ref[...], indices = lax.while_loop(
        lambda carry: carry[0] > 0, lambda carry: functools.reduce(lambda c, _: take(c), range(_ROUNDS), carry), carry
    )
    indices_ref[...] = indices.astype(jnp.int32)


def _kth(best, k: int):
    """Of the list, the k-th, [1, 128]."""
    registers = best.shape[0] // SUBLANES
    row = (k - 1) % registers * SUBLANES + (k - 1) // registers
    return best[row : row + 1]


def _before(value, column, other_value, other_column):
    return (value > other_value) | ((value == other_value) & (column < other_column))


def _insert(values, columns, value, column, enters):
    """The list with (value, column) [1, 128] in its place, in the rows that `enters` names."""
    registers = [slice(first, first + SUBLANES) for first in range(0, values.shape[0], SUBLANES)]
    values, columns = ([a[register] for register in registers] for a in (values, columns))
    stays = [_before(v, c, value, column) | ~enters for v, c in zip(values, columns, strict=True)]
    # Position p - 1 is on the register before, and for the first register on the last, one sublane up.
    shifted = [[pltpu.roll(a[-1], 1, 0), *a[:-1]] for a in (values, columns)]
    first = lax.broadcasted_iota(jnp.int32, values[0].shape, 0) == 0
    here = [first | _before(shifted[0][0], shifted[1][0], value, column), *stays[:-1]]
    return tuple(
        jnp.concatenate(
            [jnp.where(s, a, jnp.where(h, new, b)) for s, h, a, b in zip(stays, here, old, moved, strict=True)]
        )
        for old, moved, new in zip((values, columns), shifted, (value, column), strict=True)
    )
