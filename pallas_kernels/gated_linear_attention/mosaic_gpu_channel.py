"""Gated linear attention as Mosaic GPU kernels for Hopper: the forward pass with a decay per channel of the key.

Never run on a GPU: interpreted, lowered and compiled only.

Let n be the power of two for which tokens i > j of a step lie in the right and the left half of one block of 2 n
tokens. Their decay is that from the middle of the block to i times that from j to the middle, so for every n the scores
are products of the rows x_n: queries in right halves and keys in left halves, each decayed to the middle. A kernel of
its own makes them, once for all heads of a group and all columns of their values, in a block of threads for every step;
it also decays the queries from the step's start and the keys to its end. The kernel that walks over time then only
multiplies matrices. What goes from one to the other through global memory is that, in the dtype of q: as much as q and
k once more, and 64 scores per token and group.

The sums of log decays are matrix products with zeros and ones, as with a decay per head, of log decays in two numbers
of 8 bits of mantissa: they are right to 2^-17 of themselves, and their exponentials to 3e-6.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention import xla
from pallas_kernels.gated_linear_attention.mosaic_gpu_layout import (
    LOWEST,
    SLOTS,
    STEP,
    Layout,
    decayed,
    kernel,
    layout,
    load_state,
    multiply_transposed,
    wide,
)
from pallas_kernels.gated_linear_attention.mosaic_tpu_layout import masked_decay
from pallas_kernels.warpgroup import walk
from pallas_kernels.wgmma import MATRIX, ROWS, full, indices, load, matrix_ref, multiply, rounded

SQUARE = (STEP, STEP)
LEVELS = STEP.bit_length() - 1  # n = 1, 2, 4 .. 32


def decays(lay: Layout, log_decay, reset, valid) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What the kernels take of log decays [B, T, G, K].

    Returns:
      high, low: bfloat16 [B, time, G, K], which add up to the log decays to 2^-17 of them.
      whole: float32 [B, G, steps, K], the decay over a whole step.
      seen: float32 [B or 1, steps, 64], 1 where a token sees the state before its step, else 0.
    """
    g = jnp.maximum(lay.whole_steps(masked_decay(log_decay.astype(jnp.float32), reset, valid)), LOWEST)
    high = rounded(g)
    whole = jnp.exp(g.reshape(g.shape[0], lay.steps, STEP, *g.shape[2:]).sum(axis=2))
    resets = jnp.zeros((1, lay.length), bool) if reset is None else reset
    seen = jnp.cumsum(lay.whole_steps(resets).reshape(-1, lay.steps, STEP), axis=2, dtype=jnp.int32) == 0
    high, low = (x.astype(jnp.bfloat16) for x in (high, g - high))
    return high, low, jnp.swapaxes(whole, 1, 2), seen.astype(jnp.float32)


class Tokens:
    """Pairs of tokens of a step: which of them a decay is summed over, and which meet in which block."""

    def __init__(self):
        self.i, self.j = indices(SQUARE, 0), indices(SQUARE, 1)
        self.upto = self.j <= self.i
        self.differ = self.i ^ self.j

    def right(self, n: jax.Array) -> jax.Array:
        """Whether row i is in the right half of its block of 2 n."""
        return (self.i & n) != 0

    def meet(self, n: jax.Array) -> jax.Array:
        """Whether i and j are in different halves of one block of 2 n."""
        return (self.differ >= n) & (self.differ < 2 * n)

    def to_middle(self, n: jax.Array) -> jax.Array:
        """Which tokens j lie between i and the middle of its block of 2 n."""
        return (self.differ < n) & ~(self.right(n) ^ self.upto)


def half(level: jax.Array) -> jax.Array:
    """The n of a level."""
    return jax.lax.shift_left(jnp.int32(1), level)


def decay(high: Any, low: Any, taken: jax.Array) -> jax.Array:
    """exp of the sum over the tokens that are taken, [64, 64 channels], from log decays in two parts."""
    ones = jnp.where(taken, full(SQUARE, 1.0, MATRIX), 0.0).astype(high.dtype)
    return jnp.exp(multiply(ones, high, multiply(ones, low)))


def write_rows(x: Any, right: jax.Array, q: Any, k: Any, factor: jax.Array) -> None:
    """Writes the rows x_n to shared memory: queries in right halves, keys in left ones, decayed to the middle."""
    rows = jnp.where(right, load(q, MATRIX), load(k, MATRIX)).astype(jnp.float32)
    x[...] = (rows * factor).astype(x.dtype)
    plgpu.commit_smem()


def _prepare_kernel(lay: Layout, *refs):
    q_ref, k_ref, high_ref, low_ref, scores_ref, until_ref, after_ref, *refs = refs
    *buffers, x, barrier = refs
    b, g, step = (jax.lax.axis_index(name) for name in ("batch", "group", "step"))
    tokens, rows = Tokens(), pl.ds(step * STEP, STEP)

    def at(ref, block):
        return ref.at[b, rows, g, pl.ds(block * STEP, STEP)]

    def fetch(block, slot):
        for source, buffer in zip((q_ref, k_ref, high_ref, low_ref), buffers, strict=True):
            plgpu.copy_gmem_to_smem(at(source, block), buffer.at[slot], barrier.at[slot])

    def body(_, slot, scores):
        q, k, high, low = (buffer.at[slot] for buffer in buffers)
        scores += jnp.where(tokens.differ == 0, multiply(q, k, transpose=True), 0.0)

        def across_middles(level, scores):
            n = half(level)
            write_rows(x, tokens.right(n), q, k, decay(high, low, tokens.to_middle(n)))
            return scores + jnp.where(tokens.meet(n) & tokens.upto, multiply(x, x, transpose=True), 0.0)

        scores = jax.lax.fori_loop(0, LEVELS, across_middles, scores)
        # What goes out takes the place of what came.
        q[...] = (wide(q) * decay(high, low, tokens.upto)).astype(q.dtype)
        k[...] = (wide(k) * decay(high, low, ~tokens.upto)).astype(k.dtype)
        return scores

    def store(block, slot):
        for buffer, destination in zip(buffers[:2], (until_ref, after_ref), strict=True):
            plgpu.copy_smem_to_gmem(buffer.at[slot], at(destination, block), commit_group=False)

    blocks = lay.key // STEP
    scores = walk(blocks, SLOTS, barrier, fetch, body, store, full(SQUARE, 0.0, MATRIX), in_place=True)
    scores_ref.at[b, g, step][...] = scores.astype(scores_ref.dtype)


def prepare(lay: Layout, q, k, high, low) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The scores of every step [B, G, steps, 64, 64] and decayed queries and keys [B, time, G, K].

    The scores come without the scale, 0 unless j <= i; queries are decayed from the step's first token, keys to its
    last.
    """
    batch = q.shape[0]
    shapes = ((batch, lay.groups, lay.steps, *SQUARE), q.shape, k.shape)
    scratch = [
        *[matrix_ref((SLOTS, *SQUARE), x.dtype) for x in (q, k, high, low)],
        matrix_ref(SQUARE, q.dtype),
        plgpu.Barrier(num_arrivals=4, num_barriers=SLOTS),
    ]
    out_type = [jax.ShapeDtypeStruct(shape, q.dtype) for shape in shapes]
    grid = {"step": lay.steps, "group": lay.groups, "batch": batch}
    return kernel("channel_prepare", functools.partial(_prepare_kernel, lay), out_type, scratch, grid)(q, k, high, low)


def _forward_kernel(lay: Layout, scale: float, carried: bool, save: bool, shared: bool, *refs):
    *refs, q_smem, k_smem, v_smem, scores_smem, whole_smem, seen_smem, s_smem, barrier = refs
    q_ref, k_ref, v_ref, scores_ref, whole_ref, seen_ref, *refs = refs
    state_ref = refs.pop(0) if carried else None
    y_ref, new_state_ref, *boundary_ref = refs
    b, g, _, unit, columns = lay.indices()

    def fetch(step, slot):
        rows = pl.ds(step * STEP, STEP)
        for source, buffer in (
            (q_ref.at[b, rows, g], q_smem),
            (k_ref.at[b, rows, g], k_smem),
            (v_ref.at[b, rows, unit], v_smem),
            (scores_ref.at[b, g, step], scores_smem),
            (whole_ref.at[b, g, step], whole_smem),
            (seen_ref.at[0 if shared else b, step], seen_smem),
        ):
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], barrier.at[slot])

    def body(step, slot, s):
        if save:

            @pl.when(jax.lax.rem(step, jnp.int32(lay.saves)) == 0)
            def _():
                boundary_ref[0].at[b, jax.lax.div(step, jnp.int32(lay.saves)), g, :, columns][...] = s

        s_smem[...] = s.astype(s_smem.dtype)
        plgpu.commit_smem()
        v = v_smem.at[slot]
        y = decayed(load(seen_smem.at[slot], ROWS), multiply(q_smem.at[slot], s_smem), 0)
        y = multiply(scores_smem.at[slot], v, y) * scale
        s = multiply_transposed(k_smem.at[slot], v, decayed(load(whole_smem.at[slot], ROWS), s, 0))
        v[...] = y.astype(v.dtype)  # in the place of the values
        return s

    def store(step, slot):
        plgpu.copy_smem_to_gmem(v_smem.at[slot], y_ref.at[b, pl.ds(step * STEP, STEP), unit], commit_group=False)

    start = full((lay.key, STEP), 0.0, MATRIX) if state_ref is None else load_state(state_ref.at[b, g, :, columns])
    s = walk(lay.steps, SLOTS, barrier, fetch, body, store, start, in_place=True)
    new_state_ref.at[b, g, :, columns][...] = s


def forward(q, k, v, log_decay, state, reset, valid, *, scale: float, chunk_size: int, save: bool):
    """Returns (y, new_state, boundaries) as `xla.forward` does."""
    lay, batch = layout(q, v, chunk_size), q.shape[0]
    high, low, whole, seen = decays(lay, log_decay, reset, valid)
    within, until, after = prepare(lay, lay.tokens(q, valid), lay.tokens(k, valid), high, low)
    arrays = [until, after, lay.columns(v, valid), within, whole, seen]
    if state is not None:
        arrays.append(xla.flat(state, lay.groups))
    scratch = [
        *[matrix_ref((SLOTS, STEP, lay.key), q.dtype)] * 2,
        *[matrix_ref((SLOTS, *SQUARE), q.dtype)] * 2,
        plgpu.SMEM((SLOTS, lay.key), jnp.float32),
        plgpu.SMEM((SLOTS, STEP), jnp.float32),
        matrix_ref((lay.key, STEP), q.dtype),
        plgpu.Barrier(num_arrivals=6, num_barriers=SLOTS),
    ]
    body = functools.partial(_forward_kernel, lay, scale, state is not None, save, seen.shape[0] == 1)
    grid, out_type = {"unit": lay.units, "batch": batch}, lay.outputs(batch, v.dtype, save)
    return lay.results(*kernel("channel_forward", body, out_type, scratch, grid)(*arrays), valid=valid)
