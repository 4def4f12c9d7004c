"""Attention of a few queries to stored slots as a Mosaic GPU kernel for Hopper: decoding from a cache or a ring.

Never run on a GPU: interpreted and lowered only.

Forward only. Time goes into reading keys and values, each once, from where they lie; slots that are fewer than 64 or no
multiple of 8 are padded, which copies them. A block of threads holds the queries of one key head, up to 64 rows
[token, head of the group], and streams a part of the slots; two consumer warpgroups take turns. XLA merges what they
attend to. Positions, documents and the window reach the kernel as a mark per slot, whose bit t says that token t sees
it. What no token sees, as an empty slot, is cleared before the product with the weights: zero times NaN is NaN. float32
keys and values are cut into the two parts that the matrix units take once they have arrived.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import mosaic_gpu
from pallas_kernels.attention.mosaic_gpu import Softmax, bounded, copy_all, kernel, roles, stream_barriers, write
from pallas_kernels.attention.reference import visible
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.wgmma import (
    COLUMNS,
    MATRIX,
    ROWS,
    SMEM_BYTES,
    Stream,
    across,
    load,
    matrix_ref,
    multiply_parts,
    parts,
    split,
    split_array,
    split_ref,
    store,
)

MAX_ROWS = 64  # what a product of a warpgroup has
MAX_TOKENS = 31  # bits of a mark
STEP = 64  # slots that are loaded at once
MULTIPROCESSORS = 132
_TILE = 8  # slots that lie together in shared memory: copies of others start at multiples of it
_SMEM_SLACK = 16 * 1024  # barriers, and every buffer up to 1 KiB
_START = 2  # steps that pass before a block of threads computes, and while it ends


class Blocks(NamedTuple):
    """Warpgroups that compute, and steps in flight: a multiple of them, so that a slot has one reader."""

    consumers: int
    slots: int


def choose_blocks(key: int, value: int, size: int) -> Blocks:
    """Two consumers where their buffers fit in shared memory; `size` is the bytes of a stored number."""
    for consumers in (2, 1):
        cut = consumers * max(key, value) if size == 4 else 0
        spare = SMEM_BYTES - _SMEM_SLACK - size * (MAX_ROWS * key + STEP * cut)
        slots = min(4, spare // (STEP * (size * (key + value) + 4))) // consumers * consumers
        if slots >= 2:
            return Blocks(consumers, slots)
    raise ValueError(f"K={key} and V={value} in {size} bytes do not fit in shared memory")


def choose_splits(rows: int, steps: int) -> int:
    """Into how many parts the slots of each of `rows` key heads go, so that all multiprocessors end together."""
    return min(
        range(1, min(steps, MULTIPROCESSORS) + 1),
        key=lambda splits: -(-rows * splits // MULTIPROCESSORS) * (-(-steps // splits) + _START),
    )


def supports(q, k, v, q_positions, *rest, **options) -> None:
    """Raises `UnsupportedError` for what the forward kernels do not serve."""
    mosaic_gpu.supports(q, k, v, None, *rest, **options)
    time, rows = q.shape[1], q.shape[1] * q.shape[2] // k.shape[2]
    if q_positions is not None and (time > MAX_TOKENS or rows > MAX_ROWS):
        raise UnsupportedError(
            f"attention: mosaic_gpu does not serve q_positions and kv_positions with T={time}, H={q.shape[2]}, "
            f"G={k.shape[2]}: its kernel is for decoding, up to T={MAX_TOKENS} and {MAX_ROWS} queries of a key head, "
            f"here {rows}; use 'xla'"
        )


def _kernel(blocks: Blocks, steps: int, scale: float, soft_cap: float | None, *refs):
    bit_ref, mark_ref, q_ref, k_ref, v_ref, y_ref, lse_ref, *refs = refs
    bit_smem, mark_smem, q_smem, k_smem, v_smem, cut_smem, lse_smem, held, full_, free = refs
    stream, count = Stream(full_, free, blocks.slots), parts(k_ref.dtype)
    b, g, split_index = (jax.lax.axis_index(name) for name in ("batch", "head", "split"))
    share = -(-steps // (y_ref.shape[0] // blocks.consumers))
    first = split_index * share
    length = jnp.clip(steps - first, 0, share)

    def produce():
        copy_all([(bit_ref, bit_smem), (q_ref.at[b, g], q_smem)], held)

        def copy(step, slot, barrier):
            start = (first + step) * STEP
            slots = pl.ds(jnp.minimum(start, k_ref.shape[1] - STEP), STEP)
            copy_all(
                [
                    (mark_ref.at[b, pl.ds(start, STEP)], mark_smem.at[slot]),
                    (k_ref.at[b, slots, g], k_smem.at[slot]),
                    (v_ref.at[b, slots, g], v_smem.at[slot]),
                ],
                barrier,
            )

        stream.produce(length, copy)

    def consume(index):
        plgpu.barrier_wait(held)
        bits, q = load(bit_smem, ROWS), split_ref(q_smem, count)

        def cut(x):
            """The parts, in shared memory, of float32 numbers in registers."""
            refs = split_ref(cut_smem.at[index, :, : count * x.shape[1]], count)
            store(refs, x)
            plgpu.commit_smem()
            return refs

        def update(turn, carry):
            slot = stream.take(turn * blocks.consumers + index)
            k_slot, v_slot, marks = k_smem.at[slot], v_smem.at[slot], mark_smem.at[slot]
            keys = (k_slot,) if count == 1 else cut(load(k_slot, MATRIX))
            s, _ = bounded(multiply_parts(q, keys, transpose=True), scale, soft_cap)
            seen = across(load(marks, COLUMNS), s.shape, 1) & across(bits, s.shape, 0)
            s = jnp.where(seen != 0, s, -jnp.inf)

            def attend(p, acc):
                used = across(load(marks, ROWS), v_slot.shape, 0) != 0
                v = load(v_slot, MATRIX)
                v = jnp.where(used, v, jnp.zeros_like(v))
                if count == 1:
                    v_slot[...] = v
                    plgpu.commit_smem()
                values = (v_slot,) if count == 1 else cut(v)
                return multiply_parts(split_array(p, count, values[0].dtype), values, acc)

            carry = carry.update(s, attend, masked=True)
            stream.release(slot)
            return carry

        turns = jnp.maximum(length - index + blocks.consumers - 1, 0) // blocks.consumers
        carry = jax.lax.fori_loop(0, turns, update, Softmax.start(MAX_ROWS, v_ref.shape[3]))
        y, lse = carry.finish()
        part = split_index * blocks.consumers + index
        write((y, y_ref.at[part, b, g], None), (lse, lse_ref.at[part, b, g], lse_smem.at[index]))

    roles(consume, produce, blocks.consumers)


def _marks(window, q_positions, kv_positions, q_documents, kv_documents) -> jax.Array:
    """int32[B, steps * STEP]: the marks of the slots in the order in which steps load them, each slot once."""
    seen = visible(q_positions, kv_positions, q_documents, kv_documents, window)
    marks = jnp.sum(seen << jnp.arange(seen.shape[1])[:, None], axis=1, dtype=jnp.int32)
    slots = marks.shape[1]
    start = np.arange(0, slots, STEP)[:, None]
    index = np.minimum(start, slots - STEP) + np.arange(STEP)  # the last step begins before its slots
    return jnp.where(index >= start, marks[:, index], 0).reshape(len(marks), -1)


def forward(q, k, v, q_positions, kv_positions, q_documents, kv_documents, *, window, scale, soft_cap):
    """Arguments as in `attention`, positions given; returns (y [B, T, H, V] in q.dtype, lse float32[B, T, H])."""
    (batch, time, heads, key), (groups, value) = q.shape, v.shape[2:]
    ratio, dtype = heads // groups, q.dtype
    rows = time * ratio
    extra = max(STEP, -(-k.shape[1] // _TILE) * _TILE) - k.shape[1]
    if extra:
        k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (k, v))
        kv_positions, kv_documents = (
            None if x is None else jnp.pad(x, ((0, 0), (0, extra)), constant_values=-1)
            for x in (kv_positions, kv_documents)
        )
    blocks = choose_blocks(key, value, dtype.itemsize)
    steps = -(-k.shape[1] // STEP)
    splits = choose_splits(batch * groups, steps)
    partial = splits * blocks.consumers
    marks = _marks(window, q_positions, kv_positions, q_documents, kv_documents)
    index = np.arange(MAX_ROWS)
    bits = np.where(index < rows, 1 << np.minimum(index // ratio, MAX_TOKENS - 1), 0).astype(np.int32)
    real = (q_positions if q_documents is None else q_documents) >= 0
    q = jnp.where(real[:, :, None, None], q, 0).reshape(batch, time, groups, ratio, key)
    q = q.swapaxes(1, 2).reshape(batch, groups, rows, key)
    q = split(jnp.pad(q, ((0, 0), (0, 0), (0, MAX_ROWS - rows), (0, 0))))
    widest = parts(dtype) * max(key, value)
    scratch: list[Any] = [
        plgpu.SMEM((MAX_ROWS,), jnp.int32),
        plgpu.SMEM((blocks.slots, STEP), jnp.int32),
        matrix_ref((MAX_ROWS, q.shape[3]), q.dtype),
        matrix_ref((blocks.slots, STEP, key), dtype),
        matrix_ref((blocks.slots, STEP, value), dtype),
        matrix_ref((blocks.consumers, STEP, widest), q.dtype) if parts(dtype) > 1 else None,
        plgpu.SMEM((blocks.consumers, MAX_ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=2),
        *stream_barriers(blocks.slots, 3, readers=1),
    ]
    out_type = [
        jax.ShapeDtypeStruct((partial, batch, groups, MAX_ROWS, *width), jnp.float32) for width in ((value,), ())
    ]
    y, lse = kernel(
        "attention_slots",
        functools.partial(_kernel, blocks, steps, scale, soft_cap),
        out_type,
        scratch,
        {"split": splits, "head": groups, "batch": batch},
        blocks.consumers,
    )(jnp.asarray(bits), marks, q, k, v)
    y, lse = _merge(y[:, :, :, :rows], lse[:, :, :, :rows])

    def by_head(x):
        """[B, G, row, ...] -> [B, T, H, ...]."""
        x = x.reshape(batch, groups, time, ratio, *x.shape[3:])
        return x.swapaxes(1, 2).reshape(batch, time, heads, *x.shape[4:])

    return by_head(y).astype(dtype), by_head(lse)


def _merge(y, lse) -> tuple[jax.Array, jax.Array]:
    """Attentions of the same queries over disjoint sets of slots, along axis 0, as one: `merge` of many."""
    peak = jnp.max(lse, axis=0)
    sees = peak > -jnp.inf
    weights = jnp.exp(lse - jnp.where(sees, peak, 0.0))
    total = jnp.where(sees, jnp.sum(weights, axis=0), 1.0)
    return jnp.sum(weights[..., None] * y, axis=0) / total[..., None], jnp.where(sees, peak + jnp.log(total), -jnp.inf)
