"""What the conformance battery shares: cases, contexts written out by hand, and compiled forms of `mix`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.mixers.oracles import ORACLES, VISIBLE
from tests.trees import (
    FLOAT32_TOLERANCE,
    ROUNDING_TOLERANCE,
    assert_close,
    assert_trees_close,
    fast_jit,
    redraw,
    to_float64,
)
from zoo.core.context import SeqContext
from zoo.core.params import abstract
from zoo.mixers import MIXERS, mixer_of

WIDTH, BATCH, LENGTH = 16, 3, 13
CAPACITY = 24  # of states that grow with the sequence

QUANTISED = (
    "bit_mlp",
    "mlgru",
)  # mixers with int8 activations; tests of their own compare closely where no tie is near

CASES = [(f"{name}-{i}", config) for name, mixer in MIXERS.items().items() for i, config in enumerate(mixer.examples)]


def tolerance(config, usual):
    """`usual`, or what a rounding that goes the other way may change."""
    return max(usual, ROUNDING_TOLERANCE) if mixer_of(config).name in QUANTISED else usual


@functools.cache
def params_of(config):
    return redraw(mixer_of(config).param_specs(config, WIDTH), seed=1)


def inputs(seed, batch=BATCH, length=LENGTH):
    return np.random.default_rng(seed).standard_normal((batch, length, WIDTH)).astype(np.float32)


@functools.cache
def fresh(config, batch=BATCH, dtype=jnp.float32):
    return mixer_of(config).init_state(config, batch, CAPACITY, dtype)


@functools.cache
def forward(config, implementation=None):
    """mix as a compiled function (params, x, ctx, state) -> (y, state)."""
    mix = mixer_of(config).mix
    return fast_jit(
        lambda params, x, ctx, state=None: mix(params, x, ctx, state, config=config, implementation=implementation)
    )


@functools.cache
def gradient(config, implementation=None):
    """(params, x, state, ctx, cot_y, cot_state) -> (gradients of the first three, (y, state))."""
    mix = mixer_of(config).mix

    def loss(params, x, state, ctx, cot_y, cot_state):
        y, new = mix(params, x, ctx, state, config=config, implementation=implementation)
        total = jnp.sum(y * cot_y)
        for leaf, cot in zip(jax.tree.leaves(new), jax.tree.leaves(cot_state), strict=True):
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                total += jnp.sum(leaf * cot)
        return total, (y, new)

    return fast_jit(jax.grad(loss, argnums=(0, 1, 2), allow_int=True, has_aux=True))


def cotangents(config, seed, length=LENGTH, batch=BATCH):
    rng = np.random.default_rng(seed)
    specs = abstract(mixer_of(config).state_specs(config, batch, CAPACITY, jnp.float32))
    draw = lambda s: rng.standard_normal(s.shape).astype(np.float32)  # noqa: E731
    return rng.standard_normal((batch, length, WIDTH)).astype(np.float32), jax.tree.map(draw, specs)


def context(segments, start=0):
    """A SeqContext written out token by token; padding gets positions that nothing may read."""
    segments = np.asarray(segments, np.int32)
    start = np.broadcast_to(start, segments.shape[:1])
    positions = np.full(segments.shape, 77, np.int32)
    for row, ids in enumerate(segments):
        previous, position, seen = 0, 0, False
        for t, current in enumerate(ids):
            if current != 0:
                if current != previous:
                    position, seen = (0 if seen else start[row]), True
                positions[row, t] = position
                position += 1
            previous = current
    return SeqContext(jnp.asarray(positions), jnp.asarray(segments))


def contiguous(start, length, batch=BATCH):
    return SeqContext.contiguous(jnp.full((batch,), start, jnp.int32), length)


def documents(segments):
    """[(row, first, last + 1, whether it is the row's first document)] of every document."""
    found = []
    for row, ids in enumerate(np.asarray(segments)):
        t, first = 0, True
        while t < len(ids):
            end = t
            while end < len(ids) and ids[end] == ids[t]:
                end += 1
            if ids[t] != 0:
                found.append((row, t, end, first))
                first = False
            t = end
    return found


def oracle(config, params, x, segments=None, history=None):
    """The float64 oracle on a batch, document by document; `history` [B, P, D] is continued by each first document."""
    run, x = ORACLES[mixer_of(config).name], np.asarray(x, np.float64)
    params = to_float64(params)
    segments = np.ones(x.shape[:2], np.int32) if segments is None else segments
    y = np.zeros_like(x)
    for row, begin, end, first in documents(segments):
        before = np.asarray(history[row], np.float64) if first and history is not None else x[row, :0]
        y[row, begin:end] = run(config, params, np.concatenate([before, x[row, begin:end]]))[len(before) :]
    return y


def poison(x, segments):
    """x with NaN at padding."""
    return np.where((np.asarray(segments) != 0)[..., None], x, np.float32(np.nan))


def visible_state(state):
    """A state with its empty slots cleared: what they hold is never read."""
    if not hasattr(state, "positions"):
        return state
    empty = state.positions < 0

    def clear(leaf):
        return jnp.where(empty.reshape(empty.shape + (1,) * (leaf.ndim - 2)), jnp.zeros((), leaf.dtype), leaf)

    fields = {f.name: clear(getattr(state, f.name)) for f in dataclasses.fields(state) if f.name != "positions"}
    return dataclasses.replace(state, **fields)


def check_splits(config, segments, splits, implementation=None, length=LENGTH, usual=FLOAT32_TOLERANCE):
    """A pass in pieces of each of `splits` (tuples of lengths) equals one pass; `segments` [B, T] or None."""
    params, x, run = params_of(config), inputs(11, length=length), forward(config, implementation)
    whole = contiguous(0, length) if segments is None else context(segments)
    x = x if segments is None else poison(x, segments)
    expected, expected_state = run(params, x, whole, fresh(config))
    for sizes in splits:
        assert sum(sizes) == length
        state, outputs, begin = fresh(config), [], 0
        for size in sizes:
            part = slice(begin, begin + size)
            ctx = SeqContext(whole.positions[:, part], None if segments is None else whole.segment_ids[:, part])
            y, state = run(params, x[:, part], ctx, state)
            outputs.append(y)
            begin += size
        close = tolerance(config, usual)
        assert_close(np.concatenate(outputs, axis=1), expected, close, f"split {sizes}")
        assert_trees_close(visible_state(state), visible_state(expected_state), close, f"state of split {sizes}")


def check_causality(config, segments, implementation=None, rounding=0.0, over=jax.vmap):
    """d y[t] / d x[s] is exactly 0 unless t may see s, and not 0 where it may: window, documents and padding.

    Args:
      config: of a mixer.
      segments: [1, T], of the second call; the first has one document.
      implementation: of its ops.
      rounding: what may be left, relative to the largest, of later tokens of the document by sums that cancel.
      over: how a function is taken over an axis of its argument.
    """
    length = segments.shape[1]
    params, x = params_of(config), inputs(20, batch=1, length=length)
    mix, visible = mixer_of(config).mix, VISIBLE[mixer_of(config).name]

    @fast_jit
    def sensitivities(ctx):
        y, pull = jax.vjp(lambda x: mix(params, x, ctx, None, config=config, implementation=implementation)[0], x)
        cot = jnp.asarray(inputs(21, batch=1, length=length))[0]
        basis = jnp.eye(length)[:, None, :, None] * cot  # one output token after the other
        return jnp.abs(over(lambda c: pull(c.astype(y.dtype))[0])(basis)).max(axis=(1, 3))

    def compare(ctx, same):
        found, expected = np.asarray(sensitivities(ctx)), visible(config, length) & same
        left = ~expected & same & (found <= rounding * found.max())
        np.testing.assert_array_equal((found > 0) & ~left, expected)

    compare(contiguous(0, length, 1), np.ones((length, length), bool))
    compare(context(segments), (segments[0][:, None] == segments[0]) & (segments[0] != 0))


def boundary(config):
    """The length at which the mixer's memory changes behaviour: its window, or the reach of its convolution."""
    return getattr(config, "window", None) or getattr(config, "conv_width", None) or 5
