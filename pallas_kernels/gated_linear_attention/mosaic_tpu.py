"""Gated linear attention as Pallas TPU kernels: the forward pass, for a decay per head or none.

The grid walks over chunks of 128 tokens in order with the float32 states in VMEM scratch. A step holds one chunk of
several heads of a group, side by side in the lanes (two heads of 64 fill a register), so that the products with the
state are one product for all of them and the scores q . k are shared.

Token i of the eight tokens of block I sees an earlier token j through exp(prefix_i) exp(w_I[j]): prefix_i sums the log
decays of block I up to i, w_I[j] those from j + 1 to the start of block I; within a block a table of 8 x 8 sums serves.
All are sums of non-positive numbers: nothing overflows and nothing cancels. A reset is a log decay of -inf.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.gated_linear_attention import mosaic_tpu_channel, xla
from pallas_kernels.gated_linear_attention.mosaic_tpu_layout import (
    BLOCK,
    CHUNK,
    LANES,
    VMEM_LIMIT,
    Layout,
    block_specs,
    check_support,
    compute_dtype,
    contract,
    decayed,
    layout,
    widen,
)

UNROLL = 20  # pairs of heads


def supports(q, k, v, log_decay, state, reset, valid, *, scale: float, chunk_size: int, save: bool) -> None:
    """Raises UnsupportedError where `forward` does not honour an argument."""
    check_support(q, k, v, log_decay, chunk_size)


# ---- a decay per head: pieces of a kernel ---------------------------------------------------------------------


class HeadDecay:
    """The decays of a chunk of several heads, from their logarithms g [rows, 128] with the tokens in the lanes.

    Tables in memory: before, start [16 * rows, 128], row i * rows + h for head h and the i-th block of eight tokens:
    exp(token j to the block's start), 0 unless j is before it; scale * exp(chunk's start to the block's start).
    within [8 * rows, 128], row r * rows + h: exp(token j to token r of its block), 0 unless j <= r.
    columns [128, 128], tokens in the sublanes: lane h holds exp(prefix of the block of eight) of head h, lane rows + h
    exp(next token to the chunk's end), lane 2 * rows more than 0 if a head sees the state before the chunk.

    whole [rows, 128]: exp(sum over the chunk) in every lane.
    """

    def __init__(self, g, scale: float, tables):
        self.rows, (before_ref, start_ref, within_ref, columns_ref, whole_ref) = g.shape[0], tables
        self.before_ref, self.start_ref, self.within_ref, self.columns_ref, self.whole_ref = tables
        lane = jax.lax.broadcasted_iota(jnp.int32, g.shape, 1)
        place = lane & (BLOCK - 1)
        prefix, suffix = g, jnp.where(place < BLOCK - 1, pltpu.roll(g, LANES - 1, 1), 0.0)
        for size in (1, 2, 4):
            prefix = prefix + jnp.where(place >= size, pltpu.roll(prefix, size, 1), 0.0)
            suffix = suffix + jnp.where(place + size < BLOCK, pltpu.roll(suffix, LANES - size, 1), 0.0)
        self._write_within(g, place, within_ref)
        before, start, until = jnp.full(g.shape, -jnp.inf, jnp.float32), jnp.zeros_like(g), jnp.zeros_like(g)
        for i in range(CHUNK // BLOCK):
            before_ref[pl.ds(i * self.rows, self.rows), :] = jnp.exp(before)
            start_ref[pl.ds(i * self.rows, self.rows), :] = scale * jnp.exp(start)
            inside = (lane >> 3) == i
            total = jnp.broadcast_to(prefix[:, (i + 1) * BLOCK - 1 : (i + 1) * BLOCK], g.shape)
            until = jnp.where(inside, start + prefix, until)
            before = jnp.where(inside, suffix, before + total)
            start = start + total
        whole_ref[...] = jnp.exp(start)
        seen = jnp.max(jnp.exp(until), axis=0, keepdims=True)
        rows = [jnp.exp(prefix), jnp.exp(before), jnp.broadcast_to(seen, (BLOCK, LANES))]
        columns_ref[:, : 2 * self.rows + BLOCK] = jnp.concatenate(rows, axis=0).T

    def _write_within(self, g, place, within_ref) -> None:
        run, runs = jnp.zeros_like(g), [jnp.zeros_like(g)]
        for distance in range(1, BLOCK):
            run = run + pltpu.roll(g, LANES - distance, 1)
            runs.append(run)
        for r in range(BLOCK):
            total = jnp.full(g.shape, -jnp.inf, jnp.float32)
            for p in range(r + 1):
                total = jnp.where(place == p, runs[r - p], total)
            within_ref[pl.ds(r * self.rows, self.rows), :] = jnp.exp(total)

    @staticmethod
    def tables(rows: int) -> list:
        """The memory it takes, for the scratch of a kernel."""
        shapes = [CHUNK // BLOCK * rows] * 2 + [BLOCK * rows, CHUNK, rows]
        return [pltpu.VMEM((size, LANES), jnp.float32) for size in shapes]

    def seen(self) -> jax.Array:
        """[128, 128], more than 0 where the state before the chunk is seen."""
        return jnp.broadcast_to(self.columns_ref[:, 2 * self.rows : 2 * self.rows + 1], (CHUNK, LANES))

    def whole(self, heads: list, shape) -> jax.Array:
        """exp(sum over the chunk), [K, lanes], in the lanes of each head."""
        row = join([self.whole_ref[pl.ds(head, 1), :] for head in heads])
        return jnp.broadcast_to(widen(row, shape[1]), shape)

    def after(self, heads: list) -> jax.Array:
        """exp(sum from the next token to the chunk's end), [128, 128], in the lanes of each head."""
        lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, LANES), 1)
        return _pick(self.columns_ref[...], self.rows + heads[0] + (lane >> 6 if len(heads) == 2 else 0 * lane))

    def blocks(self, heads: list) -> Iterator[tuple[slice, list[jax.Array], jax.Array]]:
        """For every 16 tokens i: where they are, the weights [16, 128] of each head, and until [16, 128].

        The weights are the decays from token j to i, 0 unless j <= i; until is scale * exp(chunk's start to i) in the
        lanes of each head. Step by step, so that little is alive at a time.
        """
        withins = [self.within_ref[pl.ds(head, BLOCK, stride=self.rows), :] for head in heads]
        lane = jax.lax.broadcasted_iota(jnp.int32, (BLOCK, LANES), 1)
        for first in range(0, CHUNK // BLOCK, 2):
            weights, untils = [[] for _ in heads], []
            for i in (first, first + 1):
                columns, starts = self.columns_ref[i * BLOCK : (i + 1) * BLOCK, :], []
                for n, head in enumerate(heads):
                    row = pl.ds(i * self.rows + head, 1)
                    prefix = _pick(columns, jnp.full(columns.shape, head, jnp.int32))
                    weights[n].append(jnp.where((lane >> 3) == i, withins[n], prefix * self.before_ref[row, :]))
                    starts.append(prefix * self.start_ref[row, :])
                untils.append(join(starts))
            rows = slice(first * BLOCK, (first + 2) * BLOCK)
            yield rows, [jnp.concatenate(w, axis=0) for w in weights], jnp.concatenate(untils, axis=0)


def _pick(x, lanes) -> jax.Array:
    """x[i, lanes[i, j]] of x [n, 128]."""
    return jnp.take_along_axis(x, lanes, axis=1, mode="promise_in_bounds")


def paired(lay: Layout) -> int:
    """Heads that are computed together: two of half a register, or one."""
    return max(1, LANES // lay.values)


def unrolled(lay: Layout, limit: int) -> int:
    """How many of them the compiler sees at once: enough to overlap, few enough to stay in registers."""
    total = lay.heads // paired(lay)
    return max(n for n in range(1, limit + 1) if total % n == 0)


def for_heads(lay: Layout, steps: int, body: Callable[[list, Any, int], None]) -> None:
    """Calls `body(heads, lanes, slot)` for all heads of a step, `steps` of them unrolled, slot < steps."""
    count = paired(lay)
    width = count * lay.values

    def step(i, _=None):
        for slot in range(steps):
            first = (i * steps + slot) * count
            start = first * lay.values
            start = start if isinstance(start, int) else pl.multiple_of(start, LANES)
            body([first + n for n in range(count)], pl.ds(start, width), slot)

    if steps * count == lay.heads:
        step(0)
    else:
        jax.lax.fori_loop(0, lay.heads // (steps * count), step, None)


def join(parts: list[jax.Array]) -> jax.Array:
    """The lanes of each head from its own part, [n, 128] each; a single part is as it is."""
    if len(parts) == 1:
        return parts[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 1)
    return jnp.where(lane < LANES // 2, parts[0], parts[1])


def _head_kernel(*refs, lay: Layout, scale: float, dtype, carried: bool, save: bool, resets: bool):
    refs = list(refs)
    q_ref, k_ref, v_ref, g_ref = (refs.pop(0) for _ in range(4))
    state_ref = refs.pop(0) if carried else None
    y_ref, new_state_ref = refs.pop(0), refs.pop(0)
    boundary_ref = refs.pop(0) if save else None
    s_ref, products_ref, transposed_ref, scores_ref, until_ref, *tables = refs
    t = pl.program_id(3)

    @pl.when(t == 0)
    def _():
        s_ref[...] = jnp.zeros(s_ref.shape, jnp.float32) if state_ref is None else state_ref[...]

    if boundary_ref is not None:

        @pl.when(jax.lax.rem(t, lay.saves) == 0)
        def _():
            boundary_ref[...] = s_ref[...]

    decay = HeadDecay(g_ref[...], scale, tables)
    q, k = q_ref[...].astype(dtype), k_ref[...].astype(dtype)
    products_ref[...], transposed_ref[...] = scale * contract(q, k, 1, 1), k.T

    def body(heads, lanes, slot):
        width, until_lanes = lanes.size, slice(slot * LANES, (slot + 1) * LANES)
        for rows, weights, until in decay.blocks(heads):
            for n, weight in enumerate(weights):
                scores_ref[slot * len(heads) + n, rows, :] = (weight * products_ref[rows, :]).astype(dtype)
            until_ref[rows, until_lanes] = until
        v, s = v_ref[:, lanes].astype(dtype), s_ref[:, lanes]
        seen = contract(q_ref[...].astype(dtype), s.astype(dtype), 1, 0)
        y = decayed(widen(until_ref[:, until_lanes], width), seen, resets)
        y = y + join([contract(scores_ref[slot * len(heads) + n], v, 1, 0) for n in range(len(heads))])
        y_ref[:, lanes] = y.astype(y_ref.dtype)
        added = (widen(decay.after(heads), width) * v.astype(jnp.float32)).astype(dtype)
        kept = decayed(decay.whole(heads, s.shape), s, resets)
        s_ref[:, lanes] = kept + contract(transposed_ref[...], added, 1, 0)

    for_heads(lay, unrolled(lay, UNROLL), body)

    @pl.when(t == pl.num_programs(3) - 1)
    def _():
        new_state_ref[...] = s_ref[...]


def _by_head(q, k, v, g, state, lay: Layout, *, scale: float, save: bool, resets: bool):
    batch = v.shape[0]
    specs = block_specs(lay, lambda *ids: ids)
    rows = "shared_rows" if g.shape[0] == 1 else "rows"
    out_shape = [
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        jax.ShapeDtypeStruct((batch, lay.groups, lay.keys, lay.ratio * lay.values), jnp.float32),
    ]
    if save:
        shape = (batch, lay.boundaries, *out_shape[1].shape[1:])
        out_shape.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    dtype = compute_dtype(q, k, v)
    kernel = functools.partial(
        _head_kernel,
        lay=lay,
        scale=scale,
        dtype=dtype,
        carried=state is not None,
        save=save,
        resets=resets,
    )
    names = ("keys", "keys", "values", rows) + (("state",) if state is not None else ())
    return pl.pallas_call(
        kernel,
        grid=(batch, lay.groups, lay.blocks, lay.chunks),
        in_specs=[specs[name] for name in names],
        out_specs=[specs[name] for name in ("values", "state", "boundary")[: len(out_shape)]],
        out_shape=out_shape,
        scratch_shapes=[
            pltpu.VMEM((lay.keys, lay.lanes), jnp.float32),
            pltpu.VMEM((CHUNK, CHUNK), jnp.float32),
            pltpu.VMEM((lay.keys, CHUNK), dtype),
            pltpu.VMEM((unrolled(lay, UNROLL) * paired(lay), CHUNK, CHUNK), dtype),
            pltpu.VMEM((CHUNK, unrolled(lay, UNROLL) * LANES), jnp.float32),
            *HeadDecay.tables(lay.rows),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret.parameters(),
        name="gated_linear_attention_forward",
    )(*(a for a in (q, k, v, g, state) if a is not None))


def forward(q, k, v, log_decay, state, reset, valid, *, scale: float, chunk_size: int, save: bool):
    """Returns (y, new_state, boundaries) as `xla.forward` does."""
    if q.shape[1] == 1:  # one token is bound by the state's traffic: XLA fuses it into one pass
        return xla.forward(q, k, v, log_decay, state, reset, valid, scale=scale, chunk_size=chunk_size, save=save)
    lay = layout(q, v, chunk_size)
    per_channel = log_decay is not None and log_decay.ndim == 4
    decay = (lay.channels if per_channel else lay.head_rows)(log_decay, reset, valid)
    y, new_state, *boundaries = (mosaic_tpu_channel.forward if per_channel else _by_head)(
        lay.tokens(q, valid, lay.keys),
        lay.tokens(k, valid, lay.keys),
        lay.tokens(v, valid, lay.values),
        decay,
        None if state is None else lay.states(xla.flat(state, lay.groups)),
        lay,
        scale=scale,
        save=save,
        resets=reset is not None,
    )
    y = lay.from_tokens(y, v.shape[2], v.shape[3])
    if valid is not None:  # a state that is not finite must not show at padding
        y = jnp.where(valid[..., None, None], y, 0)
    new_state = xla.unflat(lay.from_states(new_state), lay.ratio)
    return y, new_state, lay.from_states(boundaries[0]) if save else None
