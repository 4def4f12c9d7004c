"""Gated linear attention as Mosaic GPU kernels for Hopper: the forward pass with a decay per channel of the key.

Never run on a GPU: interpreted, lowered and compiled only.

Let n be the power of two for which tokens i > j of a step lie in the right and the left half of one block of 2 n
tokens. Their decay is that from the middle of the block to i times that from j to the middle, so for every n the scores
are products of the rows x_n: queries in right halves and keys in left halves, each decayed to the middle. A kernel of
its own makes them, once for all heads of a group and all columns of their values, in a block of threads for every step;
it also decays the queries from the step's start and the keys to its end. The kernel that walks over time then only
multiplies matrices. What goes from one to the other through global memory is that, in the parts of q: as much as q and
k once more, and 64 scores per token and group.

The sums of log decays are matrix products with zeros and ones, as with a decay per head, of log decays in two numbers
of 8 bits of mantissa: they are right to 2^-17 of themselves, and their exponentials to 3e-6.
"""

import functools
from collections.abc import Sequence
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
    slots,
)
from pallas_kernels.gated_linear_attention.mosaic_tpu_layout import masked_decay
from pallas_kernels.warpgroup import walk
from pallas_kernels.wgmma import (
    MATRIX,
    ROWS,
    full,
    indices,
    join,
    load,
    matrix_ref,
    multiply,
    multiply_parts,
    rounded,
    split,
    split_ref,
    store,
)

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


def write_rows(x: Sequence[Any], right: jax.Array, q: Sequence[Any], k: Sequence[Any], factor: jax.Array) -> None:
    """Writes the rows x_n to shared memory: queries in right halves, keys in left ones, decayed to the middle."""
    rows = [jnp.where(right, load(a, MATRIX), load(b, MATRIX)) for a, b in zip(q, k, strict=True)]
    store(x, functools.reduce(jnp.add, [part.astype(jnp.float32) for part in rows]) * factor)
    plgpu.commit_smem()


class Blocks:
    """64 tokens and 64 columns at a time of q, k and two parts of log decays; results in the places of q and k.

    Every part of a block has a buffer of its own: a copy fills one as a whole.
    """

    def __init__(self, lay: Layout, sources: Sequence[Any], buffers: Sequence[Any], barrier: Any):
        self.parts, self.key, self.barrier, self.buffers = lay.parts, lay.key, barrier, buffers
        self.b, self.g, self.step = (jax.lax.axis_index(name) for name in ("batch", "group", "step"))
        self.rows = pl.ds(self.step * STEP, STEP)
        q, k, high, low = sources
        self.sources = [*self.of_parts(q), *self.of_parts(k), (high, 0), (low, 0)]

    @staticmethod
    def scratch(lay: Layout) -> list[Any]:
        """The buffers and their barriers."""
        count = 2 * lay.parts + 2
        buffers = [matrix_ref((SLOTS, *SQUARE), jnp.bfloat16)] * count
        return [*buffers, plgpu.Barrier(num_arrivals=count, num_barriers=SLOTS)]

    def of_parts(self, ref: Any) -> list[tuple[Any, int]]:
        """The parts of [B, time, G, parts * K]: the reference, and the first column of each."""
        return [(ref, part * self.key) for part in range(self.parts)]

    def at(self, ref: Any, column: int, block: Any) -> Any:
        """A block in global memory, counted from a column."""
        return ref.at[self.b, self.rows, self.g, pl.ds(block * STEP + column, STEP)]

    def fetch(self, block: Any, slot: Any) -> None:
        """Starts the copies of a block, to be counted by the barrier of its slot."""
        for (ref, column), buffer in zip(self.sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(self.at(ref, column, block), buffer.at[slot], self.barrier.at[slot])

    def take(self, slot: Any) -> tuple[list[Any], list[Any], Any, Any]:
        """q and k in parts, and the two parts of the log decays, in shared memory."""
        *buffers, high, low = (buffer.at[slot] for buffer in self.buffers)
        return buffers[: self.parts], buffers[self.parts :], high, low

    def write_out(self, block: Any, slot: Any, *results: Any) -> None:
        """Copies what has the places of q and k to two arrays [B, time, G, parts * K]."""
        places = [place for ref in results for place in self.of_parts(ref)]
        for (ref, column), buffer in zip(places, self.buffers, strict=False):
            plgpu.copy_smem_to_gmem(buffer.at[slot], self.at(ref, column, block), commit_group=False)


def _prepare_kernel(lay: Layout, *refs):
    *sources, scores_ref, until_ref, after_ref = refs[:7]
    *buffers, barrier, x_smem = refs[7:]
    blocks = Blocks(lay, sources, buffers, barrier)
    tokens, x = Tokens(), split_ref(x_smem, lay.parts)

    def body(_, slot, scores):
        q, k, high, low = blocks.take(slot)
        scores += jnp.where(tokens.differ == 0, multiply_parts(q, k, transpose=True), 0.0)

        def across_middles(level, scores):
            n = half(level)
            write_rows(x, tokens.right(n), q, k, decay(high, low, tokens.to_middle(n)))
            return scores + jnp.where(tokens.meet(n) & tokens.upto, multiply_parts(x, x, transpose=True), 0.0)

        scores = jax.lax.fori_loop(0, LEVELS, across_middles, scores)
        # What goes out takes the place of what came.
        store(q, join(q, MATRIX) * decay(high, low, tokens.upto))
        store(k, join(k, MATRIX) * decay(high, low, ~tokens.upto))
        return scores

    def write_out(block, slot):
        blocks.write_out(block, slot, until_ref, after_ref)

    start = full(SQUARE, 0.0, MATRIX)
    scores = walk(lay.key // STEP, SLOTS, barrier, blocks.fetch, body, write_out, start, in_place=True)
    store(split_ref(scores_ref.at[blocks.b, blocks.g, blocks.step], lay.parts), scores)


def prepare(lay: Layout, q, k, high, low) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The scores of every step [B, G, steps, 64, 64] and decayed queries and keys [B, time, G, K], all in parts.

    The scores come without the scale, 0 unless j <= i; queries are decayed from the step's first token, keys to its
    last. Queries and keys are in parts too.
    """
    batch = q.shape[0]
    scores = jax.ShapeDtypeStruct((batch, lay.groups, lay.steps, STEP, lay.parts * STEP), q.dtype)
    scratch = [*Blocks.scratch(lay), matrix_ref((STEP, lay.parts * STEP), q.dtype)]
    out_type = [scores, *[jax.ShapeDtypeStruct(q.shape, q.dtype)] * 2]
    grid = {"step": lay.steps, "group": lay.groups, "batch": batch}
    return kernel("channel_prepare", functools.partial(_prepare_kernel, lay), out_type, scratch, grid)(q, k, high, low)


def _forward_kernel(lay: Layout, scale: float, carried: bool, save: bool, shared: bool, *refs):
    *refs, q_smem, k_smem, v_smem, scores_smem, whole_smem, seen_smem, s_smem, barrier = refs
    q_ref, k_ref, v_ref, scores_ref, whole_ref, seen_ref, *refs = refs
    state_ref = refs.pop(0) if carried else None
    y_ref, new_state_ref, *boundary_ref = refs
    b, g, _, unit, columns = lay.indices()
    in_place = v_smem.shape[0] > 1

    def leaving(slot):
        """Where y lies in shared memory: in the place of the values, or where these are about to come, of the state."""
        return v_smem.at[slot] if in_place else s_smem.at[:STEP]

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

        q, k, v, scores = (split_ref(ref.at[slot], lay.parts) for ref in (q_smem, k_smem, v_smem, scores_smem))
        state = split_ref(s_smem, lay.parts)
        store(state, s)
        plgpu.commit_smem()
        y = decayed(load(seen_smem.at[slot], ROWS), multiply_parts(q, state), 0)
        y = multiply_parts(scores, v, y) * scale
        s = multiply_transposed(k, v, decayed(load(whole_smem.at[slot], ROWS), s, 0))
        store(split_ref(leaving(slot), lay.parts), y)
        return s

    def write_out(step, slot):
        plgpu.copy_smem_to_gmem(leaving(slot), y_ref.at[b, pl.ds(step * STEP, STEP), unit], commit_group=False)

    start = full((lay.key, STEP), 0.0, MATRIX) if state_ref is None else load_state(state_ref.at[b, g, :, columns])
    s = walk(lay.steps, v_smem.shape[0], barrier, fetch, body, write_out, start, in_place=in_place)
    new_state_ref.at[b, g, :, columns][...] = s


def forward_scratch(lay: Layout, count: int) -> list[Any]:
    """Buffers of the forward pass over time for `count` steps."""
    width = lay.parts * STEP
    return [
        *[matrix_ref((count, STEP, lay.parts * lay.key), jnp.bfloat16)] * 2,
        *[matrix_ref((count, STEP, width), jnp.bfloat16)] * 2,
        plgpu.SMEM((count, lay.key), jnp.float32),
        plgpu.SMEM((count, STEP), jnp.float32),
        matrix_ref((lay.key, width), jnp.bfloat16),
        plgpu.Barrier(num_arrivals=6, num_barriers=count),
    ]


def forward(q, k, v, log_decay, state, reset, valid, *, scale: float, chunk_size: int, save: bool):
    """Returns (y, new_state, boundaries) as `xla.forward` does."""
    lay, batch = layout(q, v, chunk_size), q.shape[0]
    high, low, whole, seen = decays(lay, log_decay, reset, valid)
    q, k, v = (split(x) for x in (lay.tokens(q, valid), lay.tokens(k, valid), lay.columns(v, valid)))
    within, until, after = prepare(lay, q, k, high, low)
    arrays = [until, after, v, within, whole, seen]
    if state is not None:
        arrays.append(xla.flat(state, lay.groups))
    scratch = forward_scratch(lay, slots(functools.partial(forward_scratch, lay)))
    body = functools.partial(_forward_kernel, lay, scale, state is not None, save, seen.shape[0] == 1)
    grid, out_type = {"unit": lay.units, "batch": batch}, lay.outputs(batch, save)
    return lay.results(*kernel("channel_forward", body, out_type, scratch, grid)(*arrays), valid=valid)
