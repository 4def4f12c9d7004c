"""Softmax and top-k on Hopper: a Mosaic GPU kernel reads the logits once, XLA finishes on what is left.

Never run on a GPU: interpreted and lowered only.

The kernel cuts every row into chunks of 64 columns and gives each chunk's maximum and sum of exponentials. The k
largest entries of a row lie in its k best chunks, those of the largest maximum, of equal ones the first: whatever chunk
comes before that of an entry holds an entry that comes before it. So only k * 64 columns of a row are gathered and
sorted; beside the one read, that is k * 64 of Z columns once more, and 8 bytes a chunk. Where Z is no multiple of 64,
or the chunks of all rows are no multiple of 8, the logits are first copied into such a shape.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import interpret
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.warpgroup import walk
from pallas_kernels.wgmma import MATRIX, across, load, matrix_ref

CHUNK = 64  # columns
TILE = 64  # chunks that a warpgroup holds at once
ALIGNMENT = 8  # chunks: copies move whole tiles of shared memory
SLOTS = 4  # tiles in flight
STEPS = 16  # tiles of a block of threads


def supports(logits, *, k: int) -> None:
    """Raises `UnsupportedError` where `forward` gains nothing."""
    if logits.shape[1] < 2 * k * CHUNK:
        raise UnsupportedError(
            f"softmax_topk: mosaic_gpu does not serve logits {logits.shape} with k={k}: it sorts k * {CHUNK} entries "
            "of a row, which is half of it or more; use 'xla'"
        )


def tiles(chunks: int) -> tuple[int, int]:
    """(blocks of threads, tiles of each) for that many chunks."""
    count = pl.cdiv(chunks, TILE)
    steps = min(STEPS, count)
    return pl.cdiv(count, steps), steps


def _kernel(steps: int, x_ref, maximum_ref, total_ref, x_smem, maximum_smem, total_smem, barrier):
    block = jax.lax.axis_index("block")

    def rows(step):
        # The last tiles may overlap, by whole eights: both write the same numbers.
        return pl.ds(jnp.minimum((block * steps + step) * TILE, x_ref.shape[0] - TILE), TILE)

    def fetch(step, slot):
        plgpu.copy_gmem_to_smem(x_ref.at[rows(step)], x_smem.at[slot], barrier.at[slot])

    def body(step, slot, carry):
        x = load(x_smem.at[slot], MATRIX).astype(jnp.float32)
        maximum = jnp.max(x, axis=1)
        # inf - inf is NaN: where the maximum is not a number, the sum is 0, inf or NaN relative to anything.
        shift = jnp.where(jnp.abs(maximum) < jnp.inf, maximum, 0.0)
        total = jnp.sum(jnp.exp2((x - across(shift, x.shape, 0)) * math.log2(math.e)), axis=1)
        maximum_smem.at[slot][...] = maximum
        total_smem.at[slot][...] = total
        return carry

    def store(step, slot):
        plgpu.copy_smem_to_gmem(maximum_smem.at[slot], maximum_ref.at[rows(step)], commit_group=False)
        plgpu.copy_smem_to_gmem(total_smem.at[slot], total_ref.at[rows(step)], commit_group=False)

    walk(steps, SLOTS, barrier, fetch, body, store, ())


def _summarise(chunks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 [n] each of chunks [n, 64], n at least 64, in eights: maxima, and sums of exponentials beside them."""
    blocks, steps = tiles(chunks.shape[0])
    numbers = plgpu.SMEM((SLOTS, TILE), jnp.float32)
    return plgpu.kernel(
        functools.partial(_kernel, steps),
        out_type=[jax.ShapeDtypeStruct(chunks.shape[:1], jnp.float32)] * 2,
        scratch_types=[
            matrix_ref((SLOTS, TILE, CHUNK), chunks.dtype),
            numbers,
            numbers,
            plgpu.Barrier(num_barriers=SLOTS),
        ],
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="softmax_topk",
        interpret=interpret.parameters(),
    )(chunks)


def forward(logits, *, k: int):
    """Returns (total [N], values [N, k], indices [N, k]): total = sum exp(x - max), 0 for a row of nothing but -inf."""
    count, columns = logits.shape
    width = pl.cdiv(columns, CHUNK)
    padded = jnp.pad(logits, ((0, 0), (0, width * CHUNK - columns)), constant_values=-jnp.inf)
    chunks = padded.reshape(-1, CHUNK)
    spare = max(TILE - chunks.shape[0], -chunks.shape[0] % ALIGNMENT)
    maxima, totals = _summarise(jnp.pad(chunks, ((0, spare), (0, 0)), constant_values=-jnp.inf))
    maxima, totals = (x[: count * width].reshape(count, width) for x in (maxima, totals))

    shifts = jnp.where(jnp.isfinite(maxima), maxima, 0.0)
    maximum = jnp.max(maxima, axis=-1, keepdims=True)
    shift = jnp.where(jnp.isfinite(maximum), maximum, 0.0)
    # A chunk without mass has no maximum to be relative to.
    total = jnp.sum(jnp.where(totals == 0, 0.0, totals * jnp.exp(shifts - shift)), axis=-1)

    # lax.top_k orders 0.0 before -0.0, and NaN before all; of equal entries it takes the first, so chunks go in order.
    _, best = jax.lax.top_k(jnp.where(maxima == 0, 0.0, maxima), min(k, width))
    best = jnp.sort(best, axis=-1)
    entries = jnp.take_along_axis(padded.reshape(count, width, CHUNK), best[:, :, None], axis=1).reshape(count, -1)
    values, places = jax.lax.top_k(jnp.where(entries == 0, 0, entries), k)
    indices = jnp.take_along_axis(best, places // CHUNK, axis=1) * CHUNK + places % CHUNK
    spoiled = jnp.isnan(total)[:, None]
    return total, jnp.where(spoiled, jnp.nan, values.astype(jnp.float32)), jnp.where(spoiled, -1, indices)
