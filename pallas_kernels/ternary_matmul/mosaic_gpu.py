"""Ternary products on Hopper: a Mosaic GPU kernel multiplies packed weights in int8, XLA scales what it sums.

Never run on a GPU: interpreted, lowered and compiled for sm_90a only.

Weights are the left factor, from registers: a thread's bytes of a tile of 64 outputs x 128 bytes become, by shifts and
masks alone, four tiles of 64 x 128 codes w + 1, laid out as `wgmma` takes them. Of the layouts, `i2_s` is the one for
this: the bytes of an output lie together, and which inputs a tile of codes belongs to is a permutation of x, which XLA
does in advance. The sums of (w + 1) x are sums of w x once sum x is taken off; int32 wraps around, so that every
sum that fits int32 at the end is exact.

A block of threads holds 128 outputs, 64 per consumer warpgroup, times up to 128 rows of x; another warpgroup copies
steps of 512 inputs into a ring of shared memory. Decoding is bound by the bytes of the weights and has few blocks of
outputs: there K is split over blocks of threads, too. Sums leave as int32; XLA adds the splits, scales and transposes
them in one pass, which costs 8 bytes per result and split beside the result itself.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir

from pallas_kernels import dispatch, interpret
from pallas_kernels.wgmma import MATRIX, SMEM_BYTES, Stream, interpreted, lay_out, load, matrix_ref

LAYOUT = "i2_s"
BYTES = plgpu.Layout.WGMMA_8BIT
# The same registers as words of four bytes.
WORDS = plgpu.Layout.TILED(Tiling(((64, 4), (16, 4), (8, 4), (1,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1)
CONSUMERS = 2  # warpgroups that compute
OUTPUTS = 64  # of a warpgroup: the rows of one matrix product
BLOCK_OUTPUTS = CONSUMERS * OUTPUTS
WIDTH = 128  # bytes of weights of an output in a step, and inputs of one product: a row of swizzled shared memory
STEP_WORDS = WIDTH // 4
STEP = 4 * WIDTH  # inputs
GROUP = 128  # inputs whose codes share 32 bytes, four to a byte
MAX_ROWS = 128  # of x in a block: the sums must fit in registers
MAX_SLOTS = 8  # steps in flight
MULTIPROCESSORS = 132  # of an H100: K is split while blocks of threads are fewer
_LOW_BITS = 0x55555555  # of every code
_CODES = 0x03030303  # the last code of every byte
_SMEM_SLACK = 4 * 1024  # barriers


class Blocks(NamedTuple):
    """How the work is cut."""

    rows: int  # of x in a block
    count: int  # blocks of rows
    splits: int  # of K
    steps: int  # of a split; the last may have fewer
    slots: int  # steps in flight


def choose_blocks(rows: int, inputs: int, outputs: int) -> Blocks:
    """Blocks whose buffers fit in shared memory, in number near that of multiprocessors where K allows.

    Args:
      rows: M.
      inputs: K.
      outputs: N.
    """
    count = pl.cdiv(rows, MAX_ROWS)
    block_rows = pl.cdiv(pl.cdiv(rows, count), 8) * 8
    steps = pl.cdiv(inputs, STEP)
    most = max(1, MULTIPROCESSORS // (outputs // BLOCK_OUTPUTS * count))
    per_split = pl.cdiv(steps, min(most, steps))
    step_bytes = BLOCK_OUTPUTS * WIDTH + block_rows * STEP
    slots = min(MAX_SLOTS, per_split, (SMEM_BYTES - _SMEM_SLACK) // step_bytes)
    return Blocks(block_rows, count, pl.cdiv(steps, per_split), per_split, slots)


def supports(x, w, x_scale, w_scale, *, layout: str, dtype: str) -> None:
    """Raises UnsupportedError where `forward` does not honour an argument."""
    del x_scale, w_scale, dtype
    if layout != LAYOUT:
        raise dispatch.UnsupportedError(
            f"ternary_matmul: mosaic_gpu does not read layout={layout!r}: bring w to {LAYOUT!r} once, with "
            f"repack(w, {layout!r}, {LAYOUT!r})"
        )
    if w.shape[0] % BLOCK_OUTPUTS:
        raise dispatch.UnsupportedError(
            f"ternary_matmul: mosaic_gpu does not serve N={w.shape[0]} outputs of w: a block holds {BLOCK_OUTPUTS}; "
            f"pad w once with rows of any bytes to N={pl.cdiv(w.shape[0], BLOCK_OUTPUTS) * BLOCK_OUTPUTS}, or use 'xla'"
        )
    if x.shape[1] < STEP:
        raise dispatch.UnsupportedError(
            f"ternary_matmul: mosaic_gpu does not serve K={x.shape[1]} inputs of x: a step takes {STEP}; use 'xla'"
        )


def _unpack(packed: jax.Array) -> list[jax.Array]:
    """int32 [outputs, words] -> four of int8 [outputs, bytes]: the codes w + 1, those of the first inputs first."""
    packed &= ~((packed & _LOW_BITS) << 1)  # the fourth code, 0b11, becomes that of 0, 0b01
    return [_bytes(jax.lax.shift_right_logical(packed, jnp.int32(shift)) & _CODES) for shift in (6, 4, 2, 0)]


def _bytes(words: jax.Array) -> jax.Array:
    """int32 [outputs, words] -> int8 [outputs, 4 words], in the same registers."""
    shape = (words.shape[0], 4 * words.shape[1])
    if interpreted():
        return jax.lax.bitcast_convert_type(words, jnp.int8).reshape(shape)

    @plgpu.inline_mgpu(arg_types=(WORDS,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.int8, layout=BYTES))
    def reinterpret(_, words):
        four = ir.VectorType.get((4,), mgpu.utils.dtype_to_ir_type(jnp.int8))
        registers = np.empty(words.registers.shape, dtype=object)
        for place, register in np.ndenumerate(words.registers):
            registers[place] = mgpu.utils.bitcast(register, four)
        return mgpu.FragmentedArray(_registers=registers, _layout=BYTES.to_mgpu(), _is_signed=True)

    call: Any = reinterpret  # without its context
    return call(words)


def _multiply(codes: list[jax.Array], x: Any, slot: Any, onto: jax.Array) -> jax.Array:
    """int32 [outputs, rows] = onto + codes @ x.T over a step."""
    parts = [x.at[slot, :, pl.ds(i * WIDTH, WIDTH)] for i in range(4)]
    if interpreted():
        dims = (((1,), (1,)), ((), ()))
        for code, part in zip(codes, parts, strict=True):
            onto = onto + jax.lax.dot_general(code, part[...], dims, preferred_element_type=jnp.int32)
        return onto

    def products(total: Any) -> None:
        for code, part in zip(codes, parts, strict=True):
            plgpu.wgmma(total, code, plgpu.transpose_ref(part, (1, 0)))

    total: Any = plgpu.WGMMAAccumulatorRef.init(onto)
    return pl.run_state(products)(total)


def _kernel(blocks: Blocks, steps: int, x_ref, w_ref, out_ref, x_smem, w_smem, full, free):
    split, block, outputs = (jax.lax.axis_index(name) for name in ("split", "rows", "outputs"))
    index = jax.lax.axis_index("warpgroup")
    stream = Stream(full, free, blocks.slots)
    first = split * blocks.steps
    count = jnp.minimum(steps - first, blocks.steps)

    @pl.when(index == CONSUMERS)
    def _():
        rows, weights = pl.ds(block * blocks.rows, blocks.rows), pl.ds(outputs * BLOCK_OUTPUTS, BLOCK_OUTPUTS)

        def copy(step, slot, barrier):
            inputs = (first + step) * STEP
            # The last step may start before the end of the one before it; x is 0 there.
            start = jnp.minimum((first + step) * STEP_WORDS, w_ref.shape[1] - STEP_WORDS)
            plgpu.copy_gmem_to_smem(w_ref.at[weights, pl.ds(start, STEP_WORDS)], w_smem.at[slot], barrier)
            plgpu.copy_gmem_to_smem(x_ref.at[rows, pl.ds(inputs, STEP)], x_smem.at[slot], barrier)

        stream.produce(count, copy)

    @pl.when(index < CONSUMERS)
    def _():
        def add(step, total):
            slot = stream.take(step)
            packed = load(w_smem.at[slot, pl.ds(index * OUTPUTS, OUTPUTS)], WORDS)
            total = _multiply(_unpack(packed), x_smem, slot, total)
            stream.release(slot)
            return total

        zeros = lay_out(jnp.zeros((OUTPUTS, blocks.rows), jnp.int32), MATRIX)
        out_ref.at[split, block, outputs * CONSUMERS + index][...] = jax.lax.fori_loop(0, count, add, zeros)


def _words_ref(slots: int, width: int) -> Any:
    """Shared memory for the weights of steps, cut so that outputs of so many bytes are whole tiles."""
    swizzle = math.gcd(width, WIDTH)
    transforms = plgpu.TilingTransform((8, swizzle // 4)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM((slots, BLOCK_OUTPUTS, STEP_WORDS), jnp.int32, transforms=() if interpreted() else transforms)


def _permute(x: jax.Array) -> jax.Array:
    """int8 [M, K] -> [M, steps * 512], the inputs of every step in the order in which `_unpack` gives their weights."""
    extra = -x.shape[1] % STEP
    if extra:
        # The last step starts `extra` inputs earlier and counts those not again.
        x = jnp.concatenate([x[:, : x.shape[1] - STEP + extra], _clear(x[:, -STEP:], extra)], axis=1)
    groups = x.reshape(x.shape[0], -1, STEP // GROUP, 4, GROUP // 4)
    return groups.transpose(0, 1, 3, 2, 4).reshape(x.shape)


def _clear(x: jax.Array, count: int) -> jax.Array:
    """Zeros in the first `count` columns."""
    return jnp.where(jnp.arange(x.shape[1]) < count, 0, x)


def forward(x, w, x_scale, w_scale, *, layout: str, dtype: str):
    """Returns [M, N]: int32 accumulators where the scales are None; arguments as in `ternary_matmul`."""
    del layout
    rows, inputs = x.shape
    outputs = w.shape[0]
    blocks = choose_blocks(rows, inputs, outputs)
    padded = jnp.pad(_permute(x), ((0, blocks.rows * blocks.count - rows), (0, 0)))
    tiles = outputs // OUTPUTS
    sums = plgpu.kernel(
        functools.partial(_kernel, blocks, pl.cdiv(inputs, STEP)),
        out_type=jax.ShapeDtypeStruct((blocks.splits, blocks.count, tiles, OUTPUTS, blocks.rows), jnp.int32),
        scratch_types=[
            matrix_ref((blocks.slots, blocks.rows, STEP), jnp.int8),
            _words_ref(blocks.slots, w.shape[1]),
            plgpu.Barrier(num_arrivals=2, num_barriers=blocks.slots),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=blocks.slots),
        ],
        grid=(blocks.splits, blocks.count, outputs // BLOCK_OUTPUTS),
        grid_names=("split", "rows", "outputs"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="ternary_matmul",
        interpret=interpret.parameters(),
    )(padded, jax.lax.bitcast_convert_type(w.reshape(outputs, -1, 4), jnp.int32))
    sums = jnp.sum(sums, axis=0).transpose(0, 3, 1, 2).reshape(-1, outputs)[:rows]
    total = sums - jnp.sum(x, axis=1, dtype=jnp.int32, keepdims=True)
    if x_scale is None:
        return total
    return (total.astype(jnp.float32) * (x_scale[:, None] * w_scale)).astype(dtype)
