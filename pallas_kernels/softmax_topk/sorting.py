"""Bitonic sorting of the columns of a few vector registers, for a TPU kernel.

A list of n = 8 R entries per lane lies in R registers [8, 128]: position p is sublane p // R of register p % R, so most
exchanges are between whole registers. An entry is a tuple of arrays, and an order a function (a, b) -> (first, second).
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

SUBLANES = 8


def by_key(a, b):
    """The larger number comes first."""
    return (jnp.maximum(a[0], b[0]),), (jnp.minimum(a[0], b[0]),)


def before(value, column, other_value, other_column):
    """Whether an entry comes before another: the larger value, of equal ones the lower column."""
    return (value > other_value) | ((value == other_value) & (column < other_column))


def by_value(a, b):
    """The order of `before` of entries (value, column)."""
    first = before(*a, *b)
    return _select(first, a, b), _select(first, b, a)


def sort(keys, reverse=False):
    """Registers of unique finite float32 keys -> the same, largest first, or last with `reverse`."""
    size, registers = 2, len(keys)
    entries, sign = [(key,) for key in keys], None
    while size <= registers * SUBLANES:
        # Runs of `size` entries alternate in direction; where sublanes do, those that ascend are negated.
        turned = None if size < registers or size == registers * SUBLANES else _has_bit(size // registers)
        wanted = None if turned is None else jnp.where(turned, -1.0, 1.0)
        change = wanted if sign is None else sign if wanted is None else sign * wanted
        if change is not None:
            entries = [(key * change,) for (key,) in entries]
        sign, stride = wanted, size // 2
        ascends = [bool(r & size) if size < registers else reverse and turned is None for r in range(registers)]
        while stride:
            entries = _exchange(entries, stride, by_key, ascends)
            stride //= 2
        size *= 2
    return [key for (key,) in entries]


def merge(entries, others, order, reverse=False):
    """The first n of a list in order and another of n in the reverse order; `reverse` reverses the result."""
    entries = [order(a, b)[0] for a, b in zip(entries, others, strict=True)]
    stride = len(entries) * SUBLANES // 2
    while stride:
        entries = _exchange(entries, stride, order, [reverse] * len(entries))
        stride //= 2
    return entries


def _has_bit(bit):
    return lax.broadcasted_iota(jnp.int32, (SUBLANES, 128), 0) & bit != 0


def _select(condition, a, b):
    return tuple(jnp.where(condition, x, y) for x, y in zip(a, b, strict=True))


def _exchange(entries, stride, order, ascends):
    """Puts entries `stride` positions apart in order; `ascends` says per register whether in the reverse order."""
    registers = len(entries)
    new = list(entries)
    if stride < registers:
        for low in range(registers):
            if not low & stride:
                pair = order(entries[low], entries[low + stride])
                new[low], new[low + stride] = pair[::-1] if ascends[low] else pair
        return new
    step = stride // registers
    upper = _has_bit(step)
    for register, entry in enumerate(entries):
        other = tuple(pltpu.roll(a, SUBLANES - step, 0) for a in entry)
        if 2 * step != SUBLANES:
            other = _select(upper, tuple(pltpu.roll(a, step, 0) for a in entry), other)
        first, second = order(entry, other)
        new[register] = _select(upper, first, second) if ascends[register] else _select(upper, second, first)
    return new
