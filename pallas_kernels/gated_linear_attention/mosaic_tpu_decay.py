"""The decays per head that a step of the TPU kernels of gated linear attention takes, as tables in VMEM.

Heads side by side in a register ("n" below, two of 64 lanes or one) share every vector operation: pairs of tokens are
computed within a span of 128 tokens / heads, [token, (n, token)]. What passes between the two spans of a chunk is a
product of scores that all heads share with rows that are decayed to and from the edge between the spans.

A span is cut into blocks of eight tokens, a register. Token t in block I sees an earlier token s through
exp(sum from the start of I to t) exp(sum from s + 1 to the start of I), or from the other side, with s in block I,
exp(sum from s + 1 to the end of I) exp(sum from the start of the next block to t): one factor of a row and one of a
column. Within a block a table of 8 x 8 sums serves. All are sums of non-positive numbers: nothing overflows and nothing
cancels. A reset is a log decay of -inf.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_linear_attention.mosaic_tpu_layout import BLOCK, CHUNK, LANES, Layout

Rows = Iterator[tuple[slice, jax.Array, jax.Array]]


class HeadDecay:
    """The decays of a chunk of several heads, from their logarithms, g_ref [count * rows, 128], tokens in the lanes.

    With targets in the rows of a span's tiles, [t, (n, s)], or `mirrored`, [s, (n, t)]. Row p of a table is the p-th
    group of `count` heads side by side. Each span has its own:
    far, edge [blocks * rows, 128], row i * rows + p for block i of the span: the factor of the columns, 0 where they
    do not belong to an earlier (a later) block; from the span's start to the block's (from the block's end to the
    span's) in the lanes of each head.
    within [8 * rows, 128], row r * rows + p: exp(sum from s + 1 to t) for the r-th row of a block and the columns of
    the same block, 0 unless s <= t.
    whole [rows, 128]: exp(sum over the span) in the lanes of each head.
    columns [128, 128], tokens in the sublanes: lane n * rows + p holds the factor of the row for head n, the next
    count * rows lanes the decay from the token to the span's end (from the span's start to the token), the next lane
    more than 0 if a head sees the state before the chunk. All but the factors are 128 lanes on if there is no room.
    What counts from the span's start is multiplied by `scale`.
    """

    def __init__(self, g_ref, scale: float, tables, count: int, *, mirrored: bool = False):
        self.count, self.rows, self.span, self.mirrored = count, g_ref.shape[0] // count, CHUNK // count, mirrored
        self.scale = scale
        self.one_tile = _one_tile(g_ref.shape[0])
        self.columns_ref, *rest = tables
        self.tables = [rest[4 * i : 4 * i + 4] for i in range(count)]
        heads = [g_ref[pl.ds(n, self.rows, stride=count), :] for n in range(count)]
        columns = [jnp.exp(_to_edge(g, mirrored)) for g in heads]
        spans = self.by_span(heads)
        others = [self._fill(g, tables) for g, tables in zip(spans, self.tables, strict=True)]
        ends = [jnp.exp(x) for x in others]
        columns += self.by_head([scale * x for x in ends] if mirrored else ends)
        if mirrored:
            columns.append(self._seen(ends))
        for lane, parts in ((0, columns),) if self.one_tile else ((0, columns[:count]), (LANES, columns[count:])):
            stacked = jnp.concatenate(parts, axis=0)
            self.columns_ref[:, lane : lane + stacked.shape[0]] = stacked.T

    def _others(self) -> tuple[slice, int]:
        """The lanes of the columns' register that holds the decays to an end, and the first of them."""
        return (slice(0, LANES), self.count * self.rows) if self.one_tile else (slice(LANES, 2 * LANES), 0)

    @staticmethod
    def scratch(lay: Layout) -> list:
        """The memory it takes."""
        rows, count = lay.rows // lay.pair, lay.pair
        blocks = CHUNK // count // BLOCK
        sizes = [blocks * rows, blocks * rows, BLOCK * rows, rows] * count
        columns = pltpu.VMEM((CHUNK, LANES if _one_tile(lay.rows) else 2 * LANES), jnp.float32)
        return [columns, *(pltpu.VMEM((size, LANES), jnp.float32) for size in sizes)]

    def by_span(self, heads: list) -> list[jax.Array]:
        """Rows [rows, 128 tokens] of each head of a group -> [rows, (n, token)] of each span."""
        if self.count == 1:
            return heads
        first = jax.lax.broadcasted_iota(jnp.int32, heads[0].shape, 1) < self.span
        even, odd = heads
        return [
            jnp.where(first, even, pltpu.roll(odd, self.span, 1)),
            jnp.where(first, pltpu.roll(even, self.span, 1), odd),
        ]

    by_head = by_span  # its own inverse

    def _fill(self, g, tables) -> jax.Array:
        """Writes the tables of a span; returns the sums from the next token to its end (its start to the token)."""
        far_ref, edge_ref, within_ref, whole_ref = tables
        lane = jax.lax.broadcasted_iota(jnp.int32, g.shape, 1)
        place, block, first = lane & (BLOCK - 1), (lane & (self.span - 1)) >> 3, lane & ~(self.span - 1)
        total, order = jnp.full(g.shape, -jnp.inf, jnp.float32), range(BLOCK)
        for n, r in enumerate(reversed(order) if self.mirrored else order):
            if n:  # one more token between the row and the columns: the row's own, or that of the row before it
                total = total + pick(g, (lane & ~(BLOCK - 1)) + (r + 1 if self.mirrored else r))
            total = jnp.where(place == r, 0.0, total)
            within_ref[pl.ds(r * self.rows, self.rows), :] = jnp.exp(total)
        # From the next token to the block's end (from the block's start to the token).
        inside = total + pick(g, lane & ~(BLOCK - 1)) if self.mirrored else total
        sums, last = (inside, BLOCK - 1) if self.mirrored else (inside + g, 0)  # of a whole block at its last (first)
        far, edge = jnp.full(g.shape, -jnp.inf, jnp.float32), jnp.zeros_like(g)
        order = range(self.span // BLOCK)
        for i in reversed(order) if self.mirrored else order:
            rows = pl.ds(i * self.rows, self.rows)
            far_ref[rows, :] = jnp.exp(far)
            edge_ref[rows, :] = jnp.exp(edge) if self.mirrored else self.scale * jnp.exp(edge)
            whole = pick(sums, first + i * BLOCK + last)
            far = jnp.where(block == i, inside, far + whole)
            edge = edge + whole
        whole_ref[...] = jnp.exp(edge)
        return far

    def _seen(self, starts: list) -> jax.Array:
        """[8, 128 tokens], more than 0 where a head sees the state before the chunk."""
        until, seen = jnp.ones_like(starts[0]), []
        for start, (*_, whole_ref) in zip(starts, self.tables, strict=True):
            most = jnp.max(until * start, axis=0, keepdims=True)
            most = jnp.broadcast_to(most, (BLOCK, LANES))
            seen.append(jnp.maximum(most, pltpu.roll(most, self.span, 1)) if self.count == 2 else most)
            until = until * whole_ref[...]
        return join(seen)

    def seen(self) -> jax.Array:
        """[128, 128], more than 0 where the state before the chunk is seen; of a mirrored one."""
        tile, first = self._others()
        lane = tile.start + first + self.count * self.rows
        return jnp.broadcast_to(self.columns_ref[:, lane : lane + 1], (CHUNK, LANES))

    def whole(self, p) -> list[jax.Array]:
        """exp(sum over the span), [1, 128] for each span, in the lanes of each head."""
        return [whole_ref[pl.ds(p, 1), :] for *_, whole_ref in self.tables]

    def _lanes(self, p) -> jax.Array:
        lane = jax.lax.broadcasted_iota(jnp.int32, (BLOCK, LANES), 1)
        return p + (lane >> 6) * self.rows if self.count == 2 else p + 0 * lane

    def other(self, p) -> jax.Array:
        """[128, 128] from the next token to its span's end (scale times from its span's start to the token)."""
        tile, first = self._others()
        lanes = self._lanes(p) + first
        blocks = [self.columns_ref[i : i + BLOCK, tile] for i in range(0, CHUNK, BLOCK)]
        return jnp.concatenate([pick(block, lanes) for block in blocks], axis=0)

    def edges(self, p, span: int) -> jax.Array:
        """[span, 128]: scale times the decay from its start to the token (from the next token to its end)."""
        _, edge_ref, *_ = self.tables[span]
        lanes, edges = self._lanes(p), []
        for i in range(self.span // BLOCK):
            start = span * self.span + i * BLOCK
            near = pick(self.columns_ref[start : start + BLOCK, :LANES], lanes)
            edges.append(near * edge_ref[pl.ds(i * self.rows + p, 1), :])
        return jnp.concatenate(edges, axis=0)

    def blocks(self, p, span: int) -> Rows:
        """For every 16 rows of a span: where they are in it, their weights [16, 128], and `edge` [16, 128].

        The weights are the decays from s to t, 0 unless s <= t; edge is scale times the decay from the span's start to
        the row's token (from the next token to the span's end) in the lanes of each head.
        """
        far_ref, edge_ref, within_ref, _ = self.tables[span]
        within = within_ref[pl.ds(p, BLOCK, stride=self.rows), :]
        lane = jax.lax.broadcasted_iota(jnp.int32, (BLOCK, LANES), 1)
        lanes, block = self._lanes(p), (lane & (self.span - 1)) >> 3
        for first in range(0, self.span // BLOCK, 2):
            weights, edges = [], []
            for i in (first, first + 1):
                start = span * self.span + i * BLOCK
                near, row = pick(self.columns_ref[start : start + BLOCK, :LANES], lanes), pl.ds(i * self.rows + p, 1)
                weights.append(jnp.where(block == i, within, near * far_ref[row, :]))
                edges.append(near * edge_ref[row, :])
            rows = slice(first * BLOCK, (first + 2) * BLOCK)
            yield rows, jnp.concatenate(weights, axis=0), jnp.concatenate(edges, axis=0)


def _one_tile(heads: int) -> bool:
    """Whether both columns of every head, and the last one, fit side by side in a register."""
    return 2 * heads + BLOCK <= LANES


def _to_edge(g, mirrored: bool) -> jax.Array:
    """Sums from the start of each block of eight to the token (from the next token to the block's end)."""
    place = jax.lax.broadcasted_iota(jnp.int32, g.shape, 1) & (BLOCK - 1)
    if mirrored:
        g = jnp.where(place < BLOCK - 1, pltpu.roll(g, LANES - 1, 1), 0.0)
    for size in (1, 2, 4):
        inside = place + size < BLOCK if mirrored else place >= size
        g = g + jnp.where(inside, pltpu.roll(g, LANES - size if mirrored else size, 1), 0.0)
    return g


def pick(x, lanes) -> jax.Array:
    """x[i, lanes[i, j]] of x [n, 128]."""
    return jnp.take_along_axis(x, lanes, axis=1, mode="promise_in_bounds")


def join(parts: list[jax.Array]) -> jax.Array:
    """The lanes of each head, or of each span, from its own part, [n, 128] each; a single part is as it is."""
    if len(parts) == 1:
        return parts[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 1)
    return jnp.where(lane < LANES // 2, parts[0], parts[1])


def apart(x, count: int) -> jax.Array:
    """x [n, (heads, width)] once per head: [(heads, n), (heads, width)], zero in the lanes of the other heads."""
    if count == 1:
        return x
    wide = x.astype(jnp.float32)  # as it comes, bfloat16 would be brought into another layout in memory
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    parts = [jnp.where((lane >> 6) == n, wide, 0.0) for n in range(count)]
    return jnp.concatenate(parts, axis=0).astype(x.dtype)
