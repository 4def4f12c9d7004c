"""What TPU kernels share: tiles of eight tokens, their masks, blocks of channels, and products of matrices.

A float32 register holds eight tokens of 128 channels, a bfloat16 one sixteen: kernels load steps of sixteen tokens and
compute on float32 tiles of eight. The masks of a tile are bits of scalars, eight each, so documents and padding cost a
few bytes per tile in SMEM instead of an array of masks in VMEM.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

TILE = 8
STEP = 16
LANES = 128
VMEM_BYTES = 12 * 2**20  # for blocks and scratch, of the 16 MiB that a kernel may use by default


def block_rows(length: int, limit: int) -> int:
    """Tokens per block: `limit`, or all of a shorter sequence rounded up to whole steps."""
    return limit if limit < length else -(-length // STEP) * STEP


def block_channels(channels: int, rows: int, token_bytes: int, limit: int) -> int | None:
    """Channels per block: fills registers with little padding and fits VMEM; None when nothing fits.

    Args:
      channels: size of the channel axis.
      rows: tokens per block.
      token_bytes: bytes that one token of one channel takes in VMEM.
      limit: most channels per block.
    """
    limit = min(limit, VMEM_BYTES // (rows * token_bytes)) // LANES * LANES
    if limit < LANES:
        return None
    if channels <= limit:
        return channels  # a block as wide as the array need not be a multiple of 128
    # A block costs about as much again as half a register, so fewer blocks win over a little padding.
    return min(range(limit, 0, -LANES), key=lambda block: -(-channels // block) * (block + LANES // 2))


def pack(flags: list[jax.Array], length: int, rows: int) -> jax.Array:
    """Packs up to four bool [B, T] into int32 [B, blocks, rows / 8]: flag i of token t of a tile is bit 8 i + t.

    Tokens behind the end of the sequence get False.
    """
    blocks = -(-length // rows)
    bits = jnp.stack([jnp.pad(flag, ((0, 0), (0, blocks * rows - length))) for flag in flags], axis=-1)
    bits = bits.reshape(bits.shape[0], blocks, rows // TILE, TILE, len(flags))
    weights = jnp.left_shift(1, jnp.arange(TILE)[:, None] + TILE * jnp.arange(len(flags)))
    return jnp.sum(bits * weights, axis=(-1, -2), dtype=jnp.int32)


def rows_of(width: int) -> jax.Array:
    """int32 [8, width]: the token of the tile that each element belongs to."""
    return jax.lax.broadcasted_iota(jnp.int32, (TILE, width), 0)


def mask(bits: jax.Array, row: jax.Array, flag: int = 0) -> jax.Array:
    """Flag `flag` of a scalar of `pack` as a bool vector over the tokens `row` of a tile."""
    return (jax.lax.shift_right_logical(jnp.broadcast_to(bits, row.shape), row + TILE * flag) & 1) == 1


def load(ref, step) -> list[jax.Array]:
    """The tokens of one step of a [rows, channels] reference as float32 tiles."""
    value = ref[pl.ds(pl.multiple_of(step * STEP, STEP), STEP), :].astype(jnp.float32)
    return [value[i : i + TILE] for i in range(0, STEP, TILE)]


def store(ref, step, tiles: list[jax.Array]) -> None:
    """Writes what `load` reads, in the dtype of the reference."""
    ref[pl.ds(pl.multiple_of(step * STEP, STEP), STEP), :] = jnp.concatenate(tiles, axis=0).astype(ref.dtype)


def contract(a, b, a_axis: int, b_axis: int) -> jax.Array:
    """float32 product of two matrices over an axis of each; float32 operands keep their precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def as_column(row, lanes: int) -> jax.Array:
    """[1, n] -> [n, lanes], every lane the same."""
    return jnp.broadcast_to(row, (lanes, row.shape[1])).T
