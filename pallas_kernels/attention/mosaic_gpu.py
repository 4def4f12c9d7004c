"""Self-attention as Mosaic GPU kernels for Hopper: the forward pass, and what it shares with the backward pass.

Never run on a GPU: interpreted and lowered only.

A block of threads holds a tile of the queries of one head, 64 per consumer warpgroup; another warpgroup copies the
keys and values of the tile's band, block by block, into a ring of shared memory. Blocks outside the band of causality
and window, and with documents those before the first and after the last that share a document with the tile, are not
loaded. Only blocks on the diagonal or on the window's edge compute a mask.

XLA cuts float32 arrays into the two parts that the matrix units take; weights and their gradients are cut in registers.

Compile with CUDA 12.9.1 or later, or before 12.8: JAX refuses to run its own causal kernel of this form with those
between, whose ptxas miscompiles the mask.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import interpret
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.wgmma import (
    COLUMNS,
    MATRIX,
    ROWS,
    SMEM_BYTES,
    Stream,
    across,
    full,
    indices,
    load,
    matrix_ref,
    multiply_parts,
    parts,
    split,
    split_array,
    split_ref,
)

CONSUMERS = 2  # warpgroups that compute
LOG2_E = math.log2(math.e)  # exponentials of two are what the chip has: scores are kept in units of log 2
MAX_WIDTH = 256  # of 16-bit numbers: a warpgroup's 64 rows of output stay in registers; half of it of float32
_SMEM_SLACK = 16 * 1024  # barriers, and every buffer up to 1 KiB
_Q_PAD, _KV_PAD = -2, -1  # documents of padding: they differ, so that padding sees no padding


class Blocks(NamedTuple):
    """Rows that a consumer warpgroup holds, rows of the other side that a step loads, steps in flight."""

    rows: int
    step: int
    slots: int

    @property
    def tile(self) -> int:
        """Rows that a block of threads holds."""
        return CONSUMERS * self.rows


def choose_blocks(held: int, streamed: int, most: int) -> Blocks:
    """Sizes whose buffers fit in shared memory.

    Steps are of 64 rows at least, what a matrix product sums over at once; two in flight where they fit.

    Args:
      held: bytes that stay for one row of the tile.
      streamed: bytes that one row of a step brings.
      most: the most rows of a step; what it computes for them must fit in registers.
    """
    rows = 64
    spare = SMEM_BYTES - _SMEM_SLACK - CONSUMERS * rows * held
    step = 128 if most >= 128 and 2 * 128 * streamed <= spare else 64
    return Blocks(rows, step, min(4, spare // (step * streamed)))


def forward_blocks(key: int, value: int, size: int = 2) -> Blocks:
    """Blocks of the forward kernel for keys and values of these widths, of `size` bytes a number."""
    # Queries, whose place 16-bit output takes where it has their width (float32 needs none), lse, document.
    held = size * key + (0 if key == value or size == 4 else size * value) + 8
    return choose_blocks(held, size * (key + value) + 4, 128 if max(key, value) <= 128 else 64)


class Band(NamedTuple):
    """Which steps of the other side a tile meets: [a, d), of them [b, c) without a mask."""

    blocks: Blocks
    length: int  # T, up to whole tiles and steps
    window: int  # `length` where nothing is out of the window

    @property
    def windowed(self) -> bool:
        """Whether the window hides anything."""
        return self.window < self.length

    def of_queries(self, start) -> tuple[Any, Any, Any, Any]:
        """Steps of keys that the tile of queries at `start` meets."""
        after = start + self.blocks.tile
        a = b = jnp.int32(0)
        if self.windowed:
            a = self._step(jnp.maximum(start - self.window + 1, 0))
            b = self._step(jnp.maximum(after - self.window, 0) + self.blocks.step - 1)
        c, d = self._step(start + 1), self._step(after - 1) + 1
        return a, b, jnp.maximum(c, b), d

    def of_keys(self, start) -> tuple[Any, Any, Any, Any]:
        """Steps of queries that the tile of keys at `start` meets."""
        after = start + self.blocks.tile
        a, b = self._step(start), self._step(after - 1 + self.blocks.step - 1)
        c = d = jnp.int32(self.length // self.blocks.step)
        if self.windowed:
            c = jnp.maximum(self._step(start + self.window), b)
            d = self._step(jnp.minimum(after - 1 + self.window, self.length) - 1) + 1
            c = jnp.minimum(c, d)
        return a, jnp.minimum(b, d), c, d

    def _step(self, index):
        return jnp.right_shift(index, self.blocks.step.bit_length() - 1)  # sizes are powers of two


def bounded(product, scale: float, soft_cap: float | None) -> tuple[jax.Array, jax.Array | None]:
    """Scores in units of log 2 from the products of queries and keys, and the tanh that bounds them."""
    if soft_cap is None:
        return product * (scale * LOG2_E), None
    # The chip's own tanh has 11 bits; this one is exact to a float32 epsilon of the bound.
    e = jnp.exp2(product * (2 * scale * LOG2_E / soft_cap))
    tanh = 1.0 - 2.0 / (1.0 + e)
    return tanh * (soft_cap * LOG2_E), tanh


class Softmax(NamedTuple):
    """An online softmax of rows: sums of weighted values, the largest score, the sum of weights (arXiv:1805.02867)."""

    acc: jax.Array
    peak: jax.Array
    total: jax.Array

    @classmethod
    def start(cls, rows: int, width: int) -> "Softmax":
        """Of no scores."""
        return cls(full((rows, width), 0.0, MATRIX), full((rows,), -jnp.inf, ROWS), full((rows,), 0.0, ROWS))

    def update(self, s, attend: Callable[[jax.Array, jax.Array], jax.Array], *, masked: bool) -> "Softmax":
        """With scores s; `attend(p, acc)` adds the values weighted by p to acc."""
        peak = jnp.maximum(self.peak, jnp.max(s, axis=1))
        shift = jnp.where(peak == -jnp.inf, 0.0, peak) if masked else peak
        p, decay = jnp.exp2(s - across(shift, s.shape, 0)), jnp.exp2(self.peak - shift)
        total = self.total * decay + jnp.sum(p, axis=1)
        return Softmax(attend(p, self.acc * across(decay, self.acc.shape, 0)), peak, total)

    def finish(self) -> tuple[jax.Array, jax.Array]:
        """The attended values and the log-sum-exp, 0 and -inf where nothing is seen."""
        share = 1.0 / jnp.where(self.total > 0, self.total, 1.0)
        y = self.acc * across(share, self.acc.shape, 0)
        # Where nothing is seen the peak is -inf; where something is, the total is at least 1.
        return y, self.peak * (1 / LOG2_E) + jnp.log(jnp.maximum(self.total, 1.0))


class Scores(NamedTuple):
    """How scores come from products: what every kernel needs beside its blocks."""

    band: Band
    scale: float
    soft_cap: float | None
    documents: bool

    def scores(self, product) -> tuple[jax.Array, jax.Array | None]:
        """Scores in units of log 2, bounded but not masked, and the tanh that bounds them."""
        return bounded(product, self.scale, self.soft_cap)

    def hide(self, s, q_start, kv_start, q_documents, kv_documents, q_axis: int) -> jax.Array:
        """Scores with -inf where the query, along `q_axis`, does not see the key."""
        distance = indices(s.shape, q_axis) - indices(s.shape, 1 - q_axis) + (q_start - kv_start)
        seen = distance >= 0
        if self.band.windowed:
            seen &= distance < self.band.window
        if self.documents:
            seen &= across(q_documents, s.shape, q_axis) == across(kv_documents, s.shape, 1 - q_axis)
        return jnp.where(seen, s, -jnp.inf)

    def score_grad(self, p, dp, delta, tanh) -> jax.Array:
        """The gradient of the product q . k without the factor `scale`."""
        ds = p * (dp - delta)
        return ds if tanh is None else ds * (1.0 - tanh * tanh)

    def narrow(self, bounds, documents, batch, tile) -> tuple[Any, Any, Any, Any]:
        """`bounds` of a tile, with documents only the steps that share one with it, all of them masked."""
        if not documents:
            return bounds
        spans = documents[2]
        first = jnp.maximum(bounds[0], spans[batch, tile, 0])
        stop = jnp.maximum(first, jnp.minimum(bounds[3], spans[batch, tile, 1]))
        return first, stop, stop, stop

    def loop(self, bounds, body: Callable[..., Any], carry: Any) -> Any:
        """Folds `body(step, carry, masked)` over the steps of `Band.of_queries` or `Band.of_keys`."""
        a, b, c, d = bounds
        for start, stop, masked in ((a, b, True), (b, c, False), (c, d, True)):
            if start is not stop:
                carry = jax.lax.fori_loop(start, stop, functools.partial(body, masked=masked), carry)
        return carry


class Layout(NamedTuple):
    """Arrays as the kernels take them: [B, T, heads, width], T up to whole tiles and zero at padding."""

    scores: Scores
    time: int
    documents: tuple[jax.Array, ...]  # of queries and of keys, int32[B, T]; or nothing

    def rows(self, x, documents) -> jax.Array:
        """[B, T, heads, width] as the kernels take it: [B, length, heads, parts * width]."""
        # Zero times NaN is NaN: what padding holds must be gone before a product with a zero weight.
        x = x if documents is None else jnp.where((documents >= 0)[:, :, None, None], x, 0)
        return split(self.pad(x))

    def statistic(self, x) -> jax.Array:
        """[B, T, H] -> [B, H, T]."""
        return self.pad(x).transpose(0, 2, 1)

    def pad(self, x, fill=0) -> jax.Array:
        """Axis 1 up to whole tiles."""
        extra = self.scores.band.length - x.shape[1]
        return jnp.pad(x, [(0, extra if axis == 1 else 0) for axis in range(x.ndim)], constant_values=fill)

    def spans(self, *, by_query: bool) -> tuple[jax.Array, ...]:
        """int32[B, tiles, 2]: first and stop of the steps that share a document with a tile; or nothing."""
        if not self.documents:
            return ()
        blocks = self.scores.band.blocks
        held, streamed = self.documents if by_query else self.documents[::-1]
        (low, high), (least, greatest) = _ranges(held, blocks.tile), _ranges(streamed, blocks.step)
        meet = (low[:, :, None] <= greatest[:, None]) & (least[:, None] <= high[:, :, None])
        first = jnp.argmax(meet, axis=-1)
        stop = jnp.where(jnp.any(meet, axis=-1), meet.shape[-1] - jnp.argmax(meet[..., ::-1], axis=-1), first)
        return (jnp.stack([first, stop], axis=-1).astype(jnp.int32),)


def _ranges(documents, size: int) -> tuple[jax.Array, jax.Array]:
    """Least and greatest document of each `size` tokens, [B, T / size]; where all is padding, least > greatest."""
    blocks = documents.reshape(documents.shape[0], -1, size)
    return jnp.where(blocks >= 0, blocks, jnp.iinfo(jnp.int32).max).min(axis=-1), blocks.max(axis=-1)


def layout(time, q_documents, kv_documents, blocks: Blocks, *, window, scale, soft_cap) -> Layout:
    """The layout of one call of one kernel."""
    size = max(blocks.tile, blocks.step)
    length = -(-time // size) * size
    band = Band(blocks, length, window if window is not None and window < time else length)
    plain = Layout(Scores(band, scale, soft_cap, q_documents is not None), time, ())
    if q_documents is None:
        return plain
    sides = ((q_documents, _Q_PAD), (kv_documents, _KV_PAD))
    return plain._replace(documents=tuple(plain.pad(jnp.where(x >= 0, x, fill), fill) for x, fill in sides))


def supports(q, k, v, q_positions, *rest, **options) -> None:
    """Raises `UnsupportedError` for what neither the forward nor the backward kernels serve."""
    widths = q.shape[3], v.shape[3]
    if q_positions is not None:
        raise UnsupportedError(
            "attention: mosaic_gpu does not serve q_positions and kv_positions: its kernels skip blocks by index; "
            "leave them out for self-attention, or use 'xla'"
        )
    most = MAX_WIDTH // parts(q.dtype)
    if any(width % 64 or width > most for width in widths):
        raise UnsupportedError(
            f"attention: mosaic_gpu does not serve widths K={widths[0]}, V={widths[1]} of q, k and v in {q.dtype}: its "
            f"tiles take multiples of 64 up to {most}; use 'xla'"
        )


def kernel(
    name: str,
    body: Callable[..., None],
    out_type: Any,
    scratch: Any,
    grid: dict[str, int],
    consumers: int = CONSUMERS,
) -> Callable[..., Any]:
    """`body` as a kernel of `consumers` warpgroups that compute and one that copies."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
        interpret=interpret.parameters(),
    )


def roles(consume: Callable[[Any], None], produce: Callable[[], None], consumers: int = CONSUMERS) -> None:
    """Has consumer warpgroups call `consume(index)` and the last one `produce()`."""
    index = jax.lax.axis_index("warpgroup")

    def set_registers(count, action):
        if consumers > 1:  # two warpgroups have all that a thread can address
            plgpu.set_max_registers(count, action=action)

    @pl.when(index < consumers)
    def _():
        set_registers(232, "increase")
        consume(index)

    @pl.when(index == consumers)
    def _():
        set_registers(40, "decrease")
        produce()


def copy_all(pairs, barrier) -> None:
    """Starts copies (source, destination) that arrive at one barrier."""
    for source, destination in pairs:
        plgpu.copy_gmem_to_smem(source, destination, barrier)


def write(*outputs: tuple[jax.Array, Any, Any]) -> None:
    """Writes (array in registers, reference to global memory, place in shared memory or None) triples."""
    for x, ref, place in outputs:
        if place is None:  # four threads write 32 bytes of a row at once
            ref[...] = x.astype(ref.dtype)
        else:
            place[...] = x.astype(place.dtype)
    plgpu.commit_smem()
    for _, ref, place in outputs:
        if place is not None:
            plgpu.copy_smem_to_gmem(place, ref)
    plgpu.wait_smem_to_gmem(0)


def stream_barriers(slots: int, copies: int, readers: int = CONSUMERS) -> tuple[Any, Any]:
    """The barriers of a `Stream` whose steps are so many copies, each read by so many warpgroups."""
    return (
        plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
        plgpu.Barrier(num_arrivals=readers, num_barriers=slots),
    )


def _forward_kernel(scores: Scores, ratio: int, *refs):
    *inputs, y_ref, lse_ref, q_smem, k_smem, v_smem, y_smem, lse_smem, marks, held, full_, free = refs
    q_ref, k_ref, v_ref, *documents = inputs
    band, blocks, count = scores.band, scores.band.blocks, parts(y_ref.dtype)
    stream = Stream(full_, free, blocks.slots)
    b, h = jax.lax.axis_index("batch"), jax.lax.axis_index("head")
    tile = band.length // blocks.tile - 1 - jax.lax.axis_index("tile")  # those with the most steps first
    bounds = scores.narrow(band.of_queries(tile * blocks.tile), documents, b, tile)
    first, stop = bounds[0], bounds[3]

    def produce():
        g = jax.lax.div(h, jnp.int32(ratio))

        def copy(step, slot, barrier):
            keys = pl.ds((first + step) * blocks.step, blocks.step)
            pairs = [(k_ref.at[b, keys, g], k_smem.at[slot]), (v_ref.at[b, keys, g], v_smem.at[slot])]
            if documents:
                pairs.append((documents[1].at[b, keys], marks[1].at[slot]))
            copy_all(pairs, barrier)

        stream.produce(stop - first, copy)

    def consume(index):
        q_start = tile * blocks.tile + index * blocks.rows
        rows = pl.ds(q_start, blocks.rows)
        q = q_smem.at[index]
        y = (q_smem if y_smem is None else y_smem).at[index] if count == 1 else None
        pairs = [(q_ref.at[b, rows, h], q)]
        if documents:
            pairs.append((documents[0].at[b, rows], marks[0].at[index]))
        copy_all(pairs, held.at[index])
        plgpu.barrier_wait(held.at[index])
        q_marks = load(marks[0].at[index], ROWS) if documents else None

        def update(step, carry, *, masked):
            slot = stream.take(step - first)
            s, _ = scores.scores(multiply_parts(split_ref(q, count), split_ref(k_smem.at[slot], count), transpose=True))
            if masked:
                kv_marks = load(marks[1].at[slot], COLUMNS) if documents else None
                s = scores.hide(s, q_start, step * blocks.step, q_marks, kv_marks, q_axis=0)

            def attend(p, acc):
                return multiply_parts(split_array(p, count, q_ref.dtype), split_ref(v_smem.at[slot], count), acc)

            carry = carry.update(s, attend, masked=masked)
            stream.release(slot)
            return carry

        out, lse = scores.loop(bounds, update, Softmax.start(blocks.rows, y_ref.shape[3])).finish()
        write((out, y_ref.at[b, rows, h], y), (lse, lse_ref.at[b, h, rows], lse_smem.at[index]))

    roles(consume, produce)


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
):
    """Arguments as in `attention`, all given; returns (y [B, T, H, V] in q.dtype, lse float32[B, T, H])."""
    (batch, time, heads, key), value = q.shape, v.shape[3]
    blocks = forward_blocks(key, value, q.dtype.itemsize)
    at = layout(time, q_documents, kv_documents, blocks, window=window, scale=scale, soft_cap=soft_cap)
    length, extra = at.scores.band.length, len(at.documents) // 2
    out_type = [
        jax.ShapeDtypeStruct((batch, length, heads, value), q.dtype),
        jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
    ]
    marks = None
    if extra:
        marks = (plgpu.SMEM((CONSUMERS, blocks.rows), jnp.int32), plgpu.SMEM((blocks.slots, blocks.step), jnp.int32))
    arrays = (at.rows(q, q_documents), at.rows(k, kv_documents), at.rows(v, kv_documents))
    dtype, (q_width, _, v_width) = arrays[0].dtype, (x.shape[3] for x in arrays)
    staged = key != value and parts(q.dtype) == 1
    scratch = [
        matrix_ref((CONSUMERS, blocks.rows, q_width), dtype),
        matrix_ref((blocks.slots, blocks.step, q_width), dtype),
        matrix_ref((blocks.slots, blocks.step, v_width), dtype),
        matrix_ref((CONSUMERS, blocks.rows, value), dtype) if staged else None,
        plgpu.SMEM((CONSUMERS, blocks.rows), jnp.float32),
        marks,
        plgpu.Barrier(num_arrivals=1 + extra, num_barriers=CONSUMERS),
        *stream_barriers(blocks.slots, 2 + extra),
    ]
    body = functools.partial(_forward_kernel, at.scores, heads // k.shape[2])
    grid = {"head": heads, "tile": length // blocks.tile, "batch": batch}
    y, lse = kernel("attention_forward", body, out_type, scratch, grid)(
        *arrays, *at.documents, *at.spans(by_query=True)
    )
    return y[:, :time], lse.transpose(0, 2, 1)[:, :time]
