"""Self-attention as Pallas TPU kernels: the forward pass, and what it shares with the backward pass.

A grid step holds one block of queries of every query head of a key head and one block of keys. Blocks outside
the band of causality and window are neither loaded nor computed. Within a step loops run over chunks of queries
and of keys whose scores are one matrix; only chunks on the diagonal or on the window's edge compute a mask.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.tiles import LANES, as_column, contract

VMEM_LIMIT = 16 * 2**20  # what v5e grants a kernel by default
_MAX_WIDTH = 1024
_Q_PAD, _KV_PAD = -2, -1  # documents of padding: they differ, so that padding sees no padding


class Blocks(NamedTuple):
    """Sizes: queries and keys of a grid step and of a chunk, query heads of a step, lanes of a row statistic."""

    q: int
    kv: int
    q_chunk: int
    kv_chunk: int
    heads: int
    lanes: int = LANES


def choose_blocks(time: int, ratio: int, key: int, value: int, itemsize: int) -> Blocks:
    """Sizes whose buffers fit in VMEM, for `ratio` query heads per key head of these widths.

    Returns:
      Powers of two, so that padding T to the larger block serves both, and divisions are shifts.
    """
    width = max(LANES * -(-max(key, value) // LANES), LANES)
    budget = 2048 * LANES * 2 // (width * itemsize)  # rows (query, head) of a step
    heads = max(n for n in range(1, ratio + 1) if ratio % n == 0 and (n == 1 or n * LANES <= budget))
    whole = LANES * (1 << max(0, (-(-time // LANES) - 1).bit_length()))  # T, up to a power of two
    q = min(whole, max(LANES, _power_of_two(budget // heads)), 1024)
    kv = min(whole, max(LANES, _power_of_two(budget // 2)), 1024)
    # A chunk's 512 x 512 scores are four times the register file and pass through VMEM, as spills. That hides behind
    # the matrix unit; smaller chunks spill less but wait more for it and for the reductions of a row. Static cycles of
    # the forward pass on v5e (8192 tokens, 8 heads, window 2048): 740k; 256 x 512: 836k, 512 x 256: 959k,
    # 256 x 256: 1144k, 1024 x 512: 842k, 512 x 1024: 904k.
    chunk = 512 if itemsize == 2 else 256
    return Blocks(q, kv, min(q, chunk), min(kv, chunk), heads)


def _power_of_two(n: int) -> int:
    """The largest that is not above n."""
    return 1 << (max(n, 1).bit_length() - 1)


class Band(NamedTuple):
    """Which blocks and chunks of queries and keys hold a visible score."""

    blocks: Blocks
    time: int
    window: int  # T, up to whole blocks, where nothing is out of the window

    @property
    def padded(self) -> int:
        """T, up to whole blocks."""
        block = max(self.blocks.q, self.blocks.kv)
        return -(-self.time // block) * block

    @property
    def q_blocks(self) -> int:
        """How many blocks the queries fill."""
        return self.padded // self.blocks.q

    @property
    def kv_blocks(self) -> int:
        """How many blocks the keys fill."""
        return self.padded // self.blocks.kv

    def kv_range(self, i) -> tuple[Any, Any]:
        """First and last block of keys that query block i meets."""
        start = i * self.blocks.q
        first = _floor(_max(start - self.window + 1, 0), self.blocks.kv)
        return first, _floor(start + self.blocks.q - 1, self.blocks.kv)

    def q_range(self, j) -> tuple[Any, Any]:
        """First and last block of queries that key block j meets."""
        start = j * self.blocks.kv
        last = _floor(start + self.blocks.kv + self.window - 2, self.blocks.q)
        return _floor(start, self.blocks.q), _min(last, self.q_blocks - 1)

    def q_diagonal(self, j) -> Any:
        """Last block of queries whose own key, the last that they see, lies in key block j."""
        return _floor((j + 1) * self.blocks.kv - 1, self.blocks.q)

    def kv_steps(self) -> int:
        """The most blocks of keys that any query block meets."""
        return max(last - first + 1 for first, last in map(self.kv_range, range(self.q_blocks)))

    def q_steps(self) -> int:
        """The most blocks of queries that any key block meets."""
        return max(last - first + 1 for first, last in map(self.q_range, range(self.kv_blocks)))

    def kv_chunks(self, q_start, kv_start) -> tuple[Any, Any, Any, Any]:
        """Of the key block at `kv_start`: chunks [a, d) that the query chunk meets, [b, c) without a mask."""
        size, count = self.blocks.kv_chunk, self.blocks.kv // self.blocks.kv_chunk
        q_last = q_start + self.blocks.q_chunk - 1
        a = _floor(q_start - self.window + 1 - kv_start, size)
        b = -_floor(self.window - 1 - q_last + kv_start, size)
        c = _floor(q_start + 1 - kv_start, size)
        d = jnp.where(q_start < self.time, _floor(q_last - kv_start, size) + 1, 0)
        return _ordered(a, b, c, d, count)

    def q_chunks(self, kv_start, q_start) -> tuple[Any, Any, Any, Any]:
        """Of the query block at `q_start`: chunks [a, d) that the key chunk meets, [b, c) without a mask."""
        size, count = self.blocks.q_chunk, self.blocks.q // self.blocks.q_chunk
        kv_last = kv_start + self.blocks.kv_chunk - 1
        a = _floor(kv_start - q_start, size)
        b = -_floor(q_start - kv_last, size)
        c = _floor(kv_start + self.window - q_start, size)
        last = _min(kv_last + self.window, self.time) - 1
        d = _floor(last - q_start, size) + 1
        return _ordered(a, b, c, d, count)


def _ordered(a, b, c, d, count):
    d = jnp.clip(d, 0, count)
    a = jnp.clip(a, 0, d)
    b = jnp.clip(b, a, d)
    return a, b, jnp.clip(c, b, d), d


def _floor(a, size):
    return a >> (size.bit_length() - 1)  # sizes are powers of two


def _max(a, b):
    return max(a, b) if isinstance(a, int) else jnp.maximum(a, b)


def _min(a, b):
    return min(a, b) if isinstance(a, int) else jnp.minimum(a, b)


class Scores(NamedTuple):
    """How scores come from products: what every kernel needs beside its blocks."""

    band: Band
    scale: float
    soft_cap: float | None
    documents: bool
    windowed: bool

    def scores(self, q, k) -> jax.Array:
        """float32[rows of q, rows of k], bounded but not masked."""
        s = contract(q, k, 1, 1) * self.scale
        return s if self.soft_cap is None else self.soft_cap * jnp.tanh(s / self.soft_cap)

    def hide(self, s, q_start, kv_start, q_documents, kv_documents, q_axis: int) -> jax.Array:
        """Scores with -inf where the query, along `q_axis`, does not see the key."""
        distance = jax.lax.broadcasted_iota(jnp.int32, s.shape, q_axis)
        distance -= jax.lax.broadcasted_iota(jnp.int32, s.shape, 1 - q_axis)
        offset = kv_start - q_start
        seen = distance >= offset
        if self.windowed:
            seen &= distance < offset + self.band.window
        if self.documents:
            seen &= q_documents == kv_documents
        return jnp.where(seen, s, -jnp.inf)

    def loop(self, bounds, body: Callable[[Any, bool], None]) -> None:
        """Calls `body(chunk, masked)` for the chunks of `Band.kv_chunks` or `Band.q_chunks`."""
        a, b, c, d = bounds
        for start, stop, masked in ((a, d, True),) if self.documents else ((a, b, True), (b, c, False), (c, d, True)):
            jax.lax.fori_loop(start, stop, functools.partial(_call, body, masked), None)

    def where_documents_meet(self, documents, q_start, kv_start) -> Callable[[Callable[[], None]], None]:
        """Decorator that calls a function if the chunks can hold a document in common."""
        if not self.documents:
            return lambda body: body()
        q_range, kv_range = documents[2:]
        q = _floor(q_start, self.band.blocks.q_chunk)
        kv = _floor(kv_start, self.band.blocks.kv_chunk)
        return pl.when((q_range[0, 0, q] <= kv_range[0, 1, kv]) & (kv_range[0, 0, kv] <= q_range[0, 1, q]))


def _call(body, masked, chunk, _):
    body(chunk, masked)


def widen(x, width: int) -> jax.Array:
    """A row statistic [rows, lanes], equal along its lanes, as [rows, width]."""
    copies = -(-width // x.shape[1])
    return jnp.concatenate([x] * copies, axis=1)[:, :width] if copies > 1 else x[:, :width]


def as_row(column) -> jax.Array:
    """float32[n, lanes], every lane the same -> [1, n]."""
    # Of each square keep the diagonal: cheaper than to transpose what is the same in every lane.
    lanes = column.shape[1]
    index = [jax.lax.broadcasted_iota(jnp.int32, (lanes, lanes), axis) for axis in (0, 1)]
    squares = [column[n : n + lanes] for n in range(0, column.shape[0], lanes)]
    diagonals = [jnp.where(index[0] == index[1], square, 0.0) for square in squares]
    return jnp.concatenate([jnp.sum(x, axis=0, keepdims=True) for x in diagonals], axis=1)


class Layout(NamedTuple):
    """Arrays as the kernels take them: [B, H / heads, heads, T, width] of queries, [B, G, T, width] of keys."""

    scores: Scores
    groups: int
    documents: tuple[jax.Array, ...]  # of queries and keys, int32[B, 1, T], and their ranges; or nothing

    @property
    def band(self) -> Band:
        """Which blocks meet."""
        return self.scores.band

    def queries(self, x, real) -> jax.Array:
        """[B, T, H, width] in that layout, zero at padding."""
        x = self.pad(_clean(x, real)).transpose(0, 2, 1, 3)
        return x.reshape(x.shape[0], -1, self.band.blocks.heads, *x.shape[2:])

    def rows(self, x) -> jax.Array:
        """[B, T, H] -> [B, H / heads, heads, T]."""
        x = self.pad(x).transpose(0, 2, 1)
        return x.reshape(x.shape[0], -1, self.band.blocks.heads, x.shape[2])

    def keys(self, x, real) -> jax.Array:
        """[B, T, G, width] in that layout, zero at padding."""
        return self.pad(_clean(x, real)).transpose(0, 2, 1, 3)

    def pad(self, x, fill=0) -> jax.Array:
        """Axis 1 up to whole blocks."""
        extra = self.band.padded - x.shape[1]
        return jnp.pad(x, [(0, extra if axis == 1 else 0) for axis in range(x.ndim)], constant_values=fill)

    def from_queries(self, x) -> jax.Array:
        """The inverse of `queries`."""
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
        return x.transpose(0, 2, 1, 3)[:, : self.band.time]

    def from_rows(self, x) -> jax.Array:
        """The inverse of `rows`."""
        return x.reshape(x.shape[0], -1, x.shape[3]).transpose(0, 2, 1)[:, : self.band.time]

    def from_keys(self, x) -> jax.Array:
        """The inverse of `keys`."""
        return x.transpose(0, 2, 1, 3)[:, : self.band.time]


def _clean(x, documents):
    # Zero times NaN is NaN: what padding holds must be gone before a product with a zero weight.
    return x if documents is None else jnp.where((documents >= 0)[:, :, None, None], x, 0)


def layout(q, k, v, q_documents, kv_documents, *, window, scale, soft_cap, blocks: Blocks | None) -> Layout:
    """The layout of one call; `blocks` None chooses them."""
    time, ratio = q.shape[1], q.shape[2] // k.shape[2]
    blocks = blocks or choose_blocks(time, ratio, q.shape[3], v.shape[3], q.dtype.itemsize)
    band = Band(blocks, time, time)
    windowed = window is not None and window < time
    band = band._replace(window=window if windowed else band.padded)
    scores = Scores(band, scale, soft_cap, q_documents is not None, windowed)
    plain = Layout(scores, k.shape[2], ())
    if q_documents is None:
        return plain
    sides = ((q_documents, _Q_PAD), (kv_documents, _KV_PAD))
    marks = tuple(plain.pad(jnp.where(x >= 0, x, fill), fill)[:, None] for x, fill in sides)
    ranges = (_ranges(x, chunk) for x, chunk in zip(marks, (blocks.q_chunk, blocks.kv_chunk), strict=True))
    return plain._replace(documents=(*marks, *ranges))


def _ranges(documents, chunk: int) -> jax.Array:
    """int32[B, 2, chunks]: the least and greatest document of a chunk; where all is padding, least > greatest."""
    chunks = documents.reshape(documents.shape[0], -1, chunk)
    least = jnp.where(chunks >= 0, chunks, jnp.iinfo(jnp.int32).max)
    return jnp.stack([least.min(axis=-1), chunks.max(axis=-1)], axis=1)


def supports(q, k, v, q_positions, *rest, **options) -> None:
    """Raises `UnsupportedError` for what neither the forward nor the backward kernel serves."""
    if q_positions is not None:
        raise UnsupportedError(
            "attention: mosaic_tpu does not serve q_positions and kv_positions: its kernels skip blocks by index; "
            "leave them out for self-attention, or use 'xla'"
        )
    if q.dtype == jnp.float16:
        raise UnsupportedError("attention: mosaic_tpu does not serve q, k and v of dtype float16: use bfloat16")
    if max(q.shape[3], v.shape[3]) > _MAX_WIDTH:
        raise UnsupportedError(
            f"attention: mosaic_tpu does not serve widths K={q.shape[3]}, V={v.shape[3]} of q, k and v: its blocks "
            f"fit in VMEM up to {_MAX_WIDTH}"
        )


def query_specs(at: Layout, ratio: int) -> tuple[Callable, Callable, list[pl.BlockSpec]]:
    """Block specs for the grid (B, H / heads, query blocks, key steps).

    Returns:
      (spec of queries and spec of keys by width, specs of `at.documents`).
    """
    blocks, steps_per_group = at.band.blocks, ratio // at.band.blocks.heads

    def kv_index(i, step):
        first, last = at.band.kv_range(i)
        return jnp.minimum(first + step, last)  # the block of the step before is not loaded again

    def q_spec(*width):
        zeros = (0,) * len(width)
        return pl.BlockSpec((1, 1, blocks.heads, blocks.q, *width), lambda b, h, i, step: (b, h, 0, i, *zeros))

    def kv_spec(width):
        return pl.BlockSpec(
            (1, 1, blocks.kv, width),
            lambda b, h, i, step: (b, jax.lax.div(h, steps_per_group), kv_index(i, step), 0),
        )

    return q_spec, kv_spec, document_specs(at, lambda i, step: i, kv_index)


def document_specs(at: Layout, q_index: Callable[..., Any], kv_index: Callable[..., Any]) -> list[pl.BlockSpec]:
    """Block specs of `at.documents`; `q_index` and `kv_index` give blocks from the third and last grid index."""
    if not at.documents:
        return []
    return [
        pl.BlockSpec((1, 1, at.band.blocks.q), lambda b, h, block, *step: (b, 0, q_index(block, step[-1]))),
        pl.BlockSpec((1, 1, at.band.blocks.kv), lambda b, h, block, *step: (b, 0, kv_index(block, step[-1]))),
        *(pl.BlockSpec((1, *x.shape[1:]), lambda b, *_: (b, 0, 0), memory_space=pltpu.SMEM) for x in at.documents[2:]),
    ]


def for_row_chunks(blocks: Blocks, body: Callable[[Any, Any], None]) -> None:
    """Calls `body(head, first query)` for every chunk of queries of a step."""
    count = blocks.q // blocks.q_chunk

    def step(c, _):
        body(jax.lax.div(c, count), pl.multiple_of(jax.lax.rem(c, count) * blocks.q_chunk, blocks.q_chunk))

    jax.lax.fori_loop(0, blocks.heads * count, step, None)


def _forward_kernel(scores: Scores, *refs):
    columns = None
    if scores.documents:
        *refs, columns = refs
    *documents, q_ref, k_ref, v_ref, y_ref, lse_ref, peak_ref, total_ref, acc_ref = refs
    band, blocks = scores.band, scores.band.blocks
    i, step = pl.program_id(2), pl.program_id(3)
    first, last = band.kv_range(i)
    j = first + step

    @pl.when(step == 0)
    def _():
        peak_ref[...] = jnp.full(peak_ref.shape, -jnp.inf, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
        if columns is not None:
            columns[...] = as_column(documents[0][0], blocks.lanes)

    def row_chunk(head, row):
        rows = pl.ds(row, blocks.q_chunk)
        q_start = i * blocks.q + row

        def chunk(c, masked):
            column = pl.multiple_of(c * blocks.kv_chunk, blocks.kv_chunk)
            keys = pl.ds(column, blocks.kv_chunk)

            @scores.where_documents_meet(documents, q_start, j * blocks.kv + column)
            def _():
                v = v_ref[0, 0, keys]
                s = scores.scores(q_ref[0, 0, head, rows], k_ref[0, 0, keys])
                if masked:
                    marks = (0, 0)
                    if columns is not None:
                        marks = (widen(columns[rows], s.shape[1]), documents[1][0, :, keys])
                    s = scores.hide(s, q_start, j * blocks.kv + column, *marks, q_axis=0)
                old_peak = peak_ref[head, rows]
                peak = jnp.maximum(old_peak, jnp.max(s, axis=1, keepdims=True))
                peak_ref[head, rows] = peak
                shift = jnp.where(peak == -jnp.inf, 0.0, peak) if masked else peak
                p, decay = jnp.exp(s - widen(shift, s.shape[1])), jnp.exp(old_peak - shift)
                # Sums stay apart by lane until the end: adding lanes of a register is slow.
                parts = [p[:, n : n + blocks.lanes] for n in range(0, s.shape[1], blocks.lanes)]
                total_ref[head, rows] = total_ref[head, rows] * decay + sum(parts[1:], parts[0])
                pv = contract(p.astype(v.dtype), v, 1, 0)
                acc_ref[head, rows] = acc_ref[head, rows] * widen(decay, v.shape[1]) + pv

        scores.loop(band.kv_chunks(q_start, j * blocks.kv), chunk)

    @pl.when(j <= last)
    def _():
        for_row_chunks(blocks, row_chunk)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        for head in range(blocks.heads):
            total = jnp.broadcast_to(jnp.sum(total_ref[head], axis=1, keepdims=True), total_ref.shape[1:])
            share = 1.0 / jnp.where(total > 0, total, 1.0)
            y_ref[0, 0, head] = (acc_ref[head] * widen(share, acc_ref.shape[2])).astype(y_ref.dtype)
            # Where nothing is seen the peak is -inf; where something is, the total is at least 1.
            lse_ref[0, 0, pl.ds(head, 1)] = as_row(peak_ref[head]) + jnp.log(jnp.maximum(as_row(total), 1.0))


def forward(
    q,
    k,
    v,
    q_positions,
    kv_positions,
    q_documents,
    kv_documents,
    *,
    window,
    scale,
    soft_cap,
    blocks: Blocks | None = None,
):
    """Arguments as in `attention`, all given; returns (y [B, T, H, V] in q.dtype, lse float32[B, T, H])."""
    at = layout(q, k, v, q_documents, kv_documents, window=window, scale=scale, soft_cap=soft_cap, blocks=blocks)
    band, blocks = at.band, at.band.blocks
    (batch, _, heads, key), value = q.shape, v.shape[3]
    q_spec, kv_spec, documents = query_specs(at, heads // k.shape[2])
    lanes = pltpu.VMEM((blocks.heads, blocks.q, blocks.lanes), jnp.float32)
    scratch = [lanes, lanes, pltpu.VMEM((blocks.heads, blocks.q, value), jnp.float32)]
    if q_documents is not None:
        scratch.append(pltpu.VMEM((blocks.q, blocks.lanes), jnp.int32))
    outer = (batch, heads // blocks.heads, blocks.heads, band.padded)
    y, lse = pl.pallas_call(
        functools.partial(_forward_kernel, at.scores),
        grid=(batch, heads // blocks.heads, band.q_blocks, band.kv_steps()),
        in_specs=[*documents, q_spec(key), kv_spec(key), kv_spec(value)],
        out_specs=[q_spec(value), q_spec()],
        out_shape=[jax.ShapeDtypeStruct((*outer, value), q.dtype), jax.ShapeDtypeStruct(outer, jnp.float32)],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret.parameters(),
        name="attention_forward",
    )(*at.documents, at.queries(q, q_documents), at.keys(k, kv_documents), at.keys(v, kv_documents))
    return at.from_queries(y), at.from_rows(lse)
