"""What Mosaic GPU kernels that walk over time share: one warpgroup per block, one channel per thread.

A warpgroup is 128 threads, and a block of 128 channels is laid out so that a thread holds the same channel of every
array: the state of a recurrence never leaves its registers, and shared memory is only where tiles of tokens come and
go by asynchronous copies.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import interpret

CHANNELS = 128
GROUP = 8  # tokens that a tile is a multiple of
CODES = 32  # places for the codes of a tile
SMEM_BYTES = 224 * 2**10  # of the 227 KiB that a block of Hopper may use
VALID, RESET = 1, 2  # bits of `codes`

# [rows, 128]: rows in registers, a channel per thread. Reduced along axis 0 it is [128] with a channel per thread,
# along axis 1 [rows] with all of the rows in every thread.
ROWS = plgpu.Layout.TILED(Tiling(((1, CHANNELS), (32,), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
CHANNEL = ROWS.reduce(0)
SHARED = ROWS.reduce(1)


def lay_out(value: jax.Array, layout: Any) -> jax.Array:
    """Fixes the registers that hold a value; interpretation, which has no registers, takes it as it is."""
    return value if interpret.parameters() else plgpu.layout_cast(value, layout)


def load(ref: Any, layout: Any = ROWS) -> jax.Array:
    """All of a reference to shared memory in float32 registers."""
    return lay_out(ref[...], layout).astype(jnp.float32)


def load_global(ref: Any, layout: Any = ROWS) -> jax.Array:
    """All of a reference to global memory in float32 registers, for what is read once."""
    if interpret.parameters():
        return ref[...].astype(jnp.float32)
    return plgpu.load(ref, ..., layout=layout, optimized=False).astype(jnp.float32)


def zeros(*shape: int) -> jax.Array:
    """float32 zeros [128] or [rows, 128] for the carry of a loop, whose registers stay what they are."""
    return lay_out(jnp.zeros(shape, jnp.float32), ROWS if len(shape) == 2 else CHANNEL)


def rows_of(vector: jax.Array) -> jax.Array:
    """[rows] in every thread -> [rows, 128]."""
    return lay_out(jax.lax.broadcast_in_dim(vector, (vector.shape[0], CHANNELS), (0,)), ROWS)


def channels_of(vector: jax.Array, rows: int) -> jax.Array:
    """[128] -> [rows, 128]."""
    return lay_out(jax.lax.broadcast_in_dim(vector, (rows, CHANNELS), (1,)), ROWS)


def row(tile: jax.Array, i: int) -> jax.Array:
    """Row i of [rows, 128] as [128]: a sum of one, as registers are renamed but not indexed."""
    return jnp.sum(tile[i : i + 1], axis=0)


def codes(reset, valid, batch: int, length: int, tiles: int, rows: int) -> jax.Array | None:
    """int32 [B, tiles, 32]: bit 0 for tokens that count, bit 1 for those that are reset; None when all is trivial.

    A tile of up to 32 tokens takes 32 places: asynchronous copies move multiples of 128 bytes.
    """
    if reset is None and valid is None and length == tiles * rows:
        return None
    code = jnp.full((batch, length), VALID, jnp.int32) if valid is None else VALID * valid.astype(jnp.int32)
    if reset is not None:
        code = code + RESET * reset.astype(jnp.int32)
    code = jnp.pad(code, ((0, 0), (0, tiles * rows - length))).reshape(batch, tiles, rows)
    return pad(code, CODES)


class Group:
    """Consecutive tokens of a tile, and which of them count and are reset; `codes` is None when that is trivial."""

    def __init__(self, codes: Any, slot: Any, start: Any, count: int):
        self.slot, self.start, self.count = slot, start, count
        code = None if codes is None else lay_out(codes[slot, pl.ds(start, count)], SHARED)
        self.valid = None if code is None else rows_of(code & VALID) != 0
        self.reset = None if code is None else rows_of(code & RESET)

    def load(self, ref: Any, otherwise: float = 0.0) -> jax.Array:
        """float32 [count, 128] of a reference [slots, tokens, 128], `otherwise` at padding."""
        return self.only_valid(load(ref.at[self.slot, pl.ds(self.start, self.count), :]), otherwise)

    def only_valid(self, tile: jax.Array, otherwise: float = 0.0) -> jax.Array:
        """[count, 128] with `otherwise` at padding."""
        return tile if self.valid is None else jnp.where(self.valid, tile, otherwise)

    def only_valid_row(self, i: int, value: jax.Array) -> jax.Array:
        """[1, 128] of token i with zeros at padding."""
        return value if self.valid is None else jnp.where(self.valid[i : i + 1], value, 0.0)

    def clear(self, i: int, state: jax.Array) -> jax.Array:
        """[rows, 128] with zeros where token i is reset."""
        if self.reset is None:
            return state
        rows = state.shape[0]
        reset = self.reset[i : i + 1] if rows == 1 else channels_of(row(self.reset, i), rows)
        return jnp.where(reset != 0, 0.0, state)

    def store(self, ref: Any, i: int, value: jax.Array) -> None:
        """Writes token i, [1, 128], in the dtype of the reference; zeros at padding."""
        ref[self.slot, pl.ds(self.start + i, 1), :] = self.only_valid_row(i, value).astype(ref.dtype)


def pad(array: jax.Array, *sizes: int) -> jax.Array:
    """Zeros behind the end of the last axes, up to `sizes`."""
    sizes = array.shape[: array.ndim - len(sizes)] + sizes
    return jnp.pad(array, [(0, size - n) for n, size in zip(array.shape, sizes, strict=True)])


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that holds `size`."""
    return -(-size // multiple) * multiple


def walk(
    steps: int,
    slots: int,
    barrier: Any,
    fetch: Callable[[Any, Any], None],
    body: Callable[[Any, Any, Any], Any],
    store: Callable[[Any, Any], None],
    carry: Any,
    *,
    in_place: bool = False,
) -> Any:
    """Runs carry = body(step, slot, carry) over tiles that asynchronous copies bring and take, `slots` in flight.

    Args:
      steps: number of tiles.
      slots: number of buffers, at least 2 where they are stored in place; step s uses slot s % slots.
      barrier: one barrier per slot; each counts the copies that `fetch` issues.
      fetch: issues the copies from global to shared memory of a step, to be counted by `barrier.at[slot]`.
      body: computes; it may read what was fetched and write what `store` takes.
      store: issues the copies from shared to global memory of a step, without committing them.
      carry: arrays in registers.
      in_place: whether `store` takes from buffers that `fetch` fills, which then waits for it to leave.

    Returns:
      The last carry, once all that was stored is visible.
    """
    ahead = slots - in_place
    for step in range(min(ahead, steps)):
        fetch(step, step)

    def fetch_ahead(step):
        slot = jax.lax.rem(step + ahead, jnp.int32(slots))
        jax.lax.cond(step + ahead < steps, lambda: fetch(step + ahead, slot), lambda: None)

    def run(step, carry):
        slot = jax.lax.rem(step, jnp.int32(slots))
        plgpu.barrier_wait(barrier.at[slot])
        # The former results in the buffers that this step writes, or in place fetches, have left.
        plgpu.wait_smem_to_gmem(0 if in_place else slots - 1, wait_read_only=True)
        if in_place:
            fetch_ahead(step)
        carry = body(step, slot, carry)
        plgpu.commit_smem()  # all threads are through with the slot, and copies see what they wrote
        store(step, slot)
        plgpu.commit_smem_to_gmem_group()
        if not in_place:
            fetch_ahead(step)
        return carry

    carry = jax.lax.fori_loop(0, steps, run, carry)
    plgpu.wait_smem_to_gmem(0)
    return carry
