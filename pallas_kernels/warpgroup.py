"""What Mosaic GPU kernels that walk over time share: one warpgroup per block, one channel per thread.

A warpgroup is 128 threads, and a block of 128 channels is laid out so that a thread holds the same channel of every
array: the state of a recurrence never leaves its registers, and shared memory is only where tiles of tokens come and
go by asynchronous copies.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import interpret

CHANNELS = 128
GROUP = 8  # tokens that are loaded and computed together
CODES = 32  # places for the codes of a tile
SMEM_BYTES = 220 * 2**10  # of the 227 KiB that a block of Hopper may use
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


def rows_of(vector: jax.Array, channels: int = CHANNELS) -> jax.Array:
    """[rows] in every thread -> [rows, 128]."""
    return lay_out(jax.lax.broadcast_in_dim(vector, (vector.shape[0], channels), (0,)), ROWS)


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


def mask(code: jax.Array, bit: int) -> jax.Array:
    """bool [rows, 128] from codes [rows] that every thread holds."""
    return rows_of(code & bit) != 0


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
) -> Any:
    """Runs carry = body(step, slot, carry) over tiles that asynchronous copies bring and take, `slots` in flight.

    Args:
      steps: number of tiles.
      slots: number of buffers; step s uses slot s % slots.
      barrier: one barrier per slot; each counts the copies that `fetch` issues.
      fetch: issues the copies from global to shared memory of a step, to be counted by `barrier.at[slot]`.
      body: computes; it may read what was fetched and write what `store` takes.
      store: issues the copies from shared to global memory of a step, without committing them.
      carry: arrays in registers.

    Returns:
      The last carry, once all that was stored is visible.
    """
    for step in range(min(slots, steps)):
        fetch(step, step)

    def run(step, carry):
        slot = jax.lax.rem(step, jnp.int32(slots))
        plgpu.barrier_wait(barrier.at[slot])
        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)  # the slot's former results have left
        carry = body(step, slot, carry)
        plgpu.commit_smem()  # all threads are through with the slot, and copies see what they wrote
        store(step, slot)
        plgpu.commit_smem_to_gmem_group()
        jax.lax.cond(step + slots < steps, lambda: fetch(step + slots, slot), lambda: None)
        return carry

    carry = jax.lax.fori_loop(0, steps, run, carry)
    plgpu.wait_smem_to_gmem(0)
    return carry
