"""Blocks of bfloat16 logits for the TPU kernel: an entry and its place in the block are one float32 number, its key.

A bfloat16 number is the upper half of a float32 one, so the lower half has room for a place, and keys are ordered as
their entries are by one maximum instead of comparisons and selections. Three kinds of numbers would break the order:
zeros (denormal with a place), so exponents are one higher; -inf and the lowest (whose exponents then are none), so
entries are raised to -2^126, which is below any k-th best here; and a block of the largest numbers, as one of NaN, is
left to the general kernel.

One pass over a block keeps, per lane, the sum of exponentials, the two largest keys and the third as a bound. The keys
of the lanes are sorted, and merged with the row's list of the k best. Where a bound may enter the list, another pass
finds the keys behind the two. Where the best of no row is far from 0, the pass tries to do with less: exponentials are
relative to 0 instead of a maximum, which leaves the normaliser its digits of float32, and entries are not raised.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.softmax_topk import sorting
from pallas_kernels.tiles import LANES

GROUP = 32  # rows whose accumulators a loop keeps in registers
_LONGER = 2  # times the steps of a block that is there as a whole
SEARCHED = 8  # rows that are searched together
_CHUNKS = 512  # 9 bits of a key, above the 7 of the lane
_PLACES = 0xFFFF
_BIAS = 0x00800000  # one more in the exponent
_HUGE = 2.0**125
_LEAST = -(2.0**126)  # entries count as at least this large
_LOWEST = 2.0**-126  # keys are this far from 0
_BELOW_ZERO = -_LOWEST * (1 + 2.0**-7)  # the largest key of a negative number
_NO_COLUMN = 1 << 23
_NOTHING = -1.5 * 2.0**127  # the key of no entry, below that of `_LEAST`
_NEAR = 44.0  # where the best logits are this near to 0, exponentials are summed as they are
_LARGE = 2.0**80  # more than their sums come to


def serves(rows: int, columns: int, dtype, unroll: int) -> bool:
    """Whether blocks of logits have keys."""
    chunks = columns // LANES
    whole = chunks <= _CHUNKS and chunks % unroll == 0 and unroll % 2 == 0
    return dtype == jnp.bfloat16 and rows == LANES and whole


def length(k: int) -> int:
    """Of the list of the k best: a power of two."""
    return max(sorting.SUBLANES, 1 << (k - 1).bit_length())


def attempt(x_ref, state_refs, list_refs, scratch_refs, kth, masked, start, unroll):
    """Takes a block into the running softmax and the lists, unless its numbers have no keys.

    Args:
      x_ref: [128, columns], the block.
      state_refs: (maximum, sum) [128, 128] of the softmax, per row and lane.
      list_refs: (values, columns) of the lists; NaN where nothing is yet, which holds before the first block alone.
      scratch_refs: four of [128, 128].
      kth: function of a list to its k-th, [1, 128].
      masked: calls a function with the number of columns that there are in the block, or None for all.
      start: the block's first column.
      unroll: chunks of columns to a loop step.

    Returns:
      Whether the block was taken, int32. Else lists and softmax are as before, or useless in the first block.
    """
    maximum_ref, total_ref = state_refs
    values_ref, columns_ref = list_refs
    *found_refs, sum_ref = scratch_refs

    def begin():
        reference = jnp.clip(jnp.max(x_ref[:, :LANES].astype(jnp.float32), axis=1, keepdims=True), -_HUGE, _HUGE)
        maximum_ref[...] = jnp.broadcast_to(reference, (LANES, LANES))
        values_ref[...] = jnp.full_like(values_ref, -jnp.inf)
        columns_ref[...] = jnp.full_like(columns_ref, _NO_COLUMN)
        return jnp.int32(1), jnp.all(jnp.abs(reference) < _NEAR).astype(jnp.int32)

    def go_on():
        best = values_ref[:1]
        usable = jnp.all((kth(values_ref[...]) > -_HUGE) & (best < _HUGE))
        return usable.astype(jnp.int32), jnp.all(jnp.abs(best) < _NEAR).astype(jnp.int32)

    usable, near = (flag > 0 for flag in lax.cond(start == 0, begin, go_on))

    def scan_all(near, limit):
        for group in _groups(GROUP):
            maximum, total = maximum_ref[group], total_ref[group]
            if near:
                maximum, total = None, total * jnp.exp(maximum)
            *keys, sum_ref[group] = _scan(x_ref, group, unroll, limit, total, maximum, raised=not near)
            for ref, key in zip(found_refs, keys, strict=True):
                ref[group] = key

    def scan_near():
        masked(functools.partial(scan_all, True))
        # What should have been raised is NaN or denormal as a key.
        normal = functools.reduce(jnp.minimum, [jnp.abs(ref[...]) for ref in found_refs]) >= _LOWEST
        return jnp.all(normal & (sum_ref[...] < _LARGE)).astype(jnp.int32)

    def scan_far():
        masked(functools.partial(scan_all, False))
        return jnp.all(sum_ref[...] < jnp.inf).astype(jnp.int32)

    def scan_behind(waits, limit):
        for group in _groups(SEARCHED):
            searched = jnp.any(waits & _of_group(group))

            def search(group=group):
                *keys, _ = _scan(x_ref, group, unroll, limit, behind=found_refs[1][group])
                for ref, key in zip(found_refs, keys, strict=True):
                    ref[group] = key

            def skip(group=group):
                for ref in found_refs:
                    ref[group] = jnp.full_like(ref[group], _NOTHING)

            lax.cond(searched, search, skip)

    def offer(_):
        _merge(found_refs, values_ref, columns_ref, start)
        waits = _waiting(found_refs[2], kth(values_ref[...]), kth(columns_ref[...]), start)
        waiting = jnp.any(waits)
        pl.when(waiting)(lambda: masked(lambda limit: scan_behind(waits, limit)))
        return waiting.astype(jnp.int32)

    def take():
        plain = lax.cond(near, scan_near, lambda: jnp.int32(0)) > 0

        def commit():
            pl.when(plain)(lambda: _set(state_refs, jnp.zeros_like(sum_ref), sum_ref[...]))

            @pl.when(~plain)
            def _():
                largest = jnp.maximum(maximum_ref[...], _value(found_refs[0][...]))
                _set(state_refs, largest, sum_ref[...] * jnp.exp(maximum_ref[...] - largest))

            lax.while_loop(lambda waiting: waiting > 0, offer, jnp.int32(1))
            return jnp.all(kth(values_ref[...]) > -_HUGE).astype(jnp.int32)

        finite = lax.cond(plain, lambda: jnp.int32(1), scan_far) > 0
        return lax.cond(finite, commit, lambda: jnp.int32(0))

    return lax.cond(usable, take, lambda: jnp.int32(0))


def _set(refs, *arrays):
    for ref, array in zip(refs, arrays, strict=True):
        ref[...] = array


def _groups(size):
    return [slice(first, first + size) for first in range(0, LANES, size)]


def _of_group(group):
    """Which lanes hold rows of the group, [1, 128]."""
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return (lane >= group.start) & (lane < group.stop)


def _bits(number):
    return lax.bitcast_convert_type(number, jnp.int32)


def _number(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)


def _value(key):
    """The entry of a key, float32."""
    return _number((_bits(key) & ~_PLACES) - _BIAS)


def _scan(x_ref, group, unroll, limit, total=None, maximum=None, raised=True, behind=None):
    """Per lane the two largest keys (smaller than `behind`), the third, and `total` with the exponentials."""
    shape = group.stop - group.start, LANES

    def load(step_ref, i, chunk):
        x = step_ref[:, chunk * LANES : (chunk + 1) * LANES].astype(jnp.float32)
        if limit is None:
            return x
        there = limit - i * (unroll * LANES) - chunk * LANES
        return jnp.where(lax.broadcasted_iota(jnp.int32, shape, 1) < there, x, _LEAST)

    def key(x, i, chunk):
        place = (_BIAS + (_CHUNKS - 1) * LANES) - i * (unroll * LANES) - chunk * LANES
        made = _number(_bits(jnp.maximum(x, _LEAST) if raised else x) + place)
        return made if behind is None else jnp.where(made < behind, made, _NOTHING)

    chunks = x_ref.shape[1] // LANES
    if limit is not None:
        steps = lax.div(limit + (unroll * LANES - 1), unroll * LANES)
    else:  # the longer a step, the less its start and end count
        unroll = max(n * unroll for n in (1, _LONGER) if chunks % (n * unroll) == 0)
        steps = chunks // unroll

    def step(i, carry):
        largest, second, third, total = carry
        step_ref = x_ref.at[group, pl.ds(pl.multiple_of(i * (unroll * LANES), unroll * LANES), unroll * LANES)]
        for chunk in range(0, unroll, 2):
            pair = [load(step_ref, i, chunk + n) for n in range(2)]
            if total is not None:
                for x in pair:
                    total += jnp.exp(x if maximum is None else x - maximum)
            a, b = (key(x, i, chunk + n) for n, x in enumerate(pair))
            high, low = jnp.maximum(a, b), jnp.minimum(a, b)
            largest, high = jnp.maximum(largest, high), jnp.minimum(largest, high)
            second = jnp.maximum(second, low)
            second, low = jnp.maximum(second, high), jnp.minimum(second, high)
            third = jnp.maximum(third, low)
        return largest, second, third, total

    nothing = jnp.full(shape, _NOTHING)
    return lax.fori_loop(0, steps, step, (nothing, nothing, nothing, total))


def _merge(found_refs, values_ref, columns_ref, start):
    """Brings the two keys of every lane into the lists."""
    keys = jnp.concatenate([_ordered(ref[...]).T for ref in found_refs[:2]])
    best = list(zip(_registers(values_ref[...]), _registers(columns_ref[...]), strict=True))
    new = [(_value(key), start + _place(key)) for key in sorting.largest(_registers(keys), values_ref.shape[0])]
    values, columns = zip(*sorting.merge(best, new), strict=True)
    values_ref[...], columns_ref[...] = jnp.concatenate(values), jnp.concatenate(columns)


def _registers(array):
    return [array[first : first + sorting.SUBLANES] for first in range(0, array.shape[0], sorting.SUBLANES)]


def _ordered(key):
    """Keys of lanes, [rows, lanes] -> keys ordered as (value descending, column ascending) in all of the block."""
    bits = _bits(key) | (LANES - 1 - lax.broadcasted_iota(jnp.int32, key.shape, 1))
    # Of negative numbers the larger place is the lower key; -0 is none.
    return _number(jnp.where(key <= _BELOW_ZERO, bits ^ _PLACES, bits & 0x7FFFFFFF))


def _place(key):
    """The column in the block of an ordered key."""
    bits = _bits(key)
    place = bits & _PLACES
    return jnp.where(bits < 0, place, _PLACES - place)


def _waiting(third_ref, value, column, start):
    """Rows [1, 128] of which a lane's third may enter before the k-th, (value, column)."""
    bits = _bits(value)
    earlier = column < start  # what is as large stands behind
    zero = value == 0
    negative = (zero & ~earlier) | (~zero & (bits < 0))
    bits = jnp.where(zero, jnp.where(earlier, 0, -(2**31)), bits) + _BIAS
    # The smallest key that may enter: of a larger value, or of this one.
    larger = jnp.where(negative, bits - 1, bits + _PLACES + 1)
    same = jnp.where(negative, bits + _PLACES, bits)
    may_enter = jnp.max(third_ref[...].T, axis=0, keepdims=True) >= _number(jnp.where(earlier, larger, same))
    return may_enter & (value > -_HUGE)  # else the block is not taken
