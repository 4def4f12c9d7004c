"""Bitonic sorting of the columns of a few vector registers, for a TPU kernel.

A list of n = 8 R entries per lane lies in R registers [8, 128]: position p is sublane p // R of register p % R. While
keys are sorted, any bit of their number may be one of the register's or one of the sublane's: entries are exchanged
between registers alone, and a bit that is on sublanes first changes places with one of the registers.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

SUBLANES = 8


def largest(keys, n: int):
    """The n largest of unique float32 keys per lane, in ascending order.

    Args:
      keys: registers [8, 128], a power of two of them and more than n / 8.
      n: a power of two from 8.

    Returns:
      The n / 8 registers of a list.
    """
    sort = _Sort(keys)
    kept = n.bit_length() - 1
    for bit in range(sort.bits):
        # Runs of 2^bit keys, or the n largest of them, are in order: two become one, the second read backwards.
        last = bit == sort.bits - 1
        below = range(min(bit, kept))
        sort.bring(bit)
        sort.exchange(bit, backwards=below)
        if bit >= kept:
            sort.drop(bit)
        for lower in reversed(below):
            sort.bring(lower, kept if last else None)
            sort.exchange(lower, ascending=last)
    order = [
        sum(((r >> b) & 1) << place for b, place in enumerate(map(sort.on_registers.index, range(kept - 3))))
        for r in range(len(sort.keys))
    ]
    return [sort.keys[r] for r in order]


class _Sort:
    """Keys while they are sorted: which bits of their number are on registers, and which on sublanes, lowest first."""

    def __init__(self, keys):
        self.keys = list(keys)
        self.bits = (len(self.keys) * SUBLANES).bit_length() - 1
        self.on_registers = list(range(self.bits - 3))
        self.on_sublanes = list(reversed(range(self.bits - 3, self.bits)))  # half a register apart is the cheapest

    def bring(self, bit, kept=None):
        """Puts a bit of the sublanes on the registers, for that used last, or in the end that which stays there."""
        if bit in self.on_registers or not self.on_registers:
            return
        sublane = self.on_sublanes.index(bit)
        above = [b for b in self.on_registers if b > bit]
        other = min(above or self.on_registers) if kept is None else kept - 3 + sublane
        place, step = self.on_registers.index(other), 1 << sublane
        upper = _has_bit(step)
        for low, high in self._pairs(place):
            a, b = self.keys[low], self.keys[high]
            self.keys[low] = jnp.where(upper, pltpu.roll(b, step, 0), a)
            self.keys[high] = jnp.where(upper, b, pltpu.roll(a, SUBLANES - step, 0))
        self.on_registers[place], self.on_sublanes[sublane] = bit, other

    def exchange(self, bit, backwards=(), ascending=False):
        """Puts the larger of two keys where a bit is 0; where it is 1, the bits of `backwards` count down."""
        if bit not in self.on_registers:
            step = 1 << self.on_sublanes.index(bit)
            self.keys = [_exchange_sublanes(key, step, ascending) for key in self.keys]
            return
        turned = sum(1 << place for place, b in enumerate(self.on_registers) if b in backwards)
        steps = [1 << place for place, b in enumerate(self.on_sublanes) if b in backwards]
        old = list(self.keys)
        for low, high in self._pairs(self.on_registers.index(bit)):
            a, b = old[low], _turn(old[high ^ turned], steps)
            larger, smaller = jnp.maximum(a, b), jnp.minimum(a, b)
            self.keys[low], self.keys[high] = (smaller, larger) if ascending else (larger, smaller)

    def drop(self, bit):
        """Leaves out the keys where a bit of the registers is 1."""
        place = self.on_registers.index(bit)
        self.keys = [self.keys[low] for low, _ in self._pairs(place)]
        self.on_registers.pop(place)

    def _pairs(self, place):
        return [(r, r | 1 << place) for r in range(len(self.keys)) if not r >> place & 1]


def merge(entries, others):
    """The first n of a list in order and another of n in the reverse order, of entries (value, column)."""
    entries = [_select(before(*a, *b), a, b) for a, b in zip(entries, others, strict=True)]
    registers = len(entries)
    stride = registers * SUBLANES // 2
    while stride >= registers:
        step = stride // registers
        entries = [_put_in_order(entry, step) for entry in entries]
        stride //= 2
    while stride:
        for low in range(registers):
            if not low & stride:
                a, b = entries[low], entries[low + stride]
                first = before(*a, *b)
                entries[low], entries[low + stride] = _select(first, a, b), _select(first, b, a)
        stride //= 2
    return entries


def before(value, column, other_value, other_column):
    """Whether an entry comes before another: the larger value, of equal ones the lower column."""
    return (value > other_value) | ((value == other_value) & (column < other_column))


def _put_in_order(entry, step):
    """The same within a register, of entries `step` sublanes apart."""
    other = tuple(_turn(a, [step]) for a in entry)
    return _select(before(*entry, *other) ^ _has_bit(step), entry, other)


def _exchange_sublanes(key, step, ascending):
    other = _turn(key, [step])
    return jnp.where(_has_bit(step) ^ ascending, jnp.minimum(key, other), jnp.maximum(key, other))


def _turn(array, steps):
    """A register whose sublanes s are those of number s ^ step before, for all steps."""
    for step in steps:
        back = pltpu.roll(array, SUBLANES - step, 0)
        array = back if 2 * step == SUBLANES else jnp.where(_has_bit(step), pltpu.roll(array, step, 0), back)
    return array


def _has_bit(bit):
    return lax.broadcasted_iota(jnp.int32, (SUBLANES, 128), 0) & bit != 0


def _select(condition, a, b):
    return tuple(jnp.where(condition, x, y) for x, y in zip(a, b, strict=True))
